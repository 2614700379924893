"""The numbers of a decoder that decide what it costs, known by name or read from a config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fastmemit.errors import BadConfig, ModelNotFound
from fastmemit.models.adapter import find_adapter
from fastmemit.models.loading import load_skeleton
from fastmemit.models.structure import text_config


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that decide what it costs.

    Attributes:
        layers: Blocks.
        d: The hidden size.
        d_k: The width of the keys: of the MLP inside.
        heads: Attention heads.
        kv_heads: Heads of keys and values, fewer with grouped queries.
        head: The width of a head.
        vocabulary: Tokens.
        gated: Whether the MLP has a gate beside its way up.
        tied: Whether the output head is the embeddings.
    """

    layers: int
    d: int
    d_k: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    gated: bool
    tied: bool

    @property
    def attention(self) -> int:
        """Weights of a block's attention: queries and outputs, keys and values."""
        return 2 * self.d * self.heads * self.head + 2 * self.d * self.kv_heads * self.head

    @property
    def before_key(self) -> int:
        """Weights of a block's MLP that are used before its key is there."""
        return (2 if self.gated else 1) * self.d * self.d_k

    @property
    def block(self) -> int:
        """Weights of a block, without norms and biases (under a thousandth)."""
        return self.attention + self.before_key + self.d * self.d_k

    @property
    def weights(self) -> int:
        """Weights of the model."""
        return self.layers * self.block + (1 if self.tied else 2) * self.vocabulary * self.d

    def run(self, last: int) -> int:
        """Weights that a pass uses which ends at the key of block `last`, embeddings aside."""
        return last * self.block + self.attention + self.before_key


#: Shapes of published models, by name.
SHAPES = {
    "gpt2-xl": Shape(48, 1600, 6400, 25, 25, 64, 50257, False, True),
    "gpt-j-6b": Shape(28, 4096, 16384, 16, 16, 256, 50400, False, False),
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000, True, False),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, True, False),
    "llama-3-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, True, False),
    "smollm2": Shape(30, 576, 1536, 9, 3, 64, 49152, True, True),
}


def shape_of(name: str) -> Shape:
    """A shape by its name in `SHAPES`, or of a model's folder, of which only config.json is read.

    Raises:
        BadConfig: It is neither.
        UnknownArchitecture: The edited projection of that model cannot be told.
    """
    if name in SHAPES:
        return SHAPES[name]
    if not (Path(name) / "config.json").is_file():
        raise BadConfig(
            f"There is no shape {name!r}; choose {', '.join(SHAPES)}, or name a folder with a model's config.json."
        )
    try:
        model = load_skeleton(name)
    except ModelNotFound as error:
        said = str(error.__cause__).strip().splitlines() or [type(error.__cause__).__name__]
        raise BadConfig(
            f"The config.json of {name!r} describes no model that can be built ({said[0]:.120}); "
            f"choose {', '.join(SHAPES)}, or name another folder."
        ) from error
    adapter, text = find_adapter(model), text_config(model)
    heads = int(text.num_attention_heads)
    d, d_k = adapter.d, adapter.d_k(adapter.layers[0])
    head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    shape = Shape(adapter.n_layers, d, d_k, heads, kv_heads, head, text.vocab_size, False, False)
    whole = sum(p.numel() for p in adapter.block(0).parameters())
    embeddings = model.get_input_embeddings().weight
    return dataclasses.replace(
        shape,
        gated=whole > shape.block + d * d_k // 2,
        tied=adapter.lm_head.weight is embeddings or bool(text.tie_word_embeddings),
    )
