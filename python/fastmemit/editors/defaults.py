"""Where settings come from: presets by architecture and size, else a model's depth."""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastcov.parsing import parse_json
from fastmemit.models import ModelAdapter

#: Methods that edit one layer; all others are relatives of MEMIT.
SINGLE = ("rome", "emmet")
#: What makes a relative of MEMIT one, whatever a preset says of MEMIT.
OWN: dict[str, dict[str, Any]] = {
    "pmet": {"spread": "sqrt"},
    # No published number of the ridge is known here for any model: AlphaEdit's weight of the same
    # penalty, the squared norm of the change.
    "encore": {"ridge": 10.0, "stop": "most-probable"},
}


def defaults(adapter: ModelAdapter, method: str) -> dict[str, Any]:
    """The settings of a method by name, without overrides.

    What a preset has for MEMIT holds for its relatives too, but for what makes them others; what it
    has for a method itself comes before all.
    """
    values = _by_depth(adapter, method)
    preset = _preset(adapter, values["layers"][0])
    if preset is None:
        return {**values, **OWN.get(method, {})}
    exact = preset["methods"].get(method, {})
    shared = {} if method in SINGLE else preset["methods"].get("memit", {})
    if exact or shared:
        values["preset"] = preset["name"]
    return {**values, **shared, **OWN.get(method, {}), **exact}


def _by_depth(adapter: ModelAdapter, method: str) -> dict[str, Any]:
    """Settings for a model that nobody has tuned.

    The published choices of layers for models of 28 to 32 blocks begin at an eighth of the depth;
    single-layer methods take the second of these.
    """
    first = min(round(adapter.n_layers / 8), adapter.n_layers - 1)
    if method not in SINGLE:
        return {"layers": tuple(range(first, min(first + 5, adapter.n_layers)))}
    values: dict[str, Any] = {"layers": (min(first + 1, adapter.n_layers - 1),)}
    if method == "emmet":
        values["lambda_e"] = 0.1
    else:
        # ROME's target is the projection's own output, which is short against the stream it joins.
        values["clamp"] = 4.0
    return values


def _preset(adapter: ModelAdapter, layer: int) -> dict[str, Any] | None:
    shape = {
        "model_type": getattr(adapter.model.config, "model_type", None),
        "n_layers": adapter.n_layers,
        "d": adapter.d,
        "d_k": adapter.d_k(layer),
    }
    for preset in load_presets():
        if preset["match"] == shape:
            return preset
    return None


def load_presets() -> list[dict[str, Any]]:
    """All presets that the package ships: ``name``, ``match``, ``source`` and ``methods``."""
    folder = resources.files("fastmemit.editors") / "presets"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return [parse_json(file.read_bytes()) for file in files]
