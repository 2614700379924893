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


def token_states(output: Any, shape: tuple[int, int], d: int, of: str) -> torch.Tensor:  # (rows, L, d)
    """The hidden states in a module's output, one of width `d` a token.

    Some blocks flatten rows and tokens before their MLP: (rows * L, d).

    Args:
        output: What the module put out.
        shape: (rows, L) of the batch.
        d: The width.
        of: The module in words, for the error.

    Raises:
        UnknownArchitecture: There are several states a token (Gemma 3n), or not one for every token (a routed expert).
    """
    hidden = hidden_of(output)
    rows, length = shape
    if tuple(hidden.shape) not in {(rows, length, d), (rows * length, d)}:
        raise UnknownArchitecture(
            f"{of} handles a tensor of shape {tuple(hidden.shape)} for {rows} rows of {length} "
            f"tokens, not one state of width {d} a token, so it can be neither read nor changed at "
            "the subject."
        )
    return hidden.reshape(rows, length, d)


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
