"""How fast a collect goes, and how fast this machine would let it go.

The limit is the arithmetic that cannot be left out, at the machine's measured speed: the truncated forward pass,
counted on the first batch, and n d_k (d_k + 1) operations for one triangle of each module's n keys. Attention counts
for a token and those before it, as in a causal model. Padding, attention to what comes later, waiting for text and
moving data are what lies between.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastcov.hooks import isolated
from fastcov.kernels import cpu

if TYPE_CHECKING:
    from fastcov.collecting import Accumulator

logger = logging.getLogger(__name__)

_SECONDS = 0.05  # what measuring the peak by products may take
_LOOP_SECONDS = 0.03  # and by loops of multiply-adds
_LARGEST = 8192  # width of the largest product tried


class Throughput:
    """What one `fastcov.collect_moments` has done, in keys, operations and seconds.

    The `peak` is the machine's speed in operations a second (a multiply-add is two). None measures it by
    `measured_peak` when the collect begins, which takes about 0.1 s that are not counted; it stays None where that
    fails.
    """

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self.flops = 0.0  # that the keys cost at least: of the forward pass and the triangles
        self._begun: float | None = None
        self._ended: float | None = None
        self._keys: dict[str, int] = {}
        self._forward: tuple[float, float] | None = None  # operations a token, and a pair of tokens of one sequence

    @property
    def modules(self) -> int:
        """How many modules have given keys."""
        return sum(keys > 0 for keys in self._keys.values())

    @property
    def keys(self) -> int:
        """How many keys the module that took most has given."""
        return max(self._keys.values(), default=0)

    @property
    def seconds(self) -> float:
        """The time since the collect began, or that it took."""
        if self._begun is None:
            return 0.0
        return (time.perf_counter() if self._ended is None else self._ended) - self._begun

    @property
    def tokens_per_second(self) -> float:
        """Keys of the module that took most, a second."""
        return self.keys / self.seconds if self.seconds else 0.0

    @property
    def limit(self) -> float | None:
        """The tokens a second at the machine's peak, or None where it is not known."""
        return self.keys * self.peak / self.flops if self.peak and self.flops else None

    @property
    def share(self) -> float | None:
        """Which part of the limit this is."""
        return self.tokens_per_second / self.limit if self.limit else None

    def rate(self) -> str:
        """Tokens a second, for a progress bar."""
        return f"{self.tokens_per_second:,.0f} tokens/s"

    def __str__(self) -> str:
        known = "the machine's limit was not measured"
        if self.share is not None:
            known = f"{100 * self.share:.0f} % of what this machine's arithmetic allows"
        layers = f"{self.modules} layer{'' if self.modules == 1 else 's'}"
        return (
            f"{self.keys:,} keys of {layers} in {self.seconds:.1f} s: {self.tokens_per_second:,.0f} tokens/s, {known}"
        )

    def measure(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Measure the peak of products in a dtype, None for the model's, unless it is known; nothing else should run.

        A collect does so when it begins. Where a thread is to read its batches ahead, do it before that thread starts.
        """
        if self.peak is None:
            dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
            try:
                self.peak = measured_peak(dtype or torch.float32, device)
            except RuntimeError as error:  # torch has no product of this dtype on this device
                logger.warning("the peak of %s could not be measured: %s", device, error)

    def start(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Measure the peak where it is not known, see `measure`, and begin to count."""
        self.measure(model, device, dtype)
        self._begun, self._ended = time.perf_counter(), None

    @contextmanager
    def batch(self, batch: Mapping[str, Any], sums: Accumulator) -> Iterator[None]:
        """Count one batch, the model's forward pass on which happens inside."""
        sequences, length = _shape(batch)
        if self._forward is not None:
            yield
        else:
            with _counting() as counted:
                yield
            linear, attention = counted
            self._forward = linear / max(sequences * length, 1), attention / max(sequences * length**2, 1)
        tokens = sequences * length if sums.tokens is None else sums.tokens
        self.flops += tokens * self._forward[0] + _pairs(batch, sequences, length) * self._forward[1]
        for name, keys in sums.took().items():
            d_k = sums.moments[name].d if keys else 0
            self.flops += keys * d_k * (d_k + 1)
            self._keys[name] = self._keys.get(name, 0) + keys

    def stop(self) -> None:
        """Take the time."""
        self._ended = time.perf_counter()


@isolated()
def measured_peak(dtype: torch.dtype, device: torch.device) -> float:
    """The speed of a machine's matrix products of factors of this dtype, in operations a second.

    The best of products of growing size through torch; on a CPU with the native extension, of its loops of
    multiply-adds as well, if they are faster.

    Raises:
        RuntimeError: torch cannot multiply matrices of this dtype there.
    """
    width, best = 256, 0.0
    square = _square(width, dtype, device)
    begun = time.perf_counter()
    while True:
        took = _timed(square)
        best = max(best, 2 * width**3 / took)
        left = _SECONDS - (time.perf_counter() - begun)
        if width < _LARGEST and 16 * took < left:  # two of eight times the work
            width *= 2
            square = _square(width, dtype, device)
        elif took > left:
            return max(best, _multiply_adds(dtype)) if device.type == "cpu" else best


def _square(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix, multiplied once already: the first product of a size may load code for it."""
    square = torch.ones(width, width, dtype=dtype, device=device)
    _timed(square)
    return square


def _timed(square: Tensor) -> float:
    """Seconds of a matrix times itself; to read a number waits for the device."""
    square[0, 0].item()
    begun = time.perf_counter()
    (square @ square)[0, 0].item()
    return time.perf_counter() - begun


def _multiply_adds(dtype: torch.dtype) -> float:
    """The best rate of the native kernels' multiply-adds, 0 where there are none of this dtype."""
    # Keys of 16 bits are multiplied in float32 where the processor has no products of their own.
    # Not float32 in parts of bfloat16: the forward pass, which is most of the work, has no such.
    names = {torch.float64: ("avx512f", "avx2"), torch.bfloat16: ("amx_bf16", "avx512_bf16")}.get(dtype, ())
    tried = [(name, dtype) for name in names]
    if dtype != torch.float64:
        tried += [("avx512f", torch.float32), ("avx2", torch.float32)]
    for name, of in tried:
        kernel = cpu.CpuKernel(name)
        if kernel.why_not() is None and kernel.not_preferred() is None:
            return cpu.fma_peak(name, dtype=of, seconds=_LOOP_SECONDS) * 1e9
    return 0.0


@contextmanager
def _counting() -> Iterator[list[int]]:
    """Operations without those of attention, and those of attention; filled on leaving."""
    from torch.utils import flop_counter

    of_shapes: Any = flop_counter.sdpa_flop_count  # untyped

    def attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **more: Any) -> int:
        return int(of_shapes(q, k, v))

    # The counter of torch 2.13 does not know the attention that runs on a CPU.
    more = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counted: list[int] = []
    with flop_counter.FlopCounterMode(display=False, custom_mapping=more) as counter:
        yield counted
    counted += [0, 0]
    for name, number in counter.get_flop_counts().get("Global", {}).items():
        short = str(name).rpartition(".")[2]
        counted[short in ("bmm", "baddbmm") or "attention" in short] += int(number)  # grows with the square of a length


def _pairs(batch: Mapping[str, Any], sequences: int, length: int) -> float:
    """How many pairs of a token and one that is not after it a batch has, padding aside."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return sequences * length * (length + 1) / 2
    lengths = mask.to("cpu", torch.bool).sum(1).double()  # (sequences,)
    return float((lengths * (lengths + 1)).sum() / 2)


def _shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    """How many sequences a batch has, and how long they are with their padding."""
    named = (batch.get(name) for name in ("attention_mask", "input_ids"))
    tensor = next((value for value in (*named, *batch.values()) if isinstance(value, Tensor)), None)
    if tensor is None or tensor.dim() == 0:
        return 1, 1
    return (1, tensor.shape[0]) if tensor.dim() == 1 else (tensor.shape[0], tensor.shape[1])
