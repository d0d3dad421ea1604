"""
A vision transformer learns which way stripes run: La-LoRA's ranks grow where they are needed, and a plain model is written.

    python examples/vit.py                   a small ViT of random weights, generated images, a minute on two cores
    python examples/vit.py --tiny --steps 8  a smaller one, seconds

No pretrained ViT can be fetched with `make data`, so weights are random and images are made here; with a checkpoint of your own, replace
`make_model` by ViTForImageClassification.from_pretrained(…).
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import adaptlora

DIRECTIONS = 6


def make_model(tiny: bool) -> ViTForImageClassification:
    torch.manual_seed(0)
    width, layers = (32, 2) if tiny else (96, 4)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
    }
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=DIRECTIONS, **sizes))


def images(count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """{"pixel_values": (count, 3, 32, 32), "labels": (count,)}: waves of any phase and length, noise on top."""
    labels = torch.randint(DIRECTIONS, (count,), generator=generator)
    angle = (labels * math.pi / DIRECTIONS).view(-1, 1, 1)
    phase, length = torch.rand(2, count, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = torch.sin((x * angle.cos() + y * angle.sin()) * (0.6 + 0.4 * length) + 2 * math.pi * phase)
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return {"pixel_values": waves[:, None] + 0.3 * noise, "labels": labels}


@torch.no_grad()
def accuracy(model, batch) -> float:
    return (model.eval()(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean().item()


def main(arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    test = images(256, generator)
    model = make_model(arguments.tiny)

    # Every block starts at rank 1; every 5 steps a budget that follows the growth of the norms is shared out anew.
    config = adaptlora.LaLoRAConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        modules_to_save=["classifier", "embeddings"],
        interval=5,
        gamma=2.0,
    )
    adapter = adaptlora.attach(model, config)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=arguments.lr)
    adapter.track(optimizer)
    print(f"accuracy before: {accuracy(model, test):.3f}")
    model.train()
    for step in range(1, arguments.steps + 1):
        loss = model(**images(32, generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        change = adapter.step(loss)
        if change is not None:
            print(
                f"step {step}: loss {loss.item():.3f}, {sum(change.before.values())} → {sum(change.after.values())} rank vectors"
            )
    print(
        f"accuracy after:  {accuracy(model, test):.3f} with {adapter.summary()['adapter_parameters']:,} parameters in the adapter"
    )

    # A model folder for whoever has transformers alone; the model here goes on with its adapter.
    adapter.save(f"{arguments.out}/merged", format="merged")
    plain = ViTForImageClassification.from_pretrained(f"{arguments.out}/merged")
    print(f"merged, without adaptlora: {accuracy(plain, test):.3f}")
    adapter.merge()
    with torch.no_grad():
        assert torch.equal(plain(test["pixel_values"]).logits, model(test["pixel_values"]).logits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tiny", action="store_true", help="a model that takes seconds")
    parser.add_argument("--out", default=None, help="folder for the merged model (a temporary one)")
    arguments = parser.parse_args()
    merged = Path(arguments.out or "") / "merged"
    if arguments.out and merged.exists() and any(merged.iterdir()):
        parser.error(f"--out: {merged} must be empty, so that a model can be written there")
    with tempfile.TemporaryDirectory() as temporary:
        arguments.out = arguments.out or temporary
        main(arguments)
