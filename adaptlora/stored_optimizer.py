"""An optimizer's state and groups by the names of its parameters, out of a training loop and back into one."""

import torch

from .distributed.sharding import decode_parts, encode_parts, is_sharded


def class_name(thing) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


class StoredOptimizer:
    """
    One optimizer of a loop, as JSON and tensors.

    Args: names: {id of a parameter: its name in the model}.   key: what this optimizer is called among the loop's parts.
    Raises: TypeError (no optimizer).
    """

    def __init__(self, op: str, optimizer, names: dict[int, str], key: str = "optimizer"):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{op}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.op, self.optimizer, self.key = op, optimizer, key
        self.groups = [
            {names.get(id(p), f"parameter {i} of group {g}"): p for i, p in enumerate(group["params"])}
            for g, group in enumerate(optimizer.param_groups)
        ]
        self.parameters = {name: p for group in self.groups for name, p in group.items()}

    def _place(self, name: str) -> str:
        return f"{self.key} state of {name}"

    def encoded(self, tensors: dict) -> dict:
        """JSON; its tensors come into `tensors`.  Raises: TypeError (state that is no number, string, tensor or collection of them)."""
        found = dict(self.optimizer.state_dict())
        names = dict(enumerate(self.parameters))
        states, others = {}, {}
        for key, value in found.pop("state").items():
            if key in names:
                name = names[key]
                self._check_sharded(name, value)
                device = self.parameters[name].device
                states[name] = encode_parts(self.op, self._place(name), value, tensors, device)
            else:
                others[key] = value
        groups = []
        for g, (group, members) in enumerate(zip(found.pop("param_groups"), self.groups, strict=True)):
            options = {key: value for key, value in group.items() if key != "params"}
            device = next((p.device for p in members.values()), None)
            encoded = encode_parts(self.op, f"{self.key} group {g}", options, tensors, device)
            groups.append({"params": list(members), "options": encoded})
        return {
            "class": class_name(self.optimizer),
            "groups": groups,
            "state": states,
            "others": encode_parts(self.op, self.key, others, tensors),
            "rest": encode_parts(self.op, self.key, found, tensors),
        }

    def _check_sharded(self, name: str, state) -> None:
        for key, value in state.items() if isinstance(state, dict) else ():
            if is_sharded(value) and value.shape != self.parameters[name].shape:
                raise TypeError(
                    f"{self.op}: {self._place(name)}.{key} is sharded and must have its parameter's shape "
                    f"{tuple(self.parameters[name].shape)}, got {tuple(value.shape)}"
                )

    def check(self, stored: dict) -> None:
        """Raises: ValueError if `restore` could not take it: another class, other groups or parameters."""
        if stored["class"] != class_name(self.optimizer):
            raise ValueError(f"{self.key} must be a {stored['class']}, got a {class_name(self.optimizer)}")
        if len(stored["groups"]) != len(self.groups):
            raise ValueError(
                f"{self.key} must have {len(stored['groups'])} parameter groups, got {len(self.groups)} (build it as before)"
            )
        for g, (group, members) in enumerate(zip(stored["groups"], self.groups, strict=True)):
            different = sorted(set(group["params"]) ^ members.keys())
            if different:
                raise ValueError(
                    f"{self.key} group {g} must hold the {len(group['params'])} parameters it held, "
                    f"got a difference in {different[:5]}"
                )

    def parameter_of(self, name: str) -> torch.nn.Parameter | None:
        """The one whose state the stored tensor `name` is."""
        found = (p for own, p in self.parameters.items() if name.startswith(f"{self._place(own)}."))
        return next(found, None)

    def restore(self, stored: dict, tensors: dict) -> None:
        """Take what `encoded` gave and `check` passed.  Raises: whatever the optimizer's load_state_dict raises."""
        numbers = {name: i for i, name in enumerate(self.parameters)}
        states = {
            name: decode_parts(self._place(name), value, tensors, self.parameters[name].device)
            for name, value in stored["state"].items()
        }
        groups = []
        for g, (group, members) in enumerate(zip(stored["groups"], self.groups, strict=True)):
            device = next((p.device for p in members.values()), None)
            options = decode_parts(f"{self.key} group {g}", group["options"], tensors, device)
            groups.append({**options, "params": [numbers[name] for name in members]})
        others = decode_parts(self.key, stored["others"], tensors)
        self.optimizer.load_state_dict(
            {
                **decode_parts(self.key, stored["rest"], tensors),
                "state": {numbers[name]: value for name, value in states.items()} | others,
                "param_groups": groups,
            }
        )
        # torch casts what it loads to the parameter's dtype, and strings to what they are not.
        for name, value in states.items():
            self.optimizer.state[self.parameters[name]] = value
