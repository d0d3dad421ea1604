"""
A language model in 4 bits learns to describe restaurants, in a loop of its own on a CPU. The adapter is then pruned and written for vLLM.

    python examples/causal_lm_4bit.py                    SmolLM2-135M and E2E (`make data-e2e` fetches both), ten minutes on two cores
    python examples/causal_lm_4bit.py --tiny --steps 10  random weights and made-up data, seconds
"""

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path

import stand_ins
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import adaptlora
from adaptlora.finetune import data
from adaptlora.finetune.fetch import locate
from adaptlora.finetune.smollm2 import convert

IGNORED = -100  # transformers' label of tokens that are not to be learnt


def task(tiny: bool, folder: str, scratch: Path):
    """(folder of the base model, tokenizer, training pairs, test pairs)"""
    if not tiny:
        # A gguf file becomes a transformers folder, once.
        base = convert(locate("smollm2", folder), Path(folder) / "smollm2-135m-instruct")
        pairs = data.e2e(locate("e2e", folder))
        return base, AutoTokenizer.from_pretrained(base), *data.split(pairs, 40, seed=0)
    pairs = stand_ins.descriptions(60)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(scratch / "base")
    return scratch / "base", stand_ins.tokenizer([" ".join(pair) for pair in pairs]), *data.split(pairs, 8, seed=0)


def encode(pairs, tokenizer) -> list[tuple[list[int], list[int]]]:
    """[(tokens, labels)]: the loss is of the description alone."""
    rows = []
    for prompt, text in pairs:
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(f" {text}")["input_ids"], tokenizer.eos_token_id]
        rows.append((before + after, [IGNORED] * len(before) + after))
    return rows


def collate(rows) -> dict[str, torch.Tensor]:
    length = max(len(tokens) for tokens, _ in rows)
    tokens, labels, mask = [], [], []
    for row, target in rows:
        room = length - len(row)
        tokens.append(row + [0] * room)
        labels.append(target + [IGNORED] * room)
        mask.append([1] * len(row) + [0] * room)
    fields = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    return {name: torch.tensor(values) for name, values in fields.items()}


@torch.no_grad()
def perplexity(model, rows) -> float:
    """exp of the mean negative log-likelihood of a token of the descriptions"""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), 8):
        batch = collate(rows[start : start + 8])
        tokens = (batch["labels"][:, 1:] != IGNORED).sum().item()
        total, count = total + model(**batch).loss.item() * tokens, count + tokens
    return math.exp(total / count)


def main(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    base, tokenizer, train, test = task(arguments.tiny, arguments.data, out)
    train, test = encode(train, tokenizer), encode(test[:64], tokenizer)

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantisation, dtype=torch.float32)
    print(f"perplexity before: {perplexity(model, test):.2f}")

    # The base's bytes stay as they are; what trains is in float32.
    adapter = adaptlora.attach(model, adaptlora.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=arguments.lr)
    adapter.track(optimizer)
    torch.manual_seed(0)
    order = torch.utils.data.DataLoader(train, batch_size=8, shuffle=True, drop_last=True, collate_fn=collate)
    batches = itertools.chain.from_iterable(itertools.repeat(order))
    model.train()
    for step, batch in enumerate(itertools.islice(batches, arguments.steps), 1):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step(loss)
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"perplexity after training: {perplexity(model, test):.2f}")

    # Half of all rank vectors, those of the largest singular values of B A over all modules; physically, and the scalings stay.
    half = sum(adapter.ranks().values()) // 2
    adaptlora.shear(adapter, adaptlora.SVDConfig(budget=half))
    ranks = adapter.ranks().values()
    print(
        f"perplexity with {half} of {2 * half} rank vectors, {min(ranks)} to {max(ranks)} a module: {perplexity(model, test):.2f}"
    )

    # PEFT's format with each module's own rank, and one for servers that know a single rank and a single scaling.
    adapter.save(out / "adapter")
    adapter.save(out / "served", format="vllm", pad=8)
    config = json.loads((out / "served" / "adapter_config.json").read_text())
    print(f"for vLLM: r {config['r']}, lora_alpha {config['lora_alpha']}, max_lora_rank must be at least {config['r']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tiny", action="store_true", help="random weights and made-up data")
    parser.add_argument("--data", default=".data", help="folder of `make data-e2e`")
    parser.add_argument("--out", default=None, help="folder for the adapters (a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or temporary
        main(arguments)
