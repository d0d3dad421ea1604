"""What a Triton kernel asks of memory, by pointer argument, and its tl.dot FLOPs: counted in triton's interpreter (3.7.1).

    with counted() as counts:
        lora_shrink(x, A)
    counts["_lora_shrink_kernel"].loaded["x_ptr"]

Requested bytes are the unmasked elements of every load, store and atomic, read again as often as the programs read them;
distinct bytes are the different addresses among them in one launch: what a perfect cache would leave.

Within `counted`, every pointer argument carries its number in the upper 16 bits of its address, which addresses of host
memory leave free. Pointer arithmetic keeps the number, so arguments that overlap or share memory stay apart, and it is taken
off where memory is touched. An address that the kernel loads from memory, as from a table, has none and is nobody's: "other".
"""

import contextlib
import dataclasses
import threading
from collections import Counter, defaultdict
from unittest.mock import patch

import numpy as np
import triton
from adaptlora.kernels.interpreter import repair_bf16
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

OTHER = "other"
_NUMBER_BIT = 48
_ADDRESS = np.uint64(2**_NUMBER_BIT - 1)
_PAGE_BIT = 20
_counting = threading.Lock()


@dataclasses.dataclass
class Traffic:
    """
    All launches of one kernel, with what the @triton.jit functions that it calls do.

    loaded, stored: requested bytes by argument name; an element of a tuple is "name[0]", an argument that was not touched 0.
        An atomic is both a load and a store.
    distinct_loaded, distinct_stored: the distinct ones among them, summed over the launches.
    flops: 2·M·N·K of every tl.dot, masked or not: tiles as they are issued.
    """

    loaded: Counter = dataclasses.field(default_factory=Counter)
    stored: Counter = dataclasses.field(default_factory=Counter)
    distinct_loaded: Counter = dataclasses.field(default_factory=Counter)
    distinct_stored: Counter = dataclasses.field(default_factory=Counter)
    flops: int = 0
    launches: int = 0
    programs: int = 0


class _Footprint:
    """One launch's accesses in one direction: requested bytes by argument number, and a flag for every byte, by page."""

    def __init__(self):
        self.requested, self.pages = Counter(), defaultdict(lambda: np.zeros(2**_PAGE_BIT, np.uint8))

    def add(self, addresses: np.ndarray, width: int) -> None:
        """Args: addresses: (n,) uint64, numbered, multiples of width.   width: bytes of an element."""
        pages = addresses >> np.uint64(_PAGE_BIT)
        for page in np.unique(pages).tolist():
            offsets = addresses[pages == page] & np.uint64(2**_PAGE_BIT - 1)
            self.requested[_number(page)] += offsets.size * width
            flags = self.pages[page].view(f"u{width}")
            flags[offsets // np.uint64(width)] = np.iinfo(flags.dtype).max

    def distinct(self) -> Counter:
        """Bytes by argument number."""
        counts = Counter()
        for page, flags in self.pages.items():
            counts[_number(page)] += int(np.count_nonzero(flags))
        return counts


def _number(page: int) -> int:
    return page >> (_NUMBER_BIT - _PAGE_BIT)


class _Launch:
    """What one launch has asked for so far; argument number 0 is "other"."""

    def __init__(self):
        self.names, self.numbers = [OTHER], {}
        self.loads, self.stores = _Footprint(), _Footprint()
        self.flops = self.programs = 0

    def number_arguments(self, arguments: dict) -> None:
        """Args: arguments by name, as the kernel will see them: tensors in host memory, each an object of its own."""
        for name, tensor in (pair for item in arguments.items() for pair in _tensors(*item)):
            self.numbers[id(tensor)] = len(self.names)
            self.names.append(name)

    def numbered(self, tensor, handle: TensorHandle) -> None:
        """Puts the number of an argument into its address."""
        assert handle.data.item() <= _ADDRESS, f"address {handle.data.item():#x} takes more than {_NUMBER_BIT} bits"
        handle.data += np.uint64(self.numbers[id(tensor)] << _NUMBER_BIT)

    def access(self, pointers: TensorHandle, mask, *footprints: _Footprint) -> TensorHandle:
        """Counts the pointers where the mask (TensorHandle, array or None for all) is set; returns them without numbers."""
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data.ravel() if mask is None else pointers.data[np.asarray(mask.data)]
        misaligned = addresses[addresses % np.uint64(width) != 0]
        if misaligned.size:
            number, address = divmod(int(misaligned[0]), 2**_NUMBER_BIT)
            raise ValueError(f"{self.names[number]}: addresses must be multiples of {width} bytes, got {address:#x}")
        for footprint in footprints:
            footprint.add(addresses, width)
        return TensorHandle(pointers.data & _ADDRESS, pointers.dtype)

    def add_to(self, traffic: Traffic) -> None:
        for total, counts in (
            (traffic.loaded, self.loads.requested),
            (traffic.stored, self.stores.requested),
            (traffic.distinct_loaded, self.loads.distinct()),
            (traffic.distinct_stored, self.stores.distinct()),
        ):
            total.update({self.names[number]: count for number, count in counts.items()})
        traffic.flops += self.flops
        traffic.launches += 1
        traffic.programs += self.programs


def _tensors(name: str, argument):
    """(name, tensor) of every tensor in an argument."""
    if isinstance(argument, tuple):
        for index, element in enumerate(argument):
            yield from _tensors(f"{name}[{index}]", element)
    elif isinstance(argument, TensorDescriptor):
        yield name, argument.base
    elif hasattr(argument, "data_ptr"):
        yield name, argument


@contextlib.contextmanager
def counted():
    """
    Yields {kernel name: Traffic}, which grows with every launch within; a launch that raises is left out.

    Raises: RuntimeError (kernels are not interpreted, or another `counted` is counting); ValueError, as an InterpreterError of the
        launch, where an address is not a multiple of its element's size, on which a GPU faults.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("counted: kernels must run in triton's interpreter, got TRITON_INTERPRET unset")
    if not _counting.acquire(blocking=False):
        raise RuntimeError("counted: must not be entered twice, got a call within another")
    # Before the wrappers: a repair on top of them would be undone with them, and is made only once.
    repair_bf16()
    counts = {}
    try:
        with _wrapped(counts):
            yield counts
    finally:
        _counting.release()


@contextlib.contextmanager
def _wrapped(counts: dict):
    launch = _Launch()
    run, to_host, to_handle = GridExecutor.__call__, GridExecutor._init_args_hst, interpreter._implicit_cvt
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas
    dot, set_grid_idx = InterpreterBuilder.create_dot, InterpreterBuilder.set_grid_idx

    def __call__(self, *args, **kwargs):
        nonlocal launch
        launch = _Launch()
        run(self, *args, **kwargs)
        launch.add_to(counts.setdefault(self.fn.__name__, Traffic()))

    def _init_args_hst(self, args, kwargs):
        args, kwargs = to_host(self, args, kwargs)
        launch.number_arguments(dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return args, kwargs

    def _implicit_cvt(arg):
        converted = to_handle(arg)
        if hasattr(arg, "data_ptr"):
            launch.numbered(arg, converted.handle)
        return converted

    def count_program(self, *index):
        launch.programs += 1
        return set_grid_idx(self, *index)

    # Every other load and store of the interpreter, by block pointer or descriptor as well, ends in these two.
    def create_masked_load(self, pointers, mask, *rest, **options):
        return load(self, launch.access(pointers, mask, launch.loads), mask, *rest, **options)

    def create_masked_store(self, pointers, value, mask, *rest, **options):
        return store(self, launch.access(pointers, mask, launch.stores), value, mask, *rest, **options)

    def create_atomic_rmw(self, op, pointers, value, mask, *rest):
        return rmw(self, op, launch.access(pointers, mask, launch.loads, launch.stores), value, mask, *rest)

    def create_atomic_cas(self, pointers, *rest):
        return cas(self, launch.access(pointers, None, launch.loads, launch.stores), *rest)

    def create_dot(self, a, b, *rest):
        launch.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    with (
        patch.multiple(GridExecutor, __call__=__call__, _init_args_hst=_init_args_hst),
        patch.object(interpreter, "_implicit_cvt", _implicit_cvt),
        patch.multiple(
            InterpreterBuilder,
            set_grid_idx=count_program,
            create_masked_load=create_masked_load,
            create_masked_store=create_masked_store,
            create_atomic_rmw=create_atomic_rmw,
            create_atomic_cas=create_atomic_cas,
            create_dot=create_dot,
        ),
    ):
        yield
