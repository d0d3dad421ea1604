"""The launches that the package ships: every kernel with every tile, dtype, rank block, group and layout that its launchers choose."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import torch
from numerics import laid_out
from triton_targets import Launch, recorded_launches

from adaptlora.kernels import (
    dropout,
    gram,
    launch,
    lora_da,
    lora_ds_db,
    lora_expand,
    lora_gemm,
    lora_shrink,
    partials,
    rank_gather,
    rank_norms,
    rank_scale,
    subspace_overlap,
    tiles,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M = 256
LAYOUTS = ("contiguous", "padded", "transposed", "strided")


@dataclasses.dataclass(frozen=True)
class Case:
    """
    One call of every launcher of the layer.

    layout: of x and dy, as in `laid_out`; "odd" is contiguous with sizes of which 16 is no divisor; "expanded" is a dy of one
        number, as `y.sum().backward()` makes it.   peft: B lies as PEFT's, (N, R) contiguous.   scale: with E, and with dE.
    """

    dtype: torch.dtype
    R: int
    factors: torch.dtype = FP32
    modules: int = 1
    dropout: bool = True
    layout: str = "contiguous"
    tf32: bool = False
    scale: bool = False
    peft: bool = False
    bias: bool = True

    def __str__(self) -> str:
        names = [str(self.dtype).removeprefix("torch."), f"R{self.R}", f"{self.modules} modules"]
        flags = ("dropout", "tf32", "scale", "peft")
        factors = f"{self.factors} factors".removeprefix("torch.")
        bias = [] if self.bias else ["no bias"]
        return " ".join([*names, self.layout, factors, *(flag for flag in flags if getattr(self, flag)), *bias])

    @property
    def matrix(self) -> bool:
        return self.dtype != FP32 or self.tf32

    @property
    def aligned(self) -> bool:
        return self.layout == "contiguous"


def cases() -> list[Case]:
    """Tiles, dtypes, rank blocks and groups crossed; layouts, factor dtypes, scales and sizes beside them."""
    ranks, modules, both, product = (16, 32, 64, 128), (1, 2, 3), (False, True), itertools.product
    single = ((FP32, False), (FP32, True))
    return [
        *(Case(BF16, R, modules=g, dropout=p) for R, g, p in product(ranks, modules, both)),
        *(Case(FP16, R, modules=g) for R, g in product((16, 128), (1, 3))),
        *(Case(d, R, modules=g, dropout=p, tf32=t) for (d, t), R, g, p in product(single, (16, 32), modules, both)),
        *(Case(BF16, R, bias=False, scale=s, dropout=False) for R, s in product((16, 32), both)),
        *(Case(BF16, R, factors=BF16, modules=g, scale=s) for R, g, s in product((16, 32, 128), modules, both)),
        *(Case(FP16, R, factors=FP16, scale=s) for R, s in product((8, 33), both)),
        *(
            Case(d, R, modules=g, layout=layout, tf32=d == FP32 and layout == "padded", dropout=p)
            for d, R, g, layout, p in product(
                (BF16, FP32), (8, 32, 128), (1, 3), ("padded", "transposed", "strided"), both
            )
            if p or layout == "padded"
        ),
        Case(FP16, 8, layout="padded"),
        *(Case(d, 8, layout="expanded") for d in (BF16, FP32)),
        *(
            Case(d, R, modules=g, layout="odd", tf32=t, dropout=p)
            for (d, t), R, g, p in product(((BF16, False), *single), (8, 32), modules, both)
        ),
        *(
            Case(d, R, factors=f, modules=g, peft=True, scale=g == 1)
            for (d, f), R, g in product(((BF16, FP32), (BF16, BF16), (FP32, FP32)), (8, 16, 33, 128), (1, 3))
        ),
    ]


@contextlib.contextmanager
def _settings(case: Case, share: float) -> Iterator[None]:
    """TF32 as the case allows it, and reductions split never (share 0) or as far as they go."""
    before = torch.backends.cuda.matmul.fp32_precision, launch.PARTIALS_SHARE
    torch.backends.cuda.matmul.fp32_precision, launch.PARTIALS_SHARE = "tf32" if case.tf32 else "ieee", share
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision, launch.PARTIALS_SHARE = before


NEVER_SPLIT, ALWAYS_SPLIT = 0.0, 1e6


def layer_launches(case: Case, capability: int, shares=(NEVER_SPLIT, ALWAYS_SPLIT)) -> list[Launch]:
    """What the launchers launch for `case`, reductions split as `shares` says; fused products with every tile of the capability."""
    group, (K, N) = range(case.modules), (100, 77) if case.layout == "odd" else (128, 192)
    layout = case.layout if case.layout in ("padded", "transposed", "strided") else "contiguous"
    x, dy = (laid_out(torch.zeros(M, width, dtype=case.dtype), layout) for width in (K, N))
    if case.layout == "expanded":
        dy = torch.zeros((), dtype=case.dtype).expand(M, N)
    As = [torch.zeros(case.R, K, dtype=case.factors) for _ in group]
    # A rank-major B is the first rows of a larger store, as RankedPair's: its strides are (1, N) at rank 1 too.
    Bs = [
        torch.zeros(N, case.R, dtype=case.factors)
        if case.peft
        else torch.zeros(case.R + 1, N, dtype=case.factors)[:-1].t()
        for _ in group
    ]
    e = torch.ones(case.R, dtype=case.factors) if case.scale else None
    masks = (0.1, 1 << 20, [torch.tensor(1) for _ in group]) if case.dropout else (0.0, 0, None)
    s, ds = torch.zeros(M, case.R * case.modules), torch.zeros(M, case.R * case.modules, dtype=case.dtype)
    with recorded_launches() as launches:
        for share in shares:
            with _settings(case, share):
                lora_shrink.lora_shrink(x, As, *masks)
                lora_da.lora_da(x, ds, [torch.empty(A.shape, dtype=A.dtype) for A in As], *masks)
                dB = torch.empty(case.R, N, dtype=case.factors).t()
                lora_ds_db.lora_ds_db(dy, Bs[0], s[:, : case.R], e, 2.0, ds[:, : case.R], dB)
                if case.scale:
                    G = torch.empty(case.R, N).t()
                    lora_ds_db.lora_ds_db(dy, Bs[0], s[:, : case.R], e, 2.0, ds[:, : case.R], G=G)
        with _settings(case, NEVER_SPLIT):
            y = laid_out(torch.zeros(M, N, dtype=case.dtype), layout)
            lora_expand.lora_expand_(y, s[:, : case.R], [Bs[0].t()], scaling=2.0, rank_scale=e)
            lora_expand.lora_expand_(x, ds, As, *masks)
            if case.dtype != FP32 and case.aligned:
                _gemms(case, capability, x, dy, As, Bs, s, ds, e, masks)
    return launches


def _gemms(case, capability, x, dy, As, Bs, s, ds, e, masks) -> None:
    dx_table = tiles.GEMM_DX if case.modules == 1 else tiles.GEMM_DX_GROUP
    (N, K), bias = (dy.shape[1], x.shape[1]), torch.zeros(dy.shape[1], dtype=case.dtype) if case.bias else None
    for transposed in (False, True):  # nn.Linear's weight and Conv1D's
        weight = laid_out(torch.zeros(N, K, dtype=case.dtype), "transposed" if transposed else "contiguous")
        for tile in () if case.peft else tiles.gemm_tiles(tiles.GEMM_EXPAND, capability):
            lora_gemm.lora_gemm_expand(x, weight, bias, s[:, : case.R], Bs[0], tile, scaling=2.0, rank_scale=e)
        for tile in tiles.gemm_tiles(dx_table, capability):
            lora_gemm.lora_gemm_dx([dy] * len(As), [weight] * len(As), ds, As, tile, *masks)


def other_launches(capability: int) -> list[Launch]:
    """The kernels that take all modules at once, on aligned and odd vectors, the sums of partial results, and those of the SVD ops."""
    aligned = [torch.zeros(8, 128, dtype=BF16)], [torch.zeros(8, 192).t()]
    odd = [torch.zeros(8, 13)], [torch.zeros(7, 8)]
    factors = torch.ones(8)
    with recorded_launches() as launches:
        dropout.dropout_keep(torch.tensor(1), 64, 64, 1 << 20)
        for pair in (aligned, odd):
            rank_norms.rank_norms(*pair)
            rank_scale.rank_scale(*pair, factors, factors)
            rank_scale.rank_scale_(*pair, factors, factors)
        rank_gather.rank_gather(aligned[0], torch.tensor([3, 1]), [2])
        for jobs in (1, 2, 3):
            partials.sum_partials(
                *[(torch.zeros(2, 8, 64), torch.zeros(8, 64, dtype=d)) for d in (FP32, BF16, FP16)[:jobs]]
            )
        for layout, (n, columns) in itertools.product(LAYOUTS, ((128, 16), (100, 30), (128, 64))):
            X = laid_out(torch.zeros(2, n, columns), layout)
            if capability < 100:  # newer GPUs take torch's product
                gram.gram(X)
            for dtype in (FP32, BF16, FP16):
                subspace_overlap.subspace_overlap(X.to(dtype), X.to(dtype))
    return launches


def needs(case: Case, launched: Launch) -> dict[str, bool]:
    """What the code of a launch of `case` must have, for `triton_targets.faults`."""
    product = launched.name.startswith("_lora_")
    streams = product and launched.name != "_lora_expand_kernel"
    return {"matrix": product and case.matrix, "asynchronous": streams and case.matrix and case.aligned}
