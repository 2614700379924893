"""Decoder stacks with the shapes of known models and random weights, in plain torch, for the suite collect.

    python -m fastcov.bench collect --load benchmarks.shapes:gpt_j

For timing alone: what a forward pass costs depends on the shapes and not on the weights. Only the blocks up to the last
edited one exist, since no contender runs those above. On a GPU where there is one, there in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        layers: The edited ones.
        d: Width of the residual stream.
        d_k: Width of the keys, the inputs of the projections that are edited.
        heads: Of attention.
        key_heads: Heads of keys and values in attention, fewer where queries share them.
        vocabulary: Number of tokens.
        context: The longest document.
        gated: Whether the MLP multiplies by a gate (Llama) or not (GPT-J).
        parallel: Whether attention and MLP read the same input (GPT-J).
    """

    layers: range
    d: int
    d_k: int
    heads: int
    key_heads: int
    vocabulary: int
    context: int
    gated: bool = True
    parallel: bool = False


SHAPES = {
    "smollm2-135m": Shape(range(4, 9), 576, 1536, 9, 3, 49152, 1024),
    "gpt-j": Shape(range(3, 9), 4096, 16384, 16, 16, 50400, 2048, gated=False, parallel=True),
    "llama-2-7b": Shape(range(4, 9), 4096, 11008, 32, 32, 32000, 2048),
    "tiny": Shape(range(1, 3), 64, 128, 4, 2, 512, 64),
}


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.key_heads = shape.heads, shape.key_heads
        self.width = shape.d // shape.heads
        self.q_proj = nn.Linear(shape.d, shape.d, bias=False)
        self.k_proj = nn.Linear(shape.d, shape.key_heads * self.width, bias=False)
        self.v_proj = nn.Linear(shape.d, shape.key_heads * self.width, bias=False)
        self.o_proj = nn.Linear(shape.d, shape.d, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Attend; padding stands on the right, where causality keeps it from mattering."""
        B, L, d = x.shape
        q = self.q_proj(x).view(B, L, self.heads, self.width).transpose(1, 2)
        k = self.k_proj(x).view(B, L, self.key_heads, self.width).transpose(1, 2)
        v = self.v_proj(x).view(B, L, self.key_heads, self.width).transpose(1, 2)
        q, k = _turned(q, turn), _turned(k, turn)
        if self.key_heads != self.heads:
            k = k.repeat_interleave(self.heads // self.key_heads, 1)
            v = v.repeat_interleave(self.heads // self.key_heads, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, L, d))


class MLP(nn.Module):
    """The part whose last projection is edited; the input of `down_proj` is the key."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up_proj = nn.Linear(shape.d, shape.d_k, bias=False)
        self.gate_proj = nn.Linear(shape.d, shape.d_k, bias=False) if shape.gated else None
        self.down_proj = nn.Linear(shape.d_k, shape.d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Up, activation, down."""
        up = self.up_proj(x)
        key = F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return self.down_proj(key)


class Block(nn.Module):
    """One layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.parallel = shape.parallel
        self.attention_norm = nn.RMSNorm(shape.d)
        self.mlp_norm = None if shape.parallel else nn.RMSNorm(shape.d)
        self.attention = Attention(shape)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Attention and MLP, after one another or side by side."""
        normed = self.attention_norm(x)
        attended = self.attention(normed, turn)
        if self.mlp_norm is None:
            return x + attended + self.mlp(normed)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """Embeddings and the blocks up to the last edited one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.d)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers.stop))

    def get_input_embeddings(self) -> nn.Module:
        """As models of transformers have it."""
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, d) after the last block; padding must be on the right."""
        x = self.embed(input_ids)  # (B, L, d)
        turn = _turns(input_ids.shape[1], self.shape.d // self.shape.heads, x)
        for layer in self.layers:
            x = layer(x, turn)
        return x


Loaded = tuple[Stack, list[str], list[list[int]]]


def build(name: str, device: torch.device | None = None, multiplier: float = 10.0) -> Loaded:
    """A stack, the paths of its edited projections, and documents enough for the budget.

    Args:
        name: One of `SHAPES`.
        device: Where the weights are.
        multiplier: Keys a layer over d_k.
    """
    shape = SHAPES[name]
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.device(device):
        model = Stack(shape).to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    modules = [f"layers.{layer}.mlp.down_proj" for layer in shape.layers]
    return model, modules, list(_documents(shape, round(multiplier * shape.d_k)))


def smollm2_135m() -> Loaded:
    return build("smollm2-135m")


def gpt_j() -> Loaded:
    return build("gpt-j")


def llama_2_7b() -> Loaded:
    return build("llama-2-7b")


def tiny() -> Loaded:
    return build("tiny", torch.device("cpu"))


def _documents(shape: Shape, tokens: int) -> Iterator[list[int]]:
    """Random tokens in documents of many lengths, from a sixteenth of the context to all of it."""
    generator = torch.Generator().manual_seed(0)
    while tokens > 0:
        low = max(1, shape.context // 16)
        length = int(torch.randint(low, shape.context + 1, (1,), generator=generator))
        yield torch.randint(0, shape.vocabulary, (length,), generator=generator).tolist()
        tokens -= length


def _turns(length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, width) of the rotary positions."""
    rates = 10000 ** -(torch.arange(0, width, 2, device=like.device) / width)
    angles = torch.arange(length, device=like.device)[:, None] * rates  # (length, width / 2)
    angles = torch.cat((angles, angles), 1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat((-second, first), -1) * turn[1]
