"""Layers as people write them."""

from __future__ import annotations

from fastmemit.errors import BadConfig


def parse_layers(text: str) -> tuple[int, ...]:
    """``"4-8"``, ``"4,6"`` or ``"3-5,9"`` as layer numbers, ascending as they are written.

    Raises:
        BadConfig: A part is neither a number nor a range of numbers.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            numbers = range(int(first), (int(last) if dash else int(first)) + 1)
        except ValueError as error:
            raise BadConfig(f"The layers {text!r} are not numbers and ranges; write them as 4-8 or 4,6.") from error
        if not numbers:
            raise BadConfig(f"The range {part!r} of layers is empty; write it as 4-8.")
        layers += numbers
    return tuple(layers)
