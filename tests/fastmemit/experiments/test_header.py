"""Folders that were recorded before are those of the present settings."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fastmemit.errors import BadData
from fastmemit.experiments import results
from fastmemit.experiments.results import check_header, with_defaults
from fastmemit.methods import find_config
from fastmemit.models import ModelAdapter

RESULTS = Path(__file__).parents[3] / "docs" / "results"
SMOLLM2 = cast(
    ModelAdapter,
    SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(model_type="llama")),
        n_layers=30,
        layers=list(range(30)),
        d=576,
        d_k=lambda layer: 1536,
        check_layer=lambda layer: None,
    ),
)


def recorded(path: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((RESULTS / path).read_text(encoding="utf-8")))


def as_published(method: str, **settings: Any) -> dict[str, Any]:
    config = find_config(SMOLLM2, method, results.as_published(method, settings))
    return cast(dict[str, Any], json.loads(json.dumps(config.as_dict())))


def test_recorded_settings_are_those_of_today() -> None:
    for method, settings in recorded("smollm2-layers/sweep.json")["methods"].items():
        assert with_defaults(method, settings) == as_published(method)


def test_settings_of_other_methods_that_were_recorded_changed_nothing() -> None:
    settings = recorded("smollm2-layers/sweep.json")["methods"]["emmet"]
    assert settings["keys"] == "consistent" and "keys" not in with_defaults("emmet", settings)
    wanted = with_defaults("emmet", settings)
    assert with_defaults("emmet", {**settings, "keys": "mean"}) == wanted
    assert with_defaults("emmet", {**settings, "ridge": 2.0}) != wanted


def test_a_recorded_sweep_goes_on_and_another_ridge_is_refused(tmp_path: Path) -> None:
    header = recorded("smollm2-layers/sweep.json")
    (tmp_path / "sweep.json").write_text(json.dumps(header))
    methods = {method: as_published(method) for method in ("memit", "rome")}
    check_header(tmp_path / "sweep.json", {**header, "methods": methods})
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert stored["methods"] == {"emmet": header["methods"]["emmet"], **methods}
    methods = {"memit": as_published("memit", relative_ridge=None)}
    with pytest.raises(BadData, match="other settings of memit"):
        check_header(tmp_path / "sweep.json", {**header, "methods": methods})


@pytest.mark.parametrize("settings", ["x", [], None, 5])
def test_settings_that_are_no_object_are_refused(tmp_path: Path, settings: Any) -> None:
    header = recorded("smollm2-layers/sweep.json")
    (tmp_path / "sweep.json").write_text(json.dumps({**header, "methods": {"memit": settings}}))
    with pytest.raises(BadData, match=r"not the header of a sweep \(the settings of memit are"):
        check_header(tmp_path / "sweep.json", header)
