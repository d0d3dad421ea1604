"""What a distributed model may be put through: copied, distributed again, detached, used with less than all of its parts."""

import copy
import gc
import io
import os
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from parallel_training import K, Loop, batches, network, process
from processes import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import adaptlora
from adaptlora.distributed import faults
from adaptlora.distributed.ddp import StandIn, check_ddp


def _own_batch() -> torch.Tensor:
    return torch.randn(4, K, dtype=torch.float64, generator=torch.Generator().manual_seed(process()[0]))


def _gradients(model: nn.Module, call=None) -> torch.Tensor:
    """Those of a pass over this process's batch."""
    model.zero_grad()
    (call or model)(_own_batch()).square().mean().backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def _same_in_all(tensor: torch.Tensor) -> bool:
    told = [torch.empty_like(tensor) for _ in range(process()[1])]
    dist.all_gather(told, tensor)
    return all(torch.equal(other, tensor) for other in told)


def _refused(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _copies(timeout):
    loop = Loop("normal", "ddp", timeout=timeout)
    ddp, found = loop.wrapped, {}
    stored = io.BytesIO()
    torch.save(ddp, stored)
    stored.seek(0)
    models = {
        "deepcopy": copy.deepcopy(ddp.module),
        "pickle": pickle.loads(pickle.dumps(ddp.module)),
        "average": AveragedModel(ddp.module).module,
    }
    wrappers = {"deepcopy of DDP": copy.deepcopy(ddp), "torch.save": torch.load(stored, weights_only=False)}
    group = ddp.process_group
    for name, model in models.items():
        found[name] = _same_in_all(_gradients(model))
    for name, wrapper in wrappers.items():
        assert not isinstance(wrapper.reducer, StandIn) and "_sync_buffers" not in vars(wrapper)
        assert wrapper.process_group is dist.group.WORLD
        found[name] = _same_in_all(_gradients(wrapper.module, wrapper))
    found["original"] = _same_in_all(_gradients(ddp.module, ddp))
    return found, ddp.process_group is group


def _copies_all():
    return _copies(None), _copies(timedelta(seconds=50))


def test_copies_are_plain_models():
    """Of the module, without gradients averaged; of the wrapper, torch's own DDP."""
    for of_process in run(2, _copies_all):
        for found, kept in of_process:
            assert found == {
                **dict.fromkeys(["deepcopy", "pickle", "average"], False),
                **dict.fromkeys(["deepcopy of DDP", "torch.save", "original"], True),
            }
            assert kept


def _held() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def _again():
    loop = Loop("normal", "ddp", timeout=timedelta(seconds=50))
    wrapper = loop.wrapped
    before = _held(), loop.adapter.processes.control
    for _ in range(3):
        loop.adapter.distribute(wrapper, timeout=timedelta(seconds=50))
    after = _held(), loop.adapter.processes.control
    same_wrapper = _same_in_all(_gradients(loop.model, wrapper))
    loop.adapter.distribute(wrapper)  # the group's own timeout
    own_group = wrapper.process_group is dist.group.WORLD
    gc.collect()
    lines = len(faults._listener.lines)
    other = DistributedDataParallel(loop.model)
    loop.adapter.distribute(other)
    moved = _refused(lambda: wrapper(_own_batch())), _same_in_all(_gradients(loop.model, other))
    model = loop.adapter.detach()
    model.requires_grad_(True)
    detached = _refused(lambda: other(_own_batch()))
    with torch.no_grad():
        other(_own_batch())
    anew = _same_in_all(_gradients(model, DistributedDataParallel(model)))
    return before == after, same_wrapper, own_group, lines, moved, detached, anew


def test_distributed_again_and_detached():
    for kept, same, own_group, lines, (moved, other), detached, anew in run(2, _again):
        assert kept and same and own_group and lines == 1
        assert "wrap the model anew" in moved and other
        assert "wrap the model anew" in detached and anew


def _groups():
    rank, _ = process()
    dist.new_group([0])
    whole = Loop("normal", "ddp")
    found = [_same_in_all(_gradients(whole.model, whole.wrapped))]
    part = dist.new_group([0, 1])
    if rank < 2:
        found.append(_refused(lambda: Loop("normal", "bare", process_group=part)))
    groups = [dist.new_group([process]) for process in (1, 2)]  # as many in 0 and 1 as before, and one more
    if rank < 2:
        loop = Loop("normal", "bare", process_group=part)
        found.append(loop.adapter.processes.size)
    return found, len(groups)


def test_processes_in_different_numbers_of_groups():
    first, second, third = run(3, _groups)
    for found, _ in (first, second):
        assert found[0] and "equally many process groups each, got [4, 3]" in found[1] and found[2] == 2
    assert third[0] == [True]


def _joined_and_frozen():
    rank, _ = process()
    loop = Loop("normal", "ddp")
    data = batches(4 if rank == 0 else 2)
    with loop.wrapped.join():
        for i, (x, y) in enumerate(data):
            if i % 2 == 0:
                with loop.adapter.no_sync():
                    (loop.wrapped(x) - y).square().mean().backward()
            else:
                loop.step([(x, y)])
    joined = _same_in_all(torch.cat([p.detach().reshape(-1) for p in loop.adapter.parameters()]))
    model = network(rank)
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(r=2, target_modules="all-linear"))
    for layer in adapter.layers.values():
        layer.lora_A.requires_grad_(False)
        nn.init.normal_(layer.lora_B)
    ddp = DistributedDataParallel(model)
    adapter.distribute(ddp)
    frozen = _same_in_all(_gradients(model, ddp)), all(p.grad is None for n, p in model.named_parameters() if "_A" in n)
    ddp._set_static_graph()
    static = [_same_in_all(_gradients(model, ddp)) for _ in range(2)], ddp._get_ddp_logging_data()
    return joined, frozen, static


def test_no_sync_within_join_frozen_factors_and_a_static_graph():
    for joined, frozen, static in run(2, _joined_and_frozen):
        assert joined and frozen == (True, True) and static == ([True, True], {})


def _losses():
    rank, _ = process()
    loop = Loop("adaptive", "ddp")
    found = [
        _refused(lambda: loop.adapter.step(None if rank else 1.0)),
        _refused(lambda: loop.adapter.step(1.0 if rank else "much")),
        _refused(lambda: loop.adapter.step(float("nan") if rank else 1.0)),
        loop.adapter.method.t,
    ]
    loop.step(batches(1))
    return found, loop.adapter.method.t


def test_a_wrong_loss_of_one_process_is_an_error_in_all():
    (first, counted), (second, _) = run(2, _losses)
    assert first[0] == "ValueError: step: process 1: step: loss must be given to an adaptive schedule, got None"
    assert second[0] == "ValueError: step: loss must be given to an adaptive schedule, got None"
    assert first[1] == "TypeError: step: loss must be a number or a one-element tensor, got 'much'"
    assert second[1].startswith("RuntimeError: step: process 0: TypeError(") and "got 'much'" in second[1]
    assert first[2] == second[2] == "NonFiniteError: step: loss must be finite, got nan"
    assert first[3] == second[3] == 0 and counted == 1


@pytest.mark.parametrize(
    ("attribute", "value", "text"),
    [
        ("_delay_all_reduce_params", [nn.Parameter(torch.ones(2))], "delay_all_reduce_named_params=None, got 1"),
        ("_use_python_reducer", True, 'optimize_ddp = "python_reducer"'),
    ],
)
def test_ddp_whose_gradients_cannot_be_taken_over(attribute, value, text):
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)
    plain = {"mixed_precision": None, "device_ids": None, "_delay_all_reduce_params": [], "_use_python_reducer": False}
    vars(ddp).update(plain)
    check_ddp(ddp)
    vars(ddp)[attribute] = value
    with pytest.raises(ValueError, match=text):
        check_ddp(ddp)
