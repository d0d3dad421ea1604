"""The pretrained models of the benchmarks whose results depend on weights, beside what adaptlora.benchmarks.models trains."""

from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from adaptlora.finetune.fetch import locate
from adaptlora.finetune.smollm2 import convert

DATA = Path(__file__).resolve().parents[1] / ".data"


def load(name: str) -> nn.Module:
    """The frozen model, float32: MiniLM with a head for 6 classes, or SmolLM2-135M."""
    if name == "minilm":
        model = AutoModelForSequenceClassification.from_pretrained(locate(name, DATA), num_labels=6)
    else:
        model = AutoModelForCausalLM.from_pretrained(convert(locate(name, DATA), DATA / "smollm2-135m-instruct"))
    return model.requires_grad_(False)
