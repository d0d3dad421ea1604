"""What bench_step.py and bench_step_parts.py train: one model with the adapters of several packages, all over the same weights."""

import copy
import re
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import adaptlora
from adaptlora.finetune.fetch import locate
from adaptlora.finetune.smollm2 import convert

DATA = Path(__file__).resolve().parents[1] / ".data"
R, TARGET, ALPHA, LR = 8, 4, 16, 1e-5
ETA = 1e-3
NEVER = 10**9
# The adapted linears: MiniLM's encoder has 36, SmolLM2-135M 210.
LINEARS = {
    "minilm": r".*\.encoder\..*\.(query|key|value|dense)",
    "smollm2": r".*\.layers\..*_proj",
}


def load(name: str) -> nn.Module:
    """The frozen model, float32: MiniLM with a head for 6 classes, or SmolLM2-135M."""
    if name == "minilm":
        model = AutoModelForSequenceClassification.from_pretrained(locate(name, DATA), num_labels=6)
    else:
        model = AutoModelForCausalLM.from_pretrained(convert(locate(name, DATA), DATA / "smollm2-135m-instruct"))
    return model.requires_grad_(False)


def batch_for(name: str, texts: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens, and random classes or the tokens themselves as labels."""
    ids = torch.randint(1000, 30000, (texts, tokens))
    labels = torch.randint(0, 6, (texts,)) if name == "minilm" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def frozen_step(model: nn.Module, batch):
    """A call that runs the bare model forward and backward to its input embeddings: what no adapter can save."""
    embeddings = model.train().get_input_embeddings()(batch["input_ids"]).requires_grad_()
    others = {name: value for name, value in batch.items() if name != "input_ids"}

    def step():
        embeddings.grad = None
        model(inputs_embeds=embeddings, **others).loss.backward()

    return step


def shared_copy(model: nn.Module) -> nn.Module:
    """The same model with modules of its own around the same weights."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


class Masked(nn.Module):
    """A LoRA layer whose pruned ranks are multiplied by 0, as the method is published: nothing gets smaller."""

    def __init__(self, base: nn.Linear, p: float):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.zeros(R, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, R))
        self.dropout = nn.Dropout(p)
        self.register_buffer("mask", torch.ones(R))

    def forward(self, x):
        s = F.linear(self.dropout(x), self.lora_A * self.mask[:, None])
        return self.base(x) + ALPHA / R * F.linear(s, self.lora_B * self.mask)


class Trained:
    """
    A model with its optimizer, and what one step of its method does besides forward and backward.

    Subclasses that are compared with each other have factors() -> {module name in the bare model: (A, B)}.
    """

    def __init__(self, model: nn.Module, parameters):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(list(parameters), lr=LR)

    def penalty(self):
        return 0.0

    def after_step(self) -> None:
        pass

    def step(self, batch) -> None:
        loss = self.model(**batch).loss
        (loss + self.penalty()).backward()
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad()


class Ours(Trained):
    def __init__(self, model, config, **options):
        self.adapter = adaptlora.attach(model, config, **options)
        super().__init__(model, self.adapter.parameters())
        self.adapter.track(self.optimizer)

    def factors(self):
        return {name: (layer.lora_A, layer.lora_B) for name, layer in self.adapter.layers.items()}

    def penalty(self):
        return self.adapter.penalty()

    def after_step(self):
        self.adapter.step()


class Peft(Trained):
    def __init__(self, model, config):
        model = peft.get_peft_model(model, config)
        super().__init__(model, (p for p in model.parameters() if p.requires_grad))

    def factors(self):
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in self.model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        return {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in layers.items()}


class AdaLora(Trained):
    """PEFT's AdaLoraModel itself: a PeftModel without a task type calls what is in it, and leaves out the penalty."""

    def __init__(self, model, config):
        tuner = peft.get_peft_model(model, config).base_model
        # As PEFT's own training does, with the rank that the layer divides by among them.
        super().__init__(tuner, (p for p in tuner.parameters() if p.requires_grad))
        self.steps = 0

    def after_step(self):
        self.steps += 1
        self.model.update_and_allocate(self.steps)


class MaskedNormal(Trained):
    def __init__(self, model, p, penalised: bool):
        self.penalised = penalised
        self.layers = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and re.fullmatch(LINEARS["minilm"], name):
                parent, _, child = name.rpartition(".")
                self.layers[name] = Masked(module, p)
                setattr(model.get_submodule(parent), child, self.layers[name])
        super().__init__(model, (p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)))
        self.weights = torch.arange(1, R + 1).sqrt()

    def factors(self):
        return {name: (layer.lora_A, layer.lora_B) for name, layer in self.layers.items()}

    def penalty(self):
        total = 0.0
        if self.penalised:
            for layer in self.layers.values():
                norms = (layer.lora_A * layer.mask[:, None]).norm(dim=1) + (layer.lora_B * layer.mask).norm(dim=0)
                total = total + (self.weights * norms).sum()
        return ETA * total


def lora(p: float, model: str = "minilm"):
    return peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS[model])


def adalora(p: float, model: str = "minilm"):
    return peft.AdaLoraConfig(
        init_r=12, target_r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS[model],
        tinit=1, tfinal=1, deltaT=10, total_step=NEVER,
    )  # fmt: skip


def normal(p: float, penalty_step: str, t: int = NEVER, model: str = "minilm"):
    return adaptlora.NormALConfig(
        r=R, target_r=TARGET, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS[model],
        penalty_step=penalty_step, t_p=t, t_c=t,
    )  # fmt: skip


def plain(p: float, model: str = "minilm"):
    return adaptlora.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS[model])


def fill(trained: Trained) -> None:
    """The same factors everywhere, with norms that differ so that a clip gives ranks that differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, (A, B) in sorted(trained.factors().items()):
            for rows in (A, B.t()):
                values = torch.randn(rows.shape, generator=generator) / rows.shape[1] ** 0.5
                rows.copy_(values * torch.rand(R, 1, generator=generator))
