"""A whole training step: forward, backward, AdamW; every linear of the blocks adapted, r = 8, float32: cases of bench_step.py.

The floor is the frozen model, forward and backward to its input embeddings: what no adapter can save. All providers share its weights and
its own dropout, as in training; each step trains the factors alone. Counted: work.training_step. Of NormAL with masks what it has to do
is counted, not what the masks make it do.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .accuracy import FLOOR, WrongResultError, errors
from .case import Case, Options
from .harness import peak_bytes, usable
from .models import (
    MODELS,
    TARGET,
    AdaLora,
    MaskedNormal,
    Ours,
    Peft,
    R,
    Trained,
    adalora,
    batch_for,
    build,
    fill,
    frozen_step,
    lora,
    normal,
    plain,
    shared_copy,
    step_work,
)

FROZEN = "frozen, forward and dx"


def clip(trained: Ours) -> None:
    """The clip to an average rank of 4: t_c = 1, so that the first step makes it."""
    change = trained.adapter.step()
    assert change is not None
    assert sum(change.after.values()) == TARGET * len(change.after)


def mask_like(trained: MaskedNormal, ranks: dict[str, int]) -> None:
    for name, rank in ranks.items():
        trained.layers[name].mask[rank:] = 0


def loss_and_gradients(trained: Trained, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and every gradient of the factors as one vector, without any dropout; rows that were pruned count as zeros."""
    trained.model.eval()
    loss = trained.model(**batch).loss
    loss.backward()
    parts = []
    for _, (A, B) in sorted(trained.factors().items()):
        for rows in (A.grad, B.grad.t()):
            parts.append(F.pad(rows, (0, 0, 0, R - rows.shape[0])).flatten())
    trained.optimizer.zero_grad()
    trained.model.train()
    return loss.detach(), torch.cat(parts)


def assert_same_training(trained: dict[str, Trained], batch, depth: int) -> None:
    """Providers that compute the same thing get the same loss and gradients, to float32's rounding through `depth` blocks.

    Raises: WrongResultError.
    """
    first, *rest = trained
    expected = loss_and_gradients(trained[first], batch)
    for name in rest:
        found = loss_and_gradients(trained[name], batch)
        error = max(max(errors(own, right)) for own, right in zip(found, expected, strict=True))
        bound = (16 / 6) * depth * FLOOR[torch.float32]
        if not error < bound:
            raise WrongResultError(f"{name} differs from {first} by {error:.3g}, allowed {bound:.3g}")


def compiled_peft(model, name: str, p: float, reference: Trained, batch, depth: int) -> tuple[dict, dict]:
    """PEFT under torch.compile as a provider, or why there is none here."""
    title = f"PEFT LoRA, dropout {p}, torch.compile"
    trained = {title: Peft(shared_copy(model), lora(p, name))}
    fill(trained[title])
    trained[title].model.compile()

    def check(name):
        assert_same_training({"the reference": reference, name: trained[name]}, batch, depth)
        trained[name].step(batch)

    return usable(trained, check)


def training_case(
    title: str,
    model,
    name: str,
    batch,
    trained: dict[str, Trained],
    *,
    rounds: int,
    unavailable=None,
    facts=None,
    work=None,
) -> Case:
    """All providers beside the floor, and the peak of memory that a step of each takes beyond what it holds before."""
    providers = {FROZEN: frozen_step(model, batch), **{key: lambda t=t: t.step(batch) for key, t in trained.items()}}
    for run in providers.values():
        run()
    device = batch["input_ids"].device
    peaks = {key: round(peak_bytes(run, device) / 2**20, 1) for key, run in providers.items() if "compile" not in key}
    texts, tokens = batch["input_ids"].shape
    facts = {"texts": texts, "tokens": tokens, **(facts or {}), "peak MiB": peaks}
    work = {FROZEN: step_work(model, name, texts, tokens, None), **(work or {})}
    return Case(title, providers, FROZEN, rounds, unavailable=unavailable or {}, facts=facts, work=work)


def bert_case(name: str, options: Options) -> Case:
    """LoRA, NormAL before and after its clip, and AdaLoRA on a BERT.  Raises: WrongResultError, MissingExtraError."""
    dims = MODELS[name]
    model = build(name).to(options.device)
    batch = batch_for(name, dims.texts, dims.tokens, options.device)

    def made(kind, *arguments, **fields):
        return kind(shared_copy(model), *arguments, **fields)

    full_rank = {
        "PEFT LoRA": made(Peft, lora(0.0, name)),
        "PEFT LoRA, dropout 0.1": made(Peft, lora(0.1, name)),
        "masked NormAL, dropout 0.1": made(MaskedNormal, 0.1, penalised=True, name=name),
        "adaptlora LoRA": made(Ours, plain(0.0, name)),
        "adaptlora LoRA, dropout 0.1": made(Ours, plain(0.1, name)),
        "adaptlora NormAL gradient, dropout 0.1": made(Ours, normal(0.1, "gradient", model=name)),
        "adaptlora NormAL proximal, dropout 0.1": made(Ours, normal(0.1, "proximal", model=name)),
    }
    clipped = {
        "masked NormAL clipped, dropout 0.1": made(MaskedNormal, 0.1, penalised=False, name=name),
        "adaptlora NormAL clipped, dropout 0.1": made(Ours, normal(0.1, "gradient", t=1, model=name)),
    }
    for trained in (*full_rank.values(), *clipped.values()):
        fill(trained)
    masked, pruned = clipped.values()
    clip(pruned)
    ranks = pruned.adapter.ranks()
    mask_like(masked, ranks)
    assert_same_training(full_rank, batch, dims.blocks)
    assert_same_training(clipped, batch, dims.blocks)

    compiled, unavailable = {}, {}
    if not options.quick:  # the compilation alone takes minutes
        compiled, unavailable = compiled_peft(model, name, 0.1, full_rank["PEFT LoRA"], batch, dims.blocks)

    ada = made(AdaLora, adalora(0.1, name))
    with torch.no_grad():  # its factors start where the model is unchanged
        torch.testing.assert_close(ada.model.eval()(**batch).logits, model.eval()(**batch).logits)
    ada.model.train()

    whole = step_work(model, name, dims.texts, dims.tokens, dict.fromkeys(ranks, R))
    fewer = step_work(model, name, dims.texts, dims.tokens, ranks)
    return training_case(
        f"{dims.title}, r = 8, average rank 4 where clipped", model, name, batch,
        {**full_rank, **compiled, "PEFT AdaLoRA 12→8, dropout 0.1": ada, **clipped},
        rounds=31, unavailable=unavailable,
        facts={"modules": len(ranks), "clipped ranks": f"{min(ranks.values())} – {max(ranks.values())}"},
        work=dict.fromkeys((*full_rank, *compiled), whole) | dict.fromkeys(clipped, fewer),
    )  # fmt: skip


def causal_case(name: str, options: Options) -> Case:
    """LoRA and NormAL on a causal language model.  Raises: WrongResultError, MissingExtraError."""
    dims = MODELS[name]
    model = build(name).to(options.device)
    batch = batch_for(name, dims.texts, dims.tokens, options.device)
    trained = {
        "PEFT LoRA": Peft(shared_copy(model), lora(0.0, name)),
        "PEFT LoRA, dropout 0.05": Peft(shared_copy(model), lora(0.05, name)),
        "masked NormAL, dropout 0.05": MaskedNormal(shared_copy(model), 0.05, penalised=True, name=name),
        "adaptlora LoRA": Ours(shared_copy(model), plain(0.0, name)),
        "adaptlora LoRA, dropout 0.05": Ours(shared_copy(model), plain(0.05, name)),
        "adaptlora NormAL gradient, dropout 0.05": Ours(shared_copy(model), normal(0.05, "gradient", model=name)),
    }
    for each in trained.values():
        fill(each)
    assert_same_training(trained, batch, dims.blocks)
    compiled, unavailable = compiled_peft(model, name, 0.05, trained["PEFT LoRA"], batch, dims.blocks)
    ranks = dict.fromkeys(trained["adaptlora LoRA"].factors(), R)
    counted = step_work(model, name, dims.texts, dims.tokens, ranks)
    trained |= compiled
    return training_case(
        f"{dims.title}, r = 8", model, name, batch, trained, rounds=11, unavailable=unavailable,
        facts={"modules": len(ranks)}, work=dict.fromkeys(trained, counted),
    )  # fmt: skip


def cases(options: Options) -> Iterator[Case]:
    if options.quick:
        yield bert_case("tiny", options)
    else:
        yield bert_case("minilm", options)
        yield causal_case("smollm2", options)
