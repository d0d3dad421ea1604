"""What the training benchmarks train: models of known dimensions with random weights, with the adapters of several packages over them.

Times and memory do not depend on the weights' values, so that nothing is fetched.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .. import attach
from ..config import LoraConfig, NormALConfig
from ..finetune._extras import need
from . import work
from .layer import Masked
from .work import Work

R, TARGET, ALPHA, LR = 8, 4, 16, 1e-5
ETA = 1e-3
NEVER = 10**9


@dataclass(frozen=True)
class Dimensions:
    """
    block: (K, N) of the adapted linears of one block.   linears: pattern of their names.   texts, tokens: of a batch.
    fields: of transformers' configuration.
    """

    title: str
    width: int
    blocks: int
    block: tuple[tuple[int, int], ...]
    linears: str
    texts: int
    tokens: int
    fields: dict


def _bert(title: str, width: int, inner: int, heads: int, blocks: int, texts: int, tokens: int) -> Dimensions:
    fields = {
        "vocab_size": 30522, "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads,
        "num_hidden_layers": blocks, "num_labels": 6,
    }  # fmt: skip
    block = ((width, width),) * 4 + ((width, inner), (inner, width))
    linears = r".*\.encoder\..*\.(query|key|value|dense)"
    return Dimensions(title, width, blocks, block, linears, texts, tokens, fields)


MODELS = {
    "tiny": _bert("a tiny BERT", 64, 128, 4, 2, texts=2, tokens=16),
    "minilm": _bert("MiniLM", 384, 1536, 12, 6, texts=8, tokens=64),
    "smollm2": Dimensions(
        "SmolLM2-135M", 576, 30,
        ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)),
        r".*\.layers\..*_proj", 4, 64,
        {
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
            "num_key_value_heads": 3, "num_hidden_layers": 30, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
        },
    ),
}  # fmt: skip
LINEARS = {name: model.linears for name, model in MODELS.items()}


def build(name: str) -> nn.Module:
    """The frozen model, float32, random weights: a BERT with a head for 6 classes, or a causal LM.  Raises: MissingExtraError."""
    transformers = need("transformers", "bench: the models of step and memory")
    torch.manual_seed(0)
    fields = MODELS[name].fields
    if name == "smollm2":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    else:
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**fields))
    return model.requires_grad_(False)


def batch_for(name: str, texts: int, tokens: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Random tokens, and random classes or the tokens themselves as labels."""
    ids = torch.randint(1000, 30000, (texts, tokens))
    labels = ids if name == "smollm2" else torch.randint(0, 6, (texts,))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: values.to(device) for key, values in batch.items()}


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


def adapted(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of a bare model that get an adapter, by name."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(LINEARS[name], path):
            yield path, module


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
        self.adapter = attach(model, config, **options)
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
        model = _peft().get_peft_model(model, config)
        super().__init__(model, (p for p in model.parameters() if p.requires_grad))

    def factors(self):
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in self.model.named_modules()
            if isinstance(module, _peft().tuners.lora.LoraLayer)
        }
        return {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in layers.items()}


class AdaLora(Trained):
    """PEFT's AdaLoraModel itself: a PeftModel without a task type calls what is in it, and leaves out the penalty."""

    def __init__(self, model, config):
        tuner = _peft().get_peft_model(model, config).base_model
        # As PEFT's own training does, with the rank that the layer divides by among them.
        super().__init__(tuner, (p for p in tuner.parameters() if p.requires_grad))
        self.steps = 0

    def after_step(self):
        self.steps += 1
        self.model.update_and_allocate(self.steps)


class MaskedNormal(Trained):
    """NormAL as it is published: masks, and a penalty module by module."""

    def __init__(self, model, p: float, penalised: bool, name: str = "minilm"):
        self.penalised = penalised
        self.layers = {}
        for path, module in list(adapted(model, name)):
            parent, _, child = path.rpartition(".")
            self.layers[path] = Masked(module, R, ALPHA / R, p)
            setattr(model.get_submodule(parent), child, self.layers[path])
        super().__init__(model, (p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)))
        self.weights = torch.arange(1, R + 1, device=model.device).sqrt()

    def factors(self):
        return {name: (layer.lora_A, layer.lora_B) for name, layer in self.layers.items()}

    def penalty(self):
        total = 0.0
        if self.penalised:
            for layer in self.layers.values():
                norms = (layer.lora_A * layer.mask[:, None]).norm(dim=1) + (layer.lora_B * layer.mask).norm(dim=0)
                total = total + (self.weights * norms).sum()
        return ETA * total


def _peft():
    return need("peft", "bench: the provider PEFT")


def lora(p: float, model: str = "minilm", r: int = R):
    return _peft().LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=LINEARS[model])


def adalora(p: float, model: str = "minilm"):
    return _peft().AdaLoraConfig(
        init_r=12, target_r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS[model],
        tinit=1, tfinal=1, deltaT=10, total_step=NEVER,
    )  # fmt: skip


def normal(p: float, penalty_step: str, t: int = NEVER, model: str = "minilm"):
    return NormALConfig(
        r=R, target_r=TARGET, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS[model],
        penalty_step=penalty_step, t_p=t, t_c=t,
    )  # fmt: skip


def plain(p: float, model: str = "minilm"):
    return LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS[model])


def fill(trained: Trained) -> None:
    """The same factors everywhere, with norms that differ so that a clip gives ranks that differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, (A, B) in sorted(trained.factors().items()):
            for rows in (A, B.t()):
                values = torch.randn(rows.shape, generator=generator) / rows.shape[1] ** 0.5
                rows.copy_(values * torch.rand(R, 1, generator=generator))


def step_work(model: nn.Module, name: str, texts: int, tokens: int, ranks: dict[str, int] | None) -> Work:
    """
    Of a training step with these ranks; None: of the frozen model, forward and backward to its embeddings.

    The x of the first block's q, k, v is the embedding, which is not trained: with an adapter those have no dx.
    """
    M, dims = texts * tokens, MODELS[name]
    first = 0 if ranks is None else 3
    linears = [
        (
            linear.in_features,
            linear.out_features,
            0 if ranks is None else ranks[path],
            linear.bias is not None,
            i >= first,
        )
        for i, (path, linear) in enumerate(adapted(model, name))
    ]
    attention = work.attention(M, tokens, dims.width, dims.blocks, causal=name == "smollm2")
    head = [(dims.width, dims.fields["vocab_size"])] if name == "smollm2" else []
    return work.training_step(linears, head, M, attention)
