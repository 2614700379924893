"""Settings of a test's own, and a tiny model as another codebase holds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmemit.compat import drop_in
from tiny_editors import tiny_corpus
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def _configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Statistics of a tiny corpus in a folder of the test."""
    chosen = drop_in.Settings(corpus=tiny_corpus(), multiplier=4, cache=tmp_path / "cache")
    monkeypatch.setattr(drop_in, "_chosen", chosen)
    yield


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def tok() -> Any:
    return tiny_tokenizer()
