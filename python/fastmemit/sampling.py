"""Text that the model writes: seeded, batched, with the settings named and none inherited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from fastcov.hooks import evaluation_mode, isolated, random_state_kept
from fastmemit.errors import BadConfig, BadRequest, FastmemitError, WrongModel
from fastmemit.models import check_lengths, input_device
from fastmemit.models.running import padding, remembered
from fastmemit.tokens import encode, pad_batch


@isolated()
def continue_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    top_k: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue rows of token ids by exactly `new_tokens` tokens each.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Token ids, at least one in each row.
        new_tokens: How many tokens to add; end-of-text is not allowed to end a row early.
        top_k: Sample among the k most probable tokens; 0 samples among all; None takes the most probable (greedy).
        seed: Of the sampling; the process's own random state is left as it was.

    Returns:
        The new tokens of each row.

    Raises:
        BadConfig: `new_tokens` is below 1.
        BadRequest: A row with its new tokens is longer than the model's context.
        FastmemitError: The model's logits are NaN or infinite, or it has no way to write text.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    if new_tokens < 1:
        raise BadConfig(f"The number of new tokens must be 1 or more but is {new_tokens}.")
    if not rows:
        return []
    check_lengths(model, rows, more=new_tokens)
    if not callable(getattr(model, "generate", None)):
        raise FastmemitError(
            f"{type(model).__name__} has no generate(), so it cannot write text; load it with AutoModelForCausalLM."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chosen: dict[str, Any] = {"do_sample": False}
    if top_k is not None:
        chosen = {"do_sample": True, "top_k": top_k, "top_p": 1.0, "temperature": 1.0}
    found: dict[int, list[int]] = {}
    # `generate` fills whatever it is not told from the model's own settings, which differ between
    # versions of transformers; nothing but the end-of-text is taken from them.
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=_end(model, tokenizer))
    try:
        with evaluation_mode(model), random_state_kept(seed):
            for group in _together(model, rows):
                batch = pad_batch([rows[number] for number in group], side="left", device=input_device(model))
                out = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    num_beams=1,
                    repetition_penalty=1.0,
                    pad_token_id=0 if pad is None else pad,
                    logits_processor=LogitsProcessorList([_Checked(model)]),
                    **chosen,
                )
                width = batch["input_ids"].shape[1]
                found.update(zip(group, (row[width:].tolist() for row in out), strict=True))
    finally:
        model.generation_config = own
    return [found[number] for number in range(len(rows))]


def _end(model: Any, tokenizer: Any) -> Any:
    """What ends a text: one token, several or None."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tokenizer.eos_token_id if stated is None else stated


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that `continue_rows` never writes, because they would end a text."""
    end = _end(model, tokenizer)
    return set() if end is None else set(end) if isinstance(end, list | tuple) else {end}


def _together(model: Any, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of rows that can be continued in one batch: all of them where padding allows it."""
    lengths = {len(row) for row in rows}
    if len(lengths) == 1 or remembered(model, "left padding", lambda: padding(model, "left")) != "none":
        return [list(range(len(rows)))]
    return [[n for n, row in enumerate(rows) if len(row) == length] for length in sorted(lengths)]


class _Checked:
    """Refuses logits of which no token can be chosen; -inf forbids one and is no fault."""

    def __init__(self, model: Any) -> None:
        self._name = type(model).__name__

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores < math.inf).all()):  # written so that NaN is caught too
            raise FastmemitError(
                f"The logits of {self._name} are NaN or infinite, so it cannot write text; look "
                "for NaN in its weights, or load it in float32 or bfloat16."
            )
        return scores


def continue_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], new_tokens: int, *, top_k: int | None = None, seed: int = 0
) -> list[str]:
    """`continue_rows` on texts: the new text of each, special tokens left out.

    Raises:
        BadRequest: A text gives no token to continue from.
        BadConfig: `new_tokens` is below 1.
        FastmemitError: The model's logits are NaN or infinite.
    """
    rows = [encode(tokenizer, text).ids for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise BadRequest(f"The text {text!r} gives no token to continue; write a word.")
    new = continue_rows(model, tokenizer, rows, new_tokens, top_k=top_k, seed=seed)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new]


OPENINGS = ("The", "Therefore", "Because", "I", "You")
Kind = Literal["words", "start"]


class Contexts:
    """The contexts of one model by method, each kind written once.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        seed: Seed for the sampling.
        written: Those that were written before, by kind; new ones join them. None: none were.
        any_time: Whether an edited model may write them, too.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        seed: int,
        written: dict[Kind, tuple[str, ...]] | None = None,
        *,
        any_time: bool = False,
    ) -> None:
        self.seed = seed
        self._model, self._tokenizer, self._any_time = model, tokenizer, any_time
        self._written = {} if written is None else written

    def of(self, method: str, *, edited: bool = False) -> tuple[str, ...]:
        """The texts of a method, for a model that is edited now or not; see `fastmemit.Editor.contexts`.

        Raises:
            WrongModel: They were never written and the model is edited now.
        """
        kind: Kind = "start" if method == "rome" else "words"
        if kind not in self._written:
            if edited and not self._any_time:
                raise WrongModel(
                    "Contexts are written by the unedited model; undo the edits, or call "
                    f"editor.contexts({method!r}) before editing."
                )
            self._written[kind] = generate_contexts(self._model, self._tokenizer, kind, self.seed)
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
