"""What a model is judged by."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ._extras import need


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """Share of examples whose highest logit is at their label; a batch has `labels` (M,) int64."""
    right = total = 0
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        right += (model(**inputs).logits.argmax(-1) == batch["labels"]).sum().item()
        total += batch["labels"].numel()
    return right / total


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """exp of the mean negative log-likelihood of tokens whose label is not -100; a batch has `labels` (M, L) int64."""
    nll, tokens = 0.0, 0
    for batch in batches:
        count = (batch["labels"][:, 1:] != -100).sum().item()
        nll += model(**batch).loss.double().item() * count
        tokens += count
    return float(torch.tensor(nll / tokens, dtype=torch.float64).exp())


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    add_special_tokens: bool = True,
    batch_size: int = 8,
) -> list[str]:
    """Greedy continuations, each cut at the first line break; prompts are padded on the left."""
    device = next(model.parameters()).device
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            list(prompts[start : start + batch_size]),
            add_special_tokens=add_special_tokens,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        output = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        texts += [text.strip().split("\n")[0] for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (sacrebleu's defaults), 0 to 100.

    Args:
        references: one list per hypothesis; their lengths may differ, none may be empty.
    Raises: ValueError, MissingExtraError.
    """
    if len(hypotheses) != len(references) or not all(references):
        raise ValueError("bleu: references must hold at least one text for each hypothesis")
    # sacrebleu wants them the other way round, with None where a hypothesis has fewer
    widest = max(len(texts) for texts in references)
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(widest)]
    return need("sacrebleu", "BLEU").corpus_bleu(list(hypotheses), streams).score
