"""Data sets by name from the Hugging Face hub, through `datasets`, imported only when asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: How a hub data set is named where a file could stand too.
PREFIX = "hub:"

_SPLIT = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class HubName:
    """What ``hub:NAME[:CONFIG][@SPLIT]`` names.

    Attributes:
        name: The data set, such as ``wikimedia/wikipedia``, or a local folder of files.
        config: One of its configurations, such as ``20231101.en``.
        split: One of its splits; None where none is named.
    """

    name: str
    config: str | None
    split: str | None

    def __str__(self) -> str:
        """As a person names it."""
        return self.name if self.config is None else f"{self.name} ({self.config})"

    @property
    def spec(self) -> str:
        """The name and the configuration as they are written, without the split."""
        return PREFIX + (self.name if self.config is None else f"{self.name}:{self.config}")


def parse_name(spec: str, error: type[Exception]) -> HubName:
    """Take ``hub:NAME``, ``hub:NAME:CONFIG`` or either with ``@SPLIT`` apart.

    Raises:
        error: There is no name, or nothing that could be a split behind the ``@``.
    """
    rest, split = spec.removeprefix(PREFIX).strip(), None
    # A folder may have an @ in its name; a data set on the hub has none.
    if "@" in rest and not Path(rest).is_dir():
        rest, _, split = rest.rpartition("@")
        if not _SPLIT.fullmatch(split):
            raise error(
                f"{spec!r} names no split behind its @; write hub:NAME[:CONFIG]@SPLIT with one "
                "split's name, such as train."
            )
    name, _, config = rest.partition(":")
    if not name.strip():
        raise error(f"{spec!r} names no data set; write hub:NAME[:CONFIG][@SPLIT].")
    return HubName(name.strip(), config.strip() or None, split)


def load_splits(spec: str, error: type[Exception], mend: str) -> dict[str, Any]:
    """The split that is named, or all, of a hub data set, downloaded (and cached by `datasets`).

    Raises:
        error: `datasets` is missing or cannot load it (`mend` ends the sentence), or there is no such split.
    """
    wanted = parse_name(spec, error)
    try:
        import datasets

        loaded = dict(datasets.load_dataset(wanted.name, wanted.config))
    except Exception as bad:
        raise error(_cannot_load(wanted, bad, mend)) from bad
    if wanted.split is None:
        return loaded
    if wanted.split not in loaded:
        raise error(_no_split(wanted, wanted.split, list(loaded)))
    return {wanted.split: loaded[wanted.split]}


def open_stream(spec: str, error: type[Exception], mend: str) -> tuple[Any, HubName, str]:
    """One split as a stream, ``train`` where none is named; nothing is downloaded as a whole.

    Returns:
        The stream, what it is of (with its split), and the revision of the data set.

    Raises:
        error: `datasets` is missing or cannot load it (`mend` ends the sentence), or there is no such split.
    """
    wanted = parse_name(spec, error)
    split = wanted.split or "train"
    try:
        import datasets

        builder = datasets.load_dataset_builder(wanted.name, wanted.config)
        stream = builder.as_streaming_dataset(split=split)
    except Exception as bad:
        known = re.search(r"Bad split: .*Available splits: \[(.*)\]", str(bad))
        if known:
            splits = [name.strip(" '\"") for name in known.group(1).split(",")]
            raise error(_no_split(wanted, split, splits)) from bad
        raise error(_cannot_load(wanted, bad, mend)) from bad
    return stream, HubName(wanted.name, wanted.config, split), str(builder.hash)


def _no_split(wanted: HubName, split: str, known: list[str]) -> str:
    return (
        f"The hub data set {wanted} has no split {split!r} (its splits: {', '.join(known)}); name "
        f"one of them, as in {wanted.spec}@{known[0]}."
    )


def _cannot_load(wanted: HubName, bad: Exception, mend: str) -> str:
    lines = str(bad).strip().splitlines()
    reason = f"{type(bad).__name__}: {lines[0][:160]}" if lines else type(bad).__name__
    return f"The hub data set {wanted} could not be loaded ({reason.rstrip('.')}); {mend}"
