"""A model with numbered layers, for rules that go by names."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.mlp = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])

    def forward(self, x):
        return x + self.mlp[1](torch.tanh(self.mlp[0](self.q(x))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))


class Deep(nn.Module):
    """Numbered layers, a Conv1D, and two modules of which the one's name ends as the other's."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(0)
        self.model = Stack()
        self.mix = Conv1D(8, 8)
        self.pre_classifier = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return self.classifier(torch.relu(self.pre_classifier(self.mix(x))))
