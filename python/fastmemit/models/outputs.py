"""The hidden states inside whatever a block returns.

Decoder blocks return a tensor since transformers 4.56 and returned a tuple before; some still do.
"""

from __future__ import annotations

from typing import Any

import torch

from fastmemit.errors import UnknownArchitecture


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


def token_states(output: Any, rows: int, d: int, of: str) -> torch.Tensor:  # (rows, L, d)
    """The hidden states in a module's output, one of width `d` a token.

    Some blocks flatten rows and tokens before their MLP: (rows * L, d).

    Args:
        output: What the module put out.
        rows: Rows of the batch.
        d: The hidden size.
        of: The module in words, for the error.

    Raises:
        UnknownArchitecture: There are several states a token, or wider ones (Gemma 3n).
    """
    hidden = hidden_of(output)
    flat = hidden.ndim == 2 and hidden.shape[0] % rows == 0
    if hidden.shape[-1] != d or not (flat or (hidden.ndim == 3 and hidden.shape[0] == rows)):
        raise UnknownArchitecture(
            f"{of} puts out a tensor of shape {tuple(hidden.shape)} for {rows} rows, not one state "
            f"of width {d} a token, so no vector can be put in its place."
        )
    return hidden.reshape(rows, -1, d)


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
