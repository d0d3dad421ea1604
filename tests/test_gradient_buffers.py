"""The one buffer of the gradients is kept from pass to pass, for as long as shapes stay and nothing went wrong."""

import itertools

import pytest
import torch
from processes import run
from torch import nn

import adaptlora
from adaptlora.distributed.gradients import Bucket


def test_a_bucket_is_filled_anew_in_the_same_memory():
    parameter, other = nn.Parameter(torch.zeros(3, 4).t()), nn.Parameter(torch.zeros(2))
    parameter.grad, other.grad = torch.ones(4, 3), torch.ones(2)
    bucket = Bucket([parameter, other])
    memory = bucket.buffer()
    bucket.set_buffer(torch.full_like(memory, 5.0))  # as a hook does that sends other bytes
    bucket.write_back()
    assert torch.equal(parameter.grad, torch.full((4, 3), 5.0)) and bucket.gradients()[0].shape == (3, 4)
    parameter.grad, other.grad = torch.full((4, 3), 2.0), None
    bucket.fill(1)
    assert bucket.buffer() is memory and torch.equal(memory, torch.tensor([2.0] * 12 + [0, 0, 1, 0, 1, 1]))
    parameter.grad = None
    assert not bucket.fill(0).buffer()[:-2].any()


def _memory_of_buckets():
    """Whether a pass has the buffer of the one before: in the same shapes, after a change, and after a pass that ended with an error."""
    config = adaptlora.NormALConfig(r=2, target_r=1, target_modules="all-linear", t_p=1, t_c=1)
    adapter = adaptlora.attach(nn.Sequential(nn.Linear(8, 8)), config)
    optimizer = torch.optim.AdamW(adapter.parameters())
    adapter.track(optimizer)
    adapter.distribute()

    def memory(hook=None):
        output = adapter.model(torch.ones(3, 8))
        if hook is not None:
            output.register_hook(hook)
        output.sum().backward()
        return adapter._distribution.gradients.buckets()[0].buffer()

    found = [memory(), memory()]
    optimizer.step()
    optimizer.zero_grad()
    assert adapter.step() is not None
    found += [memory(), memory()]
    with pytest.raises(ZeroDivisionError):
        memory(lambda _: 1 / 0)
    found.append(memory())
    return [one is other for one, other in itertools.pairwise(found)], found[2].numel()


def test_buffers_last_as_long_as_their_shapes():
    for same, numbers in run(2, _memory_of_buckets, seconds=300):
        assert same == [True, False, True, True] and numbers == 8 + 8 + 2 + 2
