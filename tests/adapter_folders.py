"""Adapters of chosen factors in folders, as PEFT writes them."""

import json
import re

import torch

from adaptlora.lora_files import peft


def factors(rank, K=12, N=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, K, generator=generator), torch.randn(N, rank, generator=generator)


def write(folder, modules, history=None, **fields):
    """modules: {name: (A, B)}; history: of rank_history.json; fields: of adapter_config.json.  Returns: the folder."""
    ranks = {name: lora_A.shape[0] for name, (lora_A, _) in modules.items()}
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items()},
        "target_modules": list(ranks),
    }
    texts = {} if history is None else {"rank_history.json": json.dumps(history)}
    peft.write_folder(folder, config | fields, peft.factor_tensors(modules), {}, texts)
    return folder


def stack(layers, ranks, kinds=("self_attn.q_proj", "mlp.up_proj"), seed=0, **sizes):
    """{name: factors} of a decoder: `ranks` are drawn from in turn."""
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    return {name: factors(ranks[i % len(ranks)], seed=seed + i, **sizes) for i, name in enumerate(names)}
