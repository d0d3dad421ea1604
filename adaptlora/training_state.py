"""Everything that the next optimizer steps depend on, out of a training loop and back into one."""

import random
import warnings

import numpy as np
import torch

from .adapter import _unwrapped
from .encoding import decode, encode


def _class_name(thing) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


class TrainingState:
    """
    A loop's adapter, optimizer, and what else it has of a scheduler and a GradScaler, as one thing that is saved and restored.

    Held beside them: parameters that the optimizer trains and the adapter does not know, the model's persistent buffers (running
    statistics), and the random number generators of torch, Python and NumPy. Gradients are not: between two steps there are none.

    Raises: TypeError (no optimizer, or a wrapper with state of its own), ValueError (an adapter that is merged or detached).
    """

    def __init__(self, op: str, adapter, optimizer, scheduler, scaler):
        adapter.check_trainable(op)
        *around, self.optimizer = _unwrapped(optimizer)
        self.op, self.adapter = op, adapter
        self.parts = {"scheduler": scheduler, "scaler": scaler}
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(f"{op}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if around:
            raise TypeError(
                f"{op}: optimizer must keep all its state itself, got a {type(around[0]).__name__} around a "
                f"{type(self.optimizer).__name__}, with state of its own"
            )
        names = {id(p): name for name, p in adapter.model.named_parameters()}
        self.groups = [
            {names.get(id(p), f"parameter {i} of group {g}"): p for i, p in enumerate(group["params"])}
            for g, group in enumerate(self.optimizer.param_groups)
        ]
        self.parameters = {name: p for group in self.groups for name, p in group.items()}

    def _others(self) -> dict[str, torch.Tensor]:
        """What `Adapter.state_dict` does not hold, by name."""
        own = {id(p) for p in self.adapter.parameters()}
        others = {name: p.detach() for name, p in self.parameters.items() if id(p) not in own}
        held = {id(layer) for layer in self.adapter.layers.values()}
        held |= {id(module) for saved in self.adapter.saved.values() for module in saved.modules()}
        for prefix, module in self.adapter.model.named_modules():
            for name, buffer in module._buffers.items():
                if id(module) not in held and buffer is not None and name not in module._non_persistent_buffers_set:
                    others[f"{prefix}.{name}".removeprefix(".")] = buffer
        return others

    def gather(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """(JSON, tensors on the host); copies.  Raises: TypeError (state that is no number, string, tensor or collection of them)."""
        tensors: dict[str, torch.Tensor] = {}
        state = {
            "config": type(self.adapter.config).__name__,
            "adapter": encode(self.op, "adapter", self.adapter.state_dict(), tensors),
            "others": encode(self.op, "model", self._others(), tensors),
            "optimizer": self._gather_optimizer(tensors),
            "random": encode(self.op, "random", self._random(), tensors),
        }
        for part, thing in self.parts.items():
            if thing is not None:
                state[part] = {
                    "class": _class_name(thing),
                    "state": encode(self.op, part, thing.state_dict(), tensors),
                }
        return state, tensors

    def _gather_optimizer(self, tensors: dict) -> dict:
        found = dict(self.optimizer.state_dict())
        names = dict(enumerate(self.parameters))
        states, others = {}, {}
        for key, value in found.pop("state").items():
            if key in names:
                name = names[key]
                where, device = f"optimizer state of {name}", self.parameters[name].device
                states[name] = encode(self.op, where, value, tensors, device)
            else:
                others[key] = value
        groups = []
        for g, (group, members) in enumerate(zip(found.pop("param_groups"), self.groups, strict=True)):
            options = {key: value for key, value in group.items() if key != "params"}
            device = next((p.device for p in members.values()), None)
            encoded = encode(self.op, f"optimizer group {g}", options, tensors, device)
            groups.append({"params": list(members), "options": encoded})
        return {
            "class": _class_name(self.optimizer),
            "groups": groups,
            "state": states,
            "others": encode(self.op, "optimizer", others, tensors),
            "rest": encode(self.op, "optimizer", found, tensors),
        }

    def _random(self) -> dict:
        name, keys, *rest = np.random.get_state()
        devices = {p.device for p in self.adapter.model.parameters() if p.device.type == "cuda"}
        return {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": (name, keys.tolist(), *rest),
            "cuda": {str(device.index): torch.cuda.get_rng_state(device) for device in devices},
        }

    def check(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Raises: ValueError if `restore` could not take these: another model, method, optimizer, scheduler or scaler."""
        config = type(self.adapter.config).__name__
        if state["config"] != config:
            raise ValueError(f"the adapter must be attached with a {state['config']}, got a {config}")
        self._check_tensors("factors", self._factors(), decode(state["adapter"], tensors)["factors"], ranked=True)
        stored = state["optimizer"]
        if stored["class"] != _class_name(self.optimizer):
            raise ValueError(f"optimizer must be a {stored['class']}, got a {_class_name(self.optimizer)}")
        if len(stored["groups"]) != len(self.groups):
            raise ValueError(
                f"optimizer must have {len(stored['groups'])} parameter groups, got {len(self.groups)} (build it as before)"
            )
        for g, (group, members) in enumerate(zip(stored["groups"], self.groups, strict=True)):
            different = sorted(set(group["params"]) ^ members.keys())
            if different:
                raise ValueError(
                    f"optimizer group {g} must hold the {len(group['params'])} parameters it held, "
                    f"got a difference in {different[:5]}"
                )
        self._check_tensors("the model", self._others(), decode(state["others"], tensors))
        for part, thing in self.parts.items():
            if (part in state) != (thing is not None):
                expected = f"be given, a {state[part]['class']}" if part in state else "be None: none was saved"
                raise ValueError(f"{part} must {expected}")
            if thing is not None and state[part]["class"] != _class_name(thing):
                raise ValueError(f"{part} must be a {state[part]['class']}, got a {_class_name(thing)}")
        scaler = self.parts["scaler"]
        if scaler is not None:
            words = {True: "enabled", False: "disabled"}
            was, now = bool(decode(state["scaler"]["state"], tensors)), bool(scaler.state_dict())
            if was != now:
                raise ValueError(
                    f"scaler must be {words[was]}, as it was when it was saved, got one that is {words[now]}"
                )

    def _factors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {name: {"lora_A": layer.lora_A, "lora_B": layer.lora_B} for name, layer in self.adapter.layers.items()}

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

    def replace(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """`restore`, and if that fails, all as it was.  Raises: what `restore` raises."""
        before = self.gather()
        try:
            self.restore(state, tensors)
        except BaseException as error:
            try:
                self.restore(*before)
            except Exception as second:
                error.add_note(f"{self.op}: what was there before could not be put back either: {second!r}")
            raise
        for parameter in self.parameters.values():
            parameter.grad = None

    def restore(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Take what `gather` gave and `check` passed.  Raises: ValueError, and whatever the parts' own load_state_dict raises."""
        self.adapter.load_state_dict(decode(state["adapter"], tensors))
        self._restore_optimizer(state["optimizer"], tensors)
        with torch.no_grad():
            others = self._others()
            for name, tensor in decode(state["others"], tensors).items():
                others[name].copy_(tensor)
        for part, thing in self.parts.items():
            if thing is not None:
                thing.load_state_dict(decode(state[part]["state"], tensors))
        self._restore_random(decode(state["random"], tensors))

    def _restore_optimizer(self, stored: dict, tensors: dict) -> None:
        numbers = {name: i for i, name in enumerate(self.parameters)}
        states = {name: decode(value, tensors, self.parameters[name].device) for name, value in stored["state"].items()}
        groups = []
        for group, members in zip(stored["groups"], self.groups, strict=True):
            device = next((p.device for p in members.values()), None)
            options = decode(group["options"], tensors, device)
            groups.append({**options, "params": [numbers[name] for name in members]})
        others = decode(stored["others"], tensors)
        self.optimizer.load_state_dict(
            {
                **decode(stored["rest"], tensors),
                "state": {numbers[name]: value for name, value in states.items()} | others,
                "param_groups": groups,
            }
        )
        # torch casts what it loads to the parameter's dtype, and strings to what they are not.
        for name, value in states.items():
            self.optimizer.state[self.parameters[name]] = value

    @staticmethod
    def _restore_random(state: dict) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        for index, of_device in state["cuda"].items():
            if int(index) < torch.cuda.device_count():
                torch.cuda.set_rng_state(of_device, int(index))
            else:
                warnings.warn(
                    f"the checkpoint has the random state of cuda:{index}, which is not there: dropout will differ",
                    stacklevel=4,
                )
