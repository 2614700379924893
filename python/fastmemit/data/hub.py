"""Data sets by name from the Hugging Face hub, through `datasets`, imported only when asked for."""

from __future__ import annotations

from typing import Any

#: How a hub data set is named where a file could stand too.
PREFIX = "hub:"


def split_name(spec: str, error: type[Exception]) -> tuple[str, str | None]:
    """The name and the configuration in ``hub:NAME`` or ``hub:NAME:CONFIG``.

    Raises:
        error: There is no name.
    """
    name, _, config = spec.removeprefix(PREFIX).partition(":")
    if not name.strip():
        raise error(f"{spec!r} names no data set; write hub:NAME or hub:NAME:CONFIG.")
    return name.strip(), config.strip() or None


def load_splits(spec: str, error: type[Exception], mend: str) -> dict[str, Any]:
    """All splits of a hub data set, downloaded (and cached by `datasets`).

    Raises:
        error: `datasets` is missing or cannot load it; `mend` ends the sentence.
    """
    name, config = split_name(spec, error)
    try:
        import datasets

        loaded = datasets.load_dataset(name, config)
    except Exception as bad:
        raise error(_cannot_load(name, config, bad, mend)) from bad
    return dict(loaded)


def open_stream(spec: str, split: str, error: type[Exception], mend: str) -> tuple[Any, str]:
    """One split as a stream, and the revision of the data set that it comes from.

    Raises:
        error: `datasets` is missing or cannot load it; `mend` ends the sentence.
    """
    name, config = split_name(spec, error)
    try:
        import datasets

        builder = datasets.load_dataset_builder(name, config)
        return builder.as_streaming_dataset(split=split), str(builder.hash)
    except Exception as bad:
        raise error(_cannot_load(name, config, bad, mend)) from bad


def _cannot_load(name: str, config: str | None, bad: Exception, mend: str) -> str:
    shown = name if config is None else f"{name} ({config})"
    lines = str(bad).strip().splitlines()
    reason = f"{type(bad).__name__}: {lines[0][:160]}" if lines else type(bad).__name__
    return f"The hub data set {shown} could not be loaded ({reason.rstrip('.')}); {mend}"
