"""Settings of torch that a caller may have made, and a record of all that must come back."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def _set(setter, value, back):
    setter(value)
    try:
        yield
    finally:
        setter(back)


@contextmanager
def _default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _newer_precision(backend, value):
    """The settings of torch 2.9 and later, which older ones then contradict."""
    where = getattr(torch.backends, backend).matmul
    where.fp32_precision = value
    try:
        yield
    finally:
        where.fp32_precision = "none"


#: Name -> a context in which the caller's torch is set so.
STATES = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "default device meta": lambda: _default_device("meta"),
    "torch.device meta": lambda: torch.device("meta"),
    "matmul precision medium": lambda: _set(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
}
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    STATES["newer precision tf32"] = lambda: _newer_precision("cuda", "tf32")
    STATES["newer precision bf16"] = lambda: _newer_precision("mkldnn", "bf16")


def _read(get):
    try:
        return get()
    except RuntimeError:  # an older setting that a newer one contradicts
        return "contradicted"


def settings():
    """Everything that a caller can set in torch and that is watched here."""
    matmul = torch.backends.cuda.matmul
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "function modes": torch._C._len_torch_function_stack(),
        "precision": _read(torch.get_float32_matmul_precision),
        "tf32": _read(lambda: matmul.allow_tf32),
        "fp32": getattr(matmul, "fp32_precision", None),
        "reductions": matmul.allow_bf16_reduced_precision_reduction,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def random_states():
    """The random states of Python, NumPy and torch."""
    return {
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
    }


def of_model(model):
    """Modes, what asks for a gradient, gradients, hooks and settings of a model."""
    return {
        "training": [module.training for module in model.modules()],
        "asking": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [p.grad is not None for p in model.parameters()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "forwards": ["forward" in module.__dict__ for module in model.modules()],
        "use_cache": model.config.use_cache,
        "generation": id(model.generation_config),
    }
