"""A whole training step: forward, backward, AdamW; every linear of the blocks adapted, r = 8, float32.

MiniLM: 8 texts of 64 tokens, 36 modules. SmolLM2-135M: 4 texts of 64 tokens, 210 modules. The floor is the frozen model, forward
and backward to its input embeddings: what no adapter can save. All providers share its weights and its own dropout, as in
training; each step trains the factors alone.

FLOPs of the base products, MiniLM with M = 512 tokens: 4·M·Σ NK = 21.7 G (y and dx). The factors add 6·M·Σ R(K + N) = 1.0 G at
R = 8 and half of it at an average rank of 4. Bytes of the optimizer: 12 per trained number (gradient and two moments), 4.0 MB at
R = 8. SmolLM2 with M = 256: 108.7 G for the blocks (29.0 G more for its output layer), the factors 3.8 G.
"""

import pytest
import torch
import torch.nn.functional as F
from numerics import FLOOR, errors
from providers import (
    TARGET,
    AdaLora,
    MaskedNormal,
    Ours,
    Peft,
    R,
    Trained,
    adalora,
    batch_for,
    fill,
    frozen_step,
    load,
    lora,
    normal,
    plain,
    shared_copy,
)

from adaptlora.benchmarks.harness import peak_bytes, usable

FLOOR_NAME = "frozen, forward and dx"


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


def assert_same_training(trained: dict[str, Trained], batch, depth: int) -> None:
    """Providers that compute the same thing get the same loss and gradients, to float32's rounding through `depth` blocks."""
    first, *rest = trained
    expected = loss_and_gradients(trained[first], batch).double()
    for name in rest:
        error = max(errors(loss_and_gradients(trained[name], batch), expected))
        assert error < (16 / 6) * depth * FLOOR[torch.float32], f"{name} differs from {first} by {error:.3g}"


def compiled_peft(model, name: str, p: float, reference: Trained, batch, depth: int) -> tuple[dict, dict]:
    """PEFT under torch.compile as a provider, or why there is none here."""
    title = f"PEFT LoRA, dropout {p}, torch.compile"
    trained = {title: Peft(shared_copy(model), lora(p, name))}
    fill(trained[title])
    trained[title].model.compile()

    def check(title):
        assert_same_training({"PEFT LoRA": reference, **trained}, batch, depth)
        trained[title].step(batch)

    return usable(trained, check)


def timed(
    compare, case: str, model, batch, trained: dict[str, Trained], *, rounds: int, unavailable: dict, facts: dict
):
    """All providers beside the floor, and the peak of memory that a step of each takes beyond what it holds before."""
    providers = {
        FLOOR_NAME: frozen_step(model, batch),
        **{name: lambda t=t: t.step(batch) for name, t in trained.items()},
    }
    for run in providers.values():
        run()
    peaks = {name: round(peak_bytes(run) / 2**20, 1) for name, run in providers.items() if "compile" not in name}
    compare(
        case, providers, floor=FLOOR_NAME, rounds=rounds, unavailable=unavailable, facts=facts | {"peak MiB": peaks}
    )


def test_step(compare, quick):
    model = load("minilm")
    texts, tokens = (2, 16) if quick else (8, 64)
    batch = batch_for("minilm", texts, tokens)

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
    depth = model.config.num_hidden_layers
    assert_same_training(full_rank, batch, depth)
    assert_same_training(clipped, batch, depth)

    compiled, unavailable = {}, {}
    if not quick:  # the compilation alone takes minutes
        compiled, unavailable = compiled_peft(model, "minilm", 0.1, full_rank["PEFT LoRA"], batch, depth)

    ada = AdaLora(shared_copy(model), adalora(0.1))
    with torch.no_grad():  # its factors start where the model is unchanged
        torch.testing.assert_close(ada.model.eval()(**batch).logits, model.eval()(**batch).logits)
    ada.model.train()

    trained = {**full_rank, **compiled, "PEFT AdaLoRA 12→8, dropout 0.1": ada, **clipped}
    ranks = pruned.adapter.ranks().values()
    facts = {"texts": texts, "tokens": tokens, "modules": len(ranks), "clipped ranks": f"{min(ranks)} – {max(ranks)}"}
    timed(
        compare, "MiniLM, r = 8, average rank 4 where clipped", model, batch, trained,
        rounds=31, unavailable=unavailable, facts=facts,
    )  # fmt: skip


def test_step_smollm2(compare, quick):
    if quick:
        pytest.skip("--quick runs MiniLM alone")
    name, texts, tokens = "smollm2", 4, 64
    model = load(name)
    batch = batch_for(name, texts, tokens)
    trained = {
        "PEFT LoRA": Peft(shared_copy(model), lora(0.0, name)),
        "PEFT LoRA, dropout 0.05": Peft(shared_copy(model), lora(0.05, name)),
        "adaptlora LoRA": Ours(shared_copy(model), plain(0.0, name)),
        "adaptlora LoRA, dropout 0.05": Ours(shared_copy(model), plain(0.05, name)),
        "adaptlora NormAL gradient, dropout 0.05": Ours(shared_copy(model), normal(0.05, "gradient", model=name)),
    }
    for each in trained.values():
        fill(each)
    depth = model.config.num_hidden_layers
    assert_same_training(trained, batch, depth)
    compiled, unavailable = compiled_peft(model, name, 0.05, trained["PEFT LoRA"], batch, depth)
    facts = {"texts": texts, "tokens": tokens, "modules": len(trained["adaptlora LoRA"].factors())}
    timed(
        compare, "SmolLM2-135M, r = 8", model, batch, {**trained, **compiled},
        rounds=11, unavailable=unavailable, facts=facts,
    )  # fmt: skip
