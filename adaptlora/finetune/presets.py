"""What a fine-tuning run is: one dataclass, and the table of presets, whose numbers stand here and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from .registry import TASKS

HUB = "hub:"  # begins the name of a model or data set of the Hugging Face hub
DTYPES = ("float32", "bfloat16")  # float16 would need its losses scaled
# method → fields of FinetuneSpec that go into its configuration as they are, beside those that all have
METHODS = {
    "normal": (),
    "lora": (),
    "lalora": ("gamma", "temperature"),
    "nora": ("r_out",),
    "adalora": ("target_r",),
    "dylora": ("r_min", "frozen"),
}


@dataclass(frozen=True)
class FinetuneSpec:
    """A fine-tuning run, completely: the same spec on the same machine gives the same ranks and accuracies.

    Raises: ValueError on construction (argument, rule, value).
    """

    model: str  # a transformers folder, "hub:owner/name", or "@minilm", "@smollm2": fetched by adaptlora.finetune.fetch
    data: str  # a .csv, .jsonl or .parquet file, a folder of a data set, "hub:owner/name", or "@trec", "@e2e"
    task: str = "classification"
    eval_data: str | None = None  # None: `test_split` of `data`, or else a part of it that is held out
    data_dir: str = ".data"  # where fetched and converted things are kept
    revision: str | None = None  # of a model on the hub: branch, tag or commit
    data_config: str | None = None  # of a folder or a data set on the hub: which of its configurations
    data_revision: str | None = None
    train_split: str = "train"  # of a folder or a data set on the hub; "train[:1000]" is a part of one
    test_split: str | None = None

    text_column: str = "text"
    label_column: str | None = (
        None  # classification: "label"; causal-lm: the text to learn, after text_column as its prompt
    )
    columns: Mapping[str, str] = field(default_factory=dict)  # the task's other roles → columns
    chat: bool = False  # causal-lm: put prompts into the tokenizer's chat template
    holdout: int | None = None  # texts (or prompts) held out for the test; None: a fifth, at most 1,000
    split_seed: int = 0  # on its own, so that runs with several seeds are tested on the same examples
    test_limit: int | None = None  # evaluate on the first so many test examples only
    max_length: int = 128
    metrics: tuple[str, ...] | None = None  # of those the task can compute; None: its own choice
    task_options: Mapping[str, object] = field(default_factory=dict)  # fields of the task's Options
    model_options: Mapping[str, object] = field(default_factory=dict)  # fields of the model's configuration

    method: str = "normal"
    r: int = 8  # La-LoRA, DyLoRA: the largest rank; NoRA: rank of the inner pair; AdaLoRA: init_r
    target_r: float | None = 4.0
    threshold: float | None = None  # instead of target_r
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    t_p: int | None = None  # None: a third of the steps
    t_c: int | None = None  # None: 7/18 of the steps
    penalty_step: str = "proximal"
    gamma: float = 1.0  # La-LoRA
    temperature: float = 1.0  # La-LoRA
    r_out: int = 256  # NoRA
    r_min: int = 1  # DyLoRA
    frozen: bool = False  # DyLoRA
    init_lora_weights: str = "kaiming"
    options: Mapping[str, object] = field(
        default_factory=dict
    )  # further fields of the method's configuration; they win

    steps: int = 180
    batch_size: int = 32
    lr: float = 2e-3
    loraplus_lr_ratio: float | None = None  # lora_B's learning rate in parts of lr; None: one for all
    max_grad_norm: float | None = None  # gradients are scaled down to this norm over all of them; None: as they are
    weight_decay: float = 0.01
    warmup: int = 0  # steps over which the learning rate rises linearly from 0
    decay: bool = False  # whether it falls linearly to 0 afterwards
    model_dropout: float | None = None  # the model's own dropout; None: as its configuration says
    dtype: str = "float32"  # of the base model
    micro_batch: int | None = None  # most examples in one forward pass; None: the whole batch
    gradient_checkpointing: bool = False
    shear: Mapping[str, object] | None = None  # after training: {"method": "norm", further fields of its configuration}
    seed: int = 0

    generate: int = 40  # causal-lm with prompts: how many of them BLEU is computed on (0: no BLEU)
    new_tokens: int = 64
    compare: bool = True  # train PEFT's LoRA on the same batches: of rank r, or of as many parameters as NoRA
    device: str = "auto"

    def __post_init__(self):
        def rule(name, holds, text):
            if not holds:
                raise ValueError(f"finetune: {name} must be {text}, got {getattr(self, name)!r}")

        rule("task", self.task in TASKS, f"one of {', '.join(TASKS)}")
        rule("method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        for name in ("steps", "batch_size", "max_length", "new_tokens"):
            rule(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "generate", "seed"):
            rule(name, getattr(self, name) >= 0, "at least 0")
        for name in ("holdout", "test_limit", "micro_batch"):
            rule(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        rule("lr", self.lr > 0, "greater than 0")
        rule("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "greater than 0")
        ratio = self.loraplus_lr_ratio
        rule("loraplus_lr_ratio", ratio is None or ratio > 0, "greater than 0")
        rule("weight_decay", self.weight_decay >= 0, "at least 0")
        rule("chat", not self.chat or self.task == "causal-lm", f"False for task {self.task}")
        rule("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        rule("device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
        rule("warmup", self.warmup < self.steps, f"less than steps={self.steps}")
        rule("model_dropout", self.model_dropout is None or 0 <= self.model_dropout < 1, "in [0, 1)")
        if self.adaptive:
            for name in ("t_p", "t_c"):
                rule(name, getattr(self, name) is None, "left out where options.schedule is adaptive, which finds it")
            latest = self.options.get("max_steps")
            if latest is not None and not latest < self.steps:
                raise ValueError(
                    f"finetune: options.max_steps must be less than steps={self.steps}, so that the ranks are clipped at all,"
                    f" got {latest}"
                )
        if self._clips_at_a_step and not self.clip_schedule[1] < self.steps:
            raise ValueError(
                f"finetune: t_c must be less than steps={self.steps}, so that the clipped model is trained too,"
                f" got t_p={self.clip_schedule[0]}, t_c={self.clip_schedule[1]}"
            )

    @property
    def adaptive(self) -> bool:
        """Whether NormAL's own rule decides when the ranks are clipped, and not `clip_schedule`."""
        return self.method == "normal" and self.options.get("schedule") == "adaptive"

    @property
    def _clips_at_a_step(self) -> bool:
        return self.method == "normal" and not self.adaptive

    @property
    def clip_schedule(self) -> tuple[int, int]:
        """(t_p, t_c), where one is None its share of the steps."""
        t_p = max(1, round(self.steps / 3)) if self.t_p is None else self.t_p
        t_c = max(t_p, round(self.steps * 7 / 18)) if self.t_c is None else self.t_c
        return t_p, t_c

    def shortened(self) -> "FinetuneSpec":
        """A run of a few steps that takes every turn of the whole one, for checks."""
        clip = {"t_p": 4, "t_c": 6}
        if self.adaptive:
            clip = {"options": {**self.options, "min_steps": 4, "max_steps": 6}}
        return replace(self, steps=12, **clip, warmup=0, test_limit=64, generate=min(self.generate, 4), new_tokens=16)

    def config(self, modules_to_save: list[str] | None):
        """The configuration of the method, for adaptlora.attach.

        Raises: ValueError, TypeError (as the configuration itself does).
        """
        from adaptlora import AdaLoRAConfig, DyLoRAConfig, LaLoRAConfig, LoraConfig, NoRAConfig, NormALConfig

        kinds = {
            "normal": NormALConfig,
            "lora": LoraConfig,
            "lalora": LaLoRAConfig,
            "nora": NoRAConfig,
            "adalora": AdaLoRAConfig,
            "dylora": DyLoRAConfig,
        }
        kind = kinds[self.method]
        unknown = [name for name in self.options if name not in {field.name for field in fields(kind)}]
        if unknown:
            raise ValueError(f"finetune: options must be fields of {kind.__name__}, got {', '.join(unknown)}")
        values = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules
            if isinstance(self.target_modules, str)
            else list(self.target_modules),
            "modules_to_save": modules_to_save,
            "init_lora_weights": self.init_lora_weights,
            "seed": self.seed,
            **{name: getattr(self, name) for name in METHODS[self.method]},
        }
        if self.method == "normal":
            values["penalty_step"] = self.penalty_step
            if self._clips_at_a_step:
                values["t_p"], values["t_c"] = self.clip_schedule
            if self.threshold is not None:
                values["threshold"] = self.threshold
            elif "budget" not in self.options:
                values["target_r"] = self.target_r
        if self.method == "adalora":
            # A sixth of the steps with all triplets, and a third with those that stay.
            values |= {"init_r": self.r, "total_step": self.steps, "tinit": self.steps // 6, "tfinal": self.steps // 3}
        return kind(**{**values, **self.options})

    def shear_config(self):
        """The configuration for adaptlora.shear after training, or None.

        Raises: ValueError, TypeError (as the configuration itself does).
        """
        if self.shear is None:
            return None
        from adaptlora.shear import ClipConfig, DropConfig, NoRMConfig, RandomConfig, SVDConfig, TAIAConfig

        kinds = {
            "norm": NoRMConfig,
            "svd": SVDConfig,
            "clip": ClipConfig,
            "taia": TAIAConfig,
            "random": RandomConfig,
            "drop": DropConfig,
        }
        method = self.shear.get("method")
        if method not in kinds:
            raise ValueError(f"finetune: shear.method must be one of {', '.join(kinds)}, got {method!r}")
        values = {name: value for name, value in self.shear.items() if name != "method"}
        unknown = [name for name in values if name not in {field.name for field in fields(kinds[method])}]
        if unknown:
            raise ValueError(f"finetune: shear must have fields of {kinds[method].__name__}, got {', '.join(unknown)}")
        return kinds[method](**values)


PRESETS = {
    "trec": FinetuneSpec(
        model="@minilm",
        data="@trec",
        task="classification",
        holdout=1000,
        max_length=64,
        r=8,
        target_r=4.0,
        lora_alpha=16,
        target_modules=r".*\.encoder\.layer\.\d+\..*\.(query|key|value|dense)",
        t_p=60,
        t_c=70,
        penalty_step="proximal",
        options={"eta_p": 0.3},  # 0.1 to 3 are within a standard deviation of it: bench/quality.py trec-step
        steps=180,
        batch_size=32,
        lr=2e-3,
        decay=True,
        model_dropout=0.0,
    ),
    "e2e": FinetuneSpec(
        model="@smollm2",
        data="@e2e",
        task="causal-lm",
        chat=True,
        holdout=40,
        max_length=256,
        r=8,
        target_r=4.0,
        lora_alpha=16,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        t_p=20,
        t_c=24,
        penalty_step="proximal",
        steps=60,
        batch_size=8,
        lr=1e-3,
        generate=40,
        compare=False,
    ),
}


def preset(name: str) -> FinetuneSpec:
    """The preset of that name. Raises: ValueError."""
    if name not in PRESETS:
        raise ValueError(f"finetune: preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def check_paths(spec: FinetuneSpec, out: str | Path | None) -> None:
    """Refuse paths that cannot work before anything is loaded. Raises: ValueError."""
    if not spec.model.startswith(("@", HUB)):
        if not Path(spec.model).is_dir():
            raise ValueError(f"finetune: model must be a folder, got {spec.model!r}")
        if not any((Path(spec.model) / name).is_file() for name in ("config.json", "model_index.json")):
            raise ValueError(f"finetune: model must be a transformers folder with a config.json, got {spec.model!r}")
    for name in ("data", "eval_data"):
        path = getattr(spec, name)
        if path is not None and not path.startswith(("@", HUB)) and not Path(path).exists():
            raise ValueError(f"finetune: {name} must be a file, got {path!r}")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"finetune: out must be a folder or a new name, got the file {str(out)!r}")
