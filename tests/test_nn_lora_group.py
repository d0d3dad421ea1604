"""LoraGroup against its layers called one by one; and how it is copied, loaded and refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from adaptlora.nn import LoraGroup, LoraLinear


def layers(*ranks: int, conv1d=(), **options) -> list[LoraLinear]:
    class Conv1D(nn.Module):  # as in transformers, known by its name
        def __init__(self, K, N):
            super().__init__()
            self.nf, self.weight, self.bias = N, nn.Parameter(torch.randn(K, N)), nn.Parameter(torch.randn(N))

    made = []
    for i, R in enumerate(ranks):
        base = Conv1D(30, 11 + i) if i in conv1d else nn.Linear(30, 11 + i, bias=i != 1)
        made.append(LoraLinear(base, R, scaling=1.0 + i, **options))
        nn.init.normal_(made[-1].lora_B)
    return made


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_layer_group_equals_its_layers(backend, p, train):
    members = layers(3, 5, 0, 7, conv1d={3}, dropout_p=p)
    both = LoraGroup(members).train(train)
    x = torch.randn(4, 6, 30)
    dys = [torch.randn(4, 6, layer.out_features) for layer in members]

    def run(forward, double=False):
        given = x.clone().requires_grad_()
        torch.manual_seed(5)
        ys = forward(given)
        torch.autograd.backward(ys, dys)
        out = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": given.grad}
        for i, layer in enumerate(members):
            out |= {f"dA{i}": layer.lora_A.grad, f"dB{i}": layer.lora_B.grad}
        both.zero_grad()
        return out

    theirs = run(lambda given: [layer(given) for layer in members])
    ours = run(both)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_layer_group_copies_and_loads(clone):
    group, x = LoraGroup([LoraLinear(nn.Linear(6, N), r) for N, r in ((5, 3), (4, 0), (7, 2))]), torch.randn(3, 6)
    for layer in group.layers:
        nn.init.normal_(layer.lora_B)
    copied, other = clone(group), LoraGroup([LoraLinear(nn.Linear(6, N), 1) for N in (5, 4, 7)])
    other.load_state_dict(group.state_dict())
    for module in (copied, other):
        assert all(torch.equal(a, b) for a, b in zip(module(x), group(x), strict=True))
        assert [layer.rank for layer in module.layers] == [3, 0, 2]
        assert not {id(p) for p in module.parameters()} & {id(p) for p in group.parameters()}


def test_layer_group_holds_the_layers_themselves():
    members = layers(3, 5)
    both = LoraGroup(members)
    assert [id(p) for p in both.parameters()] == [id(p) for layer in members for p in layer.parameters()]
    members[0].pair.narrow(1)
    assert [tuple(y.shape) for y in both(torch.randn(2, 30))] == [(2, 11), (2, 12)]


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        (lambda m: [], ValueError, "layers must hold at least one LoraLinear, got none"),
        (lambda m: [m[0], nn.Linear(30, 2)], TypeError, "layer 1 must be a LoraLinear, got Linear"),
        (
            lambda m: [m[0], LoraLinear(nn.Linear(29, 2), 3)],
            ValueError,
            "layer 1 must have the in_features of layer 0, 30, got 29",
        ),
        (
            lambda m: [*m, *layers(3, dropout_p=0.1)],
            ValueError,
            "layer 2 must have the dropout_p of layer 0, 0.0, got 0.1",
        ),
        (
            lambda m: [m[0], m[1].double()],
            TypeError,
            "layer 1 must have the dtype of layer 0, torch.float32, got torch.float64",
        ),
        (lambda m: [m[0], m[1].to("meta")], ValueError, "layer 1 must have the device of layer 0, cpu, got meta"),
    ],
)
def test_layers_that_do_not_fit(change, exception, message):
    with pytest.raises(exception, match=f"^LoraGroup: {message}$"):
        LoraGroup(change(layers(3, 5)))


def test_dropout_that_parts_later_is_noticed():
    both = LoraGroup(layers(3, 5, dropout_p=0.1))
    both.layers[1].eval()
    with pytest.raises(ValueError, match=r"^LoraGroup: the layers must have one dropout_p, got \[0.1, 0.0\]$"):
        both(torch.randn(2, 30))
