"""Text to tokens, with the place in the text that each token covers; and text that the model writes.

Which token carries a subject is a question about characters: the request knows where its subject stands in the text, so
the token is found by the span that it covers and never by searching for the subject's own tokens, which may be merged
differently in another context.

Text is written with a seed, in batches, with the settings named and none inherited.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any, Literal

from torch import Tensor

from fastcov.hooks import evaluation_mode, input_device, isolated, random_state_kept, skinny_products
from fastmemit.errors import BadConfig, BadRequest, FastmemitError, WrongModel
from fastmemit.models.running import check_lengths, pad_batch, padding, remembered
from fastmemit.request import EditRequest

NOWHERE = (-1, -1)
_MARK = "what the user writes"

#: Characters of a text whose tokens are placed by decoding; that takes a time of their square.
MAX_DECODED = 4000

_Pair = tuple[list[int], list[tuple[int, int]]]


@dataclass(frozen=True)
class Encoded:
    """One tokenised text."""

    ids: tuple[int, ...]  # leading special tokens (BOS) included, trailing ones (EOS) removed
    #: The characters ``[start, end)`` of the text that each token covers; ``(-1, -1)`` for special tokens, of none.
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of texts, also where a processor of texts and images is given; BadConfig for anything else."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(tokenizer):
        raise BadConfig(
            f"{type(tokenizer).__name__} is no tokenizer of transformers; give what "
            "AutoTokenizer.from_pretrained returns."
        )
    return tokenizer


def encode(tokenizer: Any, text: str) -> Encoded:
    """Tokenise `text`, which may be empty, the way the model's own inputs are tokenised.

    Special tokens that the tokenizer puts in front (BOS) are kept, those that it puts behind (EOS) are removed, so that
    the text can be continued. A text that begins with them itself (a rendered chat template) does not get them again.
    White space that no token claims belongs to the token that follows it. Fast tokenizers state the span of each token;
    for slow ones it is found by decoding.
    """
    read = _encode_fast if getattr(tokenizer, "is_fast", False) else _encode_slow
    ids, spans = read(tokenizer, text)
    start = next((i for i, span in enumerate(spans) if span != NOWHERE), None)
    if start and ids[start : 2 * start] == ids[:start]:
        ids, spans, start = ids[start:], spans[start:], 0
    if start is None:  # no token of the text: which specials lead shows only next to one
        start = end = _leading(read, tokenizer)
    else:
        end = max(i for i, span in enumerate(spans) if span != NOWHERE) + 1
    return Encoded(tuple(ids[:end]), tuple(spans[:start] + _tiled(spans[start:end], text)))


def _leading(read: Callable[[Any, str], _Pair], tokenizer: Any) -> int:
    """How many special tokens a tokenizer puts in front of a text."""
    spans = read(tokenizer, "a")[1]
    return next((i for i, span in enumerate(spans) if span != NOWHERE), 0)


def _tiled(spans: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """Spans that leave no white space between them.

    Byte-level tokenizers report " word" without its space, or with it, as they are configured.
    """
    tiled: list[tuple[int, int]] = []
    reached = 0
    for left, right in spans:
        gap = text[reached:left]
        tiled.append((reached if gap and gap.isspace() else left, right))
        reached = max(reached, right)
    if tiled and tiled[-1][0] == tiled[-1][1] and text[reached:].isspace():
        tiled[-1] = (reached, len(text))  # a last token that is all space, reported as nothing
    return tiled


def _encode_fast(tokenizer: Any, text: str) -> _Pair:
    out = tokenizer(
        text,
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    # The mask marks what the tokenizer added; a special token written in the text is text.
    spans = [
        NOWHERE if added else (left, right)
        for added, (left, right) in zip(out["special_tokens_mask"], out["offset_mapping"], strict=True)
    ]
    return list(out["input_ids"]), spans


def _encode_slow(tokenizer: Any, text: str) -> _Pair:
    settings = {"padding": False, "truncation": False, "verbose": False}
    ids = list(tokenizer(text, **settings)["input_ids"])
    body = list(tokenizer(text, add_special_tokens=False, **settings)["input_ids"])
    for lead in range(len(ids) - len(body) + 1):
        if ids[lead : lead + len(body)] == body:
            break
    else:
        raise BadRequest(
            f"{type(tokenizer).__name__} tokenises {text!r:.80} differently with and without "
            "special tokens, so its tokens cannot be placed; use the fast tokenizer of this model."
        )
    spans = [NOWHERE] * len(ids)
    spans[lead : lead + len(body)] = _spans_by_decoding(tokenizer, body, text)
    return ids, spans


def _spans_by_decoding(tokenizer: Any, ids: list[int], text: str) -> list[tuple[int, int]]:
    """The span of each token, from how far the decoded text grows with it.

    A token that ends inside a character (one byte of an emoji) decodes to U+FFFD and covers that whole character. Where
    the decoded text is not the text itself (collapsed white space, lower case, unknown words) the two are aligned, and
    a token covers all that it may stand for.

    Raises:
        BadRequest: The text is longer than `MAX_DECODED`.
    """
    if len(text) > MAX_DECODED:
        raise BadRequest(
            f"{text!r:.40}... has {len(text)} characters, and {type(tokenizer).__name__} does not "
            f"say which tokens cover them (over {MAX_DECODED} it would take minutes to find out); "
            "use the fast tokenizer of this model, or a shorter text."
        )
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    whole = tokenizer.decode(ids, **settings)
    place = _alignment(whole, text)  # per character of `whole` its span in the text
    spans = []
    reached = 0
    for count in range(1, len(ids) + 1):
        part = tokenizer.decode(ids[:count], **settings)
        pairs = enumerate(zip(part, whole, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(part), len(whole)))
        # Bytes of an unfinished character show as something that `whole` does not have there.
        unfinished = common < len(part) and common < len(whole)
        start, reached = reached, max(reached, common)
        covered = place[start : reached + unfinished]
        if covered:
            spans.append((covered[0][0], max(right for _, right in covered)))
        else:
            here = place[start][0] if start < len(place) else len(text)
            spans.append((here, here))
    return spans


def _alignment(whole: str, text: str) -> list[tuple[int, int]]:
    """For each character of `whole` the characters of `text` that it stands for."""
    if whole == text:
        return [(index, index + 1) for index in range(len(text))]
    place: list[tuple[int, int]] = []
    matcher = difflib.SequenceMatcher(None, whole, text, autojunk=False)
    for tag, from_, to, left, right in matcher.get_opcodes():
        if tag == "equal":
            place += [(left + step, left + step + 1) for step in range(to - from_)]
        else:
            place += [(left, right)] * (to - from_)
    return place


def subject_end(encoded: Encoded, start: int, end: int) -> int:
    """The index of the last token that overlaps the subject, ``text[start:end]``; a BadRequest if none does."""
    for index in range(len(encoded.spans) - 1, -1, -1):
        left, right = encoded.spans[index]
        if max(left, start) < min(right, end):
            return index
    raise BadRequest(
        f"No token covers the subject (characters {start} to {end} of the prompt); the tokenizer "
        "drops these characters, so write the subject with others."
    )


def chat_text(tokenizer: Any, text: str) -> str:
    """A text as a user's turn in the chat template, up to where the answer begins; BadConfig without a template."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadConfig(
            "The tokenizer has no chat template, so nothing can be asked in chat; leave --chat (chat=True) out, or "
            "load a model that was tuned for chat."
        )
    turn = [{"role": "user", "content": text}]
    rendered = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    if rendered.count(text.strip()) != 1:
        raise BadConfig(f"The chat template does not show {text!r:.80} once, as it was written; ask without chat.")
    return rendered


def chat_front(tokenizer: Any) -> str:
    """What stands before the user's words in the chat template; ``""`` where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    return chat_text(tokenizer, _MARK).partition(_MARK)[0]


def chat_request(tokenizer: Any, request: EditRequest) -> EditRequest:
    """A fact as a question in chat, its answer the beginning of the model's turn; errors as of `chat_text`."""
    return replace(
        request,
        prompt=chat_text(tokenizer, request.prompt),
        target_new=request.target_new.strip(),
        target_true=None if request.target_true is None else request.target_true.strip(),
        join="",
    )


def encode_with_target(tokenizer: Any, text: str, target: str) -> tuple[Encoded, int]:
    """Tokenise `text` and the `target` that follows it as one text; and how many tokens at its end are the target's.

    Joint, because a model reads one text: tokens at the border may merge. A token that holds characters of both belongs
    to the target, and the text's end goes with it.

    Raises:
        BadRequest: The target yields no token.
    """
    encoded = encode(tokenizer, text + target)
    ends = (i for i, (_, right) in enumerate(encoded.spans) if right > len(text))
    n_target = len(encoded) - next(ends, len(encoded))
    if n_target == 0:
        raise BadRequest(
            f"The target {target!r} yields no token after {text!r:.80}; give an answer that the tokenizer knows."
        )
    return encoded, n_target


KL_PROMPT_ENDING = " is a"
#: What may stand before a subject that would be the first token; the first that the tokenizer does
#: not swallow is taken.
LEADS = ("\n", ". ", "The ")


@dataclass(frozen=True)
class Row:
    """One sequence that runs through the model."""

    ids: tuple[int, ...]  # up to the last position that the loss reads
    subject: int  # index of the subject's last token, where the change enters
    reads: tuple[tuple[int, int], ...] = ()  # index in ids, and the token id that this position should predict
    stem: int = field(default=0, compare=False)  # tokens before the subject that other rows may have too: its context


@dataclass(frozen=True)
class RequestRows:
    """All rows of one request; ``rows[0]`` is the bare prompt, behind its `lead` if it has one."""

    rows: tuple[Row, ...]  # one a context, then that of the KL prompt unless another row serves for it
    kl: int  # which row carries the KL term, read at its subject token

    @property
    def prefix(self) -> int:
        """The most tokens that stand before the subject's last token in any row."""
        return max(row.subject for row in self.rows)

    @property
    def suffix(self) -> int:
        """The most tokens from the subject's last token on in any row."""
        return max(len(row.ids) - row.subject for row in self.rows)


def lead(tokenizer: Any, request: EditRequest) -> str:
    """What a bare prompt is read behind, one of `LEADS`, where its row would begin with the subject's end; else ""."""
    for front in ("", *LEADS):
        text, start = _placed(tokenizer, front, request)
        encoded = encode(tokenizer, text)
        if subject_end(encoded, start, start + len(request.subject)) > 0:
            return front
    return ""  # a tokenizer that makes one token of everything; nothing helps


def subject_row(tokenizer: Any, prefix: str, request: EditRequest) -> Row:
    """The tokens of ``prefix + prompt`` up to the subject's last token.

    An empty prefix stands for the bare prompt, which is read behind its `lead`.
    """
    return _subject_row(tokenizer, prefix or lead(tokenizer, request), request)


def _placed(tokenizer: Any, prefix: str, request: EditRequest) -> tuple[str, int]:
    """A prefix with the prompt behind it, and where the subject begins.

    A prompt that brings its own BOS has the prefix behind that, as every text has; one that is a question in chat has
    it inside the user's turn.
    """
    text, start = request.text, len(prefix) + len(request.before)
    if prefix and request.join == "" and request.before:  # as a question in chat is; only then the template is rendered
        turn = chat_front(tokenizer)
        if turn and request.before.startswith(turn):
            return turn + prefix + text[len(turn) :], start
    bos = getattr(tokenizer, "bos_token", None)
    if prefix and bos and request.before.startswith(bos) and encode(tokenizer, "").ids:
        return bos + prefix + text[len(bos) :], start
    return prefix + text, start


def request_rows(tokenizer: Any, request: EditRequest, contexts: Sequence[str]) -> RequestRows:
    """The rows of the target loss (ROME, 3.1; MEMIT, 4.2); the first context is ``""``, the bare prompt.

    Raises:
        BadRequest: The subject's last token and the target share a token.
        ValueError: The first context is not ``""``.
    """
    if not contexts or contexts[0] != "":
        raise ValueError(f"contexts must begin with '' (the bare prompt), not {contexts[:1]!r}.")
    front = lead(tokenizer, request)
    rows = []
    for prefix in contexts:
        rows.append(_target_row(tokenizer, request, prefix or front))
    # Bare, as published, where the prompt is; a lead is the whole request's.
    essence = EditRequest("{}" + KL_PROMPT_ENDING, request.subject, request.target_new)
    kl = _subject_row(tokenizer, front, essence)
    # A causal model gives the KL prompt's distribution at the subject in any row that has the same
    # tokens up to there, as every prompt has that begins with its subject: no row of its own then.
    for index, row in enumerate(rows):
        if row.ids[: row.subject + 1] == kl.ids:
            return RequestRows(tuple(rows), index)
    return RequestRows((*rows, kl), len(rows))


def like_lengths(rows: Sequence[RequestRows], batch_tokens: int) -> Iterator[list[int]]:
    """Requests of like lengths, as many as fit: padding to the longest then costs little."""
    group: list[int] = []
    prefix = suffix = count = 0  # carried along: a batch of UltraEdit has thousands of requests
    for index in sorted(range(len(rows)), key=lambda i: (rows[i].suffix, rows[i].prefix)):
        wide = max(prefix, rows[index].prefix) + max(suffix, rows[index].suffix)
        if group and (count + len(rows[index].rows)) * wide > batch_tokens:
            yield group
            group, prefix, suffix, count = [], 0, 0, 0
        group.append(index)
        prefix, suffix = max(prefix, rows[index].prefix), max(suffix, rows[index].suffix)
        count += len(rows[index].rows)
    if group:
        yield group


def _subject_row(tokenizer: Any, prefix: str, request: EditRequest) -> Row:
    text, start = _placed(tokenizer, prefix, request)
    encoded = encode(tokenizer, text)
    index = subject_end(encoded, start, start + len(request.subject))
    return Row(encoded.ids[: index + 1], index)


def _target_row(tokenizer: Any, request: EditRequest, prefix: str) -> Row:
    text, start = _placed(tokenizer, prefix, request)
    encoded, n_target = encode_with_target(tokenizer, text, request.target)
    subject = subject_end(encoded, start, start + len(request.subject))
    first = len(encoded.ids) - n_target
    if subject >= first:
        raise BadRequest(
            f"The tokenizer merges the end of the subject {request.subject!r} with the target "
            f"{request.target!r}; put a word between them in the prompt {request.prompt!r}."
        )
    # The last target token is predicted, never read: it needs no column.
    reads = tuple((index - 1, encoded.ids[index]) for index in range(first, len(encoded.ids)))
    stem = sum(end <= len(prefix) for _, end in encoded.spans[:subject])
    return Row(encoded.ids[:-1], subject, reads, stem)


@isolated()
def continue_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    top_k: int | None = None,
    seed: int = 0,
    stop: bool = False,
    past: Callable[[Sequence[int]], Any] | None = None,
) -> list[list[int]]:
    """Continue rows of token ids by exactly `new_tokens` tokens each; no end-of-text ends one early, but by `stop`.

    Sampled among the `top_k` most probable tokens (0: all), with a seed, the process's own random state left as it was;
    None takes the most probable (greedy). `stop` ends a row before the first token that ends a text. `past` is what the
    model need not run again: given numbers of rows, a cache of all but the last token of each, padded on the left.

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
    groups, lengths = [list(range(len(rows)))], {len(row) for row in rows}
    if len(lengths) > 1 and remembered(model, "left padding", partial(padding, model, "left")) == "none":
        groups = [[n for n, row in enumerate(rows) if len(row) == length] for length in sorted(lengths)]
    found: dict[int, list[int]] = {}
    # `generate` fills whatever it is not told from the model's own settings, which differ between
    # versions of transformers; nothing but the end-of-text is taken from them.
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=_end(model, tokenizer))
    try:
        with evaluation_mode(model), skinny_products(model), random_state_kept(seed):
            for group in groups:
                batch = pad_batch([rows[number] for number in group], side="left", device=input_device(model))
                out = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=new_tokens,
                    min_new_tokens=None if stop else new_tokens,
                    num_beams=1,
                    repetition_penalty=1.0,
                    pad_token_id=0 if pad is None else pad,
                    logits_processor=LogitsProcessorList([_Checked(model)]),
                    **({} if past is None else {"past_key_values": past(group)}),
                    **chosen,
                )
                width = batch["input_ids"].shape[1]
                found.update(zip(group, (row[width:].tolist() for row in out), strict=True))
    finally:
        model.generation_config = own
    ends = end_tokens(model, tokenizer) if stop else set()
    return [[*takewhile(lambda token: token not in ends, found[number])] for number in range(len(rows))]


def _end(model: Any, tokenizer: Any) -> Any:
    """What ends a text: one token, several or None."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tokenizer.eos_token_id if stated is None else stated


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that `continue_rows` never writes, because they would end a text."""
    end = _end(model, tokenizer)
    return set() if end is None else set(end) if isinstance(end, list | tuple) else {end}


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
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    new_tokens: int,
    *,
    top_k: int | None = None,
    seed: int = 0,
    stop: bool = False,
) -> list[str]:
    """`continue_rows` on texts: the new text of each, special tokens left out; BadRequest if one gives no token."""
    rows = [encode(tokenizer, text).ids for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise BadRequest(f"The text {text!r} gives no token to continue; write a word.")
    new = continue_rows(model, tokenizer, rows, new_tokens, top_k=top_k, seed=seed, stop=stop)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new]


OPENINGS = ("The", "Therefore", "Because", "I", "You")
Kind = Literal["words", "start"]


class Contexts:
    """The texts that stand before a prompt, by method, each kind written once by the unedited model.

    The first is ``""``, the bare prompt. For ROME 20 others follow, ten of 5 and ten of 10 tokens from the
    start-of-text token; else 5, of 10 tokens from fixed words. Sampled with top-k 5; each ends in ``". "``.
    New ones join those `written` before; with `any_time` an edited model may write them too.
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
        """The texts of a method, for a model that is edited now or not; WrongModel if too late to write them."""
        kind: Kind = "start" if method == "rome" else "words"
        if kind in self._written:
            return self._written[kind]
        if edited and not self._any_time:
            raise WrongModel(
                "Contexts are written by the unedited model; undo the edits, or call "
                f"editor.contexts({method!r}) before editing."
            )
        model, tokenizer = self._model, self._tokenizer
        texts: list[str] = []
        if kind == "words":
            rows: list[Sequence[int]] = [encode(tokenizer, word).ids for word in OPENINGS]
            new = continue_rows(model, tokenizer, rows, 10, top_k=5, seed=self.seed)
            for word, row in zip(OPENINGS, new, strict=True):
                texts.append(word + tokenizer.decode(row, skip_special_tokens=True))
        else:
            for length in (5, 10):
                rows = [[_start_token(tokenizer)]] * 10
                new = continue_rows(model, tokenizer, rows, length, top_k=5, seed=self.seed + length)
                texts += [tokenizer.decode(row, skip_special_tokens=True) for row in new]
        # White space is folded, so that line breaks do not part a context from its prompt.
        self._written[kind] = ("", *(" ".join(text.split()) + ". " for text in texts))
        return self._written[kind]


def _start_token(tokenizer: Any) -> int:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if token is not None:
            return int(token)
    return int(encode(tokenizer, "The").ids[0])
