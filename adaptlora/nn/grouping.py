"""Grouping: adapted projections that take the same x, found while the model runs and computed by one `lora_group` from then on."""

import threading
import weakref

import torch
from torch import nn

from .frozen import is_quantised, is_sharded
from .grouped_outputs import Group, Pending
from .lora_group import shared
from .lora_linear import LoraLinear

_OBSERVED = 8  # forward passes at most in which layers that were not called yet are waited for
_WASTED = 2  # for a result with an output that nobody asked for; one that was used up takes 1 back
_TOLERATED = 6


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
        self.refused = False
        self.runs: list[list[LoraLinear]] = []
        self._last = None

    def alone(self, layer: LoraLinear, x: torch.Tensor, parents: dict) -> torch.Tensor:
        if not self.observing:
            return layer.alone(x)
        continues = self._continues(layer, x, parents)
        version = None if x.is_inference() else x._version
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
        if self._last is None or layer not in parents or layer in self.runs[-1] or x.is_inference():
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
    inference tensors, and under torch.compile, saved-tensor hooks (checkpointing), function transforms and tracing. A group whose outputs
    are mostly not asked for dissolves.

    With dropout only layers between whose calls nobody draws random numbers are grouped, and draw what they would draw alone.

    Differences from layers that compute alone: the outputs have one node in the graph, so that a backward pass through one of them frees
    what the others' need (retain_graph=True keeps it); and gradients for x are added up in another order, so that a resumed training, whose
    first forward pass finds the groups anew, is not the uninterrupted one to the last bit. On a CPU, where a step of a small encoder
    takes as long with them as without, there are none unless one asks for them.

    Args:
        layers: {name: layer} of all adapted layers.
        enabled: True or False; None for layers on a GPU only.
    Copies and pickles have no layers and do nothing.
    """

    def __init__(self, layers: dict[str, nn.Module], enabled: bool | None = None):
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
        if self._enabled is False:
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
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Let every layer compute alone from now on."""
        for handle in self._handles:
            handle.remove()
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
        # looked at now, for a model may be moved when it has its adapter
        if self._enabled is None and not next(iter(self._parents)).weight.is_cuda:
            return
        dropout = any(layer.training and layer.dropout_p for layer in self._parents)
        mode = self._modes[dropout]
        observing = mode.observed < _OBSERVED and not self._parents.keys() <= mode.seen
        self._local.running = _Pass(mode, dropout, observing)

    def _leave(self, module, args, result) -> None:
        if torch.compiler.is_compiling():
            return
        running, self._local.running = getattr(self._local, "running", None), None
        # A forward pass that failed shows nothing: what was to come is not there.
        if running is None or result is None:
            return
        if running.pending is not None:
            running.pending.group.wasted += _WASTED
        if running.refused and any(is_sharded(layer.base_layer) for layer in self._parents):
            self.stop()
            return
        with self._lock:
            if running.observing:
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

    def output(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        """layer(x)"""
        running = getattr(self._local, "running", None)
        if running is None:
            return layer.alone(x)
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
        pending = None if group is None else group.compute(x, self._epoch)
        if pending is None:
            running.refused = running.refused or group is not None
            return running.alone(layer, x, self._parents)
        running.interrupted()
        running.pending = pending
        return pending.outputs.pop()
