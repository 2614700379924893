"""Running text for a perplexity: read once, tokenised, and cut into windows."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastmemit.data.reading import MAX_WHOLE_FILE, check_file, decode
from fastmemit.errors import BadConfig, BadData
from fastmemit.tokens import encode

#: Tokens in a window where nothing else is asked for and the model takes so many.
DEFAULT_CONTEXT = 1024

# A cut text may differ from the whole one in its last tokens; so many are read and not used.
_SLACK = 256


class Window(NamedTuple):
    """Some tokens that are run together, and which of them are predicted."""

    ids: tuple[int, ...]
    first: int  # index of the first predicted token; all after it are predicted too

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - self.first


@dataclass(frozen=True)
class PerplexityText:
    """A tokenised text and how it is cut.

    Attributes:
        name: The file's name without its folder.
        sha256: Of the file, in hex.
        ids: The text's tokens, without special ones.
        lead: Special tokens that the tokenizer puts in front of a text (BOS); every window begins with them.
        context: Tokens in a window, `lead` included; None takes what the model takes, at most `DEFAULT_CONTEXT`.
        stride: By how many tokens of the text a window begins behind the one before it; None: where that one ends.
    """

    name: str
    sha256: str
    ids: tuple[int, ...]
    lead: tuple[int, ...] = ()
    context: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        """Refuse a window that predicts nothing, and a stride that leaves tokens out."""
        lead = len(self.lead)
        if self.context is not None and self.context < lead + 2 - bool(lead):
            raise BadConfig(
                f"A context of {self.context} tokens predicts nothing; give 2 or more"
                + (f", or {lead + 1} with the {lead} special ones in front." if lead > 1 else ".")
            )
        if self.stride is not None and self.stride < 1:
            raise BadConfig(f"The stride must be 1 or more but is {self.stride}; give more.")

    def windows(self, limit: int | None = None) -> list[Window]:
        """The windows, in the order of the text.

        Every token of the text is predicted once, except the first of a window that has nothing in front of it: without
        overlap and without BOS that is one token a window.

        Args:
            limit: How many tokens the model takes at once; None: any number.

        Raises:
            BadConfig: The context is longer than that, or the stride is longer than a window.
        """
        context = self.context or min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if limit is not None and context > limit:
            raise BadConfig(f"The context is {context} tokens but the model takes {limit} at once; give a smaller one.")
        lead = len(self.lead)
        body = context - lead
        step = self.stride or body
        if step > body:
            raise BadConfig(
                f"The stride is {step} tokens but a window has room for {body} of the text, so "
                "some would be left out; give a smaller stride."
            )
        found = []
        done = 0
        for start in range(0, len(self.ids), step):
            end = min(start + body, len(self.ids))
            window = Window((*self.lead, *self.ids[start:end]), max(lead + done - start, 1))
            if window.predicted > 0:
                found.append(window)
            done = end
            if end == len(self.ids):
                break
        return found


def read_text(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    tokens: int | None = None,
    context: int | None = None,
    stride: int | None = None,
) -> PerplexityText:
    """Read and tokenise a text file; its line ends are read as one line feed each.

    Args:
        path: A UTF-8 file.
        tokenizer: The model's tokenizer.
        tokens: Use so many tokens from the beginning; None uses all.
        context: See `PerplexityText`.
        stride: See `PerplexityText`.

    Raises:
        BadData: The file is missing, empty, not UTF-8, larger than 1 GiB, or has fewer tokens than asked for or than
            can be predicted.
        BadConfig: A number that makes no sense.
    """
    if tokens is not None and tokens < 2:
        raise BadConfig(f"{tokens} tokens predict nothing; give 2 or more.")
    path = Path(path)
    check_file(path, BadData)
    size = path.stat().st_size
    if size > MAX_WHOLE_FILE:
        raise BadData(
            f"{path} has {size / 2**30:.1f} GiB, more than the {MAX_WHOLE_FILE >> 30} GiB that are "
            "read for a perplexity; give a part of it."
        )
    raw = path.read_bytes()
    text = decode(raw, path, 0, BadData).replace("\r\n", "\n").replace("\r", "\n")
    ids = _ids(tokenizer, text, tokens)
    lead = encode(tokenizer, "").ids
    if len(ids) < (tokens or 1) or len(lead) + len(ids) < 2:
        needed = tokens or (1 if lead else 2)
        mend = "a longer text or ask for fewer" if tokens else "a longer text"
        raise BadData(f"{path} has {len(ids)} tokens but {needed} are needed for a perplexity; give {mend}.")
    return PerplexityText(path.name, hashlib.sha256(raw).hexdigest(), tuple(ids), lead, context, stride)


def _ids(tokenizer: Any, text: str, wanted: int | None) -> list[int]:
    """The first tokens of a text, without tokenising much more of it than they need."""
    size = len(text) if wanted is None else 8 * (wanted + _SLACK)
    while True:
        ids = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
        if size >= len(text) or len(ids) >= (wanted or 0) + _SLACK:
            return list(ids[:wanted])
        size *= 4
