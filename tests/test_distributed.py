"""Several processes train as one does: gradients averaged, ranks changed together, for every method."""

import pytest
import torch
import torch.distributed as dist
from parallel_training import CONFIGS, Loop, assert_equal, assert_same, batches, process, train
from processes import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adaptlora
from adaptlora.distributed.ddp import StandIn
from adaptlora.methods import NonFiniteError


def _train_all(wrap, accumulation):
    return {kind: train(kind, wrap, accumulation=accumulation) for kind in CONFIGS}


@pytest.mark.parametrize(("size", "wrap", "accumulation"), [(2, "ddp", 2), (4, "ddp", 1), (2, "bare", 2)])
def test_several_processes_equal_one_with_the_same_global_batch(size, wrap, accumulation):
    expected = _train_all("", accumulation)
    first, *others = run(size, _train_all, wrap, accumulation, seconds=300)
    for kind in CONFIGS:
        assert_same(first[kind], expected[kind])
        for other in others:
            assert_equal(other[kind], first[kind])
    for kind in CONFIGS.keys() - {"nora"}:
        assert len(set(map(tuple, expected[kind]["ranks"]))) > 1, f"{kind}: ranks must change"


def _join(kind, divide_by_all, counts):
    rank, _ = process()
    loop = Loop(kind, "ddp")
    own = batches(max(counts), seed=10 + rank)[: counts[rank]]
    with loop.wrapped.join(divide_by_initial_world_size=divide_by_all):
        for batch in own:
            loop.step([batch])
    loop.ranks.clear()
    loop.step(batches(1, seed=20))
    return loop.state()


@pytest.mark.parametrize(
    ("kind", "divide_by_all", "counts"),
    [
        *((kind, by_all, (3, 7)) for kind in ("normal", "adaptive", "lalora", "nora") for by_all in (False, True)),
        *((kind, False, (0, 7)) for kind in ("fisher", "adalora", "adalora update")),
    ],
)
def test_processes_that_run_out_of_data_follow_the_others(kind, divide_by_all, counts):
    """The first process, which decides as a rule, ends before the ranks change, or has no data at all."""
    expected = Loop(kind)
    of_process = [batches(max(counts), seed=10 + rank)[:count] for rank, count in enumerate(counts)]
    for step in range(max(counts)):
        here = [of[step] for of in of_process if step < len(of)]
        share = len(here) / len(counts) if divide_by_all else 1.0
        x, y = (torch.cat(parts) for parts in zip(*here, strict=True))
        expected.step([(x, y)], scale=share)
    expected.ranks.clear()
    expected.step(batches(1, seed=20))
    first, second = run(2, _join, kind, divide_by_all, counts, seconds=300)
    assert_same(first, expected.state())
    assert_equal(second, first)


def _ddp_keeps():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    adapter = adaptlora.attach(model, adaptlora.NoRAConfig(r=2, r_out=4, target_modules="all-linear"))
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    adapter.distribute(ddp)
    assert isinstance(ddp.reducer, StandIn) and ddp.logger is ddp.reducer
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    ddp(x).sum().backward()
    ddp(x)  # buffers are sent before a forward pass: those of the one before
    sent = sorted(name.rpartition(".")[2] for name in ddp.named_module_buffers)
    return sent, model[1].running_mean.clone()


def test_ddp_goes_on_sending_buffers_but_not_frozen_factors():
    (sent, mean), (_, other) = run(2, _ddp_keeps, seconds=300)
    assert sent == ["num_batches_tracked", "running_mean", "running_var"]
    assert not torch.equal(mean, other)  # each its own batch, after the same start


def _refusals():
    rank, _ = process()
    found = {}

    def refused(name, call):
        try:
            call()
        except ValueError as error:
            found[name] = str(error)

    loop = Loop("lalora")
    refused("forgotten", lambda: loop.step(batches(1)))
    refused("another model", lambda: loop.adapter.distribute(nn.Linear(2, 2)))
    loop.adapter.method.t = 5 + rank
    refused("another step", loop.adapter.distribute)
    loop.adapter.method.t = 5
    if rank:
        loop.adapter.layers["2"].pair.grow(3)
    refused("other ranks", loop.adapter.distribute)
    alone = Loop("lalora")
    groups = [dist.new_group([process]) for process in range(2)]
    alone.adapter.distribute(process_group=groups[rank])
    for _ in range(2 + rank):  # each for itself
        alone.step(batches(1))
    return found, alone.adapter.method.t, alone.adapter.processes.size


def test_what_cannot_be_distributed_is_refused():
    for rank, (found, steps, size) in enumerate(run(2, _refusals, seconds=300)):
        assert "adapter.distribute(model) must be called" in found["forgotten"]
        assert "must be the adapter's model" in found["another model"] and "0.pair.lora_A" in found["another model"]
        assert "process 0 and process 1 have t 5 and 6" in found["another step"]
        assert "process 0 and process 1 have 2 [1, 1] and [3, 3]" in found["other ranks"]
        assert (steps, size) == (2 + rank, 1)


def test_distribute_needs_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        Loop("normal").adapter.distribute()


def _drifted(kind):
    rank, _ = process()
    loop = Loop(kind, "bare")
    for batch in batches(5):
        if rank and loop.adapter.method.t == 4:
            layer = loop.adapter.layers["0"]
            with torch.no_grad():
                layer.lora_A.mul_(torch.linspace(9, 1, layer.rank, dtype=torch.float64)[:, None])
        loop.step([batch])
    return loop.ranks, [layer.lora_A.norm().item() for layer in loop.adapter.layers.values()], loop.state()["method"]


@pytest.mark.parametrize("kind", ["normal", "lalora"])
def test_one_process_decides(kind):
    """A process whose factors have drifted has the ranks of the one that decides, and its method's state."""
    (ranks, norms, method), (others, other_norms, other_method) = run(2, _drifted, kind, seconds=300)
    assert ranks == others and ranks[-1] != ranks[0] and norms != other_norms
    assert method == other_method


def _masks_and_last_steps():
    rank, _ = process()
    loop = Loop("adalora", "bare")
    pair = loop.adapter.layers["0"].pair
    masks, refused = [], ""
    for t, batch in enumerate(batches(6), start=1):
        mean = pair.sensitivity.of(pair.lora_E)["mean"]
        kept = mean.clone()
        if rank and t == 4:
            mean.copy_(mean.flip(0) * 100)  # what this process alone would mask is something else
        if t == 6:
            loop.adapter.method.target = sum(loop.adapter.ranks().values())  # so that none goes at the last
            if rank:
                mean.fill_(torch.nan)
        try:
            loop.step([batch])
        except NonFiniteError as error:
            refused = str(error)
            read = [len(layer.pair.sensitivity.state) for layer in loop.adapter.layers.values()]
            undone = loop.adapter.method.t, loop.adapter.method.final, read
            mean.copy_(kept)
        masks.append([(layer.lora_E == 0).flatten().tolist() for layer in loop.adapter.layers.values()])
    return masks, refused, undone, loop.adapter.step(), loop.adapter.method.final, pair.statistics()


def test_masks_are_one_process_s_and_a_last_step_that_fails_is_undone():
    first, second = run(2, _masks_and_last_steps, seconds=300)
    assert first[0] == second[0] and any(any(module) for module in first[0][3])
    for _, refused, undone, change, final, statistics in (first, second):
        assert "importance of the triplets must be finite" in refused
        assert undone == (5, False, [3, 3, 3])
        assert change is None and final and not statistics
