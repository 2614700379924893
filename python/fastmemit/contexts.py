"""Short texts put before a prompt, so that a key and a target do not depend on how a text begins.

MEMIT and EMMET: the bare prompt and five texts that the model continues from fixed words (Meng et
al. 2023, appendix B).  ROME: the bare prompt and twenty that it writes from its start-of-text token
(Meng et al. 2022, appendix E.5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastcov.hooks import isolated
from fastmemit.errors import WrongModel
from fastmemit.sampling import continue_rows
from fastmemit.tokens import encode

OPENINGS = ("The", "Therefore", "Because", "I", "You")
Kind = Literal["words", "start"]


class Contexts:
    """The contexts of one model by method, each kind written once.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        seed: Of the sampling.
        edited: Whether the model is edited now: then it cannot write them any more.
        written: Those that were written before, by kind; new ones join them. None: none were.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        seed: int,
        edited: Callable[[], bool],
        written: dict[Kind, tuple[str, ...]] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._seed, self._edited = model, tokenizer, seed, edited
        self._written = {} if written is None else written

    def of(self, method: str) -> tuple[str, ...]:
        """The texts of a method; see `fastmemit.Editor.contexts`.

        Raises:
            WrongModel: They were never written and the model is edited now.
        """
        kind: Kind = "start" if method == "rome" else "words"
        if kind not in self._written:
            if self._edited():
                raise WrongModel(
                    "Contexts are written by the unedited model; undo the edits, or call "
                    f"editor.contexts({method!r}) before editing."
                )
            self._written[kind] = generate_contexts(self._model, self._tokenizer, kind, self._seed)
        return self._written[kind]


@isolated()
def generate_contexts(model: Any, tokenizer: Any, kind: Kind, seed: int = 0) -> tuple[str, ...]:
    """The texts that stand before a prompt; the first is ``""``, the bare prompt.

    Args:
        model: The unedited model, which writes them.
        tokenizer: Its tokenizer.
        kind: ``"words"``: five texts of 10 tokens from fixed words; ``"start"``: ten of 5 and ten of 10 tokens from the
            start-of-text token.
        seed: Of the sampling (top-k 5).

    Returns:
        6 or 21 texts, each ending in ``". "`` but the first; white space is folded, so that line breaks do not part a
        context from its prompt.
    """
    texts = [""]
    if kind == "words":
        rows = [list(encode(tokenizer, word).ids) for word in OPENINGS]
        new = continue_rows(model, tokenizer, rows, 10, top_k=5, seed=seed)
        texts += [
            _finished(word + tokenizer.decode(row, skip_special_tokens=True))
            for word, row in zip(OPENINGS, new, strict=True)
        ]
        return tuple(texts)
    start = [[_start_token(tokenizer)]] * 10
    for length in (5, 10):
        new = continue_rows(model, tokenizer, start, length, top_k=5, seed=seed + length)
        texts += [_finished(tokenizer.decode(row, skip_special_tokens=True)) for row in new]
    return tuple(texts)


def _finished(text: str) -> str:
    return " ".join(text.split()) + ". "


def _start_token(tokenizer: Any) -> int:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is not None:
            return int(token)
    return int(encode(tokenizer, "The").ids[0])
