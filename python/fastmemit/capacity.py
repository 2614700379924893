"""What statistics and edits take: memory, time and bytes moved, before any of it is spent.

Nothing is run here. Operations and bytes are counted from a model's shape, as the code does them; seconds are those
counts over a machine's rates, of which each machine says where it has them from. A multiply-add is two operations, as
everywhere in this project.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcov.hooks import isolated
from fastmemit.errors import BadConfig, ModelNotFound
from fastmemit.models import find_adapter
from fastmemit.models.loading import load_skeleton
from fastmemit.models.running import text_config
from fastmemit.request import EditRequest
from fastmemit.text import request_rows

#: What MEMIT's authors ran for each layer (100,000 Wikipedia articles), the full precompute of arXiv 2506.04226.
FULL_KEYS = 44_000_000
_F32, _F64 = 4, 8  # bytes


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that decide what it costs."""

    layers: int  # blocks
    d: int  # hidden size
    d_k: int  # width of the keys: of the MLP inside
    heads: int  # attention heads
    kv_heads: int  # heads of keys and values, fewer with grouped queries
    head: int  # width of a head
    vocabulary: int  # tokens
    gated: bool  # whether the MLP has a gate beside its way up
    tied: bool  # whether the output head is the embeddings

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
    """A shape by its name in `SHAPES`, or of a model's folder, of which only config.json is read; else BadConfig."""
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


@dataclass(frozen=True)
class Machine:
    """Rates of one process's device and of what connects it."""

    flops: float  # operations a second of its matrix products
    share: float  # the part of them that a collect reaches
    float64: float  # operations a second of a Cholesky factorisation in float64
    memory: float  # bytes of the device
    bandwidth: float  # bytes a second between its memory and its arithmetic
    link: float  # bytes a second that a process can send to the next while it receives as many
    disk: float  # bytes a second of writing moments, hashed and synced
    tokenise: float  # tokens a second that a process reads and tokenises
    dtype_bytes: int  # bytes of a weight
    source: str  # where the rates are from


@dataclass(frozen=True)
class Plan:
    """What one collect and its factors take; bytes and seconds of one process."""

    keys: int  # keys of each layer
    weights: int  # bytes of the whole model, over all of a process's devices
    weights_run: int  # bytes of the part that the pass uses, embeddings included
    activations: int  # bytes that a batch needs at most
    moments: int  # bytes of the sums of all layers
    factor: int  # bytes of one layer's factor in float64
    file: int  # bytes of one layer's file
    flops: float  # operations of all processes together: the forward passes
    triangles: float  # and those of the sums
    read: float  # bytes of weights and sums that the device reads and writes
    sent: float  # bytes that a process sends to add up the sums
    seconds: dict[str, float]  # by step
    factor_seconds: float  # for one layer

    @property
    def memory(self) -> int:
        """Bytes that collecting needs on the device that holds the part of the model that runs."""
        return self.weights_run + self.activations + self.moments

    @property
    def total(self) -> float:
        """Seconds of the collect; text is read beside the model, so the slower of both counts."""
        s = self.seconds
        return max(s["model"], s["text"], s["memory"]) + s["adding up"] + s["writing"]


@isolated()
def plan(
    shape: Shape,
    machine: Machine,
    layers: Sequence[int],
    keys: int,
    *,
    processes: int = 1,
    batch_tokens: int = 16384,
    length: int = 1024,
) -> Plan:
    """Count what collecting some layers takes; BadConfig for a layer that is not there, or a number below 1.

    A token costs ``2 run(last)`` operations in the weights' products, ``4 heads head`` in each block's attention for
    each earlier token, and ``d_k (d_k + 1)`` for one triangle of each layer. A ring of N processes sends ``2 (N - 1) /
    N`` of what is added up, which is a little more than the triangle (`fastcov.distributed.add_up_lower`).

    Each of the edited `layers` gets so many `keys`. The `processes`, each with such a machine, divide the text, in
    batches of so many tokens, of documents that are `length` tokens long as the model sees them.
    """
    _check(shape, layers, "Keys, processes, tokens of a batch and of a document", keys, processes, batch_tokens, length)
    last, n, size = max(layers), len(layers), machine.dtype_bytes
    pairs = (length + 1) / 2  # earlier tokens and itself, on average
    attention = 4 * shape.heads * shape.head * pairs * (last + 1)
    flops = keys * (2 * shape.run(last) + attention)
    triangles = float(keys * n * shape.d_k * (shape.d_k + 1))
    batches = -(-keys // batch_tokens)
    own_batches = -(-batches // processes)
    triangle = shape.d_k * (shape.d_k + 1) // 2
    wide = 3 if shape.gated else 2  # gate, way up and their product; or before and after the curve
    weights_run = (shape.run(last) + shape.vocabulary * shape.d) * size
    read = own_batches * (shape.run(last) * size + n * 2 * triangle * _F32)
    sent = 2 * (processes - 1) / processes * n * triangle * _F32 * 17 / 16
    speed = machine.flops * machine.share
    part = own_batches / batches  # of the work: whole batches are divided
    return Plan(
        keys=keys,
        weights=shape.weights * size,
        weights_run=weights_run,
        activations=min(batch_tokens, keys) * (wide * shape.d_k + 3 * shape.d) * size,
        moments=n * shape.d_k**2 * _F32,
        factor=shape.d_k**2 * _F64,
        file=triangle * _F32,
        flops=flops,
        triangles=triangles,
        read=float(read),
        sent=sent,
        seconds={
            "model": part * (flops + triangles) / speed,
            "text": keys / machine.tokenise,
            "memory": read / machine.bandwidth,
            "adding up": sent / machine.link,
            "writing": n * triangle * _F32 / machine.disk,
        },
        factor_seconds=shape.d_k**3 / 3 / machine.float64,
    )


@dataclass(frozen=True)
class EditPlan:
    """What one edit of a batch of facts takes on one device, beside the model; bytes and seconds."""

    factors: int  # bytes of the factors of all layers, float64, held for the next edit
    making: int  # bytes beside them while one is made: half of it for the triangle, a third to work in
    reading: int  # bytes that a batch of texts needs while keys are read
    keys: int  # bytes of one layer's keys, float64
    targets: int  # bytes of the target vectors and of what is read beside them
    solve: int  # bytes of what one layer's closed form makes
    copies: int  # bytes of weights as they were: for trial writes, later for the undo; more edits hold up to four
    delta: int  # bytes of the change of all layers
    seconds: dict[str, float]  # by step
    counted_with: dict[str, int]  # `rows`, `steps`, `tokens` and `moving` of `plan_edit`

    @property
    def memory(self) -> int:
        """Bytes at the most expensive moment: while keys are read, the last factor is made or a layer is solved."""
        held = self.factors + self.keys + self.targets + self.copies + self.delta
        return held + max(self.reading, self.making, self.solve)


@isolated()
def plan_edit(
    shape: Shape,
    machine: Machine,
    layers: Sequence[int],
    facts: int,
    *,
    rows: int = 6,
    steps: int = 25,
    tokens: int = 20,
    moving: int = 5,
) -> EditPlan:
    """Count what a MEMIT edit of a batch takes whose target vectors and factors are new; errors as of `plan`.

    A target is optimised in `rows` texts (the bare prompt in six contexts) of so many `tokens`, all of which run once
    up to the last edited block. Then `moving` of them, from the subject's last one on, run forward and backward in each
    of the `steps` through the blocks above, three times a forward's operations, and two of them through the head. A
    factor costs ``d_k^3 / 3`` operations, and solving with it two times ``d_k^2`` a fact. Of more facts than d_k, the
    matrix of width d_k is the smaller one (`fastcov.memit`).
    """
    _check(shape, layers, "Facts, rows, steps and tokens", facts, rows, steps, tokens, moving)
    last, n, d, d_k = max(layers), len(layers), shape.d, shape.d_k
    below, above = shape.run(last), (shape.layers - 1 - last) * shape.block
    target = rows * 2.0 * (tokens * below + 3 * steps * (moving * above + 2 * shape.vocabulary * d))
    small, wide = min(facts, d_k), facts > d_k
    # One layer: A^-1 K and K^T A^-1 K by halves, then the small system; or K K^T, its factor and a solve.
    solve = (
        facts * d_k**2 + d_k**3 / 3 + 2 * facts * d_k**2
        if wide
        else 2 * facts * d_k**2 + facts**2 * d_k + facts**3 / 3 + d * facts**2
    )
    return EditPlan(
        factors=n * d_k**2 * _F64,
        making=d_k**2 * _F64 * 5 // 6,
        # A batch of `fastmemit.partial_forward.READ_TOKENS`, with the widths that `plan` counts.
        reading=min(facts * rows * tokens, 8192) * ((3 if shape.gated else 2) * d_k + 3 * d) * machine.dtype_bytes,
        keys=facts * d_k * _F64,
        targets=facts * d * (2 * _F64 + 2 * _F32),
        solve=(2 * facts * d_k + small**2 * (3 if wide else 1) + facts * d) * _F64,
        copies=n * d * d_k * machine.dtype_bytes,
        delta=n * min(facts, d, d_k) * (d + d_k) * _F32,
        seconds={
            "targets": facts * target / (machine.flops * machine.share),
            "factors": n * d_k**3 / 3 / machine.float64,
            "reading keys": facts * rows * tokens * 2.0 * below / (machine.flops * machine.share),
            "solving": n * 2 * solve / machine.float64,
        },
        counted_with={"rows": rows, "steps": steps, "tokens": tokens, "moving": moving},
    )


def tokens_of(tokenizer: Any, requests: Sequence[EditRequest]) -> dict[str, int]:
    """What `plan_edit` takes as `tokens` and `moving`, as facts have it on average; errors as of `request_rows`.

    Contexts, which a model writes, are not known: five texts of six have one of 12 tokens before the prompt.
    """
    rows = [request_rows(tokenizer, request, ("",)).rows[0] for request in requests]
    prompts = sum(len(row.ids) for row in rows) / len(rows)
    moving = sum(len(row.ids) - row.subject for row in rows) / len(rows)
    return {"tokens": math.ceil(prompts + 10), "moving": math.ceil(moving)}


def _check(shape: Shape, layers: Sequence[int], what: str, *numbers: int) -> None:
    if not layers or min(layers) < 0 or max(layers) >= shape.layers:
        raise BadConfig(
            f"The layers {list(layers)} are not among the {shape.layers} of this model; name some from 0 to "
            f"{shape.layers - 1}."
        )
    if min(numbers) < 1:
        raise BadConfig(f"{what} must be at least 1, but one is {min(numbers)}.")


#: Machines by name. Only the second was measured by this project.
MACHINES = {
    "h100": Machine(
        flops=790e12,
        share=0.5,
        float64=30e12,
        memory=80e9,
        bandwidth=3.35e12,
        link=450e9,
        disk=1e9,
        tokenise=250e3,
        dtype_bytes=2,
        source="published: 790 TFLOP/s of large bfloat16 products; data sheet: memory, bandwidth, "
        "NVLink one way; assumed: half of the products' rate, 30 TFLOP/s of a float64 Cholesky, disk, text",
    ),
    "2-core": Machine(
        flops=152e9,
        share=0.71,
        float64=49e9,
        memory=24e9,
        bandwidth=20e9,
        link=0.1e9,
        disk=0.09e9,
        tokenise=27e3,
        dtype_bytes=4,
        source="measured: products, share and Cholesky (2 threads, nothing else running), and, on "
        "a busy machine, link, disk and text; assumed: bandwidth",
    ),
}
