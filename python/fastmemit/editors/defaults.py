"""Where settings come from: presets by architecture and size, else a model's depth."""

from __future__ import annotations

import math
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastcov.parsing import parse_json
from fastmemit.errors import BadConfig, BadLayer
from fastmemit.models import ModelAdapter

if TYPE_CHECKING:
    from fastmemit.editors.config import EditConfig


#: Adam's step in typical coordinates of v0, where nobody has tuned it: the published 0.5 is 0.2 of
#: them on SmolLM2, whose typical coordinate is 2.3 to 2.8 in the blocks that are edited.
PUBLISHED_STEP, RELATIVE_STEP = 0.5, 0.2
#: A layer that can move its block by less than this share of what is usual is no default.
FAR_LESS = 0.1


def defaults(adapter: ModelAdapter, cls: type[EditConfig], asked: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The settings by name that a method has for a model, without those that its class has.

    What a preset has for MEMIT holds for its relatives too, but for what makes them others: where the class's default
    is not MEMIT's. What it has for a method itself comes before all.

    Args:
        adapter: The model.
        cls: The method's class of settings.
        asked: The layers that the caller names, where it does: others are not looked for then.

    Raises:
        BadConfig: A preset has a setting that its method does not have.
    """
    preset = _preset(adapter)
    exact = preset["methods"].get(cls.method, {}) if preset else {}
    shared = preset["methods"].get("memit", {}) if preset and not cls.single_layer else {}
    if preset is None or not (exact or shared):
        layers = asked or _by_depth(adapter, cls)
        return {"layers": layers, **_untuned(adapter, cls, layers[-1])}
    try:
        for name in exact:
            cls.check_name(name)
    except BadConfig as error:
        raise BadConfig(f"The preset {preset['name']!r}: {error}") from error
    inherited = {name: value for name, value in shared.items() if _is_memits(cls, name)}
    return {**inherited, **exact, "preset": preset["name"]}


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
    found = list(adapter.layers)
    if not found:
        raise BadLayer(
            f"No block of {type(adapter.model).__name__} has a projection of its own to edit; name "
            "another one (--module)."
        )
    return found


def _by_depth(adapter: ModelAdapter, cls: type[EditConfig]) -> tuple[int, ...]:
    """The layers of a model that nobody has tuned.

    The published choices of layers for models of 28 to 32 blocks begin at an eighth of the depth;
    single-layer methods take the second of these.  Where not every block can be edited, the nearest
    layers above serve, and below where there are none.  A layer is passed by whose projection can
    move its block far less than those of the other layers can.
    """
    first = round(adapter.n_layers / 8)
    found = _able(adapter, candidates(adapter))
    above = [layer for layer in found if layer >= first]
    below = [layer for layer in found if layer < first]
    if cls.single_layer:
        return tuple(above[1:2] or above[:1] or below[-1:])
    return tuple(above[:5] or below[-5:])


def _able(adapter: ModelAdapter, found: list[int]) -> list[int]:
    """Those layers that are not far behind the others in what they can do.

    Where a weight is NaN or infinite there is nothing to compare: such layers stay, and what uses them says what is
    wrong with the model.
    """
    if all(adapter.adds_plainly(layer) for layer in found):
        return found
    reach = {layer: adapter.reach(layer) for layer in found}
    finite = sorted(value for value in reach.values() if math.isfinite(value))
    usual = finite[len(finite) // 2] if finite else 0.0
    return [layer for layer in found if not reach[layer] < FAR_LESS * usual]


def units(adapter: ModelAdapter, config: EditConfig) -> dict[str, Any]:
    """The scale and the learning rate that settings leave to the model, by name.

    Where nobody has tuned the method for the model, they ask nothing of the size of its activations.
    """
    scale, v_lr = config.scale, config.v_lr
    if scale is None:
        preset = _preset(adapter)
        known = {config.method} if config.single_layer else {config.method, "memit"}
        scale = "published" if preset is not None and known & preset["methods"].keys() else "median"
    if v_lr is None:
        v_lr = PUBLISHED_STEP if scale == "published" else RELATIVE_STEP
    return {"scale": scale, "v_lr": v_lr}


def _untuned(adapter: ModelAdapter, cls: type[EditConfig], layer: int) -> dict[str, Any]:
    """The site of target vectors that asks for nothing that the projection cannot put out."""
    values: dict[str, Any] = {}
    editable = layer in adapter.layers  # of another one the caller is told elsewhere
    if "site" in cls.settings() and editable and not adapter.adds_plainly(layer):
        values["site"] = "projection"
    return values


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
