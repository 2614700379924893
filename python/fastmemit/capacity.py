"""What statistics and their factors take: memory, time and bytes moved, before any of it is spent.

Nothing is run here. Operations and bytes are counted from a model's shape, as the code does them; seconds are those
counts over a machine's rates, of which each machine says where it has them from. A multiply-add is two operations, as
everywhere in this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastcov.mode import isolated
from fastmemit.errors import BadConfig
from fastmemit.models.shape import Shape

#: What MEMIT's authors ran for each layer; see arXiv 2506.04226.
FULL_KEYS = 44_000_000
_F32, _F64 = 4, 8  # bytes


@dataclass(frozen=True)
class Machine:
    """Rates of one process's device and of what connects it.

    Attributes:
        flops: Operations a second of its matrix products.
        share: The part of them that a collect reaches.
        float64: Operations a second of a Cholesky factorisation in float64.
        memory: Bytes of the device.
        bandwidth: Bytes a second between its memory and its arithmetic.
        link: Bytes a second that a process can send to the next while it receives as many.
        disk: Bytes a second of writing moments, hashed and synced.
        tokenise: Tokens a second that a process reads and tokenises.
        dtype_bytes: Of a weight.
        source: Where the rates are from.
    """

    flops: float
    share: float
    float64: float
    memory: float
    bandwidth: float
    link: float
    disk: float
    tokenise: float
    dtype_bytes: int
    source: str


@dataclass(frozen=True)
class Plan:
    """What one collect and its factors take; bytes and seconds of one process.

    Attributes:
        keys: Of each layer.
        weights: Bytes of the whole model, over all of a process's devices.
        weights_run: Bytes of the part that the pass uses, embeddings included.
        activations: Bytes that a batch needs at most.
        moments: Bytes of the sums of all layers.
        factor: Bytes of one layer's factor in float64; refined in float32, half of that.
        file: Bytes of one layer's file.
        flops: Operations of all processes together: the forward passes.
        triangles: And those of the sums.
        read: Bytes of weights and sums that the device reads and writes.
        sent: Bytes that a process sends to add up the sums.
        seconds: By step.
        factor_seconds: Of one layer.
    """

    keys: int
    weights: int
    weights_run: int
    activations: int
    moments: int
    factor: int
    file: int
    flops: float
    triangles: float
    read: float
    sent: float
    seconds: dict[str, float]
    factor_seconds: float

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
    """Count what collecting some layers takes.

    A token costs ``2 run(last)`` operations in the weights' products, ``4 heads head`` in each block's attention for
    each earlier token, and ``d_k (d_k + 1)`` for one triangle of each layer. A ring of N processes sends ``2 (N - 1) /
    N`` of what is added up, which is a little more than the triangle (`fastcov.processes.add_up_lower`).

    Args:
        shape: The model's.
        machine: What each process has.
        layers: The edited layers.
        keys: How many, of each.
        processes: How many divide the text.
        batch_tokens: Of a batch.
        length: Of a document as the model sees it, in tokens.

    Raises:
        BadConfig: A layer that the model does not have, or a number below 1.
    """
    if not layers or min(layers) < 0 or max(layers) >= shape.layers:
        raise BadConfig(
            f"The layers {list(layers)} are not among the {shape.layers} of this model; name some "
            f"from 0 to {shape.layers - 1}."
        )
    least = min(keys, processes, batch_tokens, length)
    if least < 1:
        raise BadConfig(f"Keys, processes, tokens of a batch and of a document must be at least 1, but one is {least}.")
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
        "NVLink one way; assumed: half of the products' rate, 30 TFLOP/s of a float64 Cholesky, "
        "disk, text",
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
