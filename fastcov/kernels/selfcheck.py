"""A kernel that is compiled for a device shows a right result there before it is chosen.

Devices, drivers and compilers are many, and this project has tried few of them. One small update
with a mask, compared with float64, takes milliseconds and turns a wrong second moment into a
warning and another kernel. A kernel asked for by name is not checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Wide enough for tiles on, beside and off the diagonal, with edges in every direction; rows begin
# at whole 16 bytes, so that a kernel takes its fastest way of reading them.
_ROWS, _WIDTH = 1203, 400
_TOLERANCE = 1e-5  # of the relative error; what a GPU kernel has to keep to everywhere

_failures: dict[tuple[str, torch.device, torch.dtype], str | None] = {}

Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float], None]


def failure(name: str, run: Run, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel must not be chosen on a device, or None; found out once a process.

    Args:
        name: Of the kernel.
        run: Its update, ``run(C, X, mask, rows, alpha)``.
        device: Where.
        dtype: Of the keys.
    """
    key = (name, device, dtype)
    if key not in _failures:
        _failures[key] = _try(run, device, dtype)
        if _failures[key] is not None:
            logger.warning(
                "the kernel %s is not used on %s for %s keys: %s; please report it, and name "
                "another kernel to silence this",
                name,
                device,
                str(dtype).removeprefix("torch."),
                _failures[key],
            )
    return _failures[key]


def _try(run: Run, device: torch.device, dtype: torch.dtype) -> str | None:
    # Drawn on the CPU by a generator of its own, so that no caller's random state moves.
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(_ROWS, _WIDTH, generator=generator).to(dtype)
    mask = torch.rand(_ROWS, generator=generator) < 0.9
    kept = X[mask].double()
    wanted = (0.5 * kept.mT @ kept + 1).tril()
    X[~mask] = float("nan")
    C = torch.ones(_WIDTH, _WIDTH, device=device)
    C.masked_fill_(torch.ones_like(C, dtype=torch.bool).triu_(1), float("nan"))
    try:
        run(C, X.to(device), mask.to(device), None, 0.5)
        got = C.cpu().double()
    except Exception as error:  # a compiler or a driver may raise anything
        return f"it fails there ({type(error).__name__}: {str(error).partition(chr(10))[0]:.200})"
    above = torch.ones_like(got, dtype=torch.bool).triu_(1)
    if not bool(got[above].isnan().all()):
        return "it writes above the diagonal there"
    off = float((got.tril().masked_fill(above, 0) - wanted).norm() / wanted.norm())
    # Written so that NaN fails.
    return None if off < _TOLERANCE else f"its relative error is {off:.2g} there"
