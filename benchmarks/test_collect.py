"""Collecting second moments against the released procedure, by pytest-benchmark."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from fastcov.bench import collect
from fastcov.bench.settings import Settings
from fastcov.bench.timing import Case, Contender


@functools.lru_cache(maxsize=1)
def _first(settings: Settings) -> tuple[Case, list[Contender]]:
    return next(collect.cases(settings))


@pytest.mark.parametrize("which", [0, 1], ids=["fastcov", "released"])
def test_collect(settings: Settings, timed: Any, which: int) -> None:
    case, contenders = _first(settings)
    timed(case, contenders[which])
