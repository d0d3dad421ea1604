"""Configurations: one dataclass per method, PEFT's field names and defaults, checked on construction."""

import dataclasses
import math
import re

from .ops.rank_penalty import PENALTIES

_INITS = ("kaiming", "pissa", "milora")


def _require(condition: bool, config, field: str, rule: str) -> None:
    if not condition:
        raise ValueError(f"{type(config).__name__}: {field} {rule}, got {getattr(config, field)!r}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_expressions(config, field: str, expressions) -> None:
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(
                f"{type(config).__name__}: {field} must be a regular expression, got {expression!r}: {error}"
            ) from error


def check_amount(config) -> None:
    """Raises: ValueError unless exactly one of NormAL's amounts, target_r, budget and threshold, is given, and in its range."""
    given = [name for name in ("target_r", "budget", "threshold") if getattr(config, name) is not None]
    if len(given) != 1:
        kind, found = type(config).__name__, ", ".join(given) or "none"
        raise ValueError(f"{kind}: exactly one of target_r, budget and threshold must be given, got {found}")
    if config.target_r is not None:
        _require(_is_number(config.target_r) and config.target_r > 0, config, "target_r", "must be a number > 0")
    if config.budget is not None:
        _require(_is_int(config.budget) and config.budget > 0, config, "budget", "must be an integer > 0")
    if config.threshold is not None:
        within = _is_number(config.threshold) and 0 <= config.threshold < 1
        _require(within, config, "threshold", "must be in [0, 1)")


@dataclasses.dataclass
class LoraConfig:
    """
    Plain LoRA, and the fields that every method shares.          [LoRA, arXiv:2106.09685]

    Args:
        r: rank of every module, > 0.
        lora_alpha: scaling numerator: scaling = lora_alpha / r, or / √r with `use_rslora`.
        lora_dropout: probability in [0, 1) for the adapter's input.
        target_modules: as in PEFT: a list of module names or name suffixes, a regular expression that must match the whole
            module name, or "all-linear" (every nn.Linear and transformers Conv1D but the output head).
        exclude_modules: list or regular expression of modules to leave out.
        modules_to_save: further modules to train and save whole (a classification head), by the ends of their names: as in PEFT
            "classifier" is also "pre_classifier".
        layers_to_transform: with a list of target_modules: only those in the layers of these numbers, an integer or a list of them; a
            target that is named in full is always adapted.
        layers_pattern: what the list of layers is called ("layers", "h"), one or several; without it the first number in a module's name
            that is not at its start is the layer's.
        rank_pattern: {name, suffix or regex: r} for modules whose rank differs from `r`.
        alpha_pattern: {name, suffix or regex: lora_alpha} likewise.
        use_rslora: scale by lora_alpha / √r.          [rsLoRA, arXiv:2312.03732]
        lora_bias: train a bias of B as well, zero at the start: y gets scaling · bias.
        bias: "none"; biases stay frozen.
        init_lora_weights: "kaiming": A ~ U(−1/√K, 1/√K), B = 0. "pissa", "milora": scaling · B A = the r leading, or trailing, singular
            triplets of W, √σ in each factor, taken out of the base weight, so that the model's output is unchanged: W − scaling · B A is
            frozen. r is the active rank at the start, 1 for La-LoRA.          [PiSSA, arXiv:2404.02948; MiLoRA, arXiv:2406.09044]
        freeze_A: lora_A does not train; no layer then keeps its x for the backward pass, only S = drop(x) Aᵀ.   [LoRA-FA, arXiv:2308.03303]
        keep_original: keep base weights as they were beside those that were rewritten, so that `detach` is exact; False saves their
            memory, and `detach` adds what was taken out back with a rounding error.
        seed: of the factors' initial values; torch's own generator is left alone.
    Raises: ValueError naming field, rule and value.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    lora_bias: bool = False
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    bias: str = "none"
    init_lora_weights: str = "kaiming"
    freeze_A: bool = False
    keep_original: bool = True
    seed: int = 0

    def __post_init__(self):
        _require(_is_int(self.r) and self.r > 0, self, "r", "must be an integer > 0")
        _require(_is_number(self.lora_alpha) and self.lora_alpha > 0, self, "lora_alpha", "must be a number > 0")
        _require(
            _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, self, "lora_dropout", "must be in [0, 1)"
        )
        _require(
            bool(self.target_modules), self, "target_modules", 'must name modules (a list, a regex or "all-linear")'
        )
        for pattern in ("rank_pattern", "alpha_pattern"):
            for key, value in getattr(self, pattern).items():
                positive = value > 0 if _is_number(value) else False
                if not positive or (pattern == "rank_pattern" and not _is_int(value)):
                    raise ValueError(f"{type(self).__name__}: {pattern}[{key!r}] must be > 0, got {value!r}")
        for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, field)
            expressions = [value] if isinstance(value, str) else value if isinstance(value, dict) else ()
            _check_expressions(self, field, expressions)
        self._check_layers()
        _require(isinstance(self.lora_bias, bool), self, "lora_bias", "must be True or False")
        _require(self.bias == "none", self, "bias", 'must be "none"')
        _require(self.init_lora_weights in _INITS, self, "init_lora_weights", f"must be one of {', '.join(_INITS)}")
        for field in ("freeze_A", "keep_original"):
            _require(isinstance(getattr(self, field), bool), self, field, "must be True or False")
        _require(_is_int(self.seed), self, "seed", "must be an integer")
        _require(
            not isinstance(self.modules_to_save, str),
            self,
            "modules_to_save",
            "must be a list of names, not one string",
        )

    def _check_layers(self) -> None:
        numbers, patterns = self.layers_to_transform, self.layers_pattern
        numbers = [numbers] if _is_int(numbers) else numbers or []
        whole = isinstance(numbers, list) and all(_is_int(number) and number >= 0 for number in numbers)
        _require(whole, self, "layers_to_transform", "must be an integer ≥ 0 or a list of them")
        patterns = [patterns] if isinstance(patterns, str) else patterns or []
        named = isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)
        _require(named, self, "layers_pattern", "must be a name or a list of names")
        _check_expressions(self, "layers_pattern", patterns)
        for field in ("layers_to_transform", "layers_pattern") if isinstance(self.target_modules, str) else ():
            rule = "must be None where target_modules is one string, which can say so itself"
            _require(getattr(self, field) in (None, []), self, field, rule)
        _require(not patterns or numbers != [], self, "layers_pattern", "must go with layers_to_transform")

    @classmethod
    def from_peft(cls, peft_config, **more):
        """
        The configuration of this method that means what a peft.LoraConfig does: NormALConfig.from_peft(config, t_p=9, t_c=9, budget=k).
        AdaLoRAConfig takes a peft.AdaLoraConfig too; the r of a peft.LoraConfig is its init_r.

        Args: more: further fields, and fields instead of PEFT's.
        Raises: TypeError (no PEFT configuration), ValueError naming a field of PEFT's that has no counterpart and is not at its default,
            or a field of ours that is refused. fan_in_fan_out is seen from the modules; PEFT's initial values are drawn otherwise.
        """
        from .integrations.peft_fields import fields_from_peft

        fields = fields_from_peft(
            f"{cls.__name__}.from_peft", peft_config, more, adalora=issubclass(cls, AdaLoRAConfig)
        )
        return cls(**fields, **more)

    def scaling(self, r: int, lora_alpha: float) -> float:
        """lora_alpha / r, or lora_alpha / √r for rsLoRA; 0 for rank 0, where nothing is scaled."""
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r) if r else 0.0


@dataclasses.dataclass
class NormALConfig(LoraConfig):
    """
    NormAL LoRA: a rank-ordered norm penalty, then one clip of the ranks.          [NormAL LoRA, Eq. 5–6, Algorithms 2–3]

    Exactly one of `target_r`, `budget` and `threshold` says how much rank stays.

    Args:
        penalty: w(r): "sqrt", "linear", "square", "cube", "log" or "none".
        penalty_step: "gradient": η_p · P is part of the loss; "proximal": after each optimizer step
            v ← v · max(0, 1 − lr · η_p · w(r) / ‖v‖), decoupled from the optimizer's normalisation.
        eta_p: η_p ≥ 0; None for 1e-3 ("gradient") or 1.0 ("proximal").
        penalty_mean: divide P by the largest r, as the authors' code does ("gradient" only).
        t_p, t_c: optimizer steps after which the penalty ends and the clip is made, 0 < t_p ≤ t_c.
        schedule: "fixed" (needs t_p and t_c), "adaptive" (Eq. 6), None for whichever t_p and t_c imply.
        lambda_p, lambda_c, ema: adaptive thresholds of the smoothed |ΔL| for t_p and t_c, and α of the smoothing.
        min_steps: no t_p before this step.   max_steps: whatever is undecided then happens then (None: never forced).
        target_r: average rank per module after the clip; budget k = round(target_r · #modules).
        budget: k rank vectors in total after the clip, at least one per module.
        threshold: λ in [0, 1): keep the vectors up to the last whose score exceeds λ.
        first_below: with `threshold`, stop at the first score ≤ λ instead.
        rescale: after the clip scale by lora_alpha / r_new instead of lora_alpha / r.
    """

    penalty: str = "sqrt"
    penalty_step: str = "gradient"
    eta_p: float | None = None
    penalty_mean: bool = False
    t_p: int | None = None
    t_c: int | None = None
    schedule: str | None = None
    lambda_p: float = 3e-2
    lambda_c: float = 1.1e-2
    ema: float = 0.9
    min_steps: int = 50
    max_steps: int | None = None
    target_r: float | None = None
    budget: int | None = None
    threshold: float | None = None
    first_below: bool = False
    rescale: bool = False

    def __post_init__(self):
        super().__post_init__()
        _require(self.penalty in PENALTIES, self, "penalty", f"must be one of {', '.join(PENALTIES)}")
        _require(
            self.penalty_step in ("gradient", "proximal"), self, "penalty_step", 'must be "gradient" or "proximal"'
        )
        if self.eta_p is None:
            self.eta_p = 1e-3 if self.penalty_step == "gradient" else 1.0
        _require(_is_number(self.eta_p) and self.eta_p >= 0, self, "eta_p", "must be a number ≥ 0")
        self._check_schedule()
        check_amount(self)

    def _check_schedule(self):
        if self.schedule is None:
            self.schedule = "adaptive" if self.t_p is None and self.t_c is None else "fixed"
        _require(self.schedule in ("fixed", "adaptive"), self, "schedule", 'must be "fixed" or "adaptive"')
        if self.schedule == "fixed":
            _require(_is_int(self.t_p) and self.t_p > 0, self, "t_p", "must be an integer > 0 (with t_c)")
            _require(_is_int(self.t_c) and self.t_c >= self.t_p, self, "t_c", f"must be an integer ≥ t_p={self.t_p}")
        else:
            _require(self.t_p is None, self, "t_p", 'must be None with schedule="adaptive"')
            _require(self.t_c is None, self, "t_c", 'must be None with schedule="adaptive"')
        _require(_is_number(self.lambda_p) and self.lambda_p > 0, self, "lambda_p", "must be a number > 0")
        _require(_is_number(self.lambda_c) and self.lambda_c > 0, self, "lambda_c", "must be a number > 0")
        _require(_is_number(self.ema) and 0 <= self.ema < 1, self, "ema", "must be in [0, 1)")
        _require(_is_int(self.min_steps) and self.min_steps > 0, self, "min_steps", "must be an integer > 0")
        if self.max_steps is not None:
            rule = f"must be None or an integer ≥ min_steps={self.min_steps}"
            _require(_is_int(self.max_steps) and self.max_steps >= self.min_steps, self, "max_steps", rule)


@dataclasses.dataclass
class LaLoRAConfig(LoraConfig):
    """
    La-LoRA: ranks that start at 1 and grow with a budget, shared out over groups of modules every `interval` steps.  [La-LoRA, Eq. 5–10]

    `r` is the largest rank, and lora_alpha / r the scaling at every rank.

    Args:
        gamma: γ ≥ 0 of the budget, D ← clip(D · (1 + γ · mean growth), number of groups, all largest ranks).
        interval: optimizer steps from one allocation to the next.
        group_by: "block": the modules of a transformer block share one rank, modules outside any block stand alone; "module".
        temperature: > 0; shares are softmax(contribution / temperature).
        fidelity: "truncation": factors ‖X_{|r_i}‖ / ‖X‖ of the same step; "previous": ‖X_{|r_i}‖ at the last allocation over the
            same norm now, Eq. 10 as printed; "off": 1.
        growth: "current": norms of both steps at today's rank; "own": each step's at the rank that it had.
        contribution: "norm" (Eq. 9), or "fisher": the squared gradients of the active vectors, smoothed over steps.
        ema: α of that smoothing, in [0, 1).
    """

    gamma: float = 1.0
    interval: int = 1
    group_by: str = "block"
    temperature: float = 1.0
    fidelity: str = "truncation"
    growth: str = "current"
    contribution: str = "norm"
    ema: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        _require(_is_number(self.gamma) and self.gamma >= 0, self, "gamma", "must be a number ≥ 0")
        _require(_is_int(self.interval) and self.interval > 0, self, "interval", "must be an integer > 0")
        _require(_is_number(self.temperature) and self.temperature > 0, self, "temperature", "must be a number > 0")
        _require(_is_number(self.ema) and 0 <= self.ema < 1, self, "ema", "must be in [0, 1)")
        choices = {
            "group_by": ("block", "module"),
            "fidelity": ("truncation", "previous", "off"),
            "growth": ("current", "own"),
            "contribution": ("norm", "fisher"),
        }
        for field, values in choices.items():
            _require(getattr(self, field) in values, self, field, f"must be one of {', '.join(values)}")


@dataclasses.dataclass
class AdaLoRAConfig(LoraConfig):
    """
    AdaLoRA: ΔW = scaling · B diag(E) A, whose least important triplets are taken out along a budget.  [AdaLoRA, arXiv:2303.10512]

    PEFT's fields, names and defaults; scaling = lora_alpha / (init_r + 1e-5), as PEFT computes it, at every rank (and never trained, as
    PEFT lets optimizers train its `ranknum`). Steps t are counted from 1, optimizer steps that were made: at the end of step t happens
    what PEFT's `update_and_allocate(t)` does, with the gradients of that step and the weights after it. Until the last choice two
    numbers are kept for each that trains, of which the importance is made.

    Args:
        r: None; `init_r` is the rank at the start, and r is set to it.
        init_r: rank of every module at the start.
        target_r: average rank per module at the end; round(target_r · #modules) triplets stay in all.
        total_step: optimizer steps of the whole training; no default.
        tinit: steps before the first triplet goes.
        tfinal: steps at the end with the ranks of the end: the last choice is made at t = total_step − tfinal.
        deltaT: steps from one choice to the next, made where it divides t.
        beta1, beta2: in (0, 1), of the smoothed sensitivity and of its uncertainty.
        orth_reg_weight: weight ≥ 0 of the penalty, the mean of ‖P Pᵀ − I‖_F over all A and Bᵀ.
        removal: "final": until the last choice triplets that go are masked (E = 0) and train on, so that they may come back, as in PEFT;
            those that go at the last are removed, with their gradients and optimizer state, where PEFT masks them for good. "update":
            every choice removes, so that memory falls with the budget, and none comes back.
    """

    r: int | None = None
    target_r: float = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    removal: str = "final"

    def __post_init__(self):
        _require(_is_int(self.init_r) and self.init_r > 0, self, "init_r", "must be an integer > 0")
        _require(
            self.r in (None, self.init_r), self, "r", f"must be None or init_r={self.init_r}, which takes its place"
        )
        self.r = self.init_r
        super().__post_init__()
        _require(not self.lora_bias, self, "lora_bias", "must be False: triplets have none in PEFT's AdaLoRA")
        _require(self.use_rslora is False, self, "use_rslora", "must be False: AdaLoRA scales by lora_alpha / init_r")
        _require(
            not self.freeze_A, self, "freeze_A", "must be False: a triplet's importance is made of A's gradients too"
        )
        _require(_is_number(self.target_r) and self.target_r > 0, self, "target_r", "must be a number > 0")
        for field in ("tinit", "tfinal"):
            value = getattr(self, field)
            _require(_is_int(value) and value >= 0, self, field, "must be an integer ≥ 0")
        _require(_is_int(self.deltaT) and self.deltaT > 0, self, "deltaT", "must be an integer > 0")
        rule = f"must be an integer > tinit + tfinal = {self.tinit + self.tfinal}, so that there are steps to prune in"
        _require(_is_int(self.total_step) and self.total_step > self.tinit + self.tfinal, self, "total_step", rule)
        rule = f"must be an integer ≥ tfinal + 2 = {self.tfinal + 2}, so that gradients are read before the last choice"
        _require(self.total_step >= self.tfinal + 2, self, "total_step", rule)
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            _require(_is_number(value) and 0 < value < 1, self, field, "must be in (0, 1)")
        weight = self.orth_reg_weight
        _require(_is_number(weight) and weight >= 0, self, "orth_reg_weight", "must be a number ≥ 0")
        _require(self.removal in ("final", "update"), self, "removal", 'must be "final" or "update"')
        rule = 'must be "kaiming": AdaLoRA starts at E = 0'
        _require(self.init_lora_weights == "kaiming", self, "init_lora_weights", rule)


@dataclasses.dataclass
class DyLoRAConfig(LoraConfig):
    """
    DyLoRA: each optimizer step trains the first b of r vectors, b ~ U{r_min … r} drawn anew, one for all modules; the others are parked,
    with their optimizer state.          [DyLoRA, arXiv:2210.07558, algorithm 1]

    b is a function of `seed` and of the steps made, so that processes and runs that resume draw alike. In evaluation mode all r vectors
    run, or as many as `Adapter.set_rank` says; these are what is saved and merged. A module of a smaller rank trains min(b, its rank).

    Args:
        r_min: smallest b, in [1, r].
        frozen: only vector b trains, and those before it keep their values; else all up to b do. (The released code gives them gradients
            of zero, with which momentum and weight decay still move them.)
        rescale: scale by lora_alpha / b, as the paper does, and its released code with √(r / b) on each of both factors; False: by
            lora_alpha / r at every b. With use_rslora by lora_alpha / √b, or / √r.
    """

    r_min: int = 1
    frozen: bool = False
    rescale: bool = True

    def __post_init__(self):
        super().__post_init__()
        within = _is_int(self.r_min) and 1 <= self.r_min <= self.r
        _require(within, self, "r_min", f"must be an integer in [1, r={self.r}]")
        for field in ("frozen", "rescale"):
            _require(isinstance(getattr(self, field), bool), self, field, "must be True or False")
        rule = 'must be "kaiming": a prefix of triplets that were taken out of the weight would leave the others out'
        _require(self.init_lora_weights == "kaiming", self, "init_lora_weights", rule)


@dataclasses.dataclass
class NoRAConfig(LoraConfig):
    """
    NoRA: an inner pair of rank `r` trained between frozen outer factors of rank `r_out`, taken from the weight itself.  [NoRA]

    ΔW = lora_alpha / r · U B' A' Vᵀ, with W ≈ U Σ Vᵀ; 2 · r_out · r trained parameters a module.

    Args:
        r: r_in, rank of the inner pair.
        r_out: rank of the outer factors, ≥ r; a module with fewer rows or columns has as many as those.
        inner_init: "sigma": B'A' = diag(σ_1 … σ_r, 0 …); "kaiming": A' uniform, B' zero; "orthogonal": A' of orthonormal rows, B' zero.
        residual: with "sigma", take ΔW at the start out of the base weight, so that the model's output is unchanged.
        outer: "weight": factors of W; "activation": of W diag(d), undone afterwards, d_k = mean over tokens of |x_k|^activation_power,
            from the batch given to `attach(..., calibration=batch)`.
        activation_power: > 0.
    """

    r: int = 16
    r_out: int = 256
    inner_init: str = "sigma"
    residual: bool = True
    outer: str = "weight"
    activation_power: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        _require(not self.lora_bias, self, "lora_bias", "must be False: the inner pair has none")
        _require(
            not self.freeze_A,
            self,
            "freeze_A",
            "must be False: A is frozen outside of the inner pair, and trains in it",
        )
        _require(_is_int(self.r_out) and self.r_out >= self.r, self, "r_out", f"must be an integer ≥ r={self.r}")
        inits = ("sigma", "kaiming", "orthogonal")
        _require(self.inner_init in inits, self, "inner_init", f"must be one of {', '.join(inits)}")
        _require(self.outer in ("weight", "activation"), self, "outer", 'must be "weight" or "activation"')
        positive = _is_number(self.activation_power) and self.activation_power > 0
        _require(positive, self, "activation_power", "must be a number > 0")
        _require(isinstance(self.residual, bool), self, "residual", "must be True or False")
        rule = 'must be "kaiming": what NoRA starts with is inner_init'
        _require(self.init_lora_weights == "kaiming", self, "init_lora_weights", rule)
