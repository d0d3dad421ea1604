"""Gradients in one buffer: whatever takes part in a backward pass, however often, the average is what all processes have."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from parallel_training import Loop, batches, process
from processes import run
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import adaptlora
from adaptlora.distributed.gradients import Bucket, GradientSync
from adaptlora.distributed.processes import ProcessGroup


class _Branches(nn.Module):
    """Modules that some inputs do not reach, one that is used twice, and what is recomputed in the backward pass."""

    def __init__(self, mode: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.left, self.right, self.never = (nn.Linear(4, 4) for _ in range(5))
        self.mode = mode
        self.double()

    def forward(self, x, right):
        h = self._again(self.first(self._again(x)))
        return {"loss": (self.right if right else self.left)(h).square().mean()}

    def _again(self, x):
        """Recomputed inside the backward pass it adds to its gradient in two pieces, the second after all others are there."""
        return checkpoint(self.twice, x, use_reentrant=True) if self.mode == "reentrant" else self.twice(x).tanh()


def _parameters(model):
    return dict(model.named_parameters())


def _synced(model, wanted=lambda: True, **options):
    return _sync_of(model, [p for p in model.parameters() if p.requires_grad], wanted=wanted, **options)


def _sync_of(module, parameters, wanted=lambda: True, **options):
    processes = ProcessGroup()
    sync = GradientSync(module, parameters, processes, wanted=wanted, **options)
    processes.show(lambda: {"ranks": {}, **sync.facts()})
    return sync


def _x(rank):
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def _gradients(model):
    return {name: p.grad for name, p in _parameters(model).items()}


def _branches(mode):
    rank, _ = process()
    model = _Branches(mode)
    _synced(model)
    model(_x(rank).requires_grad_(), right=rank == 1)["loss"].backward()
    only = _gradients(model)
    model.zero_grad()
    # Nothing is waited for to the end of the pass: what is launched when all are there is too early for what is used again.
    model.left.requires_grad_(False)
    model.never.requires_grad_(False)
    model(_x(rank).requires_grad_(), right=True)["loss"].backward()
    return only, _gradients(model)


@pytest.mark.parametrize("mode", ["plain", "reentrant"])
def test_parameters_that_take_no_part_count_as_zero(mode):
    found = run(2, _branches, mode, seconds=300)
    for step, right in enumerate([(False, True), (True, True)]):
        model = _Branches(mode)
        for rank in range(2):
            (model(_x(rank).requires_grad_(), right=right[rank])["loss"] / 2).backward()
        for gradients in found:
            for name, expected in _gradients(model).items():
                if expected is None:
                    assert gradients[step][name] is None, name
                else:
                    torch.testing.assert_close(gradients[step][name], expected, rtol=1e-12, atol=1e-15)


def _passes():
    """Two passes of one step, one with an error in its middle, one that is paused, one without the model's outputs."""
    rank, _ = process()
    model = _Branches()
    sync = _synced(model)
    found = []

    def backward(context=None):
        loss = model.twice(model.first(_x(rank))).square().mean()  # not from the model's own output
        with context or contextlib.nullcontext():
            loss.backward()
        found.append({name: p.grad.clone() for name, p in _parameters(model).items() if p.grad is not None})

    def fail(_):
        raise ArithmeticError

    output = model(_x(rank), right=True)["loss"]
    model.first.weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        output.backward()
    model.first.weight._backward_hooks.clear()
    model.zero_grad()
    model(_x(rank), right=True)["loss"].backward()
    found.append({name: p.grad.clone() for name, p in _parameters(model).items() if p.grad is not None})
    model.zero_grad()
    backward()
    backward()
    model.zero_grad()
    backward(sync.paused())
    sync.close()
    model.zero_grad()
    backward()
    return found


def test_passes_of_every_kind():
    """After one that failed in its middle; without the model's output; twice in a step; paused; closed."""

    def alone(rank, whole):
        model = _Branches()
        x = _x(rank)
        (model(x, right=True)["loss"] if whole else model.twice(model.first(x)).square().mean()).backward()
        return {name: p.grad for name, p in _parameters(model).items() if p.grad is not None}

    own = {(rank, whole): alone(rank, whole) for rank in range(2) for whole in (True, False)}
    found = run(2, _passes, seconds=300)
    for rank, (after_error, once, twice, paused, closed) in enumerate(found):
        for gradients, whole, factor in ((after_error, True, 1), (once, False, 1), (twice, False, 2)):
            assert gradients.keys() == own[0, whole].keys()
            for name, grad in gradients.items():
                mean = factor * (own[0, whole][name] + own[1, whole][name]) / 2
                torch.testing.assert_close(grad, mean, rtol=1e-12, atol=1e-15)
        for gradients in (paused, closed):
            assert all(torch.equal(gradients[name], grad) for name, grad in own[rank, False].items())


def _after_errors():
    """Passes that begin at a gradient, the first of which fails; none of them goes through the root."""
    rank, _ = process()
    model = _Branches()
    sync = _synced(model)

    def fail(_):
        raise ArithmeticError

    handle = model.first.weight.register_hook(fail)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            model.twice(model.first(_x(rank))).square().mean().backward()
    handle.remove()
    model.zero_grad()
    model.twice(model.first(_x(rank))).square().mean().backward()
    return model.first.weight.grad, sync.facts()["launch"]


def test_passes_that_failed_are_over():
    (first, launches), (second, _) = run(2, _after_errors, seconds=300)
    assert torch.equal(first, second) and launches == 1


def _one_pass_more():
    rank, _ = process()
    loop = Loop("nora", "ddp")
    (x, y), *others = batches(4)
    if rank == 0:
        torch.autograd.grad(loop.wrapped(x.requires_grad_()).sum(), x)
    try:
        for batch in [(x, y), *others]:
            loop.step([batch])
    except adaptlora.ProcessError as error:
        return loop.adapter.method.t, str(error)
    return None


def test_a_pass_of_one_process_alone_is_an_error():
    """The first step averages it with the others' first; in the second they are in different steps."""
    found = run(3, _one_pass_more, seconds=60)
    assert any("must make the same backward passes in each step" in said for _, said in found)
    assert all(steps <= 1 for steps, _ in found)


def test_bytes_are_those_of_the_ranks():
    """Once in each step of two micro-batches: as many numbers as the ranks say, one for each factor, and two."""
    (counted, ranks), _ = run(2, _counted, seconds=300)
    numbers = {"0": 12 + 20, "2": 20 + 20, "4": 20 + 3}
    for found, before in zip(counted, ranks, strict=True):
        gradients = sum(width * rank for width, rank in zip(numbers.values(), before, strict=True))
        assert found == 8 * (gradients + 2 * len(numbers) + 2)
    assert counted[-1] < counted[0]


def _counted():
    sizes = []

    def count(state, bucket):
        assert bucket.index() == 0 and bucket.is_last() and len(bucket.gradients()) == len(bucket.parameters())
        sizes.append(bucket.buffer().nbytes)
        tensor = bucket.buffer().div_(state)
        return dist.all_reduce(tensor, async_op=True).get_future()

    loop = Loop("normal", "ddp", comm_hook=(2, count))
    before = [list(loop.adapter.ranks().values())]
    micro_batches = batches(12)
    for step in range(6):
        loop.step(micro_batches[2 * step : 2 * step + 2])
    return sizes, (before + loop.ranks)[:-1]


def _hooked(early):
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    adapter = adaptlora.attach(model_of(model), adaptlora.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        adapter.layers["0"].lora_B.normal_(generator=torch.Generator().manual_seed(1))
    ddp = DistributedDataParallel(adapter.model)
    if early:
        ddp.register_comm_hook(None, fp16_compress_hook)
    adapter.distribute(ddp)
    if not early:
        ddp.register_comm_hook(None, fp16_compress_hook)
    ddp(torch.ones(3, 8) / 3).square().sum().backward()
    return [p.grad for p in adapter.parameters()]


def model_of(linear: nn.Linear) -> nn.Module:
    return nn.Sequential(linear)


@pytest.mark.parametrize("early", [True, False])
def test_torchs_hooks_work_and_ddps_are_taken_over(early):
    for gradients in run(2, _hooked, early, seconds=300):
        for grad in gradients:
            assert torch.equal(grad, grad.half().float()) and grad.any()


def _kinds():
    """Two dtypes, a rank-major factor, an empty one, one that is frozen later."""
    rank, _ = process()
    parameters = [
        nn.Parameter(torch.zeros(2, 3)),
        nn.Parameter(torch.zeros(2, 5).t()),
        nn.Parameter(torch.zeros(0, 4)),
        nn.Parameter(torch.zeros(3, dtype=torch.float64)),
        nn.Parameter(torch.zeros(2), requires_grad=True),
    ]
    module = nn.Module()
    sync = _sync_of(module, parameters)
    parameters[4].requires_grad_(False)
    factor = torch.arange(10.0).view(5, 2)
    loss = (parameters[0] * (rank + 1)).sum() + (parameters[1] * factor * rank).sum() + (parameters[3] * rank).sum()
    (loss + parameters[2].sum()).backward()
    return [p.grad for p in parameters], [len(bucket.parameters()) for bucket in sync.buckets()]


def test_dtypes_have_buffers_of_their_own_and_memory_orders_are_kept():
    for gradients, counts in run(2, _kinds, seconds=300):
        assert counts == [2, 1]
        assert torch.equal(gradients[0], torch.full((2, 3), 1.5))
        assert torch.equal(gradients[1], torch.arange(10.0).view(5, 2) / 2)
        assert torch.equal(gradients[3], torch.full((3,), 0.5, dtype=torch.float64))
        assert gradients[2].shape == (0, 4) and gradients[4] is None


def test_a_bucket_reads_and_writes_in_the_order_of_memory():
    parameter = nn.Parameter(torch.zeros(3, 4).t())
    parameter.grad = torch.arange(12.0).view(4, 3)
    other = nn.Parameter(torch.zeros(2))
    bucket = Bucket([parameter, other], number=19)
    assert torch.equal(bucket.buffer(), torch.tensor([*parameter.grad.t().flatten(), 0, 0, 1, 0, 1, 3]))
    bucket.buffer().mul_(2)
    held = parameter.grad
    bucket.write_back()
    assert parameter.grad is held and torch.equal(held, 2 * torch.arange(12.0).view(4, 3))
    assert other.grad is None
    bucket.buffer()[-3] = 0.5  # another process had a gradient
    bucket.write_back()
    assert torch.equal(other.grad, torch.zeros(2))
