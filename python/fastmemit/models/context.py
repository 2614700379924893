"""How many tokens a model takes at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastmemit.errors import BadRequest
from fastmemit.models.structure import text_config

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def context_limit(model: nn.Module) -> int | None:
    """The longest input that a model's config states, in tokens; None where it states none."""
    if getattr(model, "config", None) is None:
        return None
    config = text_config(model)
    stated = (getattr(config, field, None) for field in _FIELDS)
    return next((limit for limit in stated if isinstance(limit, int) and limit > 0), None)


def check_lengths(model: nn.Module, rows: Sequence[Sequence[int]], more: int = 0) -> None:
    """Refuse rows of tokens that the model has no positions for.

    Args:
        model: The model.
        rows: Token ids.
        more: Tokens that will be added to each.

    Raises:
        BadRequest: A row is too long; the message says by how much.
    """
    limit = context_limit(model)
    longest = max((len(row) for row in rows), default=0) + more
    if limit is not None and longest > limit:
        raise BadRequest(
            f"A text comes to {longest} tokens but {type(model).__name__} takes {limit} at once; "
            "shorten the prompt or the subject."
        )
