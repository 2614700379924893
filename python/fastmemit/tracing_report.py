"""What a trace says: averages with intervals, layers to edit, the result file and the picture."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from fastcov.files import StrPath, atomic_file
from fastmemit.errors import BadConfig, counted
from fastmemit.tracing import GROUPS, Trace

RESAMPLES = 2000
LEVEL = 0.95
#: Published ranges have 5 layers (GPT-2 XL 13-17, Llama-2-7B 4-8) or 6 (GPT-J 3-8).
LONGEST = 5
SHARE = 0.5
_COLOURS = {"mlp": "#2f855a", "attention": "#c53030", "hidden": "#6b46c1"}


class Effect(TypedDict):
    """An averaged indirect effect per layer: a difference of probabilities, in [-1, 1]."""

    facts: int  # how many were averaged
    mean: list[float]
    low: list[float] | None  # 95 % bootstrap interval over facts; null for a single fact
    high: list[float] | None


@dataclass(frozen=True)
class Proposal:
    """Layers to edit."""

    peak: int  # of the largest averaged effect; ROME and EMMET edit this one
    layers: tuple[int, ...]  # ascending and ending at `peak`; MEMIT edits these
    low: int  # 95 % interval of the peak's place over other draws of the facts
    high: int


def average(effects: NDArray[np.float64], seed: int = 0) -> Effect:
    """The average over facts of effects (facts, layers), with its percentile bootstrap interval.

    Facts are drawn with replacement, all layers of a fact together; noise samples are not drawn again, so the interval
    is about other facts of the same kind.
    """
    low = high = None
    if len(effects) > 1:
        tail = 50 * (1 - LEVEL)
        low, high = np.percentile(_resampled(effects, seed), [tail, 100 - tail], axis=0).tolist()
    return Effect(facts=len(effects), mean=effects.mean(0).tolist(), low=low, high=high)


def _resampled(effects: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Averages of bootstrap samples of the facts, (RESAMPLES, layers)."""
    count = len(effects)
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    return draws @ effects / count


def propose(effects: NDArray[np.float64], seed: int = 0) -> Proposal | None:
    """Choose layers by the MLP's effect (facts, layers) at the subject's last token.

    ROME edits where this effect is largest. MEMIT edits a range of MLPs that carry the fact and writes its target at
    the last of them (its section 4.1). Here that range is: the peak and the layers below it, downwards as long as the
    averaged effect is at least half the peak's, and five layers at most.

    None where there is but one fact, or the peak is not above zero: its normal interval must be, at a level of 95 %
    over all layers together (Bonferroni), for the largest of many averages is above zero by chance too.
    """
    count, n_layers = effects.shape
    mean = effects.mean(0)
    peak = int(mean.argmax())
    quantile = NormalDist().inv_cdf(1 - (1 - LEVEL) / (2 * n_layers))
    if count < 2 or mean[peak] <= quantile * effects[:, peak].std(ddof=1) / count**0.5:
        return None
    first = peak
    while first > max(0, peak - LONGEST + 1) and mean[first - 1] >= SHARE * mean[peak]:
        first -= 1
    tail = 50 * (1 - LEVEL)
    peaks = _resampled(effects, seed).argmax(1)
    low, high = np.percentile(peaks, [tail, 100 - tail], method="nearest")
    return Proposal(peak, tuple(range(first, peak + 1)), int(low), int(high))


def located(
    found: Trace,
    looked_at: int,
    proposal: Proposal | None,
    *,
    seed: int,
    seconds: float,
    command: Sequence[str],
    **about: Any,
) -> dict[str, Any]:
    """Everything that a trace found: the file that ``fastmemit experiment locate --json`` writes.

    `about` are its settings, versions and hardware, `seconds` those of the trace without loading the model.
    """
    return {
        "facts": len(found.facts),
        "looked_at": looked_at,  # how many the model was asked about to find them; the rest it does not know
        "clean": average(found.clean[:, None], seed),  # lists of one value
        "corrupted": average(found.corrupted[:, None], seed),
        "windows": found.windows,
        "noise_std": found.std,  # of what was added to the subjects' embeddings
        "effects": {  # kind -> group of positions -> `Effect`
            kind: {group: average(values, seed) for group, values in groups.items()}
            for kind, groups in found.effects.items()
        },
        # null where no effect was found, or no MLP was traced
        "proposal": None if proposal is None else {**asdict(proposal), "layers": list(proposal.layers)},
        "records": [
            {
                "prompt": fact.request.prompt,
                "subject": fact.request.subject,
                "answer": str(fact.request.target_true),
                "clean": float(clean),  # probabilities of the answer's first token
                "corrupted": float(corrupted),  # averaged over noise samples
            }
            for fact, clean, corrupted in zip(found.facts, found.clean, found.corrupted, strict=True)
        ],
        **about,
        "seconds": round(seconds, 1),
        "command": shlex.join(command),
    }


# What each format would say of the day.
_UNDATED: dict[str, tuple[str, ...]] = {".svg": ("Date",), ".pdf": ("CreationDate",), ".png": ()}


def check_figure(path: StrPath | None) -> None:
    """Refuse a picture that cannot be drawn, by its name or without matplotlib, before anything is traced."""
    if path is None:
        return
    path = Path(path)
    if path.suffix.lower() not in _UNDATED:
        raise BadConfig(f"The figure {path.name!r} must end in .svg, .pdf or .png; rename it.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadConfig(
            "Figures need matplotlib, which is not installed; run pip install "
            "'fastmemit[report]', or go without --figure."
        ) from error


def draw(result: dict[str, Any], path: StrPath) -> None:
    """Draw a line per kind at the subject's last token, with 95 % bands.

    Where all positions were traced, a map of positions and layers for each kind stands below. The path's ending chooses
    SVG, PDF or PNG.
    """
    path = Path(path)
    check_figure(path)
    import matplotlib
    from matplotlib.figure import Figure

    kinds = list(result["effects"])
    rows = [group for group in GROUPS if any(group in result["effects"][k] for k in kinds)]
    maps = len(rows) > 1
    # Text stays text, and the same result gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastmemit", "pdf.fonttype": 42}):
        picture = Figure(figsize=(8, 6.5 if maps else 3.8), layout="constrained")
        grid = picture.add_gridspec(2 if maps else 1, len(kinds))
        _draw_lines(picture.add_subplot(grid[0, :]), result)
        for column, kind in enumerate(kinds if maps else ()):
            axes = picture.add_subplot(grid[1, column])
            values = [_percent(result["effects"][kind][group]["mean"]) for group in rows]
            image = axes.imshow(values, aspect="auto", cmap="Purples", vmin=0, interpolation="nearest")
            axes.set_title(kind, fontsize="medium")
            axes.set_xlabel("layer")
            axes.set_yticks(range(len(rows)), [""] * len(rows) if column else rows)
            picture.colorbar(image, ax=axes, location="bottom", shrink=0.9)
        ending = path.suffix.lower()
        with atomic_file(path) as file:
            picture.savefig(file, format=ending[1:], metadata=dict.fromkeys(_UNDATED[ending]), dpi=150)


def _draw_lines(axes: Any, result: dict[str, Any]) -> None:
    for kind, groups in result["effects"].items():
        effect, window = groups["last subject"], result["windows"][kind]
        layers = range(len(effect["mean"]))
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
        f"{result['settings'].get('model', 'model')}: restored at the subject's last token, "
        f"{counted(result['facts'], 'fact')}",
        fontsize="medium",
    )
    axes.legend(frameon=False, fontsize="small")


def _percent(shares: list[float]) -> list[float]:
    return [100 * share for share in shares]
