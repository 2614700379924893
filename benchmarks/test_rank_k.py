"""``C += X^T X``, the lower triangle: every kernel and every library route, by pytest-benchmark."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fastcov import ops
from fastcov.bench import libraries, rank_k
from fastcov.bench.settings import DTYPES, Settings
from fastcov.bench.timing import Case, Contender
from fastcov.errors import KernelUnavailable

KERNELS = [f"fastcov {name}" for name in ops.kernels() if name not in rank_k.FOR_TESTS]


@functools.lru_cache(maxsize=1)  # the matrices of one case at a time
def _case(settings: Settings, dtype: str, d: int) -> tuple[Case, dict[str, Contender]]:
    case, contenders = rank_k.case(settings, DTYPES[dtype], d)
    return case, {contender.name: contender for contender in contenders}


def _library_names() -> list[str]:
    kinds = [torch.device("cpu"), torch.device("cuda")]
    found = [r.name for kind in kinds for t in DTYPES.values() for r in libraries.routes(kind, t, 1)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("size", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*KERNELS, *_library_names()])
def test_rank_k(settings: Settings, timed: Any, dtype: str, size: int, name: str) -> None:
    if size >= len(settings.rank_k_sizes) or DTYPES[dtype] not in settings.dtypes:
        pytest.skip("not among the sizes and dtypes asked for")
    case, contenders = _case(settings, dtype, settings.rank_k_sizes[size])
    if name not in contenders:
        pytest.skip(f"{name} is no way to do this with {dtype} keys on {settings.device}")
    try:
        timed(case, contenders[name])
    except KernelUnavailable as error:
        pytest.skip(str(error))
