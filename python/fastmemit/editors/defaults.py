"""Where settings come from: presets by architecture and size, else a model's depth."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from fastcov.parsing import parse_json
from fastmemit.errors import BadConfig, BadLayer
from fastmemit.models import ModelAdapter

if TYPE_CHECKING:
    from fastmemit.editors.config import EditConfig


#: Adam's step in typical coordinates of v0, where nobody has tuned it: the published 0.5 is 0.2 of
#: them on SmolLM2, whose typical coordinate is 2.3 to 2.8 in the blocks that are edited.
RELATIVE_STEP = 0.2


def defaults(adapter: ModelAdapter, cls: type[EditConfig]) -> dict[str, Any]:
    """The settings by name that a method has for a model, without those that its class has.

    What a preset has for MEMIT holds for its relatives too, but for what makes them others: where
    the class's default is not MEMIT's. What it has for a method itself comes before all.

    Raises:
        BadConfig: A preset has a setting that its method does not have.
    """
    values = _by_depth(adapter, cls)
    preset = _preset(adapter)
    if preset is None:
        return values
    layers = {"layers": values["layers"]}
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
    return {**layers, **inherited, **exact, "preset": preset["name"]}


def _is_memits(cls: type[EditConfig], name: str) -> bool:
    """Whether a relative of MEMIT has the setting with the same default."""
    from fastmemit.editors.config import MemitConfig

    own = cls.settings()
    return name in own and own[name] == MemitConfig.settings()[name]


def candidates(adapter: ModelAdapter) -> list[int]:
    """The layers that a default may choose from, ascending: those that can be edited.

    Raises:
        BadLayer: There is none.
    """
    found = adapter.layers
    if not found:
        raise BadLayer(
            f"No block of {type(adapter.model).__name__} has a projection of its own to edit; name "
            "another one (--module)."
        )
    return found


def _by_depth(adapter: ModelAdapter, cls: type[EditConfig]) -> dict[str, Any]:
    """Settings for a model that nobody has tuned.

    The published choices of layers for models of 28 to 32 blocks begin at an eighth of the depth;
    single-layer methods take the second of these.  Where not every block can be edited, the nearest
    layers above serve, and below where there are none.  The settings of targets are relative to
    what a typical coordinate of the model's activations is.
    """
    first = round(adapter.n_layers / 8)
    found = candidates(adapter)
    above = [layer for layer in found if layer >= first]
    below = [layer for layer in found if layer < first]
    relative = {"scale": "median", "v_lr": RELATIVE_STEP}
    if not cls.single_layer:
        return {"layers": tuple(above[:5] or below[-5:]), **relative}
    (layer,) = above[1:2] or above[:1] or below[-1:]
    if "site" in cls.settings() and not adapter.adds_plainly(layer):
        relative["site"] = "projection"
    return {"layers": (layer,), **relative}


def _preset(adapter: ModelAdapter) -> dict[str, Any] | None:
    if len(adapter.layers) < adapter.n_layers:
        return None  # the published layers are those of models whose blocks are all alike
    shape = {
        "model_type": getattr(adapter.model.config, "model_type", None),
        "n_layers": adapter.n_layers,
        "d": adapter.d,
        "d_k": adapter.d_k(adapter.layers[0]),
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
