"""RankedPair: LoRA factors in rank-major memory whose rank changes physically, optimizer state included.

lora_A (R, K) and lora_B (N, R) have PEFT's shapes. In memory both are rows of ranks: A is a view of the first R rows of a
(capacity, K) store, B the transpose of the first R rows of a (capacity, N) store. Rows R … capacity − 1 are *parked*: they keep
their values and optimizer state and take no step. To narrow or to grow within the capacity re-narrows views and copies nothing
(but gradients, which have no parked rows). What must move, in however many modules, moves by one `rank_gather` for each device.
"""

import dataclasses
import math
import weakref

import torch
from torch import nn

from .ops.rank_gather import gather_rows

FACTORS = ("lora_A", "lora_B")
_PARKED = "parked."  # in a module's state_dict


def _rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rank-major view (R, ·) of a tensor shaped like the factor `name`; its own inverse."""
    return tensor if name == "lora_A" else tensor.t()


def _is_range(rows: list[int]) -> bool:
    """Whether `rows` is 0, 1, …, len(rows) − 1."""
    return all(row == i for i, row in enumerate(rows))


def _is_prefix(rows: torch.Tensor, store: torch.Tensor) -> bool:
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


def uniform_rows(count: int, K: int, generator: torch.Generator | None) -> torch.Tensor:
    """`count` rows of PEFT's initial A: U(−1/√K, 1/√K), which is kaiming_uniform with a = √5; drawn on the CPU in float32."""
    bound = 1 / math.sqrt(K) if K else 0.0
    return torch.empty(count, K, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


@dataclasses.dataclass
class _Slot:
    """One tensor that has rank rows: a factor, its gradient, or one optimizer state tensor of it."""

    factor: str
    store: torch.Tensor  # active and parked, (capacity, ·)
    optimizer: torch.optim.Optimizer | None = None
    key: str | None = None
    rows: list[int] | None = None  # of `store`, that the new store is made of (−1: zeros); None: `store` itself will do
    drawn: torch.Tensor | None = None  # values of the new store's last rows

    def choose(self, rows: list[int], compact: bool = False) -> None:
        """Plan the new store: a view of the old one if `rows` are its first and `compact` would free nothing more."""
        store, count = self.store, len(rows)
        frees = compact and store.untyped_storage().nbytes() > count * store.shape[1] * store.element_size()
        if frees or not _is_range(rows):
            self.rows = rows
        elif count < store.shape[0]:
            self.store = store[:count]


@dataclasses.dataclass
class RankPlan:
    """A checked rank change. `commit` first moves what must move, which may run out of memory and then has changed nothing."""

    pair: "RankedPair"
    rank: int
    slots: list[_Slot]
    grads: dict[str, _Slot]
    in_place: bool  # every vector stays where it was, parked or not

    def commit(self) -> None:
        _commit([self])

    def assign(self) -> None:
        """The pair takes its new stores, which must be there: this allocates nothing that could fail."""
        pair = self.pair
        if not self.in_place:
            pair._waiting = {}
        for slot in self.slots:
            store = slot.store
            active = _rows(slot.factor, store if store.shape[0] == self.rank else store[: self.rank])
            parameter = pair._parameters[slot.factor]
            if slot.optimizer is None:
                pair._stores[slot.factor] = slot.store
                grad = self.grads.get(slot.factor)
                _assign(parameter, active, None if grad is None else _rows(slot.factor, grad.store))
            else:
                pair._tracked[slot.optimizer][slot.factor, slot.key] = slot.store
                slot.optimizer.state[parameter][slot.key] = active


def _commit(plans: list[RankPlan]) -> None:
    """All or none: every row lies in its new memory before the first pair takes it."""
    moving = {}
    for plan in plans:
        for slot in (*plan.slots, *plan.grads.values()):
            if slot.rows is not None:
                moving.setdefault(slot.store.device, []).append(slot)
    for slots in moving.values():
        stores = gather_rows([slot.store for slot in slots], [slot.rows for slot in slots])
        for slot, store in zip(slots, stores, strict=True):
            if slot.drawn is not None:
                store[-len(slot.drawn) :].copy_(slot.drawn)
            slot.store, slot.rows = store, None
    for plan in plans:
        plan.assign()


def _assign(parameter: nn.Parameter, data: torch.Tensor, grad: torch.Tensor | None) -> None:
    parameter.grad = None
    if parameter.shape != data.shape:
        # A graph that is still alive keeps a gradient accumulator of the old shape; torch drops it only with a change of dtype.
        other = torch.float16 if data.dtype != torch.float16 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    parameter.grad = grad


class RankedPair(nn.Module):
    """
    The two factors of one LoRA module with a rank that can change at any time between optimizer steps.

    Args:
        in_features: K.   out_features: N.
        r: active rank R ≥ 0.
        capacity: rows allocated, at least r (default r); rows r … capacity − 1 start parked.
        generator: CPU generator for A's rows, U(−1/√K, 1/√K); B starts at zero.
        dtype, device: of both factors.
    Raises: ValueError (r < 0, capacity < r).
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, *, capacity=None, generator=None, dtype=None, device=None
    ):
        super().__init__()
        capacity = r if capacity is None else capacity
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if r < 0:
            raise ValueError(f"RankedPair: r must be ≥ 0, got {r}")
        if capacity < r:
            raise ValueError(f"RankedPair: capacity must be at least r={r}, got {capacity}")
        self._tracked = weakref.WeakKeyDictionary()
        self._waiting: dict[
            tuple[str, str], torch.Tensor
        ] = {}  # stores for the state of an optimizer that is not tracked yet
        self._stores = {
            "lora_A": uniform_rows(capacity, in_features, generator).to(device=device, dtype=dtype),
            "lora_B": torch.zeros(capacity, out_features, device=device, dtype=dtype),
        }
        for name in FACTORS:
            setattr(self, name, nn.Parameter(_rows(name, self._stores[name][:r])))

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def capacity(self) -> int:
        return self._data_slot("lora_A").store.shape[0]

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A (capacity, K), B (N, capacity)): all vectors, the parked ones behind the active ones; views, without gradient."""
        stores = []
        for name in FACTORS:
            store = self._stores[name]
            # Called for every module in every step: what `_data_slot` checks more closely is nearly always so.
            same = self._parameters[name].data_ptr() == store.data_ptr() and self._parameters[name].dtype == store.dtype
            stores.append(store if same else self._data_slot(name).store)
        return stores[0], stores[1].t()

    def extra_repr(self) -> str:
        return f"K={self.lora_A.shape[1]}, N={self.lora_B.shape[0]}, rank={self.rank}, capacity={self.capacity}"

    def track(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the state that `optimizer` keeps for the two factors follow every rank change. Held weakly."""
        self._tracked.setdefault(optimizer, {}).update(self._waiting)
        self._waiting = {}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self._tracked)

    def _data_slot(self, name: str) -> _Slot:
        rows, store = _rows(name, self._parameters[name].data), self._stores[name]
        if not _is_prefix(rows, store):
            store = _rejoin(rows, store)
        return _Slot(name, store)

    def _state_slots(self, name: str):
        parameter = self._parameters[name]
        shape = parameter.shape
        for optimizer, stores in self._tracked.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor):
                    continue
                if value.shape != shape:
                    if value.numel() == 1 and value.dim() <= 1:
                        continue
                    raise TypeError(
                        f"rank change: optimizer state must be shaped like its parameter, {tuple(shape)}, to follow the "
                        f"rank; {type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)}"
                    )
                rows = _rows(name, value)
                store = stores.get((name, key), rows)
                yield _Slot(name, store if _is_prefix(rows, store) else _rejoin(rows, store), optimizer, key)

    def check_states(self) -> None:
        """Raises: TypeError if a tracked optimizer keeps state that could not follow a rank change."""
        for name in FACTORS:
            for _ in self._state_slots(name):
                pass

    def plan(self, rank: int, *, order=None, compact: bool = False, generator=None) -> RankPlan:
        """
        Check a change to `rank` active vectors and list what must move; nothing changes before `RankPlan.commit`.

        Args:
            rank: new R ≥ 0. Up to the capacity, parked vectors come back as they left; beyond it new rows of A are drawn
                from `generator` and new rows of B are zero, so that the layer's output does not change.
            order: permutation of range(current rank), applied first: vector order[i] becomes vector i.
            compact: leave nothing parked and give the memory back.
        Raises: ValueError (rank, order), TypeError (an optimizer's state that cannot follow).
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank change: rank must be an integer ≥ 0, got {rank!r}")
        if order is not None and sorted(order) != list(range(self.rank)):
            raise ValueError(f"rank change: order must be a permutation of range({self.rank}), got {list(order)}")
        order = list(range(self.rank)) if order is None else list(order)

        lists: dict[int, list[int]] = {}
        capacity = self.capacity

        def rows_of(held: int) -> list[int]:
            if held not in lists:
                # A store that must grow takes the whole capacity at once, so that an optimizer's state, which begins with the
                # active rows alone, is moved once and not at every step up.
                size = max(rank, capacity) if rank > held else held
                rows = [*order, *range(len(order), held), *[-1] * (size - held)]
                lists[held] = rows[:rank] if compact else rows
            return lists[held]

        slots, grads = [], {}
        for name in FACTORS:
            for slot in (self._data_slot(name), *self._state_slots(name)):
                held, width = slot.store.shape
                slot.choose(rows_of(held), compact)
                if rank > held and name == "lora_A" and slot.optimizer is None:
                    slot.drawn = uniform_rows(rank - held, width, generator)
                slots.append(slot)
            grad = self._parameters[name].grad
            if grad is not None:
                grads[name] = _Slot(name, _rows(name, grad.detach()))
                # A gradient has no parked rows to keep, and what a narrower one leaves behind is freed at once.
                grads[name].choose(rows_of(len(order))[:rank], compact=True)
        return RankPlan(self, rank, slots, grads, in_place=not compact and _is_range(order))

    def narrow(self, rank: int) -> None:
        """Keep the first `rank` vectors active and park the others: views only, no copy.  Raises: ValueError (rank > R)."""
        if rank > self.rank:
            raise ValueError(f"narrow: rank must be at most the active rank {self.rank}, got {rank}")
        self.plan(rank).commit()

    def grow(self, rank: int, generator=None) -> None:
        """Make `rank` vectors active: parked ones first, as they left, then new ones (see `plan`).  Raises: ValueError (rank < R)."""
        if rank < self.rank:
            raise ValueError(f"grow: rank must be at least the active rank {self.rank}, got {rank}")
        self.plan(rank, generator=generator).commit()

    def permute(self, order) -> None:
        """Reorder the active vectors, state included: vector order[i] becomes vector i.  Raises: ValueError (not a permutation)."""
        self.plan(self.rank, order=order).commit()

    def compact(self) -> None:
        """Drop the parked vectors and give their memory back, optimizer state included."""
        self.plan(self.rank, compact=True).commit()

    def nbytes(self) -> dict[str, int]:
        """Bytes really held: {"factors", "gradients", "optimizer"}, parked rows included."""
        held = {"factors": 0, "gradients": 0, "optimizer": 0}
        for name in FACTORS:
            grad = getattr(self, name).grad
            held["factors"] += self._data_slot(name).store.untyped_storage().nbytes()
            held["gradients"] += 0 if grad is None else grad.untyped_storage().nbytes()
            held["optimizer"] += sum(slot.store.untyped_storage().nbytes() for slot in self._state_slots(name))
        return held

    def parked(self) -> dict[str, torch.Tensor]:
        """
        Copies of what is parked, rank-major: {"lora_A": (capacity − R, K), "lora_B": (capacity − R, N), "lora_A.exp_avg": …};
        empty if nothing is. With the factors and the optimizer's own state this is all that a pair holds.
        """
        found = {}
        for name in FACTORS:
            for slot in (self._data_slot(name), *self._state_slots(name)):
                if slot.store.shape[0] > self.rank:
                    key = name if slot.key is None else f"{name}.{slot.key}"
                    found[key] = slot.store[self.rank :].clone()
        found.update({f"{name}.{key}": store[self.rank :].clone() for (name, key), store in self._waiting.items()})
        return found

    def check_parked(self, parked: dict[str, torch.Tensor]) -> None:
        """Raises: ValueError if `parked` is not what `parked()` returns for a pair of these sizes."""
        if parked and not {*FACTORS} <= parked.keys():
            raise ValueError(f"parked rows must hold {FACTORS[0]} and {FACTORS[1]}, got {sorted(parked)}")
        for key, rows in parked.items():
            name = key.split(".")[0]
            expected = (parked[FACTORS[0]].shape[0], self._stores[name].shape[1]) if name in FACTORS else None
            if tuple(rows.shape) != expected:
                raise ValueError(f"parked rows of {key} must have shape {expected}, got {tuple(rows.shape)}")

    def park(self, parked: dict[str, torch.Tensor]) -> None:
        """
        Put rows from `parked()` behind the active ones, in the place of whatever was there. The state among them goes to the tracked
        optimizers, or to the next one that is.  Raises: as `check_parked`; nothing has changed then.
        """
        self.check_parked(parked)
        for name in FACTORS:
            rows = _rows(name, getattr(self, name).data)
            self._stores[name] = torch.cat([rows, parked[name].to(rows)]) if parked else rows
            getattr(self, name).data = _rows(name, self._stores[name][: self.rank])
        # The active rows of a state's store are the optimizer's own, wherever it keeps them.
        states = {
            tuple(key.split(".", 1)): torch.cat([rows.new_zeros(self.rank, rows.shape[1]), rows])
            for key, rows in parked.items()
            if key not in FACTORS
        }
        for stores in self._tracked.values():
            stores.clear()
            stores.update(states)
        self._waiting = {} if self._tracked else states

    def _apply(self, fn, recurse=True):
        stores = {name: self._data_slot(name).store for name in FACTORS}
        super()._apply(fn, recurse)
        # The parked rows move with the active ones, and the parameters stay views of the store.
        self._relink({name: fn(store) for name, store in stores.items()})
        return self

    def _relink(self, stores: dict[str, torch.Tensor]) -> None:
        for name, store in stores.items():
            self._stores[name] = store
            getattr(self, name).data = _rows(name, store[: self.rank])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{_PARKED}{key}": rows for key, rows in self.parked().items()})

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        start = prefix + _PARKED
        parked = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        incoming = state_dict.get(prefix + "lora_A")
        fits = isinstance(incoming, torch.Tensor) and incoming.shape[1:] == self.lora_A.shape[1:]
        if fits and incoming.shape[0] != self.rank:
            self.plan(incoming.shape[0], compact=True).commit()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if fits and (parked or self.capacity > self.rank):
            # What was parked belonged to the values that are replaced here.
            self.park(parked)

    def __getstate__(self):
        # Copies and pickles take the factors and the parked rows; an optimizer belongs to the original.
        return {**self.__dict__, "_tracked": None, "_waiting": {}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._tracked = weakref.WeakKeyDictionary()
        self._relink({name: self._data_slot(name).store for name in FACTORS})


def _rejoin(rows: torch.Tensor, store: torch.Tensor) -> torch.Tensor:
    """Store whose first rows are `rows`, found in other memory than the store's, with the store's parked rows behind them."""
    parked = store[rows.shape[0] :]
    if parked.shape[0] == 0 or parked.shape[1] != rows.shape[1]:
        return rows
    return torch.cat([rows, parked.to(rows)])


def commit_ranks(pairs: dict[str, RankedPair], ranks: dict[str, int], *, compact: bool = False, generator=None) -> None:
    """Change the rank of many pairs, all or none: plans are made and rows moved before the first pair changes.

    Raises: ValueError, TypeError (naming the module); then ranks, weights and optimizer state are as they were.
    """
    plans = []
    for name, rank in ranks.items():
        if rank == pairs[name].rank and not compact:
            continue
        try:
            plans.append(pairs[name].plan(rank, compact=compact, generator=generator))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    _commit(plans)
