"""The hidden states inside whatever a block returns.

Decoder blocks return a tensor since transformers 4.56 and returned a tuple before; some still do.
"""

from __future__ import annotations

from typing import Any

import torch


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states (B, L, d) in a block's output, be it a tensor, a tuple or a ModelOutput.

    Raises:
        TypeError: The output holds no tensor in first place.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):
        first = next(iter(output.values()), None)
    else:
        first = output[0] if isinstance(output, (tuple, list)) and output else None
    if not isinstance(first, torch.Tensor):
        raise TypeError(
            f"A block returned {type(output).__name__} without a tensor in first place; "
            "its hidden states cannot be found."
        )
    return first


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """The same kind of object as `output`, with its hidden states replaced by `hidden`."""
    hidden_of(output)  # the same refusal for what cannot be read
    if isinstance(output, torch.Tensor):
        return hidden
    if isinstance(output, dict):
        first = next(iter(output))
        return type(output)(**{**output, first: hidden})
    if hasattr(output, "_replace"):  # a named tuple takes its fields one by one
        return output._replace(**{output._fields[0]: hidden})
    return type(output)((hidden, *output[1:]))
