"""What each quality table compares. A variant is a method with the fields of its configuration; its learning rate is searched for."""

from dataclasses import dataclass

from quality_methods import LALORA, NORA, NORMAL, PEFT_ADALORA, PEFT_DORA, PEFT_LORA, PEFT_PISSA

# Where the search for a method's learning rate starts; it goes on, in steps of FACTOR, until the best one lies inside what was tried.
RATES = {"trec": (1e-3, 2e-3, 4e-3), "e2e": (1e-3, 2e-3), "cifar10": (1e-3, 2e-3)}
FACTOR = 2.0
MOST_RATES = 8
RATE_SEED = 1000  # of the runs that choose the learning rates: no table's seed


@dataclass(frozen=True)
class Variant:
    """One row of a table."""

    method: str
    fields: dict
    rate_of: str  # the row of METHODS whose learning rate it trains with


@dataclass(frozen=True)
class Curves:
    """What is plotted over a number instead of row by row."""

    axis: str
    points: dict[str, tuple[str, float]]  # row → (curve, abscissa)
    log: bool = False


@dataclass(frozen=True)
class Table:
    task: str
    title: str
    seeds: int
    rows: dict[str, Variant]
    baseline: str  # whose runs of the same seeds the differences are taken to
    curves: Curves | None = None


def lora(r: int, **fields) -> dict:
    """lora_alpha / r = 2 everywhere, so that ranks differ in capacity and not in step size."""
    return {"r": r, "lora_alpha": 2 * r, **fields}


def normal(target_r: float | None = 4.0, r: int = 8, **fields) -> dict:
    target = {} if target_r is None else {"target_r": target_r}
    return lora(r) | target | {"penalty_step": "proximal", "eta_p": 0.3} | fields


# Rank 4 of every linear, or as near to as many parameters: DoRA's magnitudes (13 %) and AdaLoRA's scales come on top of it, NormAL's and
# AdaLoRA's budgets count vectors of unequal lengths (some 5 %), NoRA's inner rank is chosen for it, La-LoRA's γ comes out below it.
_GAMMAS = {"trec": 1.0, "e2e": 1.0, "cifar10": 1.5}
_NORA_RANKS = {"trec": (9, 256), "e2e": (15, 192), "cifar10": (9, 256)}


def _lalora(gamma: float) -> dict:
    return lora(8, temperature=10.0, gamma=gamma)


def _methods(task: str) -> dict[str, Variant]:
    r_in, r_out = _NORA_RANKS[task]
    rows = {
        "PEFT LoRA": (PEFT_LORA, lora(4)),
        "PEFT AdaLoRA 6 → 4": (PEFT_ADALORA, {"init_r": 6, "target_r": 4, "lora_alpha": 12}),
        "PEFT DoRA": (PEFT_DORA, lora(4)),
        "PEFT PiSSA": (PEFT_PISSA, {"r": 4, "lora_alpha": 4}),
        "NormAL 8 → 4": (NORMAL, normal()),
        "La-LoRA ≤ 8": (LALORA, _lalora(_GAMMAS[task])),
        "NoRA": (NORA, {"r": r_in, "r_out": r_out, "lora_alpha": r_in}),
    }
    return {name: Variant(method, fields, rate_of=name) for name, (method, fields) in rows.items()}


METHODS = {task: _methods(task) for task in RATES}
BASELINE, NORMAL_ROW, LALORA_ROW = "PEFT LoRA", "NormAL 8 → 4", "La-LoRA ≤ 8"


def _ablation(title: str, rows: dict[str, dict], *, curves: Curves | None = None) -> Table:
    """Variants of NormAL beside the one of the methods' table and PEFT's LoRA, at NormAL's learning rate."""
    shared = {name: METHODS["trec"][name] for name in (BASELINE, NORMAL_ROW)}
    variants = {name: Variant(NORMAL, fields, rate_of=NORMAL_ROW) for name, fields in rows.items()}
    return Table("trec", title, 5, shared | variants, BASELINE, curves)


def _steps() -> Table:
    gradient, proximal = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0.1, 1.0, 3.0)
    rows = {f"gradient, η = {eta:g}": normal(penalty_step="gradient", eta_p=eta) for eta in gradient}
    rows |= {f"proximal, η = {eta:g}": normal(eta_p=eta) for eta in proximal}
    points = {f"gradient, η = {eta:g}": ("in the loss", eta) for eta in gradient}
    points |= {f"proximal, η = {eta:g}": ("proximal", eta) for eta in proximal} | {NORMAL_ROW: ("proximal", 0.3)}
    title = "gradient against proximal penalty step, over η"
    return _ablation(title, rows, curves=Curves("η", points, log=True))


def _averages() -> Table:
    rows = {}
    for rank in range(1, 9):
        rows[f"LoRA {rank}"] = METHODS["trec"][BASELINE] if rank == 4 else Variant(PEFT_LORA, lora(rank), BASELINE)
        # An average of 8 of 8 is NormAL without a clip: the penalty alone.
        rows[f"NormAL 8 → {rank}"] = Variant(NORMAL, normal(float(rank)), NORMAL_ROW)
    points = {label: (label.split()[0], float(label.split()[-1])) for label in rows}
    title = "average rank of NormAL against the rank of LoRA"
    return Table("trec", title, 5, rows, "LoRA 4", Curves("rank, NormAL's on average", points))


TABLES = {
    "trec-methods": Table(
        "trec",
        "methods at about equal final parameters",
        5,
        # γ decides how far La-LoRA's ranks grow: a larger one ends with more parameters than the others have.
        METHODS["trec"] | {"La-LoRA ≤ 8, γ = 1.5": Variant(LALORA, _lalora(1.5), LALORA_ROW)},
        BASELINE,
    ),
    "trec-step": _steps(),
    "trec-penalty": _ablation(
        "penalty functions",
        {f"w(r) = {name}": normal(penalty=name) for name in ("linear", "square", "cube", "log")}
        | {"no penalty": normal(penalty="none")},
    ),
    "trec-budget": _ablation(
        "budget against threshold",
        {f"threshold {value:g}": normal(None, threshold=value) for value in (0.8, 0.9, 0.95)},
    ),
    "trec-schedule": _ablation(
        "when the penalty ends and the clip comes, in steps of 120",
        {
            f"t_p = {t_p}, t_c = {t_c}": normal(t_p=t_p, t_c=t_c)
            for t_p, t_c in ((20, 20), (20, 40), (40, 40), (40, 80), (80, 80))
        },
    ),
    "trec-rank": _averages(),
    "cifar10-methods": Table("cifar10", "methods at about equal final parameters", 3, METHODS["cifar10"], BASELINE),
    "e2e-methods": Table("e2e", "methods at about equal final parameters", 3, METHODS["e2e"], BASELINE),
}
