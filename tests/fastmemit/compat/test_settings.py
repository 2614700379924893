"""What is configured, or in the environment, decides on what is collected."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastmemit import compat
from fastmemit.errors import BadConfig
from tiny_editors import tiny_corpus

NAME = "model.layers.{}.mlp.down_proj"


def test_other_settings_give_other_statistics(model: Any, tok: Any) -> None:
    four = compat.layer_stats(model, tok, NAME.format(1), "", "wikipedia", ["mom2"]).mom2
    compat.configure(multiplier=2)
    two = compat.layer_stats(model, tok, NAME.format(1), "", "wikipedia", ["mom2"]).mom2
    assert (four.count, two.count) == (256, 128)
    compat.configure(multiplier="auto", corpus=tiny_corpus(400), allow_fewer=True)
    auto = compat.layer_stats(model, tok, NAME.format(1), "", "wikipedia", ["mom2"]).mom2
    assert auto.count > 128
    compat.configure(multiplier=None)
    dynamic = SimpleNamespace(layers=[1], dynamic=True, dynamic_multiplier=3)
    three = compat.layer_stats(model, tok, NAME.format(1), "", "wikipedia", ["mom2"], hparams=dynamic).mom2
    assert three.count == 192


def test_configured_values(model: Any, tok: Any) -> None:
    assert compat.configure(layers=range(1, 3), multiplier="3").layers == (1, 2)
    assert compat.configure().multiplier == 3
    none: dict[str, Any] = {"field": None, "seed": None, "allow_fewer": None, "layers": None}
    found = compat.configure(**none)
    assert (found.field, found.seed, found.allow_fewer, found.layers) == ("text", 0, False, None)
    with pytest.raises(BadConfig, match=r"multiplier must be a number or 'auto' but is \[3\]"):
        compat.configure(multiplier=[3])  # type: ignore[arg-type]  # a wrong kind is what is refused


def test_the_environment_is_asked_where_nothing_is_configured(
    model: Any, tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(tiny_corpus().documents(0)))
    compat.configure(corpus=None, multiplier=None)
    monkeypatch.setenv("FASTMEMIT_CORPUS", str(path))
    monkeypatch.setenv("FASTMEMIT_MULTIPLIER", "3")
    stats = compat.layer_stats(model, tok, NAME.format(1), "", "wikipedia", ["mom2"])
    assert stats.mom2.count == 192
    monkeypatch.setenv("FASTMEMIT_MULTIPLIER", "ten")
    with pytest.raises(BadConfig, match="FASTMEMIT_MULTIPLIER must be a number or 'auto' but is"):
        compat.get_cov(model, tok, NAME.format(1), "wikipedia", 1, "float32")
