"""The tolerance rule of every kernel test and of every benchmark: no worse than twice eager's own error.

err(ours) ≤ 2 · err(eager in the same dtype) + floor(dtype), where err(out) = ‖out − exact‖ / ‖exact‖ against the same
float64 result, in the 2-norm and in the maximum norm: one wrong element among many hides from the first, not the second.
"""

import math

import torch

# One unit roundoff for the half types, whose error is that of storing the result; 16 for float32 and 1024 for float64,
# whose error is that of summing in another order.
FLOOR = {torch.float64: 2**-43, torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}
NORMS = (2, math.inf)


class WrongResultError(AssertionError):
    """Something computes another result than its definition: it is not worth a timing."""


def errors(out: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """‖out − exact‖ / ‖exact‖ for each of `NORMS` in float64; ‖out‖ where ‖exact‖ = 0, and 0 for empty tensors."""
    if exact.numel() == 0:
        return [0.0] * len(NORMS)
    difference, exact = (out.detach().double() - exact.detach().double()).flatten(), exact.detach().double().flatten()
    norms = [(torch.linalg.vector_norm(difference, p).item(), torch.linalg.vector_norm(exact, p).item()) for p in NORMS]
    return [error / scale if scale else error for error, scale in norms]


def assert_accurate(name: str, out: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, *, precision=None) -> None:
    """
    Args:
        out: what is tested.   exact: the float64 result.   eager: plain torch operations in the dtypes of `out`.
        precision: dtype whose floor counts, by default that of `out` (autocast computes in another).
    Raises: WrongResultError.
    """
    assert exact.dtype == torch.float64, f"{name}: the exact result must be float64, got {exact.dtype}"
    if not out.shape == exact.shape == eager.shape:
        raise WrongResultError(f"{name}: shape {tuple(out.shape)}, expected {tuple(exact.shape)}")
    if out.dtype != eager.dtype:
        raise WrongResultError(f"{name}: dtype {out.dtype}, expected {eager.dtype}")
    floor = FLOOR[precision or out.dtype]
    for norm, ours, theirs in zip(NORMS, errors(out, exact), errors(eager, exact), strict=True):
        bound = 2 * theirs + floor
        if not ours <= bound:  # so that a NaN on either side fails
            raise WrongResultError(
                f"{name}: error {ours:.3g} in the {norm}-norm, allowed {bound:.3g} (eager: {theirs:.3g})"
            )


def assert_all_accurate(out: dict, exact: dict, eager: dict, *, precision=None) -> None:
    """`assert_accurate` for every entry; all three dicts name the same results."""
    assert out.keys() == exact.keys() == eager.keys()
    for name in exact:
        assert_accurate(name, out[name], exact[name], eager[name], precision=precision)
