from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastcov

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys

BLOCKED = {"transformers", "datasets", "fastmemit", "safetensors", "scipy", "tqdm", "numpy"}
for name in BLOCKED:
    sys.modules[name] = None  # an import of it fails as if it were not installed
import torch
import fastcov
factor = fastcov.factorize(fastcov.SecondMoment(2).update(torch.eye(2)).second_moment)
assert factor.solve(torch.ones(2)).tolist() == [2.0, 2.0]
assert all(sys.modules[name] is None for name in BLOCKED)
assert "torch._dynamo" not in sys.modules  # more than a second to import, and of no use here
"""


def test_fastcov_needs_torch_alone():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    assert sorted(fastcov.__all__) == fastcov.__all__
    for name in fastcov.__all__:
        assert getattr(fastcov, name) is not None
