"""What the pytest-benchmark suites share: settings, and rows that are checked before they count.

    pytest benchmarks                                   # the sizes of this machine's defaults
    FASTCOV_BENCH="--sizes 1536 --threads 2" pytest benchmarks/test_rank_k.py
    FASTCOV_BENCH=--quick pytest benchmarks             # does everything work?

They time what `python -m fastcov.bench` times, one contender after another instead of in turns: good for watching one
of them, not for ratios.
"""

from __future__ import annotations

import os
import shlex
from typing import Any

import pytest
import torch

from fastcov.bench.settings import Settings, parse
from fastcov.bench.timing import Case, Contender


@pytest.fixture(scope="session")
def settings() -> Settings:
    """What FASTCOV_BENCH asks for, in the words of `python -m fastcov.bench`."""
    found = parse(shlex.split(os.environ.get("FASTCOV_BENCH", "")))
    torch.set_num_threads(found.threads)
    return found


@pytest.fixture
def timed(benchmark: Any, settings: Settings) -> Any:
    """Checks a contender against float64 and times it."""

    def run(case: Case, contender: Contender) -> None:
        if contender.cannot is not None or contender.check is None or contender.run is None:
            pytest.skip(f"{contender.name} cannot run: {contender.cannot}")
        verdict = contender.check()
        assert verdict.failure is None, f"{contender.name}: {verdict.failure}"
        benchmark.group = f"{case.suite}: {case.name}"
        benchmark.name = contender.name
        benchmark.extra_info.update(error=verdict.error, bias=verdict.bias, flops=case.flops())
        setup = contender.prepare
        benchmark.pedantic(
            contender.run,
            setup=None if setup is None else lambda: (setup(), None)[1],
            rounds=settings.effort.least,
            warmup_rounds=0 if setup else 1,
        )

    return run
