"""Tensors with one row for each rank, wherever their rank dimension is: views as rows, stores with parked rows, and how they move."""

import dataclasses

import torch

from .optimizer_state import fresh_value
from .state_layouts import PARAMETER, RANK_DIM, Packed, Rows


def to_rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Rank-major (R, ·) of a tensor whose dimension `dim` runs over the ranks; a view wherever one can be."""
    if tensor.dim() == 2:
        return tensor if dim == 0 else tensor.t()
    return tensor[:, None] if tensor.dim() == 1 else tensor.movedim(dim, 0).flatten(1)


def from_rows(rows: torch.Tensor, dim: int, others: torch.Size | None) -> torch.Tensor:
    """The view of `rows` that `to_rows` was given, with the sizes `others` in all other dimensions, or of two dimensions."""
    if others is None:
        return rows if dim == 0 else rows.t()
    return rows.squeeze(1) if not others else rows.unflatten(1, others).movedim(0, dim)


def factor_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rank-major view (R, ·) of a tensor shaped like the factor `name`; its own inverse."""
    return to_rows(tensor, RANK_DIM[name])


def is_range(rows: list[int]) -> bool:
    """Whether `rows` is 0, 1, …, len(rows) − 1."""
    return rows == list(range(len(rows)))


def is_prefix(rows: torch.Tensor, store: torch.Tensor) -> bool:
    """Whether `rows` still are the first rows of `store` in memory: `module.to()` and `load_state_dict` can part them."""
    if rows is store:
        return True
    if rows.dtype != store.dtype or rows.device != store.device or rows.shape[0] > store.shape[0]:
        return False
    if rows.numel():
        return rows.data_ptr() == store.data_ptr()
    # An empty tensor has no address of its own.
    same_memory = rows.untyped_storage().data_ptr() == store.untyped_storage().data_ptr()
    return same_memory and rows.storage_offset() == store.storage_offset()


def rejoin(rows: torch.Tensor, parked: torch.Tensor | None) -> torch.Tensor:
    """Store whose first rows are `rows`, found in other memory than the store's, with the store's parked rows behind them."""
    if parked is None or parked.shape[0] == 0 or parked.shape[1] != rows.shape[1]:
        return rows
    return torch.cat([rows, parked.to(rows)])


@dataclasses.dataclass(frozen=True)
class Tail:
    """Rows start, start + 1, … of a store whose first rows are the optimizer's own, elsewhere or packed."""

    start: int
    rows: torch.Tensor

    def after(self, rank: int) -> torch.Tensor:
        if rank < self.start:
            return torch.cat([self.rows.new_zeros(self.start - rank, self.rows.shape[1]), self.rows])
        return self.rows[rank - self.start :]


def parked_rows(kept: torch.Tensor | Tail | None, rank: int) -> torch.Tensor | None:
    """What lies behind the first `rank` rows of what a pair keeps for one state tensor; None if nothing does."""
    if kept is None:
        return None
    rows = kept.after(rank) if isinstance(kept, Tail) else kept[rank:]
    return rows if rows.shape[0] else None


@dataclasses.dataclass
class Slot:
    """One tensor that has rank rows: a factor, its gradient, or one optimizer state tensor of it."""

    factor: str
    store: torch.Tensor  # active and parked, (capacity, ·)
    optimizer: torch.optim.Optimizer | None = None
    key: str | None = None
    layout: Rows | Packed | None = None
    others: torch.Size | None = None  # sizes of the dimensions that are not the ranks', unless there is one
    rows: list[int] | None = None  # of `store`, that the new store is made of (−1: zeros); None: `store` itself will do
    drawn: torch.Tensor | None = None  # values of the new store's last rows
    packed: dict[str, torch.Tensor] | None = None  # new entries of a packed state
    tail: Tail | None = None  # its parked rows

    def choose(self, rows: list[int], compact: bool = False) -> None:
        """Plan the new store: a view of the old one if `rows` are its first and `compact` would free nothing more."""
        store, count = self.store, len(rows)
        frees = compact and store.untyped_storage().nbytes() > count * store.shape[1] * store.element_size()
        if frees or not is_range(rows):
            self.rows = rows
        elif count < store.shape[0]:
            self.store = store[:count]

    def active(self, rank: int) -> torch.Tensor:
        """The first `rank` rows, in the shape of the tensor that they are."""
        rows = self.store if self.store.shape[0] == rank else self.store[:rank]
        return factor_rows(self.factor, rows) if self.layout is None else from_rows(rows, self.layout.dim, self.others)

    def pack(self, parameter: torch.nn.Parameter, rank: int, moves: bool) -> None:
        """Make what a packed state becomes, beside the one that is."""
        state = self.optimizer.state[parameter]
        self.packed = self.layout.pack(state, self.key, self.active(rank)) if moves else {}
        parked = parked_rows(self.store, rank)
        self.tail = None if parked is None else Tail(rank, parked.clone())

    def begin(
        self,
        parameter: torch.nn.Parameter,
        values: torch.Tensor,
        new: int | None = None,
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        What `new` rows that were never there (default: all of `values`) begin with, where that is not zero: as the layout says.

        values: the factor's rows at their place, as far as it has any.   drawn: those that it gets behind them, None: zeros.
        """
        fresh, new = getattr(self.layout, "fresh", 0.0), len(values) if new is None else new
        if not fresh:
            return None
        if fresh == PARAMETER:
            rows, behind = values[:new], new - len(values)
            if behind <= 0:
                return rows.clone()
            return torch.cat(
                [rows, rows.new_zeros(behind, rows.shape[1]) if drawn is None else drawn[:behind].to(rows)]
            )
        return self.store.new_full((new, self.store.shape[1]), fresh_value(self.optimizer, parameter, self.layout))


def state_slot(factor: str, optimizer, key: str, value, layout: Rows | Packed, kept, state: dict, rank: int) -> Slot:
    """The slot of one state tensor; `kept` is what the pair keeps for it. Packed numbers are unpacked into a store of their own."""
    dim = layout.dim
    if isinstance(layout, Packed):
        value = layout.unpack(state, key)
        if not 0 <= dim < value.dim() or value.shape[dim] != rank:
            raise TypeError(
                f"rank change: {type(optimizer).__name__}'s {key!r} must have {rank} entries in dimension {dim} when it is unpacked, "
                f"got shape {tuple(value.shape)}"
            )
    rows = to_rows(value, dim)
    if not isinstance(kept, torch.Tensor) or not is_prefix(rows, kept):
        kept = rejoin(rows, parked_rows(kept, rank))
    others = None if value.dim() == 2 else value.shape[:dim] + value.shape[dim + 1 :]
    return Slot(factor, kept, optimizer, key, layout, others)
