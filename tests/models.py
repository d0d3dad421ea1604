"""Small models that several test files share."""

import torch
from torch import nn


class Net(nn.Module):
    """Two adapted layers and a head; returns logits, or an object with .loss when labels are given."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(13, 17, dtype=dtype)
        self.second = nn.Linear(17, 11, bias=False, dtype=dtype)
        self.classifier = nn.Linear(11, 3, dtype=dtype)

    def forward(self, x):
        return self.classifier(torch.relu(self.second(torch.relu(self.first(x)))))


def batch(size=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 13, generator=generator, dtype=dtype), torch.randint(0, 3, (size,), generator=generator)


def task_loss(model, size=32, dtype=torch.float32, seed=0):
    x, labels = batch(size, dtype, seed)
    return nn.functional.cross_entropy(model(x), labels)


def randomise(adapter, seed=0):
    """Give every factor values, as training would: B starts at zero and hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapter.factors():
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=factor.dtype) / 4)


def tiny_bert(labels=3, seed=0):
    """A BertForSequenceClassification of two layers of 16."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).eval()


def bert_batch(size=4, length=9, labels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, 50, (size, length), generator=generator),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "labels": torch.randint(0, labels, (size,), generator=generator),
    }
