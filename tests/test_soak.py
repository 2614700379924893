"""The soak of benchmarks/, short: bits come back, memory stays, nothing is torn by a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def soak() -> Any:
    """benchmarks/soak.py as a module; the search path is as before afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        spec = importlib.util.spec_from_file_location("soak", ROOT / "benchmarks" / "soak.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_edits_come_and_go(soak: Any) -> None:
    found = soak.soak_edits(30)
    assert found["sound"] and found["undone_to_other_bits"] == []
    assert sum(found["edits_of_each_kind"].values()) == 30 and len(found["edits_of_each_kind"]) == 12
    assert len(found["samples"]["resident"]) == 30
    # A weight that stayed behind would be 8 kB an edit, a graph more; targets are 2 kB a fact.
    assert found["python_bytes_per_edit"]["bytes"] < 50_000


def test_an_undo_that_leaves_a_bit_is_found(soak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail."""
    from fastmemit import edits as applied

    restore = applied.restore

    def nearly(weights: list[Any], before: list[Any]) -> None:
        restore(weights, before)
        weights[0].view(-1)[0] += 1e-3

    monkeypatch.setattr(applied, "restore", nearly)
    found = soak.soak_edits(6)
    assert not found["sound"] and found["undone_to_other_bits"] == list(range(6))


def test_the_slope_and_its_error(soak: Any) -> None:
    assert soak.slope([7 + 3 * x for x in range(10)]) == {"bytes": 3, "standard_error": 0}
    # By hand: y = 0, 1, 0 has the slope 0, residuals -1/3, 2/3, -1/3 and sqrt(6/9 / 1 / 2).
    assert soak.slope([0, 1, 0]) == {"bytes": 0, "standard_error": 0.6}


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked from a clean server")
def test_precomputes_are_killed(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", "kills", "--cycles", "3", "--multiplier", "60",
               "--json", str(tmp_path / "kills.json")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, env=environment, timeout=300)
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["sound"] and found["kills"] >= 3
    assert all(min(pair) == 0 < max(pair) for pair in found["batches_of_two_at_once"])
    assert found["torn_files"] == found["files_left_after_a_cycle"] == []
    assert found["cycles_with_other_bits"] == []
    assert found["machine"]["cores"] and found["versions"]["torch"]
