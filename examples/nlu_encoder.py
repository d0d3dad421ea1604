"""
An encoder learns to sort questions with transformers' Trainer. Its ranks are pruned in mid-training, and stock PEFT loads the result.

    python examples/nlu_encoder.py                    MiniLM and TREC-6 (`make data` fetches both), two minutes on two cores
    python examples/nlu_encoder.py --tiny --steps 12  random weights and made-up questions, seconds
"""

import argparse
import tempfile

import peft
import stand_ins
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import adaptlora
from adaptlora.finetune import data
from adaptlora.finetune.fetch import locate


def task(tiny: bool, folder: str):
    """(function that makes the base model, tokenizer, training pairs, test pairs, labels)"""
    pairs = stand_ins.questions(200) if tiny else data.trec(locate("trec", folder))
    # TREC's file repeats most of its questions: they are made unique before any is held out.
    train, test = data.split(list(dict.fromkeys(pairs)), 10 if tiny else 1000, seed=0)
    labels = sorted({label for _, label in train})

    def model():
        torch.manual_seed(0)  # of the new head
        if tiny:
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=len(labels), **sizes))
        return AutoModelForSequenceClassification.from_pretrained(locate("minilm", folder), num_labels=len(labels))

    texts = [text for text, _ in pairs]
    tokenizer = stand_ins.tokenizer(texts) if tiny else AutoTokenizer.from_pretrained(locate("minilm", folder))
    return model, tokenizer, train, test, labels


def encode(pairs, tokenizer, labels) -> list[dict]:
    rows = tokenizer([text for text, _ in pairs], truncation=True, max_length=64)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": labels.index(label)}
        for ids, mask, (_, label) in zip(rows["input_ids"], rows["attention_mask"], pairs, strict=True)
    ]


@torch.no_grad()
def accuracy(model, rows, collate) -> float:
    model.eval()
    right = 0
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64])
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return right / len(rows)


def main(arguments: argparse.Namespace) -> None:
    make_model, tokenizer, train, test, labels = task(arguments.tiny, arguments.data)
    collate = DataCollatorWithPadding(tokenizer)
    train, test = encode(train, tokenizer, labels), encode(test, tokenizer, labels)

    # Rank 8 everywhere at first; a penalty orders the rank vectors, and after a third of the steps 4 are left on average.
    model = make_model()
    config = adaptlora.NormALConfig(
        r=8,
        target_r=4,
        lora_alpha=16,
        target_modules=r".*\.encoder\.layer\.\d+\..*\.(query|key|value|dense)",
        modules_to_save=["classifier"],
        penalty_step="proximal",
        t_p=max(1, arguments.steps // 3),
        t_c=max(2, arguments.steps * 7 // 18),
    )
    adapter = adaptlora.attach(model, config)
    print(f"before: {adapter.summary()['adapter_parameters']:,} parameters in the adapter")

    options = TrainingArguments(
        output_dir=f"{arguments.out}/trainer",
        max_steps=arguments.steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(model, options, train_dataset=train, data_collator=collate, callbacks=[adapter.callback()]).train()
    model.cpu()

    ranks = adapter.ranks()
    print(f"after:  {adapter.summary()['adapter_parameters']:,}; ranks {min(ranks.values())} to {max(ranks.values())}")
    ours = accuracy(model, test, collate)
    print(f"accuracy on {len(test)} questions held out: {ours:.3f}")

    # A PEFT adapter, and the same numbers without adaptlora.
    adapter.save(f"{arguments.out}/adapter")
    theirs = accuracy(peft.PeftModel.from_pretrained(make_model(), f"{arguments.out}/adapter"), test, collate)
    print(f"the same with stock PEFT: {theirs:.3f}")
    assert abs(theirs - ours) < 0.01


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=180, help="at least 3: one with the penalty, the clip, one after it"
    )
    parser.add_argument("--tiny", action="store_true", help="random weights and made-up data")
    parser.add_argument("--data", default=".data", help="folder of `make data`")
    parser.add_argument("--out", default=None, help="folder for the adapter (a temporary one)")
    arguments = parser.parse_args()
    if arguments.steps < 3:
        parser.error(f"--steps: must be at least 3, got {arguments.steps}")
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or temporary
        main(arguments)
