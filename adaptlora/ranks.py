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
from .optimizer_state import entries, held_bytes, skip_empty_factors
from .rank_slots import Slot, Tail, factor_rows, is_prefix, is_range, parked_rows, rejoin, state_slot
from .state_layouts import Packed

FACTORS = ("lora_A", "lora_B")
_PARKED = "parked."  # in a module's state_dict


def uniform_rows(count: int, K: int, generator: torch.Generator | None) -> torch.Tensor:
    """`count` rows of PEFT's initial A: U(−1/√K, 1/√K), which is kaiming_uniform with a = √5; drawn on the CPU in float32."""
    bound = 1 / math.sqrt(K) if K else 0.0
    return torch.empty(count, K, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


@dataclasses.dataclass
class RankPlan:
    """A checked rank change. `commit` first moves what must move, which may run out of memory and then has changed nothing."""

    pair: "RankedPair"
    rank: int
    slots: list[Slot]
    grads: dict[str, Slot]
    in_place: bool  # every vector stays where it was, parked or not
    moves: bool  # another rank or another order

    def commit(self) -> None:
        _commit([self])

    def assign(self) -> None:
        """The pair takes its new stores, which must be there: this allocates nothing that could fail."""
        pair = self.pair
        if not self.in_place:
            pair._waiting = {}
            for kept in pair._tracked.values():
                kept.clear()
        for slot in self.slots:
            parameter = pair._parameters[slot.factor]
            if slot.optimizer is None:
                pair._stores[slot.factor] = slot.store
                grad = self.grads.get(slot.factor)
                _assign(
                    parameter, slot.active(self.rank), None if grad is None else factor_rows(slot.factor, grad.store)
                )
                continue
            kept, state = pair._tracked[slot.optimizer], slot.optimizer.state[parameter]
            if slot.packed is None:
                kept[slot.factor, slot.key], state[slot.key] = slot.store, slot.active(self.rank)
            else:
                kept[slot.factor, slot.key] = slot.tail
                state.update(slot.packed)


def _commit(plans: list[RankPlan], prepared=None) -> None:
    """All or none: every row lies in its new memory, and `prepared` was called and returned, before the first pair takes it."""
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
        for slot in plan.slots:
            if isinstance(slot.layout, Packed):
                slot.pack(plan.pair._parameters[slot.factor], plan.rank, plan.moves)
    if prepared is not None:
        prepared()
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
    The two factors of one LoRA module with a rank that can change at any time between optimizer steps; a subclass may have more.

    Args:
        in_features: K.   out_features: N.
        r: active rank R ≥ 0.
        capacity: rows allocated, at least r (default r); rows r … capacity − 1 start parked.
        generator: CPU generator for A's rows, U(−1/√K, 1/√K); B starts at zero.
        dtype, device: of both factors.
    Attributes: factor_names: of all its factors.
    Raises: ValueError (r < 0, capacity < r).
    """

    factor_names: tuple[str, ...] = FACTORS

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
        # parked state whose active rows no tracked optimizer has yet, by factor and key
        self._waiting: dict[tuple[str, str], Tail] = {}
        self._stores = {}
        for name in self.factor_names:
            width = {"lora_A": in_features, "lora_B": out_features}.get(name, 1)
            drawn, like = self.drawn_rows(name, capacity, width, generator), {"device": device, "dtype": dtype}
            self._stores[name] = torch.zeros(capacity, width, **like) if drawn is None else drawn.to(**like)
            setattr(self, name, nn.Parameter(factor_rows(name, self._stores[name][:r])))

    @staticmethod
    def drawn_rows(factor: str, count: int, width: int, generator: torch.Generator | None) -> torch.Tensor | None:
        """(count, width): what vectors that never were there begin with, drawn on the CPU in float32; None for zeros."""
        return uniform_rows(count, width, generator) if factor == "lora_A" else None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def capacity(self) -> int:
        return self._data_slot("lora_A").store.shape[0]

    def factors(self) -> dict[str, torch.Tensor]:
        """All factors by name, without gradient: views."""
        return {name: getattr(self, name).detach() for name in self.factor_names}

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A (capacity, K), B (N, capacity)): all vectors, the parked ones behind the active ones; views, without gradient."""
        lora_A, lora_B, *_ = self.whole_rows()
        return lora_A, lora_B.t()

    def whole_rows(self) -> list[torch.Tensor]:
        """
        (capacity, ·) of every factor, rank-major: all vectors, the parked ones behind the active ones; without gradient, and views but
        in a compiled graph.
        """
        if torch.compiler.is_compiling():
            # What is traced cannot compare addresses.
            rows = {name: factor_rows(name, self._parameters[name].detach()) for name in self.factor_names}
            return [torch.cat([active, self._stores[name][self.rank :]]) for name, active in rows.items()]
        stores = []
        for name in self.factor_names:
            store = self._stores[name]
            # Called for every module in every step: what `_data_slot` checks more closely is nearly always so.
            same = self._parameters[name].data_ptr() == store.data_ptr() and self._parameters[name].dtype == store.dtype
            stores.append(store if same else self._data_slot(name).store)
        return stores

    def extra_repr(self) -> str:
        return f"K={self.lora_A.shape[1]}, N={self.lora_B.shape[0]}, rank={self.rank}, capacity={self.capacity}"

    def track(self, optimizer: torch.optim.Optimizer) -> None:
        """
        Make the state that `optimizer` keeps for the two factors follow every rank change. Held weakly.

        State shaped like its parameter follows bit for bit, and so does Adafactor's mean of each rank, while its means over the ranks
        stay as they are. Quantised state is packed anew: the same codes where the block is the same. See `register_optimizer_state`.
        """
        skip_empty_factors(optimizer)
        self._tracked.setdefault(optimizer, {})

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self._tracked)

    def _data_slot(self, name: str) -> Slot:
        rows, store = factor_rows(name, self._parameters[name].data), self._stores[name]
        if not is_prefix(rows, store):
            store = rejoin(rows, store[rows.shape[0] :])
        return Slot(name, store)

    def _states(self, name: str, tracked=None):
        """(optimizer, what is kept of its state, key, value, layout) of all state of a factor that has rank rows."""
        parameter = self._parameters[name]
        for optimizer, kept in (self._tracked if tracked is None else tracked).items():
            for key, value, layout in entries(optimizer, name, parameter):
                if layout is not None:
                    yield optimizer, kept, key, value, layout

    def _kept(self, kept: dict, name: str, key: str) -> torch.Tensor | Tail | None:
        """What is kept of one state tensor. Parked rows that waited for it belong to its optimizer from now on."""
        place = name, key
        if self._waiting and place in self._waiting and place not in kept:
            kept[place] = self._waiting.pop(place)
        return kept.get(place)

    def _state_slots(self, name: str, data: torch.Tensor):
        parameter, rank = self._parameters[name], self.rank
        for optimizer, kept, key, value, layout in self._states(name):
            place = self._kept(kept, name, key)
            slot = state_slot(name, optimizer, key, value, layout, place, optimizer.state[parameter], rank)
            if isinstance(place, Tail) and rank < place.start <= slot.store.shape[0]:
                # Ranks parked before the optimizer had any state, in front of those that had some before.
                begin = slot.begin(parameter, data[rank : place.start])
                if begin is not None:
                    slot.store[rank : place.start].copy_(begin)
            yield slot

    def check_states(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Raises: TypeError if a tracked optimizer, or the one given, keeps state that could not follow a rank change."""
        for name in self.factor_names:
            for _ in self._states(name, None if optimizer is None else {optimizer: {}}):
                pass

    def plan(self, rank: int, *, order=None, compact: bool = False, generator=None) -> RankPlan:
        """
        Check a change to `rank` active vectors and list what must move; nothing changes before `RankPlan.commit`.

        Args:
            rank: new R ≥ 0. Up to the capacity, parked vectors come back as they left; beyond it new rows are `drawn_rows`, A's from
                `generator` and B's zero, so that the layer's output does not change.
            order: permutation of range(current rank), applied first: vector order[i] becomes vector i.
            compact: leave nothing parked and give the memory back.
        Raises: ValueError (rank, order), TypeError (an optimizer's state that cannot follow).
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank change: rank must be an integer ≥ 0, got {rank!r}")
        if order is not None and sorted(order) != list(range(self.rank)):
            raise ValueError(f"rank change: order must be a permutation of range({self.rank}), got {list(order)}")
        order = list(range(self.rank)) if order is None else list(order)

        lists: dict[tuple[int, int], list[int]] = {}
        # A store that must grow takes the whole capacity at once, so that an optimizer's state, which begins with the active rows
        # alone, is moved once and not at every step up. Packed state is packed anew, whatever room it had.
        capacity = max(rank, self.capacity)

        def rows_of(held: int, room: int) -> list[int]:
            if (held, room) not in lists:
                size = room if rank > held else held
                rows = [*order, *range(len(order), held), *[-1] * (size - held)]
                lists[held, room] = rows[:rank] if compact else rows
            return lists[held, room]

        slots, grads = [], {}
        for name in self.factor_names:
            data = self._data_slot(name)
            values = data.store
            for slot in (data, *self._state_slots(name, values)):
                held, width = slot.store.shape
                packed = isinstance(slot.layout, Packed)
                rows = rows_of(held, rank if packed else capacity)
                if rank > held and slot.optimizer is None:
                    slot.drawn = self.drawn_rows(name, rank - held, width, generator)
                if len(rows) > held and slot.optimizer is not None:
                    slot.drawn = slot.begin(self._parameters[name], values[held:], len(rows) - held, data.drawn)
                slot.choose(rows, compact and not packed)
                slots.append(slot)
            grad = self._parameters[name].grad
            if grad is not None:
                grads[name] = Slot(name, factor_rows(name, grad.detach()))
                # A gradient has no parked rows to keep, and what a narrower one leaves behind is freed at once.
                grads[name].choose(rows_of(len(order), capacity)[:rank], compact=True)
        ordered = is_range(order)
        moves = rank != self.rank or not ordered
        return RankPlan(self, rank, slots, grads, in_place=not compact and ordered, moves=moves)

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
        """
        Bytes really held: {"factors", "gradients", "optimizer"}, parked rows included; of an optimizer all that has an entry for
        each rank, element or feature.
        """
        held = {"factors": 0, "gradients": 0, "optimizer": 0}
        for name in self.factor_names:
            grad = getattr(self, name).grad
            held["factors"] += self._data_slot(name).store.untyped_storage().nbytes()
            held["gradients"] += 0 if grad is None else grad.untyped_storage().nbytes()
            held["optimizer"] += sum(self._state_bytes(name, optimizer) for optimizer in self._tracked)
        return held

    def _state_bytes(self, name: str, optimizer: torch.optim.Optimizer) -> int:
        parameter, kept = self._parameters[name], self._tracked[optimizer]
        state, features = optimizer.state.get(parameter, {}), factor_rows(name, parameter).shape[1]
        by_key, parked = {}, 0
        for key, value, layout in entries(optimizer, name, parameter):
            place = self._kept(kept, name, key)
            if isinstance(layout, Packed):
                tail = parked_rows(place, self.rank)
                parked += 0 if tail is None else tail.nbytes
                by_key.update({k: held_bytes(state[k]) for k in layout.keys})
            elif layout is not None:
                slot = state_slot(name, optimizer, key, value, layout, place, state, self.rank)
                by_key[key] = held_bytes(slot.store)
            elif isinstance(value, torch.Tensor) and features in value.shape:
                by_key.setdefault(key, held_bytes(value))
        return sum(by_key.values()) + parked

    def parked(self) -> dict[str, torch.Tensor]:
        """
        Copies of what is parked, rank-major: {"lora_A": (capacity − R, K), "lora_B": (capacity − R, N), "lora_A.exp_avg": …};
        empty if nothing is. Of state there may be fewer rows, and those of quantised state are float32. With the factors and the
        optimizer's own state this is all that a pair holds.
        """
        found = {}
        for name in self.factor_names:
            store = self._data_slot(name).store
            if store.shape[0] > self.rank:
                found[name] = store[self.rank :].clone()
            kept_states = {(name, key): self._kept(kept, name, key) for _, kept, key, *_ in self._states(name)}
            for (_, key), kept in {**self._waiting_of(name), **kept_states}.items():
                rows = parked_rows(kept, self.rank)
                if rows is not None:
                    found[f"{name}.{key}"] = rows.clone()
        return found

    def _waiting_of(self, name: str) -> dict[tuple[str, str], Tail]:
        return {place: tail for place, tail in self._waiting.items() if place[0] == name}

    def check_parked(self, parked: dict[str, torch.Tensor]) -> None:
        """Raises: ValueError if `parked` is not what `parked()` returns for a pair of these sizes."""
        if parked and not {*self.factor_names} <= parked.keys():
            raise ValueError(f"parked rows must hold {' and '.join(self.factor_names)}, got {sorted(parked)}")
        for key, rows in parked.items():
            count, (name, _, state) = parked["lora_A"].shape[0], key.partition(".")
            if state and name in self.factor_names:
                if rows.dim() != 2 or rows.shape[0] > count:
                    raise ValueError(
                        f"parked rows of {key} must be at most {count} rows, got shape {tuple(rows.shape)}"
                    )
                continue
            expected = (count, self._stores[name].shape[1]) if name in self.factor_names else None
            if tuple(rows.shape) != expected:
                raise ValueError(f"parked rows of {key} must have shape {expected}, got {tuple(rows.shape)}")

    def park(self, parked: dict[str, torch.Tensor]) -> None:
        """
        Put rows from `parked()` behind the active ones, in the place of whatever was there. The state among them goes to the tracked
        optimizer that has the active rows of it, now or later.  Raises: as `check_parked`; nothing has changed then.
        """
        self.check_parked(parked)
        for name in self.factor_names:
            rows = factor_rows(name, getattr(self, name).data)
            self._stores[name] = torch.cat([rows, parked[name].to(rows)]) if parked else rows
            getattr(self, name).data = factor_rows(name, self._stores[name][: self.rank])
        # The active rows of a state's store are the optimizer's own, wherever it keeps them.
        states = {
            tuple(key.split(".", 1)): Tail(self.rank, rows)
            for key, rows in parked.items()
            if key not in self.factor_names
        }
        for stores in self._tracked.values():
            stores.clear()
        self._waiting = states

    def statistics(self) -> dict[str, torch.Tensor]:
        """
        What a method keeps of each element beside the factors and follows the ranks, rank-major: {"lora_A.mean": (R, K), …}, the live
        tensors; empty if nothing.
        """
        return {}

    def check_statistics(self, statistics: dict[str, torch.Tensor], rank: int) -> None:
        """Raises: ValueError if `statistics` is not what `statistics()` returns for a pair of this rank and these sizes."""
        if statistics:
            raise ValueError(f"statistics: there must be none, got {sorted(statistics)}")

    def take_statistics(self, statistics: dict[str, torch.Tensor]) -> None:
        """Inverse of `statistics`; copies.  Raises: as `check_statistics`; nothing has changed then."""
        self.check_statistics(statistics, self.rank)

    def _apply(self, fn, recurse=True):
        stores = {name: self._data_slot(name).store for name in self.factor_names}
        super()._apply(fn, recurse)
        # The parked rows move with the active ones, and the parameters stay views of the store.
        self._relink({name: fn(store) for name, store in stores.items()})
        return self

    def _relink(self, stores: dict[str, torch.Tensor]) -> None:
        for name, store in stores.items():
            self._stores[name] = store
            getattr(self, name).data = factor_rows(name, store[: self.rank])

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
        self._relink({name: self._data_slot(name).store for name in self.factor_names})


def commit_ranks(
    pairs: dict[str, RankedPair],
    ranks: dict[str, int],
    *,
    orders: dict[str, list[int]] | None = None,
    compact: bool = False,
    generator=None,
    prepared=None,
) -> None:
    """
    Change the rank of many pairs, all or none: plans are made and rows moved before the first pair changes.

    Args:
        orders: of `plan`, for pairs whose vectors that stay are not the first ones.
        prepared: called just before that, when nothing can fail any more; what it raises calls the change off.
    Raises: ValueError, TypeError (naming the module); then ranks, weights and optimizer state are as they were.
    """
    plans, orders = [], orders or {}
    for name, rank in ranks.items():
        if rank == pairs[name].rank and name not in orders and not compact:
            continue
        try:
            plans.append(pairs[name].plan(rank, order=orders.get(name), compact=compact, generator=generator))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    _commit(plans, prepared)
