"""Causal tracing (Meng et al. 2022, ROME, section 2): which layer's states carry a fact.

`choose_facts` finds facts that the model knows, `trace` measures; `fastmemit.tracing_report` averages and proposes.

What is restored at one token of one layer reaches neither the tokens before it nor the blocks below. There the restored
run is the corrupted one, so that run is done once and its states are cached: the attention keys and values of the
earlier tokens, and the hidden states that leave each block. Every restored run then begins at the restored layer and
token, through the model's own code; a model of which such a part is not the whole is refused.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from fastcov.hooks import evaluation_mode, isolated
from fastmemit.answers import judge_answers
from fastmemit.errors import BadConfig, BadRequest, FastmemitError, UnknownArchitecture, counted
from fastmemit.models import ModelAdapter
from fastmemit.models.adapter import linear_shape
from fastmemit.models.running import agrees, check_lengths, head_reads, hidden_of, packed, probe_ids, replaced_output
from fastmemit.partial_forward import align, as_cache, begun_at, past_of, run_whole
from fastmemit.request import EditRequest
from fastmemit.text import Row, encode_with_target, subject_end

Kind = Literal["mlp", "attention", "hidden"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Positions = Literal["last-subject", "all"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
#: ROME's groups of positions (its figure 2), in the order of the text.
GROUPS = ("first subject", "middle subject", "last subject", "first after", "further", "last")

_PAPER_WINDOW, _PAPER_LAYERS = 10, 48  # ROME restores 10 of GPT-2 XL's 48 layers together
_CHUNK = 32  # facts asked for at a time, until as many are known as are to be traced


@dataclass(frozen=True)
class TraceSettings:
    """Everything that a trace depends on but the model and the facts; a `BadConfig` if a value is out of range."""

    samples: int = 10  # corrupted runs per fact, each with noise of its own
    noise: float = 3.0  # standard deviation of the noise, in standard deviations of the subjects' embeddings
    window: int | None = None  # layers whose MLP or attention is restored together; None: the paper's share, 1 to 10
    hidden_window: int = 1  # of hidden states one is enough: it replaces all that the blocks below wrote at this token
    limit: int | None = None  # trace at most so many facts
    only_known: bool = True  # leave out facts of which the model does not predict the answer
    positions: Positions = "last-subject"  # decides which layers to edit; "all" are those from the subject on
    kinds: tuple[Kind, ...] = KINDS  # restored are outputs of the MLP, of attention, or of the block ("hidden")
    seed: int = 0  # for the noise, the facts' order and the intervals
    batch_tokens: int | None = None  # padded tokens of a corrupted run at most (one fact always runs); None: by device

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for name in ("samples", "hidden_window", "window", "limit", "batch_tokens"):
            value = getattr(self, name)
            unset = value is None and name not in ("samples", "hidden_window")
            if not unset and (type(value) is not int or value < 1):
                raise BadConfig(f"{name} must be a whole number above 0 but is {value!r}.")
        if isinstance(self.noise, bool) or not isinstance(self.noise, int | float) or not 0 < self.noise < math.inf:
            raise BadConfig(f"noise must be a finite number above 0 but is {self.noise!r}.")
        if self.positions not in POSITIONS:
            raise BadConfig(f"positions must be one of {', '.join(POSITIONS)} but is {self.positions!r}.")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise BadConfig(
                f"kinds must be different ones of {', '.join(KINDS)}, at least one, "
                f"but are {', '.join(map(repr, self.kinds)) or 'none'}."
            )

    def tokens_on(self, device: torch.device) -> int:
        """`batch_tokens`, or the default of a device."""
        return self.batch_tokens or (2048 if device.type == "cpu" else 16384)

    def window_of(self, kind: Kind, n_layers: int) -> int:
        """How many layers are restored together; a `BadConfig` if the setting is more than the model has."""
        window = self.hidden_window if kind == "hidden" else self.window
        if window is None:
            return max(1, min(_PAPER_WINDOW, n_layers * _PAPER_WINDOW // _PAPER_LAYERS))
        if window > n_layers:
            raise BadConfig(f"The window of {window} layers is more than the model's {n_layers}; give a smaller one.")
        return window


def window_at(layer: int, window: int, n_layers: int) -> tuple[int, int]:
    """First and last layer of the window around a layer, cut where the model ends."""
    first = layer - window // 2  # 10 layers are 5 below to 4 above, as in ROME's own traces
    return max(0, first), min(n_layers, first + window) - 1


@dataclass(frozen=True)
class TracedFact:
    """One fact as the model reads it."""

    request: EditRequest
    ids: tuple[int, ...]  # the tokens of its prompt, up to the one that the answer is predicted from
    first: int  # index of the subject's first token
    last: int  # index of the subject's last token
    answer: int  # id of the first token of the true answer

    def groups(self) -> dict[int, str]:
        """The group of each position from the subject on; a single token is the last of its part."""
        found = {}
        for index in range(self.first, len(self.ids)):
            if index <= self.last:
                names, rest = {self.first: "first subject", self.last: "last subject"}, "middle subject"
            else:
                names, rest = {self.last + 1: "first after", len(self.ids) - 1: "last"}, "further"
            found[index] = names.get(index, rest)
        return found


class Chosen(NamedTuple):
    """The facts to trace, and how many the model was asked about to find them."""

    facts: tuple[TracedFact, ...]
    looked_at: int


def encode_fact(tokenizer: Any, request: EditRequest) -> TracedFact:
    """Tokenise a fact and its true answer; a BadRequest where no token between subject and answer can be traced."""
    if request.target_true is None:
        raise BadRequest(
            f"The fact {request.text!r:.80} has no target_true, whose probability is traced; "
            "add the answer that the model gives."
        )
    truth = _truth(request)
    encoded, n_answer = encode_with_target(tokenizer, request.text, truth)
    ids = encoded.ids[:-n_answer]
    start, end = len(request.before), len(request.before) + len(request.subject)
    last = subject_end(encoded, start, end)
    first = next(index for index, (a, b) in enumerate(encoded.spans) if max(a, start) < min(b, end))
    if last >= len(ids):
        raise BadRequest(
            f"The tokenizer merges the end of the subject {request.subject!r} with the answer "
            f"{truth!r}; put a word between them in the prompt {request.prompt!r}."
        )
    if last == len(ids) - 1:
        raise BadRequest(
            f"The prompt {request.text!r:.80} ends with its subject, so no token after it reads "
            "what was restored there; write at least one word behind the subject."
        )
    return TracedFact(request, tuple(ids), first, last, encoded.ids[-n_answer])


def _truth(request: EditRequest) -> str:
    return request.answer_to(request.text, str(request.target_true))


@isolated()
def choose_facts(
    adapter: ModelAdapter, tokenizer: Any, requests: Sequence[EditRequest], settings: TraceSettings
) -> Chosen:
    """Encode the facts and choose those to trace: by default known ones, `settings.limit` at most.

    Known is a fact whose first answer token is the model's most probable next token. The order is shuffled, because
    files of facts are often sorted by relation.

    Raises:
        BadRequest: A fact cannot be traced, there is none, or none is known.
    """
    for kind in settings.kinds:
        settings.window_of(kind, adapter.n_layers)
        for layer in range(adapter.n_layers):
            restored_module(adapter, kind, layer)
    order = [encode_fact(tokenizer, request) for request in requests]
    if not order:
        raise BadRequest("There is no fact to trace; give at least one.")
    check_lengths(adapter.model, [fact.ids for fact in order])
    random.Random(settings.seed).shuffle(order)
    if not settings.only_known:
        facts = tuple(order[: settings.limit])
        return Chosen(facts, len(facts))
    known: list[TracedFact] = []
    batch_tokens = settings.tokens_on(adapter.device)
    for begin in range(0, len(order), _CHUNK):
        chunk = order[begin : begin + _CHUNK]
        asked = [(fact.request.text, _truth(fact.request)) for fact in chunk]
        answers = judge_answers(adapter, tokenizer, asked, batch_tokens=batch_tokens)
        for index, (fact, answer) in enumerate(zip(chunk, answers, strict=True), begin + 1):
            if answer.matches[0]:
                known.append(fact)
            if len(known) == settings.limit:
                return Chosen(tuple(known), index)
    if not known:
        raise BadRequest(
            f"The model knows none of the {counted(len(order), 'fact')}: its most probable next token is never the "
            "first of target_true; give facts that it knows, or trace unknown ones too with only_known=False "
            "(--unknown-too)."
        )
    return Chosen(tuple(known), len(order))


@isolated()
def subject_embeddings(adapter: ModelAdapter, facts: Sequence[TracedFact]) -> tuple[float, int]:
    """Standard deviation over all coordinates of the subjects' token embeddings, and their width.

    ROME's noise level (its section 2.1 and appendix B) is 3 of these. Read where the noise is added, at the embeddings'
    output: some models scale it (Gemma 3).

    Raises:
        BadRequest: All coordinates are alike, so that there is nothing to measure noise by.
    """
    tokens = [token for fact in facts for token in fact.ids[fact.first : fact.last + 1]]
    values = _input_embeddings(adapter)(torch.tensor([tokens], device=adapter.device)).float()
    std = float(values.std())
    if not std > 0:
        raise BadRequest(
            f"The embeddings of the {len(tokens)} subject tokens have a standard deviation of "
            f"{std}, which noise cannot be measured by; give other facts or another model."
        )
    return std, values.shape[-1]


@isolated()
def subject_noise(fact: TracedFact, samples: int, width: int, std: float, seed: int) -> Tensor:
    """Gaussian noise for the subject's tokens, (samples, subject tokens, width), float32."""
    # A fact gets the same wherever it stands in a file or a batch, and at whichever position something is restored.
    digest = hashlib.sha256(f"{seed} {fact.first} {fact.last} {fact.ids}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return std * torch.randn(samples, fact.last - fact.first + 1, width, generator=generator)


def added_to_embeddings(adapter: ModelAdapter, noise: Tensor) -> AbstractContextManager[Any]:
    """Add `noise` (rows, tokens, width) to what the input embeddings give inside the block."""
    return _input_embeddings(adapter).register_forward_hook(lambda _module, _args, out: out + noise.to(out))


def _input_embeddings(adapter: ModelAdapter) -> Any:
    model: Any = adapter.model
    return model.get_input_embeddings()


def restored_module(adapter: ModelAdapter, kind: Kind, layer: int) -> nn.Module:
    """The module whose output is a layer's hidden state, MLP output (the edited projection's) or attention output."""
    block = adapter.block(layer)
    if kind != "attention":
        return block if kind == "hidden" else adapter.projection(layer)
    found = {  # named after attention, with linear maps, as norms do not have them
        name: part
        for name, part in block.named_children()
        if any(word in f"{name} {type(part).__name__}".lower() for word in ("attn", "attention"))
        and any(linear_shape(inner) is not None for inner in part.modules())
    }
    if len(found) != 1:
        parts = ", ".join(found or dict(block.named_children()))
        raise UnknownArchitecture(
            f"The attention of {type(block).__name__} is not clear (found {parts}); trace the "
            "other kinds with --kinds mlp,hidden."
        )
    return next(iter(found.values()))


class Spot(NamedTuple):
    """A token at which states are restored, of the fact with this number."""

    fact: TracedFact
    position: int
    number: int = 0
    group: str = "last subject"

    @property
    def suffix(self) -> int:
        """Tokens from the restored one on."""
        return len(self.fact.ids) - self.position


class Runs:
    """The clean, corrupted and restored runs of n spots, a clean row and `samples` noisy ones of each together.

    The spots have equally many tokens from the restored one on, which stands in column P; earlier tokens to the left of
    it, padded on the left. `noises` are of their subjects' tokens, (samples, subject tokens, width) each. The model is
    in evaluation mode. `clean` (n,), float32, are probabilities of each answer, `corrupted` (n, samples) the same with
    the subject hidden by noise.
    """

    def __init__(
        self, adapter: ModelAdapter, spots: Sequence[Spot], noises: Sequence[Tensor], kinds: Sequence[Kind]
    ) -> None:
        self._adapter = adapter
        self._samples = samples = len(noises[0])
        self._column = column = max(spot.position for spot in spots)
        batch = align([Row(spot.fact.ids, spot.position) for spot in spots], column, spots[0].suffix)
        ids, self._mask, positions = (
            part.to(adapter.device).repeat_interleave(1 + samples, 0) for part in batch.values()
        )
        self._answers = torch.tensor([spot.fact.answer for spot in spots]).repeat_interleave(1 + samples)
        noise = torch.zeros(len(spots), 1 + samples, ids.shape[1], noises[0].shape[-1])
        for row, spot, own in zip(noise, spots, noises, strict=True):
            begin = column - spot.position + spot.fact.first
            row[1:, begin : begin + own.shape[1]] = own
        self._noise = noise.flatten(0, 1).to(ids.device)  # (rows, P + S, width)
        # What restored runs begin with: clean values (n, d) of each module at the restored token; of the noisy rows
        # what each block puts out (rows, S, d), copied, so that the columns before are freed; and the cache.
        self._values: dict[tuple[Kind, int], Tensor] = {}
        self._hidden: list[Tensor] = []
        cache = DynamicCache()
        noisy = torch.arange(len(ids)).view(-1, 1 + samples)[:, 1:].flatten()

        def record(place: tuple[Kind, int], _module: nn.Module, _args: object, out: object) -> None:
            self._values[place] = hidden_of(out).reshape(*ids.shape, -1)[:: 1 + samples, column].clone()

        def keep(_module: nn.Module, _args: object, out: object) -> None:
            self._returns_tuple = isinstance(out, tuple)
            self._hidden.append(hidden_of(out)[noisy, column:])

        with ExitStack() as hooks:
            for place in product(kinds, range(adapter.n_layers)):
                hooks.enter_context(restored_module(adapter, *place).register_forward_hook(partial(record, place)))
            for layer in range(adapter.n_layers):
                hooks.enter_context(adapter.block(layer).register_forward_hook(keep))
            found = self._probability(ids, positions, cache).view(-1, 1 + samples)
        self.clean, self.corrupted = found[:, 0], found[:, 1:]
        cache.batch_select_indices(noisy.to(ids.device))
        self._past = past_of(cache, column)
        self._ids, self._positions = ids[noisy, column:], positions[noisy, column:]
        self._mask, self._answers, self._noise = self._mask[noisy], self._answers[noisy], self._noise[noisy, column:]

    def restored(self, kind: Kind, first: int, last: int) -> Tensor:  # (n, samples)
        """Probabilities with the clean values of the layers `first` to `last` put back."""
        begin = first + 1 if kind == "hidden" else first  # the first block that runs
        cache = as_cache(self._past[begin:], begin, self._hidden[0], self._column)
        with ExitStack() as changes:
            changes.enter_context(begun_at(self._adapter, begin, lambda: self._hidden[begin - 1], self._returns_tuple))
            for layer in range(first, last + 1):
                value = self._values[kind, layer].repeat_interleave(self._samples, 0)  # (rows, d)
                module = restored_module(self._adapter, kind, layer)
                changes.enter_context(replaced_output(module, self._ids.shape, value))
            return self._probability(self._ids, self._positions, cache).view(-1, self._samples)

    def _probability(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Run the model with the noise; float32 probabilities (rows,) of the answers, read at the last column."""
        rows, columns = ids.shape
        call = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions, "past_key_values": cache}
        with (
            added_to_embeddings(self._adapter, self._noise),
            head_reads(self._adapter, range(rows), [columns - 1] * rows),
        ):
            logits = self._adapter.run(**call, use_cache=True).logits[0].float()
        wanted = logits.gather(1, self._answers.to(logits.device)[:, None])[:, 0]
        return (wanted - logits.logsumexp(1)).exp().cpu()


def check_tracing(adapter: ModelAdapter) -> None:
    """Refuse a model that is not causal, or of which runs that begin in its middle are not those of the whole.

    Some tokens run with noise at the first two and one clean state put back at a later one: in part and beside a
    shorter row, and whole and alone. The model is in evaluation mode.

    Raises:
        UnknownArchitecture: It is such a model.
        FastmemitError: Its input cannot be read or its blocks not be run.
        torch.OutOfMemoryError: There is no memory for that.
    """
    if adapter.measured.get("traced in part"):
        return
    adapter.check_causal()
    ids = probe_ids(adapter.model)
    layer, position = adapter.n_layers // 2, len(ids) // 2
    embeddings = _input_embeddings(adapter).weight.detach()
    wave = torch.linspace(-1, 1, embeddings.shape[1]) * float(embeddings.float().std())
    noise = wave.repeat(1, 2, 1)  # (1 sample, 2 tokens, width)
    request = EditRequest("{}", "a", "b")  # a fact's words are not read here, its tokens are
    rows = (ids, ids[2:])
    spots = [Spot(TracedFact(request, row, 0, 1, ids[-1]), position - len(ids) + len(row)) for row in rows]
    heads: list[Tensor] = []
    with adapter.lm_head.register_forward_hook(lambda _m, _a, out: heads.append(out[0, 0])):
        try:
            # The restored run as it is defined: every token through every block.
            row, reads = [Row(ids, position)], ([0], [len(ids) - 1 - position])
            clean, _ = run_whole(adapter, adapter.block(layer), row, reads)
            with added_to_embeddings(adapter, nn.functional.pad(noise, (0, 0, 0, len(ids) - noise.shape[1]))):
                run_whole(adapter, adapter.block(layer), row, reads, lambda _: clean)
            want = heads[-1]
            Runs(adapter, spots, [noise, noise], ("hidden",)).restored("hidden", layer, layer)
            why = "is off by more than rounding"
            same = agrees(adapter.model, heads[-1][None], want[None])
        except (FastmemitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what a model makes of cached states is its own affair
            why, same = f"fails ({type(error).__name__}: {str(error)[:200]})", False
    if not same:
        raise UnknownArchitecture(
            "Causal tracing runs part of a model for each state that it restores, and part of "
            f"{type(adapter.model).__name__} {why}, so it cannot be traced; choose layers by the scores of edits "
            "instead."
        )
    adapter.measured["traced in part"] = True


@dataclass(frozen=True)
class Trace:
    """What a trace found of n facts."""

    facts: tuple[TracedFact, ...]
    windows: dict[Kind, int]  # how many layers were restored together
    std: float  # standard deviation of the noise
    clean: NDArray[np.float64]  # (n,) probability of the answer
    corrupted: NDArray[np.float64]  # (n,) the same with the subject hidden, averaged over noise samples
    #: kind -> group -> (facts that have such a token, layers): probability of the answer with the state restored less
    #: that of the corrupted run, averaged over noise samples and over the group's tokens within a fact. Every fact has
    #: "last subject".
    effects: dict[Kind, dict[str, NDArray[np.float64]]]


@isolated()
def trace(
    adapter: ModelAdapter,
    facts: Sequence[TracedFact],
    settings: TraceSettings,
    *,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Trace facts (ROME, section 2.1): hide the subject, put one state back, see what returns.

    The indirect effect of a state is ``p(answer | restored) - p(answer | corrupted)``, where p is the probability of
    the answer's first token after the prompt.

    `progress` is called with the number of states restored since the last call; there are `count_states`.

    Raises:
        BadRequest: There is no fact.
    """
    if not facts:
        raise BadRequest("There is no fact to trace; give at least one.")
    n_layers = adapter.n_layers
    windows = {kind: settings.window_of(kind, n_layers) for kind in settings.kinds}
    spots = _spots(facts, settings)
    clean, corrupted = np.zeros(len(facts)), np.zeros(len(facts))
    found = {kind: np.zeros((len(spots), n_layers)) for kind in windows}
    with evaluation_mode(adapter.model):
        check_tracing(adapter)
        embedding_std, width = subject_embeddings(adapter, facts)
        std = settings.noise * embedding_std
        for batch in _batches(spots, settings.samples, settings.tokens_on(adapter.device)):
            some = [spots[index] for index in batch]
            noises = [subject_noise(spot.fact, settings.samples, width, std, settings.seed) for spot in some]
            runs = Runs(adapter, some, noises, settings.kinds)
            numbers = [spot.number for spot in some]
            clean[numbers] = _finite(runs.clean, "the clean run", some)
            corrupted[numbers] = base = _finite(runs.corrupted, "the corrupted run", some).mean(1)
            for kind, layer in product(windows, range(n_layers)):
                restored = runs.restored(kind, *window_at(layer, windows[kind], n_layers))
                what = f"the run with {kind} restored at layer {layer}"
                found[kind][batch, layer] = _finite(restored, what, some).mean(1) - base
                if progress is not None:
                    progress(len(batch))
    effects = {kind: _grouped(spots, values) for kind, values in found.items()}
    return Trace(tuple(facts), windows, std, clean, corrupted, effects)


def count_states(adapter: ModelAdapter, facts: Sequence[TracedFact], settings: TraceSettings) -> int:
    """How many states `trace` restores, each for all noise samples."""
    return len(_spots(facts, settings)) * adapter.n_layers * len(settings.kinds)


def _spots(facts: Sequence[TracedFact], settings: TraceSettings) -> list[Spot]:
    return [
        Spot(fact, position, number, group)
        for number, fact in enumerate(facts)
        for position, group in fact.groups().items()
        if settings.positions == "all" or group == "last subject"
    ]


def _batches(spots: Sequence[Spot], samples: int, batch_tokens: int) -> list[list[int]]:
    """Indices of spots that run together."""

    # From the restored token on they are equally long: these tokens run for every state and padding would too, while
    # the tokens before it, which grow, run once.
    def tokens(batch: list[int]) -> float:
        first, last = spots[batch[0]], spots[batch[-1]]
        return len(batch) * samples * len(last.fact.ids) if first.suffix == last.suffix else math.inf

    return packed(sorted(range(len(spots)), key=lambda i: (spots[i].suffix, spots[i].position)), tokens, batch_tokens)


def _finite(values: Tensor, what: str, spots: Sequence[Spot]) -> NDArray[np.float64]:
    """Probabilities as float64, if none of them is NaN or infinite."""
    found = values.double().numpy()
    for spot, row in zip(spots, found, strict=True):
        if not np.isfinite(row).all():
            raise FastmemitError(
                f"The probability of {spot.fact.request.target_true!r} after {spot.fact.request.text!r:.80} is not "
                f"finite in {what}; load the model with --dtype float32, or check its weights."
            )
    return found


def _grouped(spots: Sequence[Spot], values: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Averages over each fact's tokens of a group; groups that no fact has are left out."""
    rows: dict[str, dict[int, list[int]]] = {group: {} for group in GROUPS}
    for index, spot in enumerate(spots):
        rows[spot.group].setdefault(spot.number, []).append(index)
    return {
        group: np.stack([values[i].mean(0) for i in by_fact.values()]) for group, by_fact in rows.items() if by_fact
    }
