"""attach(model, config) -> Adapter: the one object a user holds."""

import contextlib
import copy
import dataclasses
import math
import warnings
import weakref

import torch
from torch import nn

from . import io
from .adapter_contents import AdapterContents
from .config import LoraConfig
from .distributed.distribution import Distribution, must_distribute
from .distributed.processes import Processes
from .methods import METHODS, Attachment, Method, NonFiniteError, check_config
from .nn import Grouping, LoraLinear, linear_shape
from .ops._checks import check_finite_number
from .optimizer_wrappers import check_wrappers, holding, unwrap
from .ranks import commit_ranks
from .targets import find_saved, find_stacked, find_targets, matches_pattern


def _number(loss) -> float:
    if loss is None:
        raise ValueError("step: loss must be given to an adaptive schedule, got None")
    try:
        return float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"step: loss must be a number or a one-element tensor, got {loss!r}") from error


@dataclasses.dataclass(frozen=True)
class RankChange:
    """What `Adapter.step` returns when ranks changed: the number of optimizer steps made, and {module: rank} around the change."""

    step: int
    before: dict[str, int]
    after: dict[str, int]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _set_fused_encoders(model: nn.Module, names, fused: dict) -> None:
    """
    Switch off torch's fused evaluation of the nn.TransformerEncoderLayers around the modules `names`: it reads the weights of
    the layer's linears and calls none of them, so that adapters would be left out. `fused` keeps what they had.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(name.startswith(f"{prefix}.") for name in names):
            fused.setdefault(module, module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0


def attach(
    model: nn.Module, config: LoraConfig, *, calibration=None, progress=None, group_projections: bool = True
) -> "Adapter":
    """
    Put an adapter of `config`'s method on `model`, in place: chosen linear layers become `LoraLinear`, all else is frozen.

    Args:
        model: any nn.Module.
        config: LoraConfig, NormALConfig, LaLoRAConfig, NoRAConfig, AdaLoRAConfig, DyLoRAConfig.
        calibration: a batch, for NoRAConfig(outer="activation"): a dict of the model's keyword arguments, a tuple of its arguments, or its
            one argument.
        progress: called with (modules done, modules in all) where the start takes long (factorizations for NoRA, PiSSA, MiLoRA).
        group_projections: whether to compute modules that turn out to share their input (q, k and v; gate and up) by one op, on a CPU from
            256 tokens on. It adds their gradients for it up in another order, and their outputs share one node of the graph: separate
            backward passes through them need retain_graph=True. `nn.Grouping` says more, `Adapter.summary` which they are.
    Raises: ValueError or TypeError (targets, patterns, budget, calibration, a model adapted already); the model is unchanged then.
    """
    return _attach(model, config, calibration=calibration, progress=progress, group_projections=group_projections)


def _attach(
    model: nn.Module, config: LoraConfig, *, whole=None, group_projections: bool = True, **options
) -> "Adapter":
    """`attach` of what is stored: full names of the modules trained whole, and frozen factors among the `Attachment`'s options."""
    check_config(config)
    targets = find_targets(model, config, whole)
    saved = find_saved(model, config, whole)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(matches_pattern(key, name) for name in targets):
                raise ValueError(f"attach: {field} must name adapted modules, got {key!r}")
    _report_stacked(model, config)
    required = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    kind = METHODS[type(config)]
    try:
        layers = kind.build(config, Attachment(model, targets, **options))
        for name, layer in layers.items():
            if config.lora_bias:
                layer.add_lora_bias()
            layer.train(targets[name].training)
        method = kind(config, layers)
        model.requires_grad_(False)
        trained = {name: copy.deepcopy(module).requires_grad_(True) for name, module in saved.items()}
        method.begin()
    except BaseException:
        _require_grad(model, required)
        raise
    for name, module in {**layers, **trained}.items():
        _replace(model, name, module)
    groups = Grouping(layers, group_projections)
    return Adapter(model, config, layers, trained, saved, method, required, groups)


def _report_stacked(model: nn.Module, config: LoraConfig) -> None:
    stacked = find_stacked(model, config)
    if stacked:
        name, shape = next(iter(stacked.items()))
        warnings.warn(
            f'attach: "all-linear" means linear layers, and {len(stacked)} stacked weights of experts ({name} {shape}, …) are not adapted',
            stacklevel=4,
        )


def _require_grad(model: nn.Module, required: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(required[name])


def trained_parameters(model: nn.Module, config: LoraConfig) -> int:
    """
    How many numbers `attach(model, config)` would train, at the largest ranks and with modules_to_save; from shapes alone, so that the
    model may be on the meta device.  Raises: as `attach` for targets.
    """
    check_config(config)
    kind = METHODS[type(config)]
    targets = find_targets(model, config)
    factors = sum(kind.parameters(config, name, module) for name, module in targets.items())
    if config.lora_bias:
        factors += sum(linear_shape(module)[1] for module in targets.values())
    return factors + sum(p.numel() for module in find_saved(model, config).values() for p in module.parameters())


def load(model: nn.Module, path, *, progress=None, group_projections: bool = True) -> "Adapter":
    """
    Put a saved adapter on `model`: PEFT's LoRA, each module with the rank and scaling it has in the file, or NoRA's own.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors, or what `Adapter.save(format="nora")` wrote.
        progress, group_projections: as in `attach`.
    Returns: an Adapter with a LoraConfig, which trains on at fixed ranks, or with NoRA's; both save and merge.
    Raises: FileNotFoundError, ValueError (a file that is damaged, unsupported, or does not fit the model, or NoRA's for other base
        weights), TypeError (it names modules that are no linear layers); the model is unchanged then.
    """
    stored = io.read(path)
    try:
        adapter = _attach(model, progress=progress, group_projections=group_projections, **stored.attach_options())
    except TypeError as error:
        raise TypeError(f"load: {path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"load: {path}: {error}") from error
    try:
        adapter._fill(stored)
    except BaseException:
        adapter.detach()
        raise
    return adapter


def _unwrapped(optimizer) -> list:
    """Those around others that keep state of their own, then those that make the steps."""
    around, stepping = unwrap(optimizer)
    return [*around, *stepping]


def _watch(optimizer: torch.optim.Optimizer, method: Method) -> None:
    """Tell a method that looks at gradients when the optimizer steps; the optimizer does not keep it alive."""
    reference = weakref.ref(method)

    def telling(event: str):
        def hook(stepping, *_):
            alive = reference()
            if alive is not None:
                getattr(alive, event)(stepping)

        return hook

    registers = {
        "before_optimizer_step": optimizer.register_step_pre_hook,
        "after_optimizer_step": optimizer.register_step_post_hook,
    }
    for event, register in registers.items():
        if getattr(type(method), event) is not getattr(Method, event):
            register(telling(event))


class Adapter(AdapterContents):
    """
    An adapter on a model: its trainable parameters, its method, its file.  Made by `attach` and `load`.

    Attributes:
        model, config, method.   layers: {module name: LoraLinear}, in the model's order.
        saved: {module name: module} trained whole (modules_to_save).
    """

    def __init__(self, model, config, layers, saved, originals, method, required, groups: Grouping):
        self.model = model
        self.config = config
        self.layers: dict[str, LoraLinear] = layers
        self.saved: dict[str, nn.Module] = saved
        self.method = method
        self._originals = originals
        self._required = required
        self._unmerged: dict[str, dict[str, nn.Parameter]] | None = None
        self._attached = True
        self._distribution, self._distributed = Distribution(), False
        self._watched = weakref.WeakSet()
        self._seen: set[tuple] | None = None
        self._fused: dict[nn.Module, int] = {}
        _set_fused_encoders(model, layers, self._fused)
        self._groups = groups
        groups.start(model)

    def __repr__(self) -> str:
        ranks = list(self.ranks().values())
        return (
            f"Adapter({type(self.config).__name__}, {len(ranks)} modules, ranks {min(ranks)}–{max(ranks)}, "
            f"average {sum(ranks) / len(ranks):.2f}, {self.method.phase})"
        )

    # Training

    def parameters(self) -> list[nn.Parameter]:
        """
        Everything that trains: the factors but for those that are frozen, as freeze_A freezes lora_A, the biases, then the
        modules_to_save. Parameters stay the same objects as ranks change.
        """
        trained = [factor for factor in self.factors() if factor.requires_grad]
        return trained + self.biases() + [p for module in self.saved.values() for p in module.parameters()]

    def biases(self) -> list[nn.Parameter]:
        """lora_bias of every module that has one."""
        return [layer.lora_bias for layer in self.layers.values() if layer.lora_bias is not None]

    def factors(self) -> list[nn.Parameter]:
        """lora_A and lora_B of every module, and lora_E of AdaLoRA's."""
        return [getattr(layer.pair, name) for layer in self.layers.values() for name in layer.pair.factor_names]

    def parameter_groups(
        self, lr: float, *, loraplus_lr_ratio: float | None = None, weight_decay: float = 0.0
    ) -> list[dict]:
        """
        `parameters()` as an optimizer's groups, B faster than A: η_B = loraplus_lr_ratio · η_A          [LoRA+, arXiv:2402.12354]

        torch.optim.AdamW(adapter.parameter_groups(2e-4, loraplus_lr_ratio=16)); track that optimizer as any other; in Trainer
        Trainer(model, …, optimizers=(optimizer, None), callbacks=[adapter.callback()]). A penalty_step="proximal" shrinks each factor by
        its own learning rate, and schedulers keep the ratio.

        Args:
            lr: η_A > 0, of lora_A (and AdaLoRA's lora_E) and of the matrices of modules_to_save.
            loraplus_lr_ratio: > 0, the paper's advice is ≥ 1; lr times it is for lora_B and, as with PEFT's create_loraplus_optimizer, for
                all vectors: biases, those of modules_to_save too; here for its 0-dim parameters as well, which PEFT's takes for
                matrices. None: one learning rate.
            weight_decay: ≥ 0, of all but vectors and 0-dim parameters.
        Returns: groups {"params", "lr", "weight_decay"}: A, B, vectors; those that hold anything.
        Raises: ValueError.
        """
        ratio = 1.0 if loraplus_lr_ratio is None else loraplus_lr_ratio
        for name, value in {"lr": lr, "loraplus_lr_ratio": ratio, "weight_decay": weight_decay}.items():
            check_finite_number("parameter_groups", name, value)
            if value < 0 or (value == 0 and name != "weight_decay"):
                rule = "≥ 0" if name == "weight_decay" else "> 0"
                raise ValueError(f"parameter_groups: {name} must be {rule}, got {value!r}")
        of_B = {id(layer.lora_B) for layer in self.layers.values()}
        slow, fast, vectors = [], [], []
        for parameter in self.parameters():
            (vectors if parameter.dim() <= 1 else fast if id(parameter) in of_B else slow).append(parameter)
        groups = ((slow, lr, weight_decay), (fast, lr * ratio, weight_decay), (vectors, lr * ratio, 0.0))
        return [{"params": params, "lr": rate, "weight_decay": decay} for params, rate, decay in groups if params]

    def track(self, optimizer) -> None:
        """
        Make the optimizer's state follow the ranks. Needed by every method that changes ranks or shrinks vectors.

        Args:
            optimizer: torch optimizer (or a wrapper of one, as accelerate's, Lookahead, SAM: what is inside is tracked, and the
                wrapper if it keeps state of its own) over `parameters()`. Held weakly. What its state is need not be said for most: see
                `register_optimizer_state`.
        Raises: TypeError (no optimizer, or one whose state cannot follow the method's rank changes), ValueError (it holds none of the
            adapter's factors; an adapted module's base is not frozen). Nothing is tracked then.
        """
        around, stepping = holding("track", optimizer, self.factors(), "adapter.parameters()")
        self._check_frozen()
        if self.method.needs_optimizer():
            self._check_states([*around, *stepping])
            check_wrappers("track", optimizer, around, self.factors())
        for layer in self.layers.values():
            for inner in stepping:
                layer.track(inner)
            for outer in around:
                layer.pair.track(outer)
        for inner in stepping:
            if inner not in self._watched:
                _watch(inner, self.method)
                self._groups.watch(inner)
        self._watched.update([*around, *stepping])

    def _check_frozen(self) -> None:
        for name, layer in self.layers.items():
            for key, parameter in layer.base_layer.named_parameters():
                if parameter.requires_grad:
                    raise ValueError(
                        f"track: {name}.{key} must be frozen, as no gradient for it is computed, got requires_grad=True: call "
                        "requires_grad_(False) on it, or exclude the module from the adapter to train it whole"
                    )

    def _check_states(self, optimizers: list) -> None:
        """Raises: TypeError (naming the module) if one of them keeps state that cannot follow a rank change."""
        for name, layer in self.layers.items():
            for optimizer in optimizers:
                try:
                    layer.pair.check_states(optimizer)
                except TypeError as error:
                    raise TypeError(f"{name}: {error}") from error

    def penalty(self) -> torch.Tensor:
        """The method's term of the loss now: a 0-dim tensor, zero when there is none.  loss + penalty() is what trains."""
        term = self.method.penalty() if self._attached else None
        return self.factors()[0].new_zeros(()) if term is None else term

    def step(self, loss=None) -> RankChange | None:
        """
        Tell the method that an optimizer step was made. Ranks may change here, physically and with optimizer state.

        Args:
            loss: task loss of that step without the penalty: number or one-element tensor. Only adaptive schedules need it, of several
                processes the mean; it is checked where it is given, but on a GPU, or among several processes, nobody waits for one
                that is not needed.
        Returns: RankChange if ranks changed, else None.
        Raises: NonFiniteError, a ValueError (the loss, or norms that ranks are decided by), ValueError (loss missing, optimizer not
            tracked), TypeError (an optimizer's state that cannot follow). Ranks, weights, optimizer state and the method are then as
            before, and the step was not counted: what it was to do is for the next call to do.
        """
        self.check_trainable("step")
        return self._step(self._loss_value(loss))

    def _step(self, value: float | None) -> RankChange | None:
        optimizers = self._tracked_optimizers() if self.method.needs_optimizer() else []
        if optimizers and not self._distributed and must_distribute():
            raise ValueError(
                "step: among several processes ranks must change on all of them together: adapter.distribute(model) must be called once "
                "the model is wrapped, and was not (distribute(process_group=…) with a group of this process alone keeps it to itself)"
            )
        state = self.method.step_state()
        kept = [factor.detach().clone() for factor in self.factors()] if self.method.writes_before_change() else []
        before = self.ranks()
        try:
            if self.processes.size > 1 and self.method.may_change():
                ranks = self._step_together(value, optimizers, before)
            else:
                ranks = self.method.step(value, optimizers)
                if ranks is not None:
                    self._commit(ranks, compact=not self.method.parks)
        except BaseException:
            self.method.load_state_dict(state)
            with torch.no_grad():
                for factor, values in zip(self.factors(), kept, strict=bool(kept)):
                    factor.copy_(values)
            raise
        if ranks is None:
            self.method.unchanged()
            return None
        for name, layer in self.layers.items():
            layer.scaling = self.method.scaling(name, layer, ranks[name])
        self.method.changed(ranks)
        return RankChange(self.method.t, before, ranks)

    def _step_together(self, value, optimizers, before: dict[str, int]) -> dict[str, int] | None:
        """The method's step in which one process decides for all, and in which all change ranks or none."""

        def own() -> dict[str, int] | None:
            # Without data there may be nothing to decide by, nor need there be: it is what others decide that counts.
            return None if self._distribution.joined else self.method.step(value, optimizers)

        with self._distribution.agreement() as agreement:
            ranks = self._distribution.decide(self.method, own)
            if ranks is None:
                agreement.reached({}, self.method.masked())
            else:
                change = {name: [before[name], rank] for name, rank in ranks.items()}
                self._commit(ranks, compact=not self.method.parks, prepared=lambda: agreement.reached(change))
        return ranks

    def _commit(self, ranks: dict[str, int], *, compact: bool, prepared=None) -> None:
        # Vectors that never were there are drawn alike whatever else drew random numbers.
        generator = torch.Generator().manual_seed(self.config.seed + self.method.t)
        pairs = {name: layer.pair for name, layer in self.layers.items()}
        commit_ranks(pairs, ranks, orders=self.method.orders, compact=compact, generator=generator, prepared=prepared)
        self._groups.drop()

    def compact(self) -> None:
        """
        Give the memory of parked vectors back, their optimizer state included: factors, gradients and state are then as small as the
        ranks say, DyLoRA's those of `set_rank`, and the method changes ranks no more. Where nothing can come back (NormAL, plain LoRA)
        there is nothing to give back.

        Raises: ValueError (merged or detached), TypeError (an optimizer's state that cannot follow); nothing has changed then.
        """
        self.check_trainable("compact")
        self._commit(self.method.final_ranks(), compact=True)
        if self.method.parks:
            self.method.compacted()

    def set_rank(self, rank: int | None) -> None:
        """
        DyLoRA: evaluate, merge and save with the first `rank` vectors of every module, or all that a smaller one has; None for all, as at
        first. Training goes on with the ranks that are drawn; `compact` then keeps these vectors for good.

        Raises: ValueError (another method, a rank that there is not, merged or detached).
        """
        self.check_trainable("set_rank")
        self.method.set_rank(rank)

    def _loss_value(self, loss) -> float | None:
        elsewhere = isinstance(loss, torch.Tensor) and loss.device.type != "cpu"
        if not self.method.needs_loss() and (loss is None or elsewhere or self.processes.size > 1):
            return None
        try:
            value, error = _number(loss), None
        except (TypeError, ValueError) as found:
            # The others wait for this process, and raise with it.
            value, error = math.nan, found
        value = self._distribution.mean(value, error)
        if not math.isfinite(value):
            raise NonFiniteError(f"step: loss must be finite, got {value}")
        return value

    def _tracked_optimizers(self) -> list[torch.optim.Optimizer]:
        """
        Those tracked, seen to hold every factor that trains and no state that could not follow a rank change. Seen once: again only when
        another optimizer is tracked or one has other parameters or state than it had.
        """
        optimizers = list(self._watched)
        seen = {(id(o), len(o.state), *(len(group["params"]) for group in o.param_groups)) for o in optimizers}
        if seen != self._seen:
            held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
            for name, layer in self.layers.items():
                for factor in layer.pair.factor_names:
                    parameter = getattr(layer.pair, factor)
                    if parameter.requires_grad and id(parameter) not in held:
                        raise ValueError(
                            f"step: the optimizer must be tracked before ranks change (adapter.track(optimizer)), "
                            f"got none for {name}.{factor}"
                        )
            self._check_states(optimizers)
            self._seen = seen
        return optimizers

    def callback(self, **options):
        """
        A transformers TrainerCallback that does all of the above inside `Trainer` and TRL's: Trainer(…, callbacks=[adapter.callback()]).
        Options: those of `integrations.transformers.AdapterCallback`.
        """
        from .integrations.transformers import AdapterCallback

        return AdapterCallback(self, **options)

    # Several processes

    @property
    def processes(self) -> Processes:
        """Those that train this adapter together, as `distribute` was told; one by itself otherwise."""
        return self._distribution.processes

    def distribute(self, model=None, *, process_group=None, comm_hook=None, timeout=None) -> None:
        """
        Train with the other processes of torch.distributed: gradients are averaged, and ranks change on all processes or on none. Every
        process calls it once, after the model was wrapped and before the first backward pass.

        Gradients of all that trains travel in one buffer for each dtype, as long as the ranks of that moment say, in one all-reduce at the
        end of the backward pass. What is frozen now stays out. DistributedDataParallel keeps its `no_sync`, `join` and
        buffers; its reducer goes, and it is of no use after `detach`. Copies and pickles of the model are plain.

        Args:
            model: DistributedDataParallel(model); the model itself after fully_shard(…, ignored_params=set(adapter.factors())), whose
                own sharded parameters FSDP goes on reducing; or the model as it is, or None for it: then nothing is wrapped.
            process_group: of the all-reduce; None for the wrapper's, or all processes. A group of one leaves everything as it is.
            comm_hook: (state, hook) in the place of the average: hook(state, bucket) -> Future of the buffer, as DDP's hooks are; None for
                the one that DDP was given.
            timeout: timedelta to wait for other processes: when they agree on something, and for gradients and DDP's own messages where
                gloo sends them; None for that of the process group, by which NCCL's watchdog goes in any case.
        Raises: ValueError (no process group; not the adapter's model; factors that are sharded; processes with other ranks, or at other
            steps), in all processes. From then on ProcessError, wherever processes are waited for: it names those that are missing.
        """
        from .distributed.setup import distribute

        self.check_trainable("distribute")
        new = distribute(self, model, process_group=process_group, comm_hook=comm_hook, timeout=timeout)
        self._distribution.close()
        self._distribution, self._distributed = new, True

    def no_sync(self):
        """A context whose backward passes leave this process its own gradients: of all but the last micro-batch, and of a penalty alone."""
        return self._distribution.no_sync()

    def follow_step(self) -> None:
        """A step that others make while this process has no more data: ranks and method follow, weights when all are through."""
        self._distribution.joined = True
        # One that is refused is refused in the processes that made it, too.
        with contextlib.suppress(NonFiniteError):
            value = self._distribution.mean(0.0) if self.method.needs_loss() else None
            if value is not None and not math.isfinite(value):
                return
            self._step(value)

    def take_state_of(self, process: int) -> None:
        """All processes have no more data: what trains, its optimizers' state and the method's become those of `process`."""
        from .distributed.state import broadcast_state

        self._distribution.joined = False
        broadcast_state(self, list(self._watched), process)

    # What it is now

    def ranks(self) -> dict[str, int]:
        """{module name: active rank}"""
        return {name: layer.rank for name, layer in self.layers.items()}

    def summary(self) -> dict:
        """
        Sizes and state now, all counts of real storage: ranks, modules, average_rank, trainable_parameters (factors and modules_to_save),
        adapter_parameters (factors), adapter_bytes, gradient_bytes, optimizer_bytes (of the factors), method, phase, t, t_p, t_c; groups,
        lists of the modules that are computed by one op, as the forward passes so far have shown them to share their input.
        """
        ranks = self.ranks()
        held = [layer.pair.nbytes() for layer in self.layers.values()]
        return {
            "method": type(self.config).__name__.removesuffix("Config"),
            "modules": len(ranks),
            "ranks": ranks,
            "average_rank": sum(ranks.values()) / len(ranks),
            "trainable_parameters": sum(p.numel() for p in self.parameters()),
            "adapter_parameters": sum(p.numel() for p in self.factors()),
            "adapter_bytes": sum(h["factors"] for h in held),
            "gradient_bytes": sum(h["gradients"] for h in held),
            "optimizer_bytes": sum(h["optimizer"] for h in held),
            "phase": self.method.phase,
            "t": self.method.t,
            "t_p": self.method.t_p,
            "t_c": self.method.t_c,
            "groups": self._groups.groups(),
            **self.method.summary(),
        }

    # The model around it

    def merge(self) -> nn.Module:
        """
        Add every update to its base weight and put the plain modules back: no adapter is left in the model's way.

        The unmerged weights are kept beside the merged ones, so that `unmerge` restores them bit for bit; a weight that is tied
        to others is untied by it, since only the adapted module may change. Parameters stay frozen.
        Returns: the model.   Raises: ValueError (already merged or detached; a lora_bias over a base without a bias).
        """
        self.check_trainable("merge")
        merged = {name: layer.merged_parameters() for name, layer in self.layers.items()}
        self._unmerged = {}
        for name, layer in self.layers.items():
            self._unmerged[name] = {key: getattr(layer.base_layer, key) for key in merged[name]}
            for key, values in merged[name].items():
                setattr(layer.base_layer, key, nn.Parameter(values, requires_grad=False))
            _replace(self.model, name, layer.base_layer)
        self._restore_fused_encoders()
        self._groups.stop(self.model)
        return self.model

    def unmerge(self) -> nn.Module:
        """Undo `merge`, exactly.  Returns: the model.   Raises: ValueError (not merged)."""
        if self._unmerged is None:
            raise ValueError("unmerge: the adapter must be merged, and it is not")
        for name, layer in self.layers.items():
            # The model may have been moved meanwhile, without the layers that were out of it.
            for key, original in self._unmerged[name].items():
                original.data = original.data.to(getattr(layer.base_layer, key))
                setattr(layer.base_layer, key, original)
            layer.to(layer.weight.device)
            _replace(self.model, name, layer)
        self._unmerged = None
        _set_fused_encoders(self.model, self.layers, self._fused)
        self._groups.start(self.model)
        return self.model

    def _restore_fused_encoders(self) -> None:
        for module, value in self._fused.items():
            module.activation_relu_or_gelu = value
        self._fused.clear()

    def detach(self) -> nn.Module:
        """Take the adapter off: original modules, weights and requires_grad flags.  Returns: the model."""
        if self._unmerged is not None:
            self.unmerge()
        self.check_trainable("detach")
        self.method.end()
        for name, layer in self.layers.items():
            _replace(self.model, name, layer.base_layer)
        for name, module in self._originals.items():
            trained = next(self.saved[name].parameters(), None)
            _replace(self.model, name, module if trained is None else module.to(trained.device, trained.dtype))
        self._restore_fused_encoders()
        self._groups.stop(self.model)
        self._distribution.close()
        _require_grad(self.model, self._required)
        self._attached = False
        return self.model

    def check_trainable(self, op: str) -> None:
        if not self._attached:
            raise ValueError(f"{op}: the adapter must be on its model, and it was detached")
        if self._unmerged is not None:
            raise ValueError(f"{op}: the adapter must not be merged (unmerge it first)")
