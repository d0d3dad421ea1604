"""A whole training step of MiniLM: forward, backward, AdamW; 8 texts of 64 tokens, all 36 linears of the encoder, r = 8, float32.

The floor is the frozen model, forward and backward to its input embeddings: what no adapter can save. All providers share its
weights and its own dropout, as in training; each step trains the factors alone.

FLOPs of the base products with M = 512 tokens: 4·M·Σ NK = 21.7 G (y and dx). The factors add 6·M·Σ R(K + N) = 1.0 G at R = 8
and half of it at an average rank of 4. Bytes of the optimizer: 12 per trained number (gradient and two moments), 4.0 MB at R = 8.
"""

import copy
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from harness import usable
from numerics import FLOOR, errors
from torch import nn
from transformers import AutoModelForSequenceClassification

import adaptlora
from adaptlora.finetune.fetch import locate

ROOT = Path(__file__).resolve().parents[1]
LINEARS = r".*\.encoder\..*\.(query|key|value|dense)"
R, TARGET, ALPHA, LR = 8, 4, 16, 1e-5
ETA = 1e-3
NEVER = 10**9


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
    def __init__(self, model, config):
        self.adapter = adaptlora.attach(model, config)
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
    def __init__(self, model, config):
        model = peft.get_peft_model(model, config)
        super().__init__(model, (p for p in model.parameters() if p.requires_grad))
        self.steps = 0

    def after_step(self):
        self.steps += 1
        self.model.base_model.update_and_allocate(self.steps)


class MaskedNormal(Trained):
    def __init__(self, model, p, penalised: bool):
        self.penalised = penalised
        self.layers = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and ".encoder." in name:
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


def lora(p: float):
    return peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS)


def adalora(p: float):
    return peft.AdaLoraConfig(
        init_r=12, target_r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS,
        tinit=1, tfinal=1, deltaT=10, total_step=NEVER,
    )  # fmt: skip


def normal(p: float, penalty_step: str, t: int = NEVER):
    return adaptlora.NormALConfig(
        r=R, target_r=TARGET, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS,
        penalty_step=penalty_step, t_p=t, t_c=t,
    )  # fmt: skip


def plain(p: float):
    return adaptlora.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=LINEARS)


def fill(trained: Trained) -> None:
    """The same factors everywhere, with norms that differ so that a clip gives ranks that differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, (A, B) in sorted(trained.factors().items()):
            for rows in (A, B.t()):
                values = torch.randn(rows.shape, generator=generator) / rows.shape[1] ** 0.5
                rows.copy_(values * torch.rand(R, 1, generator=generator))


def clip(trained: Ours) -> None:
    """The clip to an average rank of 4: t_c = 1, so that the first step makes it."""
    change = trained.adapter.step()
    assert change is not None
    assert sum(change.after.values()) == TARGET * len(change.after)


def mask_like(trained: MaskedNormal, ranks: dict[str, int]) -> None:
    for name, rank in ranks.items():
        trained.layers[name].mask[rank:] = 0


def loss_and_gradients(trained: Trained, batch) -> torch.Tensor:
    """Loss and every gradient of the factors as one vector, without any dropout; rows that were pruned count as zeros."""
    trained.model.eval()
    loss = trained.model(**batch).loss
    loss.backward()
    parts = [loss.detach().reshape(1)]
    for _, (A, B) in sorted(trained.factors().items()):
        for rows in (A.grad, B.grad.t()):
            parts.append(F.pad(rows, (0, 0, 0, R - rows.shape[0])).flatten())
    trained.optimizer.zero_grad()
    trained.model.train()
    return torch.cat(parts)


def assert_same_training(trained: dict[str, Trained], batch) -> None:
    """Providers that compute the same thing get the same loss and gradients, to float32's rounding through six blocks."""
    first, *rest = trained
    expected = loss_and_gradients(trained[first], batch).double()
    for name in rest:
        error = max(errors(loss_and_gradients(trained[name], batch), expected))
        assert error < 16 * FLOOR[torch.float32], f"{name} differs from {first} by {error:.3g}"


def test_step(compare, quick):
    model = AutoModelForSequenceClassification.from_pretrained(locate("minilm", ROOT / ".data"), num_labels=6)
    model.requires_grad_(False)
    texts, tokens = (2, 16) if quick else (8, 64)
    ids = torch.randint(1000, 30000, (texts, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 6, (texts,))}

    full_rank = {
        "PEFT LoRA": Peft(shared_copy(model), lora(0.0)),
        "PEFT LoRA, dropout 0.1": Peft(shared_copy(model), lora(0.1)),
        "masked NormAL, dropout 0.1": MaskedNormal(shared_copy(model), 0.1, penalised=True),
        "adaptlora LoRA": Ours(shared_copy(model), plain(0.0)),
        "adaptlora LoRA, dropout 0.1": Ours(shared_copy(model), plain(0.1)),
        "adaptlora NormAL gradient, dropout 0.1": Ours(shared_copy(model), normal(0.1, "gradient")),
        "adaptlora NormAL proximal, dropout 0.1": Ours(shared_copy(model), normal(0.1, "proximal")),
    }
    clipped = {
        "masked NormAL clipped, dropout 0.1": MaskedNormal(shared_copy(model), 0.1, penalised=False),
        "adaptlora NormAL clipped, dropout 0.1": Ours(shared_copy(model), normal(0.1, "gradient", t=1)),
    }
    for trained in (*full_rank.values(), *clipped.values()):
        fill(trained)
    masked, pruned = clipped.values()
    clip(pruned)
    mask_like(masked, pruned.adapter.ranks())
    assert_same_training(full_rank, batch)
    assert_same_training(clipped, batch)

    compiled, unavailable = {}, {}
    if not quick:  # the compilation alone takes minutes
        name = "PEFT LoRA, dropout 0.1, torch.compile"
        compiled = {name: Peft(shared_copy(model), lora(0.1))}
        fill(compiled[name])
        compiled[name].model.compile()

        def check(name):
            assert_same_training({"PEFT LoRA": full_rank["PEFT LoRA"], **compiled}, batch)
            compiled[name].step(batch)

        compiled, unavailable = usable(compiled, check)

    ada = AdaLora(shared_copy(model), adalora(0.1))
    with torch.no_grad():  # its factors start where the model is unchanged
        torch.testing.assert_close(ada.model.eval()(**batch).logits, model.eval()(**batch).logits)
    ada.model.train()

    model.train()
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    from_embeddings = {name: value for name, value in batch.items() if name != "input_ids"}

    def floor():
        embeddings.grad = None
        model(inputs_embeds=embeddings, **from_embeddings).loss.backward()

    trained = {**full_rank, **compiled, "PEFT AdaLoRA 12→8, dropout 0.1": ada, **clipped}
    ranks = pruned.adapter.ranks().values()
    compare(
        "MiniLM, r = 8, average rank 4 where clipped",
        {"frozen, forward and dx": floor, **{name: lambda t=t: t.step(batch) for name, t in trained.items()}},
        floor="frozen, forward and dx",
        rounds=41,
        unavailable=unavailable,
        facts={
            "texts": texts,
            "tokens": tokens,
            "modules": len(ranks),
            "clipped ranks": f"{min(ranks)} – {max(ranks)}",
        },
    )
