"""Grouping: adapted projections that take the same x, found while the model runs and computed by one `lora_group` from then on."""

import threading
import weakref

import torch
from torch import nn

from .frozen import is_quantised, is_sharded
from .grouped_outputs import Group, Pending, x_state
from .lora_group import shared
from .lora_linear import LoraLinear

_OBSERVED = 8  # forward passes at most in which layers that were not called yet are waited for
_WASTED = 2  # for a result with an output that nobody asked for; one that was used up takes 1 back
_TOLERATED = 6
_MODES = {False: "without dropout", True: "with dropout"}


def _generator_state(device: torch.device) -> bytes | None:
    """Of the generator that dropout on `device` draws seeds from; None where it cannot be looked at."""
    if device.type == "cpu":
        return torch.get_rng_state().numpy().tobytes()
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return torch.cuda.get_rng_state(device).numpy().tobytes()
    return None


class _Mode:
    """What is known of the layers with dropout, or without: groups by their first layer, and the layers that were ever called."""

    def __init__(self):
        self.groups: dict[LoraLinear, Group] = {}
        self.seen: set[LoraLinear] = set()
        self.observed = 0


class _Pass:
    """One forward pass of the model, in one thread."""

    def __init__(self, mode: _Mode, dropout: bool, observing: bool):
        self.mode, self.dropout, self.observing = mode, dropout, observing
        self.pending: Pending | None = None
        self.refused = self.succeeded = False
        self.runs: list[list[LoraLinear]] = []
        self._last = None

    def alone(self, layer: LoraLinear, x: torch.Tensor, parents: dict) -> torch.Tensor:
        if not self.observing:
            return layer.alone(x)
        # What could not be grouped shows nothing, nor do layers that are not the model's own, as DataParallel's replicas.
        if layer not in parents or x_state(x) is None:
            self.interrupted()
            return layer.alone(x)
        continues = self._continues(layer, x, parents)
        version = x._version
        y = layer.alone(x)
        if continues:
            self.runs[-1].append(layer)
        else:
            self.runs.append([layer])
        # Weakly: what is observed must not keep an activation alive.
        drawn = _generator_state(x.device) if self.dropout else None
        self._last = layer, weakref.ref(x), version, drawn
        return y

    def interrupted(self) -> None:
        self._last = None

    def _continues(self, layer: LoraLinear, x: torch.Tensor, parents: dict) -> bool:
        """Whether layer is a sibling of the one before it, with the same x, and nobody has drawn random numbers since."""
        if self._last is None or layer in self.runs[-1]:
            return False
        before, of_x, version, drawn = self._last
        return (
            of_x() is x
            and x._version == version
            and parents.get(before) == parents[layer]
            and shared(before) == shared(layer)
            and (not self.dropout or (drawn is not None and _generator_state(x.device) == drawn))
        )


def _common_prefixes(runs: list[list[LoraLinear]]) -> dict[LoraLinear, list[LoraLinear]]:
    """{first layer: what every run that it begins begins with}"""
    found = {}
    for run in runs:
        known = found.get(run[0], run)
        length = next((i for i, pair in enumerate(zip(known, run, strict=False)) if pair[0] is not pair[1]), None)
        found[run[0]] = known[: min(len(known), len(run)) if length is None else length]
    return found


class Grouping:
    """
    y_i = layer_i(x) of several layers at once, where a model calls siblings one after the other with the very same x.

    The first forward pass of the model shows which layers do; from the next one on the first of them computes the outputs of all, and each
    of the others returns its own, unless anything that it depends on is another one than it was: x (the object and its version), the
    layer's tensors, scaling, dropout and mode, grad mode, autocast. An output is returned once, in this forward pass and thread, and only
    if no other adapted layer was called in between; else the layer computes alone, as it does outside the model's forward, for
    inference tensors, under torch.compile, saved-tensor hooks (checkpointing), function transforms and tracing, for an x of few tokens on a
    CPU, and with dropout while gradients are off. A group whose outputs are mostly not asked for dissolves.

    With dropout only layers between whose calls nobody draws random numbers are grouped, and draw what they would draw alone.

    Differences from layers that compute alone: the outputs have one node in the graph, so that a backward pass through one of them frees
    what the others' need (retain_graph=True keeps it); gradients for x are added up in another order; and a write between two calls that
    torch does not count, through `.data` or NumPy, is not seen by the layers that are called after it.

    Args:
        layers: {name: layer} of all adapted layers.
        enabled: whether to group any.
    Copies and pickles have no layers and do nothing. `state` is what was found, so that a resumed training computes as it would have.
    """

    def __init__(self, layers: dict[str, nn.Module], enabled: bool = True):
        self._enabled = enabled
        self._names = {layer: name for name, layer in layers.items()}
        self._parents: dict[LoraLinear, str] = {}
        self._handles = []
        self._local, self._lock = threading.local(), threading.Lock()
        self._epoch = 0
        self._modes: dict[bool, _Mode] = {}

    def __reduce__(self):
        return Grouping, ({},)

    def start(self, model: nn.Module) -> None:
        """Find siblings that may share an x, and watch the model's forward passes; nothing where there are none."""
        if not self._enabled:
            return
        siblings: dict[tuple, list[LoraLinear]] = {}
        for layer, name in self._names.items():
            if type(layer) is LoraLinear and not is_quantised(layer.base_layer) and not is_sharded(layer.base_layer):
                parent = name.rpartition(".")[0]
                siblings.setdefault((parent, layer.in_features), []).append(layer)
        self._parents = {layer: key[0] for key, found in siblings.items() if len(found) > 1 for layer in found}
        self._modes = {False: _Mode(), True: _Mode()}
        if not self._parents:
            return
        for layer in self._names:
            layer.grouping = weakref.ref(self)
        self._handles = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._succeed),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def stop(self, model: nn.Module) -> None:
        """Let every layer of the model that `start` was given, or of a copy of it, compute alone from now on."""
        for handle in self._handles:
            handle.remove()
        # A copy of the model has hooks, but nobody has their handles.
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
        for layer in self._names if self._handles else ():
            layer.grouping = None
        self._handles, self._parents, self._modes = [], {}, {}
        self.drop()

    def drop(self, *_) -> None:
        """What was computed and not yet asked for is out of date, in all threads."""
        self._epoch += 1

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """`drop` whenever the optimizer steps; it does not keep the layers alive."""
        reference = weakref.ref(self)

        def stepped(*_):
            alive = reference()
            if alive is not None:
                alive.drop()

        optimizer.register_step_post_hook(stepped)

    def groups(self) -> list[list[str]]:
        """Names of the layers of each group that is computed at once, as found so far."""
        found = [tuple(self._names[layer] for layer in group.layers) for group in self._found()]
        order = {name: i for i, name in enumerate(self._names.values())}
        return [list(names) for names in sorted(set(found), key=lambda names: order[names[0]])]

    def _found(self) -> list[Group]:
        with self._lock:
            return [group for mode in self._modes.values() for group in mode.groups.values()]

    def _enter(self, *_) -> None:
        if torch.compiler.is_compiling() or not self._parents:
            return
        # One that an exception which hooks are not told of has left behind goes here.
        self._local.running = None
        dropout = any(layer.training and layer.dropout_p for layer in self._parents)
        mode = self._modes[dropout]
        observing = mode.observed < _OBSERVED and not self._parents.keys() <= mode.seen
        self._local.running = _Pass(mode, dropout, observing)

    def _succeed(self, *_) -> None:
        running = None if torch.compiler.is_compiling() else getattr(self._local, "running", None)
        if running is not None:
            running.succeeded = True

    def _leave(self, model: nn.Module, *_) -> None:
        if torch.compiler.is_compiling():
            return
        running, self._local.running = getattr(self._local, "running", None), None
        # A forward pass that failed shows nothing: what was to come is not there.
        if running is None or not running.succeeded:
            return
        if running.pending is not None:
            running.pending.group.wasted += _WASTED
        if running.refused and any(is_sharded(layer.base_layer) for layer in self._parents):
            self.stop(model)
            return
        with self._lock:
            if running.observing and running.runs:
                self._learn(running)
            mode = running.mode
            for first in [first for first, group in mode.groups.items() if group.wasted >= _TOLERATED]:
                del mode.groups[first]

    def _learn(self, running: _Pass) -> None:
        mode = running.mode
        mode.observed += 1
        for first, run in _common_prefixes(running.runs).items():
            if len(run) > 1 and first not in mode.seen and not any(is_sharded(layer.base_layer) for layer in run):
                mode.groups[first] = Group(run)
        mode.seen.update(layer for run in running.runs for layer in run)

    def state(self) -> dict:
        """What was found so far, as JSON: by dropout, the groups, the layers that were ever called, and the passes looked at."""
        with self._lock:
            return {
                _MODES[dropout]: {
                    "groups": [
                        {"layers": [self._names[layer] for layer in group.layers], "wasted": group.wasted}
                        for group in mode.groups.values()
                    ],
                    "seen": [name for layer, name in self._names.items() if layer in mode.seen],
                    "observed": mode.observed,
                }
                for dropout, mode in self._modes.items()
            }

    def check_state(self, state: dict) -> None:
        """Raises: ValueError if `state` is not what `state` gives for these layers."""
        parents = {self._names[layer]: parent for layer, parent in self._parents.items()}
        try:
            groups = [group for found in state.values() for group in found["groups"]]
            named = {name for found in state.values() for name in found["seen"]}
            named.update(name for group in groups for name in group["layers"])
            numbers = [*(found["observed"] for found in state.values()), *(group["wasted"] for group in groups)]
            if any(type(number) is not int for number in numbers):
                raise TypeError(f"numbers {numbers}")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"groups must be what a state holds of them, got {type(error).__name__}: {error}"
            ) from error
        if parents and not named <= parents.keys():
            raise ValueError(f"groups must be of the adapter's modules, got {sorted(named - parents.keys())[:5]}")
        for group in groups if parents else ():
            if len({parents[name] for name in group["layers"]}) != 1:
                raise ValueError(f"groups must be of siblings, got {group['layers']}")

    def take_state(self, state: dict) -> None:
        """Inverse of `state`, from `check_state`; where nothing is to be grouped nothing changes."""
        layers = {name: layer for layer, name in self._names.items()}
        self.drop()
        with self._lock:
            for dropout in self._modes:
                found, mode = state.get(_MODES[dropout]), _Mode()
                if found is not None:
                    for group in found["groups"]:
                        made = Group([layers[name] for name in group["layers"]])
                        made.wasted, mode.groups[made.layers[0]] = group["wasted"], made
                    mode.seen.update(layers[name] for name in found["seen"])
                    mode.observed = found["observed"]
                self._modes[dropout] = mode

    def output(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        """layer(x)"""
        running = getattr(self._local, "running", None)
        if running is None:
            return layer.alone(x)
        try:
            return self._output(running, layer, x)
        except BaseException:
            # Whatever the model does about it, nothing of this pass is kept: no hook is told of a KeyboardInterrupt.
            self._local.running = None
            raise

    def _output(self, running: _Pass, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        pending, running.pending = running.pending, None
        if pending is not None:
            y = pending.take(layer, x, self._epoch)
            if y is not None:
                if pending.outputs:
                    running.pending = pending
                else:
                    pending.group.wasted = max(0, pending.group.wasted - 1)
                return y
            pending.group.wasted += _WASTED
        group = running.mode.groups.get(layer)
        if group is not None and not group.pays(x):
            group = None
        pending = None if group is None else group.compute(x, self._epoch)
        if pending is None:
            running.refused = running.refused or group is not None
            return running.alone(layer, x, self._parents)
        running.interrupted()
        running.pending = pending
        return pending.outputs.pop()
