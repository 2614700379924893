"""What the other codebases' signatures have no argument for: corpus, multiplier, cache."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastmemit.auto import AUTO
from fastmemit.compat.hparams import whole_numbers
from fastmemit.data import Corpus
from fastmemit.errors import BadConfig

MULTIPLIER = 10.0


@dataclass(frozen=True)
class Settings:
    """How statistics are come by; see `configure`."""

    corpus: str | os.PathLike[str] | Corpus | None = None
    multiplier: float | Literal["auto"] | None = None
    cache: str | os.PathLike[str] | None = None
    layers: tuple[int, ...] | None = None
    max_length: int | None = None
    allow_fewer: bool = False
    field: str = "text"
    seed: int = 0
    progress: bool = False


_UNSET: Any = object()
_chosen = Settings()


def configure(
    *,
    corpus: str | os.PathLike[str] | Corpus | None = _UNSET,
    multiplier: float | Literal["auto"] | None = _UNSET,
    cache: str | os.PathLike[str] | None = _UNSET,
    layers: Sequence[int] | None = _UNSET,
    max_length: int | None = _UNSET,
    allow_fewer: bool = _UNSET,
    field: str = _UNSET,
    seed: int = _UNSET,
    progress: bool = _UNSET,
) -> Settings:
    """Choose how the functions of `fastmemit.compat` come by statistics, in this process.

    What is not named stays as it is; None brings back the default.

    Args:
        corpus: As for `fastmemit.Editor.precompute`: a file, ``"self"``, ``"builtin"``, a hub name. None:
            ``$FASTMEMIT_CORPUS``, else the newest statistics that are kept of the model, else the data set that the
            caller names (``mom2_dataset``), from the hub.
        multiplier: d_m, or ``"auto"``; None: ``$FASTMEMIT_MULTIPLIER``, else that of the hparams where they are
            ``dynamic``, else 10.
        cache: The folder for statistics and targets; None: `fastmemit.cache.cache_dir`.
        layers: Those to collect together on the unedited model, where the caller does not pass its hparams; None: see
            `get_cov`.
        max_length: Cut documents at so many tokens.
        allow_fewer: Take a corpus that ends early for what it has.
        field: The text's field in a JSON corpus.
        seed: Of contexts and of the corpus's order.
        progress: Show bars.

    Returns:
        The settings that hold now.

    Raises:
        BadConfig: The multiplier is neither a number nor ``"auto"``, or a layer no whole number.
    """
    global _chosen
    given = {name: value for name, value in locals().items() if value is not _UNSET}
    default = Settings()
    named = {n: getattr(default, n) if value is None else value for n, value in given.items()}
    if named.get("layers") is not None:
        named["layers"] = whole_numbers(named["layers"], "configure")
    if named.get("multiplier") is not None:
        named["multiplier"] = _multiplier(named["multiplier"], "multiplier")
    _chosen = dataclasses.replace(_chosen, **named)
    return _chosen


def current() -> Settings:
    """The settings that hold now, those of the environment included."""
    found = _chosen
    if found.corpus is None and (corpus := os.environ.get("FASTMEMIT_CORPUS")):
        found = dataclasses.replace(found, corpus=corpus)
    if found.multiplier is None and (text := os.environ.get("FASTMEMIT_MULTIPLIER")):
        multiplier = _multiplier(text, "FASTMEMIT_MULTIPLIER")
        found = dataclasses.replace(found, multiplier=multiplier)
    if found.cache is not None:
        found = dataclasses.replace(found, cache=Path(found.cache))
    return found


def _multiplier(value: Any, name: str) -> Any:
    if value == AUTO:
        return AUTO
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise BadConfig(f"{name} must be a number or 'auto' but is {value!r}.") from error
