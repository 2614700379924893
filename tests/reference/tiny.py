"""A small model with projections, and counts of what ran; stands in for a language model."""

from __future__ import annotations

import torch
from torch import nn


class Counted(nn.Linear):
    """A linear layer that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, d, d_k):
        super().__init__()
        self.up = Counted(d, d_k)
        self.down_proj = Counted(d_k, d)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.down_proj(torch.tanh(self.up(x))))


class Tiny(nn.Module):
    """Tokens see themselves and their position only, so padding cannot change a key."""

    def __init__(self, d=6, d_k=8, layers=3, vocabulary=50, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(64, d)
        self.layers = nn.ModuleList(Block(d, d_k) for _ in range(layers))
        self.unused = nn.Linear(d, d)
        self.head = Counted(d, vocabulary)
        self.seen = []
        self.to(dtype)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=True):
        self.seen.append((input_ids.shape, use_cache, torch.is_grad_enabled(), self.training))
        x = self.embed(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def paths(*layers):
    return [f"layers.{layer}.down_proj" for layer in layers]


def keys_of(model, documents, layer):
    """The literal keys of each token of each document, one document at a time."""
    rows = []
    with torch.no_grad():
        for document in documents:
            x = model.embed(torch.tensor(document)) + model.positions.weight[: len(document)]
            for below in model.layers[:layer]:
                x = x + below.down_proj(torch.tanh(below.up(x)))
            rows.append(torch.tanh(model.layers[layer].up(x)))
    return torch.cat(rows)
