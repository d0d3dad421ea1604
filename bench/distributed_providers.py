"""What bench_distributed.py trains: BERT encoders of random weights with an adapter, wrapped in one way or another."""

import os
import warnings
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import adaptlora

FLOOR = "DDP's reducer"
RANKS = (1, 2, 4, 8, 16, 32)
LINEARS = r".*\.encoder\..*\.(query|key|value|dense)"
# Torch 2.13 renames it; no older one knows the new name.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")


@dataclass(frozen=True)
class Case:
    """An encoder's sizes and the rank of its adapter."""

    name: str
    blocks: int
    hidden: int
    r: int

    @property
    def modules(self) -> int:
        return 6 * self.blocks


MINILM = [Case("MiniLM's sizes", 6, 384, r) for r in RANKS]
SMALL = [Case("blocks of 32", blocks, 32, 8) for blocks in (2, 8, 32)]


def encoder(case: Case):
    """The same random weights in every process."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=case.hidden, num_hidden_layers=case.blocks, num_attention_heads=case.hidden // 32,
        intermediate_size=4 * case.hidden, max_position_embeddings=64, num_labels=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def batch() -> dict[str, torch.Tensor]:
    """Another text in every process."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return {
        "input_ids": torch.randint(0, 1000, (1, 16), generator=generator),
        "labels": torch.randint(0, 4, (1,), generator=generator),
    }


def fill(adapter) -> None:
    """The same factors everywhere, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in adapter.factors():
            factor.copy_(torch.randn(factor.shape, generator=generator) / factor.shape[-1] ** 0.5 / 4)


class Trained:
    """An encoder with an adapter, wrapped as `kind` says, and its step."""

    def __init__(self, case: Case, kind: str, config=None, hook=None):
        self.model = model = encoder(case).train()
        if config is None:
            self.adapter = adaptlora.attach(
                model, adaptlora.LoraConfig(r=case.r, lora_alpha=16, target_modules=LINEARS)
            )
            fill(self.adapter)
        else:
            self.adapter = adaptlora.attach(model, config)
        if "DDP" in kind:
            views = "views" in kind
            self.model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=views)
        if "adaptlora" in kind:
            self.adapter.distribute(self.model, comm_hook=hook)
        elif hook is not None:
            self.model.register_comm_hook(*hook)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-3)
        self.adapter.track(self.optimizer)
        self.batch = batch()

    def no_sync(self):
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else self.adapter.no_sync()

    def loss(self):
        return self.model(**self.batch).loss

    def gradients(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        self.loss().backward()
        return torch.cat([factor.grad.flatten() for factor in self.adapter.factors()]).double()
