"""The model of bytes and memory against numbers worked out by hand, and against what processes really hand to the all-reduce."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import communication
import gloo_wire
from communication import Decoder, Network, Trained
from models import Net, randomise, task_loss
from processes import run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import adaptlora

# One block of 4 → 4 projections but for keys and values (2) and the MLP (6); 10 words.
SMALL = Decoder("small", layers=3, hidden=4, intermediate=6, kv=2, vocabulary=10)


def test_shapes_are_those_of_the_published_models():
    counts = {decoder.name: decoder.parameters() for decoder in communication.DECODERS}
    assert counts == {
        "LLaMA-2 7B": 6_738_415_616,
        "LLaMA-3 8B": 8_030_261_248,
        "LLaMA-2 70B": 68_976_648_192,
        "LLaMA-3 70B": 70_553_706_496,
    }


def test_gradient_bytes_by_hand():
    shapes = {"a": (3, 5), "b": (7, 2), "c": (1, 1)}
    # 2·8 + 1·9 numbers, two marks for each of the two modules that have rank vectors, and the step's two.
    assert communication.gradient_bytes(shapes, {"a": 2, "b": 1, "c": 0}) == 4 * (16 + 9 + 4 + 2)
    assert communication.gradient_bytes(shapes, 2, itemsize=2) == 2 * (2 * (8 + 9 + 2) + 6 + 2)
    # q 8, k 6, v 6, o 8, gate 10, up 10, down 10
    assert communication.factor_numbers(SMALL.linears(), 1) == 3 * 58


def test_sent_by_hand():
    gradients = 4 * (2 * 3 * 58 + 2 * 21 + 2)
    lora = Trained("", 2)
    assert communication.sent(SMALL, lora, 4, "DDP") == {"base": 0, "gradients": 1.5 * gradients}
    # A block: 16 + 8 + 8 + 16 + 3·24 weights and two norms of 4; besides: two tables of 10·4 and a norm.
    base = 2 * (2 * 3 * 128 + 84)
    assert communication.sent(SMALL, lora, 4, "FSDP2") == {"base": 0.75 * base, "gradients": 1.5 * gradients}
    everything = Trained("", full=True)
    assert communication.sent(SMALL, everything, 4, "DDP") == {"base": 0, "gradients": 1.5 * 2 * 468}
    assert communication.sent(SMALL, everything, 4, "FSDP2") == {"base": 0.75 * base, "gradients": 0.75 * 2 * 468}
    # Two nodes of 8: gathered within the node, and between the two an eighth of all gradients goes back and forth.
    assert communication.sent(SMALL, lora, 16, "HSDP") == {"base": 7 / 8 * base, "gradients": 15 / 8 * gradients}
    assert communication.sent(SMALL, everything, 16, "HSDP")["gradients"] == 7 / 8 * 936 + 936 / 8


def test_nothing_is_sent_by_one_process():
    assert communication.sent(SMALL, Trained("", 2), 1, "FSDP2") == {"base": 0, "gradients": 0}
    assert gloo_wire.wire_all_reduce(400, 4, 1) == gloo_wire.wire_all_gather(400, 1) == 0


def test_memory_by_hand():
    one = 3 * 58
    parked = communication.memory(SMALL, Trained("", 2, held=8), 4, "FSDP2")
    assert parked == {
        "base": 2 * 468 / 4,
        "gathered": 2 * (2 * 128 + 84),
        "factors": 4 * 8 * one,
        "gradients": 4 * 2 * one,
        "buffer": 4 * (2 * one + 42 + 2),
        "optimizer": 8 * 8 * one,
    }
    pruned = communication.memory(SMALL, Trained("", 2), 4, "DDP")
    assert (pruned["base"], pruned["gathered"], pruned["factors"], pruned["optimizer"]) == (936, 0, 8 * one, 16 * one)
    everything = communication.memory(SMALL, Trained("", full=True), 4, "FSDP2")
    assert (everything["gradients"], everything["buffer"], everything["optimizer"]) == (234, 0, 936)


def test_gloo_s_ring_by_hand():
    # 40 bytes in 4 pieces of 3 numbers, the last shorter; then so few that pieces are missing.
    assert gloo_wire.gloo_segments(40, 4, 2) == [12, 12, 12, 4]
    assert gloo_wire.gloo_segments(8, 4, 4) == [4, 4]
    # 3 · 2²⁰ bytes for one process more than 2²⁰ each: 6 pieces of half as much.
    assert gloo_wire.gloo_segments(3 << 20, 4, 3) == [1 << 19] * 6
    # 4 pieces cross twice, each with 3 · 48 bytes of gloo's and 4 · 52 of TCP's.
    assert gloo_wire.wire_all_reduce(40, 4, 2) == 2 * 40 + 8 * 352
    assert gloo_wire.wire_all_gather(40, 2) == 40 + 4 * 352
    # Halves of 65536 bytes and a preamble do not fit one packet.
    assert gloo_wire.wire_all_gather(4 * 65536, 2) == 4 * 65536 + 4 * (352 + 52)


def test_time_of_an_all_reduce_by_hand():
    network = Network(
        per_node=2, inside=10.0, between=5.0, start=1.0, ring_inside=0.1, tree_inside=0.2, step_between=0.5
    )
    # One node: 2 · (1/2) · 100 bytes at 10 a second; 2 ring steps of 0.1, or 2 tree steps of 0.2.
    assert network.all_reduce_seconds(100, 2) == pytest.approx(1 + 10 + 0.2)
    # Four nodes: 2 · (7/8) · 100 at 5; ring 2 · (4 · 0.1 + 3 · 0.5) = 3.8, tree 2 · (1 · 0.2 + 2 · 0.5) = 2.4.
    assert network.all_reduce_seconds(100, 8) == pytest.approx(1 + 35 + 2.4)
    assert network.all_gather_seconds(100, 8) == pytest.approx(1 + 17.5 + 1.9)


def _hooked_and_modelled():
    """[(bytes that a communication hook saw, the model's)] of a step before NormAL's clip and of one after it."""
    config = adaptlora.NormALConfig(r=4, target_r=2, target_modules=["first", "second"], t_p=1, t_c=1)
    adapter = adaptlora.attach(Net(), config)
    randomise(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters())
    adapter.track(optimizer)
    seen, found = [], []

    def hook(state, bucket):
        state.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    adapter.distribute(comm_hook=(seen, hook))
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in adapter.layers.items()}
    for _ in range(2):
        task_loss(adapter.model).backward()
        found.append((seen.pop(), communication.gradient_bytes(shapes, adapter.ranks())))
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    assert not seen
    return found


def test_the_model_s_bytes_are_those_that_a_communication_hook_sees():
    for (before, modelled_before), (after, modelled_after) in run(2, _hooked_and_modelled):
        assert (before, after) == (modelled_before, modelled_after)
        assert before == 4 * (4 * (13 + 17 + 17 + 11) + 4 + 2) and after < 0.8 * before
