"""Logits only where they are read: the output head is a large part of a small model's work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastmemit.errors import UnknownArchitecture
from fastmemit.models import ModelAdapter


@contextmanager
def head_reads(adapter: ModelAdapter, rows: Sequence[int], columns: Sequence[int]) -> Iterator[None]:
    """Let the model's output head see M chosen positions instead of every one.

    Inside the block a forward returns logits of shape (1, M, vocabulary), with whatever the model does to logits after
    its head (scaling, soft caps) done to them.

    Args:
        adapter: The model.
        rows: M rows of the batch.
        columns: M positions in these rows.

    Raises:
        UnknownArchitecture: The model does not call its output head.
    """
    chosen = (list(rows), list(columns))
    called = False

    def gather(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal called
        called = True
        return (args[0][chosen][None], *args[1:])

    handle = adapter.lm_head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
    if not called:
        raise UnknownArchitecture(
            f"{type(adapter.model).__name__} does not call {type(adapter.lm_head).__name__}, which "
            "it names as its output head, so its logits cannot be told from others; load it with "
            "AutoModelForCausalLM."
        )
