"""adaptlora._cuda: the small factorizations of csrc/cuda in a library that knows no torch, called through ctypes."""

import ctypes
import functools
import importlib.util

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
_PLAN = [_INT, _INT, ctypes.POINTER(_INT), ctypes.POINTER(_INT)]
# Arguments by function, as csrc/cuda declares them.
FUNCTIONS = {
    "adaptlora_jacobi_svd_plan": _PLAN,
    "adaptlora_jacobi_svd_f32": [_POINTER, *[_SIZE] * 4, _INT, *[_POINTER] * 5, _INT, _POINTER],
    "adaptlora_cholesky_inverse_plan": _PLAN,
    "adaptlora_cholesky_inverse_f64": [_POINTER, _SIZE, _INT, *[_POINTER] * 4, _INT, _POINTER],
    "adaptlora_cuda_architectures": [],
    "adaptlora_cuda_error": [_INT],
}


def load(path: str) -> ctypes.CDLL:
    """The library in that file, with the types of its functions."""
    library = ctypes.CDLL(path)
    for name, arguments in FUNCTIONS.items():
        getattr(library, name).argtypes = arguments
    library.adaptlora_cuda_architectures.restype = library.adaptlora_cuda_error.restype = ctypes.c_char_p
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where the package was built without it; broken is an ImportError, never a fall-back."""
    spec = importlib.util.find_spec("adaptlora._cuda")
    if spec is None:
        return None
    try:
        return load(spec.origin)
    except (OSError, AttributeError) as error:
        raise ImportError(f"adaptlora: the CUDA library {spec.origin} does not load: {error}") from error


def architectures(cuda_library: ctypes.CDLL) -> list[int]:
    """The compute capabilities it has machine code for, as 10 · major + minor; later GPUs compile its PTX."""
    return [int(number) // 10 for number in cuda_library.adaptlora_cuda_architectures().decode().split(",")]


def plan(cuda_library: ctypes.CDLL, factorization: str, size: int, limit: int) -> tuple[int, int, int]:
    """(matrices in shared memory, threads, bytes of shared memory) of a block that may have `limit` bytes."""
    threads, used = _INT(), _INT()
    held = getattr(cuda_library, f"adaptlora_{factorization}_plan")(
        size, limit, ctypes.byref(threads), ctypes.byref(used)
    )
    return held, threads.value, used.value


def check(cuda_library: ctypes.CDLL, op: str, code: int) -> None:
    """Raises RuntimeError for what a launcher returned, unless it is 0."""
    if code:
        raise RuntimeError(f"{op}: the launch failed: {cuda_library.adaptlora_cuda_error(code).decode()}")
