"""Everything that the next optimizer steps depend on, out of a training loop and back into one."""

import torch

from .adapter import _unwrapped
from .config_state import check_config_state, config_state
from .distributed.sharding import (
    decode_parts,
    encode_parts,
    gathered,
    is_sharded,
    reshard,
    sharded_like,
)
from .encoding import decode, encode
from .random_state import random_state, seed_from, set_random_state
from .stored_optimizer import StoredOptimizer, class_name


def the_optimizer(op: str, optimizer) -> torch.optim.Optimizer:
    """The one that makes the steps.  Raises: TypeError (no optimizer, or a wrapper with state of its own)."""
    *around, inner = _unwrapped(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"{op}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if around:
        raise TypeError(
            f"{op}: optimizer must keep all its state itself, got a {type(around[0]).__name__} around a "
            f"{type(inner).__name__}, with state of its own"
        )
    return inner


class TrainingState:
    """
    A loop's adapter, optimizers, and what else it has of a scheduler and a GradScaler, as one thing that is saved and restored.

    Held beside them: parameters that an optimizer trains and the adapter does not know; and, if `own`, what belongs to a process: the
    model's persistent buffers (running statistics) and the random number generators of torch, Python and NumPy. Gradients are not:
    between two steps there are none. Among several processes (`adapter.processes`) all call the same methods at the same time, and an
    error of one is raised by all. What every process has whole is that of process 0 where it is stored; random states are those of each.

    Raises: TypeError (no optimizer), ValueError (an adapter that is merged or detached).
    """

    def __init__(self, op: str, adapter, optimizers: list, scheduler=None, scaler=None, *, own: bool = True):
        adapter.check_trainable(op)
        self.op, self.adapter, self.own = op, adapter, own
        self.parts = {"scheduler": scheduler, "scaler": scaler}
        reshard(adapter.model)
        names = {id(p): name for name, p in adapter.model.named_parameters()}
        keys = ["optimizer", *(f"optimizer {i}" for i in range(1, len(optimizers)))]
        self.optimizers = [
            StoredOptimizer(op, optimizer, names, key) for optimizer, key in zip(optimizers, keys, strict=False)
        ]

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for optimizer in self.optimizers for name, p in optimizer.parameters.items()}

    def _others(self) -> dict[str, torch.Tensor]:
        """What `Adapter.state_dict` does not hold, by name."""
        own = {id(p) for p in (*self.adapter.factors(), *self.adapter.parameters())}
        others = {name: p.detach() for name, p in self.parameters.items() if id(p) not in own}
        if not self.own:
            return others
        held = {id(layer) for layer in self.adapter.layers.values()}
        held |= {id(module) for saved in self.adapter.saved.values() for module in saved.modules()}
        for prefix, module in self.adapter.model.named_modules():
            for name, buffer in module._buffers.items():
                if id(module) not in held and buffer is not None and name not in module._non_persistent_buffers_set:
                    others[f"{prefix}.{name}".removeprefix(".")] = buffer
        return others

    def gather(self, *, whole: bool = True) -> tuple[dict, dict[str, torch.Tensor]]:
        """
        (JSON, tensors on the host); copies.

        Args: whole: gather tensors that are sharded; False: they are the live DTensors.
        Raises: TypeError (state that is no number, string, tensor or collection of them).
        """
        processes = self.adapter.processes
        tensors: dict[str, torch.Tensor] = {}
        with processes.agreement(self.op):
            state = self._encoded(tensors)
        if self.own:
            first, *others = processes.gather(random_state(self.adapter.model), doing=f"{self.op}: random states")
            state["random"] = encode(self.op, "random", first, tensors)
            if others:
                state["processes"] = encode(self.op, "processes", others, tensors)
        return state, gathered(tensors) if whole else tensors

    def _encoded(self, tensors: dict) -> dict:
        state = {
            "config": config_state(self.adapter),
            "adapter": encode_parts(self.op, "adapter", self.adapter.state_dict(), tensors),
            "others": encode_parts(self.op, "model", self._others(), tensors),
            **{optimizer.key: optimizer.encoded(tensors) for optimizer in self.optimizers},
        }
        for part, thing in self.parts.items():
            if thing is not None:
                state[part] = {
                    "class": class_name(thing),
                    "state": encode(self.op, part, thing.state_dict(), tensors),
                }
        return state

    def check(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Raises: ValueError if `restore` could not take these: another model, configuration, optimizer, scheduler or scaler."""
        check_config_state(self.adapter, state["config"])
        stored = decode_parts("adapter", state["adapter"], tensors)
        self._check_tensors("factors", self._factors(), stored.get("factors", {}), ranked=True)
        keys = [optimizer.key for optimizer in self.optimizers]
        stored_keys = [key for key in state if key.startswith("optimizer")]
        if stored_keys != keys:
            raise ValueError(f"there must be {len(stored_keys)} optimizers, got {len(keys)}")
        for optimizer in self.optimizers:
            optimizer.check(state[optimizer.key])
        self._check_tensors("the model", self._others(), decode_parts("model", state["others"], tensors))
        for part, thing in self.parts.items():
            if (part in state) != (thing is not None):
                expected = f"be given, a {state[part]['class']}" if part in state else "be None: none was saved"
                raise ValueError(f"{part} must {expected}")
            if thing is not None and state[part]["class"] != class_name(thing):
                raise ValueError(f"{part} must be a {state[part]['class']}, got a {class_name(thing)}")
        scaler = self.parts["scaler"]
        if scaler is not None:
            words = {True: "enabled", False: "disabled"}
            was, now = bool(decode(state["scaler"]["state"], tensors)), bool(scaler.state_dict())
            if was != now:
                raise ValueError(
                    f"scaler must be {words[was]}, as it was when it was saved, got one that is {words[now]}"
                )

    def _factors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {name: layer.pair.factors() for name, layer in self.adapter.layers.items()}

    @staticmethod
    def _check_tensors(what: str, expected: dict, found: dict, ranked: bool = False) -> None:
        different = sorted(expected.keys() ^ found.keys())
        if different:
            raise ValueError(f"{what} must have the names that were saved, got a difference in {different[:5]}")
        for name, tensor in expected.items():
            if ranked:
                for factor, own in tensor.items():
                    if own.dtype != found[name][factor].dtype:
                        raise ValueError(f"{name}.{factor} must be of {found[name][factor].dtype}, got {own.dtype}")
            elif (tensor.shape, tensor.dtype) != (found[name].shape, found[name].dtype):
                raise ValueError(
                    f"{name} must have shape {tuple(found[name].shape)} and {found[name].dtype}, "
                    f"got {tuple(tensor.shape)} and {tensor.dtype}"
                )

    def spread_as(self, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
        """Of stored tensors, by name and whole shape: the DTensors that they belong to and are spread like, where there are such."""
        parameters = [*self.parameters.values(), *self.adapter.parameters()]
        if not any(map(is_sharded, parameters)):
            return {}
        saved = {name: module.state_dict() for name, module in self.adapter.saved.items()}
        own = {f"adapter.modules_to_save.{name}.{key}": t for name, of in saved.items() for key, t in of.items()}
        own |= {f"model.{name}": tensor for name, tensor in self._others().items()}
        likes = {}
        for name, shape in shapes.items():
            found = [own.get(name), *(optimizer.parameter_of(name) for optimizer in self.optimizers)]
            like = next((tensor for tensor in found if is_sharded(tensor) and tensor.shape == shape), None)
            if like is not None:
                likes[name] = like
        return likes

    def _spread(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`tensors`, of which those that belong to DTensors are DTensors, too."""
        whole = {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}
        likes = self.spread_as({name: tensor.shape for name, tensor in whole.items()})
        return tensors | {name: sharded_like(tensors[name], like) for name, like in likes.items()}

    def replace(self, state: dict, tensors: dict[str, torch.Tensor], *, kept: bool = False) -> None:
        """
        `restore`, and if that fails in any process, all as it was in all.  Raises: what `restore` raises.

        kept: this process is left as it is, since it is where `state` comes from.
        """
        before = self.gather()
        try:
            with self.adapter.processes.agreement(self.op):
                if not kept:
                    self.restore(state, tensors)
        except BaseException as error:
            try:
                if not kept:
                    self.restore(*before)
            except Exception as second:
                error.add_note(f"{self.op}: what was there before could not be put back either: {second!r}")
            raise

    def restore(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Take what `gather` gave and `check` passed.  Raises: ValueError, and whatever the parts' own load_state_dict raises."""
        tensors = self._spread(tensors)
        self.adapter.load_state_dict(decode_parts("adapter", state["adapter"], tensors))
        for optimizer in self.optimizers:
            optimizer.restore(state[optimizer.key], tensors)
        with torch.no_grad():
            others = self._others()
            for name, tensor in decode_parts("model", state["others"], tensors).items():
                others[name].copy_(tensor)
        for part, thing in self.parts.items():
            if thing is not None:
                thing.load_state_dict(decode(state[part]["state"], tensors))
        if self.own:
            self._restore_random(state, tensors)

    def _restore_random(self, state: dict, tensors: dict) -> None:
        rank = self.adapter.processes.rank
        stored = decode([state["random"], *state.get("processes", [])], tensors)
        if rank < len(stored):
            set_random_state(stored[rank], self.adapter.model)
        else:
            seed_from(stored[0], rank)

    def drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
