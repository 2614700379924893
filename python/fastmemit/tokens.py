"""Text to tokens, with the place in the text that each token covers.

Which token carries a subject is a question about characters: the request knows where its subject
stands in the text, so the token is found by the span that it covers and never by searching for the
subject's own tokens, which may be merged differently in another context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmemit.errors import BadRequest

NOWHERE = (-1, -1)


@dataclass(frozen=True)
class Encoded:
    """One tokenised text.

    Attributes:
        ids: Token ids, leading special tokens (BOS) included, trailing ones (EOS) removed.
        spans: Per token the characters ``[start, end)`` of the text that it covers; ``(-1, -1)``
            for special tokens, which stand for no character.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)


def encode(tokenizer: Any, text: str) -> Encoded:
    """Tokenise `text` the way the model's own inputs are tokenised.

    Args:
        tokenizer: A transformers tokenizer, fast or slow.
        text: Any text; it may be empty.

    Returns:
        Ids and character spans.  Special tokens that the tokenizer puts in front (BOS) are kept,
        those that it puts behind (EOS) are removed, so that the text can be continued.
    """
    ids, spans = _fast(tokenizer, text)
    end = len(ids)
    return Encoded(tuple(ids[:end]), tuple(spans[:end]))


def _fast(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    out = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    ids = list(out["input_ids"])
    special = out["special_tokens_mask"]
    spans = [
        NOWHERE if flag and start == end else (start, end)
        for flag, (start, end) in zip(special, out["offset_mapping"], strict=True)
    ]
    while spans and spans[-1] == NOWHERE and any(s != NOWHERE for s in spans):
        spans.pop()
        ids.pop()
    return ids, spans


def subject_end(encoded: Encoded, start: int, end: int) -> int:
    """The index of the last token that overlaps ``text[start:end]``.

    Raises:
        BadRequest: No token covers any of these characters.
    """
    for index in range(len(encoded.spans) - 1, -1, -1):
        left, right = encoded.spans[index]
        if left < end and right > start:
            return index
    raise BadRequest(
        f"No token covers the characters {start} to {end} of the prompt; "
        "name a subject that the tokenizer does not drop."
    )


def encode_with_target(tokenizer: Any, text: str, target: str) -> tuple[Encoded, int]:
    """Tokenise `text` and `target` as one text.

    Returns:
        The encoding of ``text + target`` and how many of its last tokens are the target's.

    Raises:
        BadRequest: The target yields no token.
    """
    encoded = encode(tokenizer, text + target)
    n_target = sum(right > len(text) for _, right in encoded.spans)
    if n_target == 0:
        raise BadRequest(f"The target {target!r} yields no token; give another answer.")
    return encoded, n_target


def pad_batch(
    rows: Sequence[Sequence[int]],
    pad_id: int = 0,
    side: str = "right",
    device: torch.device | str | None = None,
) -> dict[str, torch.Tensor]:
    """Rows of token ids as one batch.

    Returns:
        ``input_ids``, ``attention_mask`` and ``position_ids``, int64, each (n, L).
    """
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place] = torch.tensor(list(row), dtype=torch.int64)
        mask[index, place] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in batch.items()}
