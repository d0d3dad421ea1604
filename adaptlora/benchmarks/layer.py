"""One adapted layer, forward and backward (dx, dA, dB), by every provider, and several that share x: cases of the layer's benchmarks.

The factors are float32 whatever the base is. Memory beyond the two base products, in elements of 4 bytes, R small (W is read twice by all):
    frozen      none: x, W → y; dy, W → dx
    PEFT        forward MK (S), 6 MN (the update written, scaled, added to y); dropout 6 MK more (noise drawn, scaled, multiplied)
                backward 4 MN (dy scaled; dB, dS), 5 MK (dA; the update's dx written, then added); dropout 3 MK more
    masked      as PEFT, and 2R(K + N) for the masked factors, as often again backward
    adaptlora   forward MK (S, with the mask regenerated), 2 MN (y starts as the update and the base product adds to it)
                backward MN (dS and dB in one pass), 3 MK (dA; dx as y); dropout or not
What all have to do at least is work.layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..finetune._extras import need
from ..nn import LoraGroup, LoraLinear
from ..ops import lora_linear_ref
from ..ops._dropout import new_seed
from . import work
from .accuracy import assert_accurate, assert_all_accurate
from .case import Case, NotRun, Options
from .harness import usable
from .roofline import bf16_unusable, dtype_name
from .work import Work

FROZEN, PEFT, COMPILED, MASKED, OURS = (
    "frozen linear",
    "PEFT",
    "PEFT, torch.compile",
    "masked, as published",
    "adaptlora",
)
R, SCALING = 8, 2.0


@dataclass(frozen=True)
class Point:
    """Sizes of one case."""

    M: int
    K: int
    N: int
    R: int
    p: float
    dtype: torch.dtype

    @property
    def adapted(self) -> Work:
        return work.layer(self.M, self.K, self.N, self.R, self.dtype)

    @property
    def frozen(self) -> Work:
        return work.layer(self.M, self.K, self.N, 0, self.dtype)

    def facts(self) -> dict[str, object]:
        return {
            "M": self.M, "K": self.K, "N": self.N, "R": self.R, "dropout": self.p, "dtype": str(self.dtype),
            "GFLOP of the floor": round(self.frozen.flops / 1e9, 3),
        }  # fmt: skip


class Masked(nn.Module):
    """
    A LoRA layer whose pruned ranks are multiplied by 0, as NormAL is published: nothing gets smaller.

    Args: base: a frozen linear.   r: all its ranks; `mask` (r,) begins with ones.
    """

    def __init__(self, base: nn.Linear, r: int, scaling: float, p: float):
        super().__init__()
        self.base, self.scaling = base, scaling
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.zeros(r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        self.dropout = nn.Dropout(p)
        self.register_buffer("mask", torch.ones(r, **like))

    def forward(self, x):
        s = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A * self.mask[:, None])
        y = self.base(x)
        return y + (self.scaling * F.linear(s, self.lora_B * self.mask)).to(y.dtype)


def peft_layer(base: nn.Linear, lora_A, lora_B, p: float) -> nn.Module:
    peft = need("peft", "bench: the provider PEFT")
    r = lora_A.shape[0]
    config = peft.LoraConfig(r=r, lora_alpha=int(SCALING * r), lora_dropout=p, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    return _filled(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, lora_A, lora_B)


def masked_layer(base: nn.Linear, lora_A, lora_B, p: float) -> nn.Module:
    layer = Masked(base, lora_A.shape[0], SCALING, p)
    return _filled(layer, layer.lora_A, layer.lora_B, lora_A, lora_B)


def our_layer(base: nn.Linear, lora_A, lora_B, p: float) -> LoraLinear:
    layer = LoraLinear(base, lora_A.shape[0], scaling=SCALING, dropout_p=p)
    return _filled(layer, layer.lora_A, layer.lora_B, lora_A, lora_B)


@torch.no_grad()
def _filled(layer: nn.Module, own_A, own_B, lora_A, lora_B) -> nn.Module:
    own_A.copy_(lora_A)
    own_B.copy_(lora_B)
    return layer


def copy_of(base: nn.Linear) -> nn.Linear:
    """A layer around the same weight: the providers share it, as they share the caches it is in."""
    copy = nn.Linear(base.in_features, base.out_features, device="meta")
    copy.weight, copy.bias = base.weight, base.bias
    return copy


def step(layer, x, dy):
    """Forward and backward with gradients that start empty, as after `zero_grad`."""
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.backward(dy)
    return y


def results(layer, x, dy) -> dict[str, torch.Tensor]:
    """y, dx and the gradients of the two factors."""
    y = step(layer, x, dy)
    grads = {name: p.grad for name in ("lora_A", "lora_B") for n, p in layer.named_parameters() if name in n}
    return {"y": y.detach(), "dx": x.grad, **grads}


def exact(base, x, lora_A, lora_B, dy) -> tuple[dict, dict]:
    """The definition in float64, and the same in the dtype of x; no dropout."""
    outs = []
    for dtype in (torch.float64, x.dtype):
        x_, A_, B_ = (t.detach().to(dtype).requires_grad_() for t in (x, lora_A, lora_B))
        y = F.linear(x_, base.weight.to(dtype), base.bias.to(dtype)) + SCALING * (x_ @ A_.t()) @ B_.t()
        grads = torch.autograd.grad(y, [x_, A_, B_], dy.to(dtype))
        if dtype != torch.float64:  # the factors' gradients have the factors' dtype
            grads = [grad.to(operand.dtype) for grad, operand in zip(grads, (x, lora_A, lora_B), strict=True)]
        outs.append(dict(zip(("y", "dx", "lora_A", "lora_B"), (y.detach(), *grads), strict=True)))
    return outs[0], outs[1]


def with_masks(layers, x, dys, seeds) -> tuple[dict, dict]:
    """The definition of training LoraLinears with the masks of these seeds, in float64 and in the dtype of x: y, dA, dB of each, and dx."""
    outs = []
    for dtype in (torch.float64, x.dtype):
        x_, *factors = (
            t.detach().to(dtype).requires_grad_()
            for t in (x, *(f for each in layers for f in (each.lora_A, each.lora_B)))
        )
        ys = [
            lora_linear_ref(
                x_, layer.weight.to(dtype), layer.bias.to(dtype), *factors[2 * i : 2 * i + 2], scaling=layer.scaling,
                dropout_p=layer.dropout_p, seed=seed,
            )
            for i, (layer, seed) in enumerate(zip(layers, seeds, strict=True))
        ]  # fmt: skip
        dx, *grads = torch.autograd.grad(ys, [x_, *factors], [dy.to(dtype) for dy in dys])
        if dtype != torch.float64:  # the factors' gradients have the factors' dtype
            grads = [grad.to(layers[0].lora_A.dtype) for grad in grads]
        outs.append(_named([y.detach() for y in ys], dx, grads))
    return outs[0], outs[1]


def _named(ys, dx, grads) -> dict[str, torch.Tensor]:
    names = [f"{name}{i or ''}" for i in range(len(ys)) for name in ("dA", "dB")]
    return {f"y{i or ''}": y for i, y in enumerate(ys)} | {"dx": dx} | dict(zip(names, grads, strict=True))


def assert_masks_right(title: str, forward, layers, x, dys) -> None:
    """
    As they are timed, with dropout, our layers give y and all gradients of their definition, with the masks that torch's generator gives.

    Args: forward: x → the layers' y's.   layers: LoraLinears, in the order in which they draw.
    Raises: WrongResultError.
    """
    x.grad = None
    for layer in layers:
        layer.train().zero_grad()
    torch.manual_seed(7)
    ys = forward(x)
    torch.autograd.backward(ys, dys)
    found = _named([y.detach() for y in ys], x.grad, [f.grad for each in layers for f in (each.lora_A, each.lora_B)])
    torch.manual_seed(7)
    seeds = [new_seed(x.device) for _ in layers]
    try:
        assert_all_accurate(found, *with_masks(layers, x, dys, seeds), precision=x.dtype)
    except AssertionError as error:
        raise type(error)(f"{title}, training: {error}") from error


def _normal(*shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _operands(point: Point, device: torch.device) -> tuple:
    """A frozen linear, lora_A, lora_B."""
    base = nn.Linear(point.K, point.N, device=device, dtype=point.dtype).requires_grad_(False)
    lora_A = _normal(point.R, point.K, dtype=torch.float32, device=device) / point.K**0.5
    return base, lora_A, _normal(point.N, point.R, dtype=torch.float32, device=device) / point.N**0.5


def rounds_for(point: Point) -> int:
    """So many that a case takes seconds, not minutes, on two cores."""
    gflop = point.frozen.flops / 1e9
    return 101 if gflop < 2 else 51 if gflop < 10 else 15


def layer_case(
    point: Point, device: torch.device, *, name: str, compiled: bool, facts: dict | None = None, layers=None
) -> Case:
    """
    Every provider of one layer, each seen to give y and all gradients of the definition.

    Args:
        compiled: whether torch.compile takes part; a compilation takes longer than the rest of a small case.
        layers: makers by name of further layers, called as `our_layer` is.
    Raises: WrongResultError, MissingExtraError.
    """
    torch.manual_seed(0)
    base, lora_A, lora_B = _operands(point, device)
    x = _normal(point.M, point.K, dtype=point.dtype, device=device).requires_grad_()
    dy = _normal(point.M, point.N, dtype=point.dtype, device=device)
    makers = {PEFT: peft_layer, MASKED: masked_layer, OURS: our_layer, **(layers or {})}
    made = {title: make(copy_of(base), lora_A, lora_B, point.p) for title, make in makers.items()}
    if compiled:
        made[COMPILED] = torch.compile(peft_layer(copy_of(base), lora_A, lora_B, point.p), fullgraph=True)
    truth, eager = exact(base, x, lora_A, lora_B, dy)

    def check(title: str) -> None:
        layer = made[title].eval()
        try:
            assert_all_accurate(results(layer, x, dy), truth, eager, precision=point.dtype)
        except AssertionError as error:
            raise type(error)(f"{name}: {title}: {error}") from error
        step(layer.train(), x, dy)

    providers, unavailable = usable(
        {title: lambda layer=each: step(layer, x, dy) for title, each in made.items()}, check
    )
    assert_masks_right(f"{name}: {OURS}", lambda x: [made[OURS](x)], [made[OURS]], x, [dy])
    counted = {FROZEN: point.frozen, **dict.fromkeys(providers, point.adapted)}
    return Case(
        name, {FROZEN: lambda: step(base, x, dy), **providers}, FROZEN, rounds_for(point), unavailable=unavailable,
        facts=point.facts() | (facts or {}), work=counted, graphs=True,
    )  # fmt: skip


class Each(nn.Module):
    """Layers called one after the other on the same x; the y's side by side, as LoraGroup's are put here too."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def group_case(point: Point, device: torch.device, *, siblings: int = 3) -> Case:
    """Layers that share x, as q, k and v do.  Raises: WrongResultError, MissingExtraError."""
    torch.manual_seed(0)
    operands = [_operands(point, device) for _ in range(siblings)]
    x = _normal(point.M, point.K, dtype=point.dtype, device=device).requires_grad_()
    dys = [_normal(point.M, point.N, dtype=point.dtype, device=device) for _ in operands]
    ours = [our_layer(copy_of(base), *pair, point.p) for base, *pair in operands]
    floor = f"{siblings} frozen linears"
    groups = {
        floor: Each([base for base, *_ in operands]),
        PEFT: Each([peft_layer(copy_of(base), *pair, point.p) for base, *pair in operands]),
        f"adaptlora, {siblings} layers": Each(ours),
        "adaptlora, LoraGroup": LoraGroup(ours),
    }

    def run(group):
        x.grad = None
        for parameter in group.parameters():
            parameter.grad = None
        torch.autograd.backward(group(x), dys)
        return x.grad

    expected = [exact(base, x, *pair, dy) for (base, *pair), dy in zip(operands, dys, strict=True)]
    truth, eager = (
        [sum(found["dx"] for found in side), *(found[name] for found in side for name in ("lora_A", "lora_B"))]
        for side in zip(*expected, strict=True)
    )
    for title, group in groups.items():
        run(group.eval())
        if title != floor:
            factors = {name: p.grad for name, p in group.named_parameters() if "lora_" in name}
            for i, triple in enumerate(zip([x.grad, *factors.values()], truth, eager, strict=True)):
                assert_accurate(f"{title}: gradient {i}", *triple, precision=point.dtype)
        group.train()
    for title in list(groups)[2:]:
        assert_masks_right(title, groups[title], ours, x, dys)
    counted = [work.layer(point.M, point.K, point.N, r, point.dtype, siblings=siblings) for r in (0, point.R)]
    return Case(
        f"{siblings} × {point.K}×{point.N} of one x, dropout {point.p}",
        {title: lambda group=group: run(group) for title, group in groups.items()},
        floor,
        rounds=101,
        facts={"M": point.M, "R": point.R, "dtype": str(point.dtype)},
        work={title: counted[title != floor] for title in groups},
        graphs=True,
    )


# One axis at a time around a centre: a layer of MiniLM's to SmolLM2's width on a CPU, of an 8B model's on a GPU.
_CENTRES = {
    "cpu": Point(512, 1024, 1024, R, 0.05, torch.float32),
    "cuda": Point(8192, 4096, 4096, R, 0.05, torch.bfloat16),
    "quick": Point(32, 64, 64, 4, 0.05, torch.float32),
}
_AXES = {
    "cpu": {
        "M": (64, 256, 512, 1024, 4096),
        "K = N": (256, 512, 1024, 2048, 4096),
        "R": (1, 4, 8, 32, 128),
    },
    "cuda": {
        "M": (64, 512, 2048, 8192, 16384),
        "K = N": (1024, 2048, 4096, 8192),
        "R": (1, 4, 8, 32, 128),
    },
    "quick": {"M": (16, 32), "K = N": (32, 64), "R": (1, 4)},
}
_ALL_AXES = {"dropout": (0.0, 0.05, 0.1), "dtype": (torch.float32, torch.bfloat16)}
_FIELDS = {"M": ("M",), "K = N": ("K", "N"), "R": ("R",), "dropout": ("p",), "dtype": ("dtype",)}


def sweep(options: Options) -> dict[Point, list[str]]:
    """The points of the sweep and the axes that each lies on: the centre lies on all of them."""
    kind = "quick" if options.quick else options.device.type
    points: dict[Point, list[str]] = {}
    for axis, values in (_AXES[kind] | _ALL_AXES).items():
        for value in values:
            point = replace(_CENTRES[kind], **dict.fromkeys(_FIELDS[axis], value))
            points.setdefault(point, []).append(axis)
    return points


def title(point: Point) -> str:
    return f"layer, M {point.M}, K = N {point.K}, R {point.R}, dropout {point.p}, {dtype_name(point.dtype)}"


def sweep_case(point: Point, axes: list[str], options: Options) -> Case | NotRun:
    reason = bf16_unusable(options.device) if point.dtype == torch.bfloat16 else None
    if reason:
        return NotRun(title(point), reason)
    return layer_case(point, options.device, name=title(point), compiled=not options.quick, facts={"axes": axes})


def cases(options: Options) -> Iterator[Case | NotRun]:
    """The sweep, each case made when it is asked for."""
    for point, axes in sweep(options).items():
        yield sweep_case(point, axes, options)
