"""What a model is judged by."""

import re
import statistics
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ._extras import need

# What metrics are computed by, beside torch.
PACKAGES = {"bleu": "sacrebleu"} | dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), "rouge_score")


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of the (M,) predicted classes that are the labels."""
    return (predicted == labels).double().mean().item()


def f1(predicted: Tensor, labels: Tensor) -> float:
    """F1 of class 1 of two, (M,) each; 0 where it is neither there nor predicted."""
    hits = ((predicted == 1) & (labels == 1)).sum().item()
    both = (predicted == 1).sum().item() + (labels == 1).sum().item()
    return 2 * hits / both if both else 0.0


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of (M,) classes, of any number; 0 where all are one class."""
    classes = torch.unique(torch.cat([predicted, labels]))
    p, t = ((side[:, None] == classes).double() for side in (predicted, labels))
    count = len(labels)
    covariance = count * (p * t).sum() - (p.sum(0) * t.sum(0)).sum()
    spread = (count**2 - p.sum(0).square().sum()) * (count**2 - t.sum(0).square().sum())
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


def pearson(predicted: Tensor, wanted: Tensor) -> float:
    """Correlation of two (M,) series; 0 where one is constant."""
    x, y = (side.double() - side.double().mean() for side in (predicted, wanted))
    norms = x.norm() * y.norm()
    return (x @ y / norms).item() if norms > 0 else 0.0


def spearman(predicted: Tensor, wanted: Tensor) -> float:
    """Correlation of the ranks of two (M,) series, equal values sharing the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(wanted))


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[dict[str, Tensor]], *, shifted: bool = True) -> float:
    """exp of the mean negative log-likelihood of tokens whose label is not -100; a batch has `labels` (M, L) int64.

    Args: shifted: each label is for the position before it, so that the first is for none; a decoder beside an encoder has none such.
    """
    nll, tokens = 0.0, 0
    for batch in batches:
        count = (batch["labels"][:, int(shifted) :] != -100).sum().item()
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
    **search,
) -> list[str]:
    """Continuations (greedy, unless `search`, arguments of model.generate, says otherwise), each cut at the first line break.

    Prompts are padded on the left.
    """
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
            **search,
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


def rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F of rouge1, rouge2, rougeL and rougeLsum with stemming, 0 to 100; of several references the best one for each.

    rougeLsum goes sentence by sentence: one ends at a line break, or at . ! ? and a blank.

    Raises: ValueError, MissingExtraError.
    """
    if len(texts) != len(references) or not all(references):
        raise ValueError("rouge: references must hold at least one text for each hypothesis")
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer = need("rouge_score.rouge_scorer", "ROUGE").RougeScorer(names, use_stemmer=True)
    best = [
        {name: max(scorer.score(_lines(wanted), _lines(text))[name].fmeasure for wanted in some) for name in names}
        for text, some in zip(texts, references, strict=True)
    ]
    return {name: 100 * statistics.fmean(row[name] for row in best) for name in names}


def _lines(text: str) -> str:
    """One sentence a line."""
    return "\n".join(re.split(r"(?<=[.!?])\s+|\n", text.strip()))


def same_answers(texts: Sequence[str], references: Sequence[Sequence[str]], pattern: str) -> float:
    """Share of texts in which the first match of `pattern` is that in one of their references, case aside.

    Raises: ValueError (a reference without a match).
    """
    right = 0
    for text, some in zip(texts, references, strict=True):
        wanted = {match.group().lower() for match in (re.search(pattern, reference) for reference in some) if match}
        if not wanted:
            raise ValueError(
                f"finetune: task_options.answer must match in every reference, got {pattern!r} and {some[0][:60]!r}"
            )
        found = re.search(pattern, text)
        right += found is not None and found.group().lower() in wanted
    return right / len(texts)


def answer_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's exact match and F1, 0 to 100: case, punctuation, articles and blanks aside, of several references the best one.

    Args: references: for each answer the right ones; none, or only "", where the right answer is none.
    """
    exact, overlap = [], []
    for answer, some in zip(answers, references, strict=True):
        pairs = [(_bare_words(answer), _bare_words(reference)) for reference in some or [""]]
        exact.append(max(float(found == wanted) for found, wanted in pairs))
        overlap.append(max(_word_f1(found, wanted) for found, wanted in pairs))
    return {"exact": 100 * statistics.fmean(exact), "f1": 100 * statistics.fmean(overlap)}


def _bare_words(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _word_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))
