"""What predictions ask of an architecture: peak speeds as its data sheet prints them, and how much a Triton GEMM loses on it."""

from typing import NamedTuple


class Device(NamedTuple):
    """
    flops: dense 16-bit FLOP/s.   bandwidth: bytes/s of memory.   multiprocessors: how many programs run at once.
    slowdown: share by which a fused GEMM is slower than torch's alone. Assumed, not measured.
    """

    flops: float
    bandwidth: float
    multiprocessors: int
    slowdown: float


DEVICES = {
    80: Device(312e12, 2.04e12, 108, 0.10),  # A100 SXM 80 GB
    90: Device(989e12, 3.35e12, 132, 0.25),  # H100 SXM
}


def generation(capability: int) -> int:
    """The compute capability to look up in tables whose entries also serve those above them."""
    # Consumer Blackwell, 12x, has the matrix instructions and the shared memory of 8x, not those of 9x and 10x.
    return 80 if capability // 10 == 12 else capability


def device(capability: int) -> Device:
    """The nearest that is not newer; the oldest for those before it."""
    return DEVICES[max((known for known in DEVICES if known <= generation(capability)), default=min(DEVICES))]
