"""Where settings come from: presets by architecture and size, else a model's depth."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from fastcov.parsing import parse_json
from fastmemit.errors import BadConfig
from fastmemit.models import ModelAdapter

if TYPE_CHECKING:
    from fastmemit.editors.config import EditConfig


def defaults(adapter: ModelAdapter, cls: type[EditConfig]) -> dict[str, Any]:
    """The settings by name that a method has for a model, without those that its class has.

    What a preset has for MEMIT holds for its relatives too, but for what makes them others: where
    the class's default is not MEMIT's. What it has for a method itself comes before all.

    Raises:
        BadConfig: A preset has a setting that its method does not have.
    """
    values = _by_depth(adapter, cls)
    preset = _preset(adapter, values["layers"][0])
    if preset is None:
        return values
    exact = preset["methods"].get(cls.method, {})
    shared = {} if cls.single_layer else preset["methods"].get("memit", {})
    if not exact and not shared:
        return values
    try:
        for name in exact:
            cls.check_name(name)
    except BadConfig as error:
        raise BadConfig(f"The preset {preset['name']!r}: {error}") from error
    inherited = {name: value for name, value in shared.items() if _is_memits(cls, name)}
    return {**values, **inherited, **exact, "preset": preset["name"]}


def _is_memits(cls: type[EditConfig], name: str) -> bool:
    """Whether a relative of MEMIT has the setting with the same default."""
    from fastmemit.editors.config import MemitConfig

    own = cls.settings()
    return name in own and own[name] == MemitConfig.settings()[name]


def _by_depth(adapter: ModelAdapter, cls: type[EditConfig]) -> dict[str, Any]:
    """Settings for a model that nobody has tuned.

    The published choices of layers for models of 28 to 32 blocks begin at an eighth of the depth;
    single-layer methods take the second of these.
    """
    first = min(round(adapter.n_layers / 8), adapter.n_layers - 1)
    if cls.single_layer:
        return {"layers": (min(first + 1, adapter.n_layers - 1),)}
    return {"layers": tuple(range(first, min(first + 5, adapter.n_layers)))}


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
