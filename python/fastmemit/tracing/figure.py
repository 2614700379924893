"""The averaged effects as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from fastcov.store import atomic_file
from fastmemit.errors import BadConfig
from fastmemit.tracing.facts import GROUPS
from fastmemit.tracing.schema import Located

SUFFIXES = (".svg", ".png")
_COLOURS = {"mlp": "#2f855a", "attention": "#c53030", "hidden": "#6b46c1"}


def check_figure(path: Path | None) -> None:
    """Refuse a picture that cannot be drawn before anything is traced.

    Raises:
        BadConfig: The name ends in neither .svg nor .png, or matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise BadConfig(f"The figure {path.name!r} must end in .svg or .png; rename it.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadConfig(
            "Figures need matplotlib, which is not installed; run pip install "
            "'fastmemit[report]', or go without --figure."
        ) from error


def draw(result: Located, path: Path) -> None:
    """Draw a line per kind at the subject's last token, with 95 % bands.

    Where all positions were traced, a map of positions and layers for each kind stands below.

    Args:
        result: What was found.
        path: Where to; the ending chooses SVG or PNG.

    Raises:
        BadConfig: See `check_figure`.
    """
    check_figure(path)
    import matplotlib
    from matplotlib.figure import Figure

    kinds = list(result["effects"])
    rows = [group for group in GROUPS if any(group in result["effects"][k] for k in kinds)]
    maps = len(rows) > 1
    # Text stays text, and the same result gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastmemit"}):
        picture = Figure(figsize=(8, 6.5 if maps else 3.8), layout="constrained")
        grid = picture.add_gridspec(2 if maps else 1, len(kinds))
        _lines(picture.add_subplot(grid[0, :]), result)
        if maps:
            for column, kind in enumerate(kinds):
                _map(picture, picture.add_subplot(grid[1, column]), result, kind, rows, column == 0)
        metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
        with atomic_file(path) as file:
            picture.savefig(file, format=path.suffix[1:].lower(), metadata=metadata, dpi=150)


def _lines(axes: Any, result: Located) -> None:
    for kind, groups in result["effects"].items():
        effect = groups["last subject"]
        layers = range(len(effect["mean"]))
        window = result["windows"][kind]
        label = f"{kind}, {window} layers together" if window > 1 else f"{kind}, one layer"
        axes.plot(layers, _percent(effect["mean"]), color=_COLOURS[kind], label=label)
        if effect["low"] is not None and effect["high"] is not None:
            ends = _percent(effect["low"]), _percent(effect["high"])
            axes.fill_between(layers, *ends, color=_COLOURS[kind], alpha=0.2, linewidth=0)
    if result["proposal"] is not None:
        chosen = result["proposal"]["layers"]
        name = f"proposed: {chosen[0]}-{chosen[-1]}" if len(chosen) > 1 else f"proposed: {chosen[0]}"
        axes.axvspan(chosen[0] - 0.5, chosen[-1] + 0.5, color="#a0aec0", alpha=0.3, label=name)
    axes.axhline(0, color="#4a5568", linewidth=0.8)
    axes.set_xlabel("layer restored (of a window, its middle)")
    axes.set_ylabel("indirect effect, points of probability")
    axes.set_title(
        f"{result['settings'].get('model', 'model')}: restored at the subject's last token, {result['facts']} facts",
        fontsize="medium",
    )
    axes.legend(frameon=False, fontsize="small")


def _map(picture: Any, axes: Any, result: Located, kind: str, rows: list[str], named: bool) -> None:
    groups = cast(dict[str, Any], result["effects"])[kind]
    values = [_percent(groups[group]["mean"]) for group in rows]
    image = axes.imshow(values, aspect="auto", cmap="Purples", vmin=0, interpolation="nearest")
    axes.set_title(kind, fontsize="medium")
    axes.set_xlabel("layer")
    axes.set_yticks(range(len(rows)), rows if named else [""] * len(rows))
    picture.colorbar(image, ax=axes, location="bottom", shrink=0.9)


def _percent(shares: list[float]) -> list[float]:
    return [100 * share for share in shares]
