"""Factorising, solving and editing against fresh factorisations, by pytest-benchmark."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from fastcov.bench import factor
from fastcov.bench.settings import Settings


@functools.lru_cache(maxsize=1)
def _problem(settings: Settings, d: int) -> factor.Problem:
    return factor.problem(d, settings.device)


@pytest.mark.parametrize("which", [0, -1], ids=["fastcov", "others"])
@pytest.mark.parametrize("make", [factor.factorising, factor.solving, factor.editing])
def test_factor(settings: Settings, timed: Any, make: Any, which: int) -> None:
    case, contenders = make(settings, _problem(settings, settings.factor_sizes[0]))
    timed(case, contenders[which])
