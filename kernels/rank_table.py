"""Where every rank vector of every module lies in memory: the operand of the kernels that take all modules in one launch."""

import functools

import torch
import triton
import triton.language as tl

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ALIGNMENT = 16


@triton.jit
def vector_row(table_ptr, index, VECTOR: tl.constexpr):
    """(address, element stride, length, dtype code) of rank vector `index`; VECTOR: as promised by `vector_table`."""
    row = table_ptr + index.to(tl.int64) * 4
    address, stride, length, code = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if VECTOR:
        stride, length = 1, tl.multiple_of(length, 16)
    return address, stride, length, code


@triton.jit
def elements(address, dtype: tl.constexpr, offs, VECTOR: tl.constexpr):
    """Pointers to the elements `offs` behind an integer address, on 16 bytes if VECTOR."""
    pointer = address.to(tl.pointer_type(dtype))
    # The hint must sit on the pointer: what is known of an integer is forgotten when it becomes one.
    if VECTOR:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offs


@triton.jit
def load_vector(address, offs, mask, code, VECTOR: tl.constexpr):
    """fp32 values at `offs` (elements) of the vector at `address`."""
    if code == 0:
        values = tl.load(elements(address, tl.float32, offs, VECTOR), mask=mask, other=0.0)
    elif code == 1:
        values = tl.load(elements(address, tl.bfloat16, offs, VECTOR), mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.load(elements(address, tl.float16, offs, VECTOR), mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def store_vector(address, offs, mask, code, values, VECTOR: tl.constexpr):
    """Rounds fp32 `values` to the vector's dtype and writes them at `offs` (elements)."""
    if code == 0:
        tl.store(elements(address, tl.float32, offs, VECTOR), values, mask=mask)
    elif code == 1:
        tl.store(elements(address, tl.bfloat16, offs, VECTOR), values.to(tl.bfloat16), mask=mask)
    else:
        tl.store(elements(address, tl.float16, offs, VECTOR), values.to(tl.float16), mask=mask)


def repeated(layout: list[tuple[int, ...]], counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(each line of `layout` as often as its count says, the number of every copy among those of its line), int64."""
    counts = torch.tensor(counts, device="cpu")
    lines = torch.tensor(layout, device="cpu").repeat_interleave(counts, dim=0)
    return lines, torch.arange(len(lines), device="cpu") - (counts.cumsum(0) - counts).repeat_interleave(counts)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy there of a CPU tensor; from pinned memory, so that the CPU does not wait until a GPU has come to it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@functools.lru_cache(maxsize=16)
def _table(device: torch.device, factors: tuple) -> tuple[torch.Tensor, bool]:
    """The table of factors given as (address, ranks, elements from rank to rank, element stride, length, dtype)."""
    vectors, r = repeated(
        [
            (pointer, step * dtype.itemsize, stride, length, _CODES[dtype])
            for pointer, _, step, stride, length, dtype in factors
        ],
        [rank for _, rank, *_ in factors],
    )
    vector = all(
        stride == 1 and pointer % ALIGNMENT == 0 and step * dtype.itemsize % ALIGNMENT == 0 and length % ALIGNMENT == 0
        for pointer, _, step, stride, length, dtype in factors
    )
    address = vectors[:, 0] + r * vectors[:, 1]
    return to_device(torch.cat([address[:, None], vectors[:, 2:]], dim=1), device), vector


def vector_table(lora_As, lora_Bs) -> tuple[torch.Tensor, bool]:
    """
    The table, int64 (2 ΣR, 4) on the device of the factors: address, element stride, length and dtype code of every a_r
    of every module, then of every b_r. It is made of nothing but addresses and layouts, and kept while they do not change.

    Args: lora_As: list of (R_i, K_i), lora_Bs: list of (N_i, R_i), fp32 / bf16 / fp16 in any mixture, any strides.
    Returns: (table, vector): `vector` promises unit strides, addresses on 16 bytes and lengths that are multiples of 16.
    """
    factors = tuple(
        (M.data_ptr(), M.shape[0], M.stride(0), M.stride(1), M.shape[1], M.dtype)
        for M in (*lora_As, *(B.t() for B in lora_Bs))
    )
    return _table(lora_As[0].device, factors)


@functools.lru_cache(maxsize=16)
def _relative_table(device: torch.device, shapes: tuple) -> tuple[torch.Tensor, bool, torch.Tensor]:
    """`_table` of contiguous factors with the shapes (ranks, length, dtype), as if each began at address 0, and whose each vector is."""
    table, vector = _table(device, tuple((0, rank, length, 1, length, dtype) for rank, length, dtype in shapes))
    owners, _ = repeated([(i,) for i in range(len(shapes))], [rank for rank, *_ in shapes])
    return table, vector, to_device(owners.flatten(), device)


@functools.lru_cache(maxsize=16)
def _addresses(device: torch.device, addresses: tuple[int, ...]) -> torch.Tensor:
    return to_device(torch.tensor(addresses, device="cpu"), device)


def empty_pairs(lora_As, lora_Bs):
    """
    New A's and B's for the results of a kernel, and their table. The allocator may put them elsewhere in every call, so the table
    holds addresses relative to the factor's own and is kept while the shapes stay; what follows the allocator is one address
    for each factor, which goes to the device only when it has changed and without waiting for it.

    Returns: (As, Bs, table, vector, owners, addresses): A's (R, K) contiguous, B's (N, R) with strides (1, N); `table` and
        `vector` as of `vector_table`, to whose addresses `addresses[owners[v]]` must be added; `owners` is int64 (2 ΣR,).
    """
    device, shapes = lora_As[0].device, tuple((*M.shape, M.dtype) for M in (*lora_As, *(B.t() for B in lora_Bs)))
    rows = [torch.empty((rank, length), dtype=dtype, device=device) for rank, length, dtype in shapes]
    table, vector, owners = _relative_table(device, shapes)
    addresses = _addresses(device, tuple(M.data_ptr() for M in rows))
    return rows[: len(lora_As)], [b.t() for b in rows[len(lora_As) :]], table, vector, owners, addresses
