"""The caller's settings of torch and the model's modes: left outside, and the same afterwards.

What is computed here must not depend on where it was called from: a moment summed under autocast, or an edit written
with TF32 on, would be stored under the name of the right one. `isolated` stands at every public entry point; nested, it
costs a few reads.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastcov.intact import intact

_cuda: Any = torch.cuda  # in part untyped
_AUTOCAST = tuple(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)
# torch's own values. Named by the attributes of torch.backends.cuda.matmul; older torch lacks some.
_CUDA_PRODUCTS = {
    "allow_fp16_reduced_precision_reduction": True,
    "allow_bf16_reduced_precision_reduction": True,
    "allow_fp16_accumulation": False,
}


class isolated(ContextDecorator):
    """Torch as it is when it has just been imported, with gradients off.

    Inside, autocast, inference mode, TF32 and other short products of float32 are off on every device, the default
    dtype is float32, the default device is the CPU, and reductions of 16-bit products are as torch has them by default.
    All of it is afterwards as it was, also after an exception. ``torch.use_deterministic_algorithms`` is left as it is:
    nothing here needs an operator that it forbids. Gradients, inference mode, autocast and the default device are those
    of the running thread; the other settings are the whole process's.

    A decorator or a with statement. It must not enclose a ``yield`` to a caller, whose settings are the caller's own; a
    decorated generator would not run inside it at all.

    Args:
        gradients: Whether operations are recorded for a backward pass.

    Example:
        >>> with isolated():
        ...     total = keys.mT @ keys
    """

    def __init__(self, *, gradients: bool = False) -> None:
        self._gradients = gradients
        self._undo: list[Callable[[], object]] = []

    def _recreate_cm(self) -> isolated:  # one for every call of a decorated function
        return isolated(gradients=self._gradients)

    def __enter__(self) -> None:
        try:
            self._change()
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _change(self) -> None:
        """Set what is not as it should be; how to undo it is noted before it is done."""
        undo = self._undo
        if torch.is_inference_mode_enabled():
            normal = torch.inference_mode(False)
            normal.__enter__()
            undo.append(partial(normal.__exit__, None, None, None))
        if torch.is_grad_enabled() is not self._gradients:
            undo.append(partial(torch.set_grad_enabled, not self._gradients))
            torch.set_grad_enabled(self._gradients)
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                undo.append(partial(torch.set_autocast_enabled, kind, True))
                torch.set_autocast_enabled(kind, False)
        dtype = torch.get_default_dtype()
        if dtype is not torch.float32:
            undo.append(partial(torch.set_default_dtype, dtype))
            torch.set_default_dtype(torch.float32)
        # A default device is a mode on this stack; to ask for the device itself takes far longer.
        if torch._C._len_torch_function_stack() and torch.get_default_device().type != "cpu":
            cpu = torch.device("cpu")
            cpu.__enter__()
            undo.append(partial(cpu.__exit__, None, None, None))
        precision = _matmul_precision()
        if precision != "highest":
            undo.append(_precision_restorer(precision))
            _full_precision(precision)
        if _cuda.is_initialized():
            products: Any = torch.backends.cuda.matmul
            for name, value in _CUDA_PRODUCTS.items():
                if hasattr(products, name) and getattr(products, name) is not value:
                    before = _reduction(products, name)
                    undo.append(partial(setattr, products, name, before))
                    setattr(products, name, value)

    def _restore(self) -> None:
        try:
            while self._undo:
                self._undo.pop()()
        except BaseException:  # an interrupt comes once
            self._restore()
            raise


def _matmul_precision() -> str | None:
    """What ``torch.get_float32_matmul_precision`` says; None where newer settings contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _newer_settings() -> list[Any]:
    """Where torch 2.9 and newer keep the precision of float32 products, for each backend."""
    found = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [where for where in found if hasattr(where, "fp32_precision")]


def _full_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision("highest")
    for where in _newer_settings():
        where.fp32_precision = "ieee"


def _precision_restorer(precision: str | None) -> Callable[[], None]:
    newer = [(where, where.fp32_precision) for where in _newer_settings()]

    def restore() -> None:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for where, before in newer:
            # "none" stands for what is set for the backend or for all of them, and so reads alike.
            where.fp32_precision = "none"
            if where.fp32_precision != before:
                where.fp32_precision = before

    return restore


def _reduction(products: Any, name: str) -> Any:
    """A setting of CUDA's products; newer torch has a second one beside each reduction."""
    split = f"{name}_split_k"
    value = getattr(products, name)
    return (value, getattr(products, split)) if hasattr(products, split) else value


@contextmanager
def evaluation_mode(model: nn.Module, *, frozen: bool = False) -> Iterator[None]:
    """No submodule trains inside; afterwards each is in the mode that it was in before.

    Only those that train are touched: setting the mode of all of them several times took a tenth of planning the edit
    of one fact.

    Args:
        model: The model.
        frozen: Whether no parameter asks for a gradient inside either.
    """
    training = [module for module in model.modules() if module.training]
    asking = [p for p in model.parameters() if p.requires_grad] if frozen else []
    with intact(model):
        try:
            for module in training:
                module.training = False
            for parameter in asking:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """The random states of Python, NumPy and torch, on every device, are afterwards as before.

    Args:
        seed: What torch's generators begin with inside; None leaves them where they are.
    """
    numpy: Any = sys.modules.get("numpy")  # who has not imported it has no state of it either
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices: list[Any] = [torch.cuda, torch.xpu]
    devices = [device for device in devices if device.is_initialized()]
    states = [(device, device.get_rng_state_all()) for device in devices]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    cpu = torch.get_rng_state()
    try:
        if seed is not None:
            # Not torch.manual_seed: what it notes down for a device that was never used comes
            # true when the caller first uses it.
            torch.default_generator.manual_seed(seed)
            for device in devices:
                device.manual_seed_all(seed)
            if mps is not None:
                torch.mps.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        for device, state in states:
            device.set_rng_state_all(state)
        if arrays is not None:
            numpy.random.set_state(arrays)
        random.setstate(python)
