"""What every method shares: what an edit is made of, the keys it reads, the writes that are taken back at the end.

A method computes on the model itself, because MEMIT's upper layers must see its lower ones and ROME's later facts its
earlier ones written. All of that happens inside `run`, which gives the weights their bits back whatever happens:
nothing is applied before all is computed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastcov import CholeskyFactor, LowRank
from fastcov.files import StrPath
from fastcov.hooks import KeyHooks, evaluation_mode, key_rows
from fastcov.linalg import UpdatedFactor, place_of_float64, updated
from fastmemit.data.corpora import Corpus, corpus_from_texts, corpus_of_lines
from fastmemit.delta import Delta, add_low_rank, compact, restore
from fastmemit.display import bar
from fastmemit.edits import Edit, EditStack, Writing
from fastmemit.errors import BadConfig, BadRequest, counted
from fastmemit.methods.config import CONFIGS, PRESERVING, Config, EditConfig, TargetConfig
from fastmemit.models import ModelAdapter
from fastmemit.models.running import accepted, length_batches, pad_batch
from fastmemit.partial_forward import KEPT, READ_TOKENS, SubjectPass, read_at_subject, runs_in_stages
from fastmemit.request import EditRequest, check_batch
from fastmemit.statistics import StatisticsStore, versions
from fastmemit.targets import Target, TargetStore, stored_or_optimised
from fastmemit.text import Contexts, Row, encode, subject_row

log = logging.getLogger(__name__)

Blocks = tuple[Tensor, ...]
#: Facts whose keys are read in all contexts before they are averaged.
TOGETHER = 256
Keys = dict[str, list[Tensor]]  # weight name -> keys (d_k, B), float64, block by block


@dataclass(frozen=True)
class Reading:
    """What was read for one layer; nobody writes into it."""

    keys: Tensor  # (B, d_k) float64, at the subject over all contexts, see `averaged_keys`
    outputs: Tensor  # (B, d) float64, what the projection puts out at the bare prompt's subject
    block: Tensor  # (B, d) float64, what the last edited block puts out there
    passes: tuple[SubjectPass, ...]  # where to go on: over the bare prompts, then the contexts of `TOGETHER` facts each

    @property
    def nbytes(self) -> int:
        """What it takes, the states in its passes included."""
        own = self.keys.nbytes + self.outputs.nbytes + self.block.nbytes
        return own + sum(each.nbytes for each in self.passes)


@dataclass(frozen=True)
class ContextReading:
    """What ROME reads of a batch; nobody writes into it."""

    keys: Tensor  # (B, contexts, d_k) float64, at the subject in every context
    outputs: Tensor  # (B, contexts, d) float64, what the projection puts out there

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.keys.nbytes + self.outputs.nbytes


_Read = TypeVar("_Read", Reading, ContextReading)


class ReadCache:
    """What the unedited model shows, kept over several plans.

    What a method reads before it has written anything depends on the weights and the requests, not on the statistics:
    all that EMMET reads, MEMIT's first layer, ROME's first fact. A sweep over multipliers that hands the same cache to
    each `fastmemit.Editor.plan` or `edit` reads it once, and gets the same bits. Nothing of an edited model is kept.

    Args:
        capacity: Bytes to hold at most; the least recently used go first.
    """

    def __init__(self, capacity: int = 1 << 30) -> None:
        self._capacity = capacity
        self._held: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _Read]) -> _Read:
        """The reading of this key, made if it is not held."""
        if key in self._held:
            self._held.move_to_end(key)
            held: _Read = self._held[key]
            return held
        reading = make()
        if reading.nbytes <= self._capacity:
            self._held[key] = reading
            while self.nbytes > self._capacity:
                self._held.popitem(last=False)
        return reading

    @property
    def nbytes(self) -> int:
        """What is held."""
        return sum(reading.nbytes for reading in self._held.values())

    def __len__(self) -> int:
        """How many readings are held."""
        return len(self._held)


class Subjects:
    """One batch of B facts on its way up, in contexts of which the first is ``""``."""

    def __init__(
        self, adapter: ModelAdapter, tokenizer: Any, requests: Sequence[EditRequest], contexts: Sequence[str]
    ) -> None:
        self._adapter, self._tokenizer = adapter, tokenizer
        self._requests, self._contexts = tuple(requests), tuple(contexts)
        self._passes: tuple[SubjectPass, ...] = ()
        self._bare: list[Row] = []  # once they are made

    @property
    def bare_ids(self) -> list[tuple[int, ...]]:
        """The token ids of each bare prompt up to its subject's last token."""
        if not self._bare:
            self._bare = [subject_row(self._tokenizer, "", request) for request in self._requests]
        return [row.ids for row in self._bare]

    def key(self, layer: int, last: int) -> Hashable:
        """What a reading depends on beside the weights."""
        return (self._requests, self._contexts, layer, last)

    def resume(self, reading: Reading) -> None:
        """Go on from a reading, whether it was made here or held elsewhere."""
        self._passes = reading.passes

    def read(self, layer: int, last: int, known: Reading | None = None) -> Reading:
        """What a batch shows at the layer to edit next, below which nothing changed since it was read.

        Where a reading of that layer is `known`, its keys are still these ones, and only the bare prompts run.
        """
        adapter, projection, requests = self._adapter, self._adapter.projection(layer), self._requests
        if known is not None:
            self._passes = known.passes
        if not self._passes:
            groups: list[list[Row]] = [[]]  # of the bare prompts, then of the other contexts
            for place, request in enumerate(requests):
                groups[0].append(subject_row(self._tokenizer, "", request))
                if len(self._contexts) > 1 and place % TOGETHER == 0:
                    groups.append([])
                for context in self._contexts[1:]:
                    groups[-1].append(subject_row(self._tokenizer, context, request))
            self._passes, self._bare = tuple(SubjectPass.of(adapter, group) for group in groups), groups[0]
        keys = torch.empty(0)
        given: list[Tensor] = []
        passes: list[SubjectPass] = []
        for number, rows_of in enumerate(self._passes):
            if number and known is not None:
                passes.append(rows_of)
                continue
            # Of one module the input comes before its output, and the block's output last of all.
            outputs = [] if number else [projection, adapter.block(last)]  # of the bare prompts alone
            room = layer < last and sum(each.nbytes for each in passes) < KEPT
            keep = layer if room and runs_in_stages(adapter, layer, [projection], outputs) else 0
            (read,), put_out, after = rows_of.read(adapter, inputs=[projection], outputs=outputs, keep=keep, tried=True)
            passes.append(after)
            if not number:
                keys, given = read.double(), put_out
                continue
            # Averaged part by part: the keys of all contexts would be as many times larger.
            part = keys[(number - 1) * TOGETHER : number * TOGETHER]  # (facts, d_k), the bare prompts'
            part.copy_(
                averaged_keys(torch.cat([part[:, None], read.double().reshape(len(part), -1, keys.shape[1])], 1)).T
            )
        out, block = given
        return Reading(keys if known is None else known.keys, out.double(), block.double(), tuple(passes))


class _Held(NamedTuple):
    """What a weight's keys added to the factor of its A: not that factor, which the statistics may have dropped."""

    diagonal: Tensor  # (d_k,), of the factor of A, by which another one is told
    blocks: Blocks
    whitened: Tensor  # see `fastcov.linalg.UpdatedFactor`, also for small
    small: Tensor

    def of(self, diagonal: Tensor, blocks: Blocks) -> bool:
        """Whether it is of the factor with this diagonal, and of no keys but the first of these."""
        same = diagonal.device == self.diagonal.device and torch.equal(diagonal, self.diagonal)
        return same and len(blocks) >= len(self.blocks) and all(map(operator.is_, self.blocks, blocks))


class PreservedKeys:
    """Edit keys by the edit and the weight that they were written for.

    Hand it to `fastmemit.Editor.edit`, which preserves the keys that are in it and adds those of the new edit. The keys
    of an edit count while the edit is in the weights: an undo takes them out, and applying the edit again brings them
    back. Edits from a file hold no keys.
    """

    def __init__(self) -> None:
        # An edit that is undone and forgotten takes its keys with it.
        self._keys: WeakKeyDictionary[Edit, Mapping[str, Blocks]] = WeakKeyDictionary()
        self._held: dict[str, _Held] = {}

    def add(self, edit: Edit, keys: Mapping[str, Sequence[Tensor]]) -> None:
        """Preserve the keys of an edit: weight name -> blocks K (d_k, B), float64, in the order of their writing."""
        self._keys[edit] = {name: tuple(blocks) for name, blocks in keys.items()}

    def of(self, edit: Edit) -> Mapping[str, Blocks]:
        """The keys of an edit by weight name, whether they count now or not; none where it is not in it."""
        return self._keys.get(edit, {})

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits whose keys count now, in the order in which they were added."""
        return tuple(edit for edit in self._keys if edit.applied)

    def blocks(self, name: str) -> Blocks:
        """What counts now for a weight: blocks K (d_k, B) in the order in which they were added."""
        return tuple(k for edit in self.edits for k in self._keys[edit].get(name, ()))

    def __len__(self) -> int:
        """How many keys count now, for the weight that has most."""
        names = {name for edit in self.edits for name in self._keys[edit]}
        return max((sum(k.shape[1] for k in self.blocks(name)) for name in names), default=0)

    def factor(self, name: str, base: CholeskyFactor, written: Sequence[Tensor] = ()) -> CholeskyFactor:
        """The factor of ``A + sum K_p K_p^T`` of a weight; only what is new since the last call is worked in.

        Args:
            name: The weight's name.
            base: The factor of A.
            written: Further keys (d_k, B): of facts that the present batch has written already.

        Raises:
            fastcov.BadInput: Keys are of another width than A.
        """
        blocks = (*self.blocks(name), *written)
        if not blocks:
            self._held.pop(name, None)
            return base
        held, diagonal = self._held.get(name), base.lower.diagonal()
        factor, known = base, 0
        if held is not None and held.of(diagonal, blocks):
            known = len(held.blocks)
            factor = UpdatedFactor(base.lower, base.jitter, base.rank, whitened=held.whitened, small=held.small)
        if len(blocks) > known:
            factor = updated(factor, torch.cat([block.to(base.device) for block in blocks[known:]], 1))
            self._held[name] = _Held(diagonal.clone(), blocks, factor.whitened, factor.small)
        return factor


@dataclass(frozen=True)
class PreservedText:
    """Text that an edit shall preserve beside C: ``A = w C + ridge I + weight * sum k k^T`` over its tokens' keys k.

    Attributes:
        corpus: The texts, each run on its own: prompts, or paragraphs.
        weight: What one token counts, where one fact of the edit counts 1, and all that C stands for w. None takes 1,
            or what makes the whole text count w where it has more tokens than that: see `columns`.

    Raises:
        BadConfig: The weight is not a finite number above 0.
    """

    corpus: Corpus
    weight: float | None = None

    def __post_init__(self) -> None:
        """Refuse a weight that counts nothing."""
        given = 1.0 if self.weight is None else self.weight
        if isinstance(given, bool) or not (math.isfinite(given) and given > 0):
            raise BadConfig(f"The weight of preserved text must be a finite number above 0 but is {self.weight!r}.")

    @classmethod
    def from_text(cls, text: StrPath | Iterable[str], weight: float | None = None) -> PreservedText:
        """That of a file, see `fastmemit.data.corpora.corpus_of_lines`, or of texts.

        Raises:
            BadCorpus: The file cannot be read, or there is no text.
            BadConfig: See the class.
        """
        if isinstance(text, str | os.PathLike):
            return cls(corpus_of_lines(Path(text)), weight)
        return cls(corpus_from_texts("the preserved text", text), weight)

    def columns(
        self, adapter: ModelAdapter, tokenizer: Any, config: EditConfig
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weight name -> P (d_k, m), float64, with ``P P^T = weight * sum k k^T``; and the text as provenance has it.

        The keys are those of the model as it is. There are as many columns as keys, but never more than twice d_k. A
        text that is longer than the model's context runs in pieces.

        Of n tokens each weighs ``min(1, w / n)`` where nobody says what; w is d_k where the method has none.
        """
        # MEMIT leaves (I + K^T A^-1 K)^-1 of what is missing. A text like C's own makes A = w C (1 + n weight / w)
        # times as large, and then at most so many times as much is left: no more than twice with n weight <= w.
        adapter.look()
        limit, rows = adapter.max_context, []
        for text in self.corpus.documents():
            ids = encode(tokenizer, text).ids
            rows += [ids[start : start + limit] for start in range(0, len(ids), limit)]
        tokens = sum(map(len, rows))
        w = getattr(config, "weight", None) or min(map(adapter.d_k, config.layers))
        weight = min(1.0, w / max(1, tokens)) if self.weight is None else self.weight
        weights = {adapter.projection_name(layer): adapter.weight_name(layer) for layer in config.layers}
        found: dict[str, Tensor] = {}
        mask = torch.empty(0)

        def take(module: str, x: Tensor) -> None:
            place = place_of_float64(x.device)
            for keys, kept in key_rows(x, mask.to(x.device)):
                new = keys[kept].to(place).double()  # (n, d_k)
                all_of = torch.cat([found[module], new]) if module in found else new
                # R^T R is the same sum, of d_k rows.
                found[module] = torch.linalg.qr(all_of, mode="r").R if len(all_of) > 2 * all_of.shape[1] else all_of

        together = 1 if adapter.traits.right_padding == "none" else READ_TOKENS
        with KeyHooks(adapter.model, list(weights), take) as hooks, evaluation_mode(adapter.model):
            for batch in length_batches(rows, together):
                inputs = pad_batch(batch, device=adapter.device)
                mask = inputs["attention_mask"]
                hooks.run(accepted(adapter.model, {**inputs, "use_cache": False}))
        columns = {name: found[module].T * math.sqrt(weight) for module, name in weights.items()}
        about = {"name": self.corpus.name, "fingerprint": self.corpus.fingerprint, "texts": len(self.corpus)}
        return columns, {**about, "tokens": tokens, "weight": weight}


@dataclass
class Workspace:
    """What the edits of one model are made of.

    Attributes:
        adapter: The model.
        tokenizer: Its tokenizer.
        stack: The edits in the weights, which gives weights their bits back.
        statistics: The second moments and their factors.
        stored_targets: Target vectors that were made before.
        contexts: Texts before the prompts, by method.
        batch_tokens: Bound on the padded tokens of target vectors optimised together; None takes 1024 on a CPU, where
            little padding is worth more than large products (8192 of ``"rotate"``, a step of which runs a third of
            them), else 16384.
        progress: Show a bar for each long step.
        preserved: The keys of edits that were computed here and preserve keys, for methods to which they belong.
    """

    adapter: ModelAdapter
    tokenizer: Any
    stack: EditStack
    statistics: StatisticsStore
    stored_targets: TargetStore
    contexts: Contexts
    batch_tokens: int | None = None
    progress: bool = False
    preserved: PreservedKeys = field(default_factory=PreservedKeys)

    def contexts_of(self, method: str) -> tuple[str, ...]:
        """The texts put before prompts; see `fastmemit.Editor.contexts`."""
        _ = self.stack.fingerprint  # those of another model would be none of this one's
        if not issubclass(CONFIGS[method], TargetConfig):
            return ("",)  # the bare prompt
        return self.contexts.of(method, edited=bool(self.stack.edits))

    def targets(
        self, requests: Sequence[EditRequest], config: EditConfig, *, stored: bool = True, together: bool = False
    ) -> list[Target]:
        """Target vectors on the model as it is.

        Args:
            requests: The facts.
            config: The settings.
            stored: Whether stored vectors may serve and new ones be stored. Not so between two writes of one batch,
                when the weights are in a state that no key can name.
            together: See `fastmemit.targets.stored_or_optimised`.

        Returns:
            A target for each fact; none where the method has no target vectors.
        """
        self.adapter.look()
        settings = config.targets()
        if settings is None:
            return []
        usual = 8192 if settings.optimiser == "rotate" else 1024
        # At a projection's output a vector is of that projection, which another editor of the model may not edit.
        place = f"/{self.adapter.template}" if settings.site == "projection" else ""
        identity = f"{self.stack.state()}/{self.statistics.identity['tokenizer']}{place}" if stored else ""
        total = len(requests) * settings.steps
        with bar("target steps", total, True) if self.progress else nullcontext() as progress:
            return stored_or_optimised(
                self.stored_targets if stored else TargetStore(None),
                identity,
                self.adapter,
                self.tokenizer,
                requests,
                self.contexts_of(config.method),
                settings,
                batch_tokens=self.batch_tokens or (usual if self.adapter.device.type == "cpu" else 16384),
                together=together,
                progress=progress,
            )


@dataclass
class Draft(Generic[Config]):
    """One edit while it is computed: what was read, and what was written so far.

    Attributes:
        work: What it is made of.
        config: The settings.
        preserved: Keys of earlier edits, which are preserved too.
        reads: Where readings of the unedited model are cached.
        texts: Columns of text that is preserved too, by weight name, see `PreservedText.columns`.
        contexts: Texts before the prompts, the first one ``""``.
        factors: What has been written so far, by weight name, in the weights' own orientation.
        keys: The keys of what has been written so far, by weight name; none where nothing preserves keys.
        moments: Of what the edit was normalised by, its own share, see `fastmemit.delta.Delta`; UltraEdit's alone.
        tokens: How many tokens `moments` are of.
    """

    work: Workspace
    config: Config
    preserved: PreservedKeys | None = None
    reads: ReadCache | None = None
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    contexts: tuple[str, ...] = ()
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    keys: Keys = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def __post_init__(self) -> None:
        work = self.work
        self.adapter = work.adapter
        self.contexts = self.contexts or work.contexts_of(self.config.method)
        if work.stack.edits:
            self.reads = None
        self._state = (work.stack.fingerprint, work.statistics.identity["tokenizer"], self.adapter.template)
        self._trial: Writing | None = None
        self._kept = PreservedKeys() if self.preserved is None else self.preserved

    def trial(self) -> Writing:
        """A context inside which `write` may be used; afterwards the weights have their bits back."""
        self._trial = self.work.stack.trial(map(self.adapter.weight_name, self.config.layers))
        return self._trial

    def preserving(self, layer: int, factor: CholeskyFactor) -> CholeskyFactor:
        """The factor of all that a layer shall preserve.

        That of ``w C + ridge I``, joined with `preserved` by ``K_p K_p^T`` of every edit in it and of the facts that
        this batch has written into the layer already, and with that of `texts`.
        """
        name = self.adapter.weight_name(layer)
        return self._kept.factor(name, factor, self._beside(name))

    def earlier_keys(self, layer: int) -> Blocks:
        """The preserved keys (d_k, B): of earlier edits, of text, and what this one has written there."""
        name = self.adapter.weight_name(layer)
        return (*self._kept.blocks(name), *self._beside(name))

    def _beside(self, name: str) -> Blocks:
        """What is preserved beside the keys of earlier edits."""
        text = (self.texts[name],) if name in self.texts else ()
        return (*text, *self.keys.get(name, ()))

    def write(self, layer: int, change: LowRank, keys: Tensor) -> None:
        """Add a change (d, d_k) to a layer's weight, and put it on record, with its keys (d_k, B) where any count."""
        name = self.adapter.weight_name(layer)
        if self.preserved is not None:
            self.keys.setdefault(name, []).append(keys)
        left, right = change.left, change.right
        transposed = self.adapter.weight_is_transposed(layer)
        if transposed:
            left, right = right, left
        if name in self.factors:
            old_left, old_right = (old.to(left) for old in self.factors[name])
            left, right = torch.cat([old_left, left], 1), torch.cat([old_right, right], 1)
        left, right = (side.to("cpu", torch.float32).contiguous() for side in compact(left, right))
        self.factors[name] = (left, right)
        # From the unedited weight in one step, as the delta will be applied.
        assert self._trial is not None
        weight = self.adapter.weight(layer).T if transposed else self.adapter.weight(layer)
        restore(weight, self._trial.before(name))
        add_low_rank(weight, *self.factors[name])

    # -- what methods read from the model ---------------------------------------------------------

    def subjects(self, requests: Sequence[EditRequest]) -> Subjects:
        """A batch to be read at one layer after the other; see `read`."""
        return Subjects(self.adapter, self.work.tokenizer, requests, self.contexts)

    def read(self, subjects: Subjects, layer: int, known: Reading | None = None) -> Reading:
        """What a batch shows at a layer, with what has been written so far below it; layers come in ascending order.

        The lowest one may come again, with what was read there first; see `Subjects.read`.
        """
        last = self.config.layers[-1]
        if self.reads is None or self.factors:
            reading = subjects.read(layer, last, known)
        else:
            key = (self._state, subjects.key(layer, last))
            reading = self.reads.get(key, lambda: subjects.read(layer, last))
        subjects.resume(reading)
        return reading

    def context_outputs(self, layer: int, requests: Sequence[EditRequest]) -> ContextReading:
        """Keys and the projection's outputs in every context, with what has been written so far."""

        def make() -> ContextReading:
            tokenizer, contexts = self.work.tokenizer, self.contexts
            rows = [subject_row(tokenizer, context, request) for request in requests for context in contexts]
            module = self.adapter.projection(layer)
            (keys,), (outputs,) = read_at_subject(self.adapter, rows, inputs=[module], outputs=[module])
            shape = (len(requests), len(contexts), -1)
            return ContextReading(keys.double().reshape(shape), outputs.double().reshape(shape))

        if self.reads is None or self.factors:
            return make()
        return self.reads.get((self._state, tuple(requests), self.contexts, layer), make)


Write = Callable[[Draft[Any], list[EditRequest], Tensor], None]  # facts, their target vectors (B, d) float64


class Method(NamedTuple):
    """How a method writes, and whether each fact on the model with the earlier ones of its batch in it."""

    write: Write
    one_by_one: bool = False


#: The methods by name; each is registered once, beside its formula.
REGISTRY: dict[str, Method] = {}


def register(*configs: type[EditConfig], one_by_one: bool = False) -> Callable[[Write], Write]:
    """Register a function as the one that writes facts with these classes of settings."""

    def registered(write: Write) -> Write:
        REGISTRY.update({config.method: Method(write, one_by_one) for config in configs})
        return write

    return registered


def run(
    config: EditConfig,
    work: Workspace,
    facts: Sequence[EditRequest],
    preserved: PreservedKeys | None = None,
    reads: ReadCache | None = None,
    targets: Mapping[EditRequest, Target] | None = None,
    text: PreservedText | None = None,
) -> Edit:
    """Compute an edit; the weights are the same before and after. To be called inside `fastcov.hooks.isolated`.

    Args:
        config: The settings.
        work: What it is made of.
        facts: The facts, written together.
        preserved: Keys of earlier edits that this one shall preserve too, which those of this one join; None stands for
            none, but for those of the edits in the weights that keep any where they belong to the method.
        reads: Where to cache what the unedited model shows.
        targets: Target vectors by fact, in the place of those of the model as it is.
        text: Text whose keys are preserved too, as they are before the edit.

    Returns:
        The edit, not applied.

    Raises:
        BadConfig: Targets or text are given for a method that has none.
        BadRequest: A request that cannot be carried out, or two that contradict each other; or a fact has no target.
        WrongModel: The preserved keys are of another editor's edits; or a weight is not in floating point or not in
            memory, which is said before any work.
        fastcov.FastcovError: No statistics of the edited layers were precomputed.
    """
    batch = check_batch(facts)
    stack, own = work.stack, preserved
    if preserved is None and config.method in PRESERVING:
        preserved = work.preserved
        unknown = len(stack.edits) - len(preserved.edits)
        if unknown:
            log.warning(
                "%s without keys, from files, from others or of a method that keeps keys only where it is given "
                "preserved=PreservedKeys(), and %s does not preserve them",
                *(counted(unknown, "edit in the weights is", "edits in the weights are"), config.method),
            )
    earlier = () if preserved is None else preserved.edits
    for edit in earlier:
        stack.check(edit)
    for layer in config.layers:
        work.adapter.weight(layer)  # one that cannot be written is told before statistics are asked for
    used = work.statistics.needed(config)
    if text is not None and not isinstance(config, TargetConfig):
        raise BadConfig(f"{config.method} preserves no keys, so those of a text neither; leave the text out.")
    columns, about = ({}, None) if text is None else text.columns(work.adapter, work.tokenizer, config)
    draft: Draft[Any] = Draft(work, config, preserved, reads, columns)
    method = REGISTRY[config.method]
    trial = draft.trial()
    with trial, trial:
        for part in [[request] for request in batch] if method.one_by_one else [batch]:
            # Once something is written, the weights are in a state that no key can name.
            made = _given(part, config, targets) or work.targets(part, config, stored=not draft.factors)
            goal = torch.stack([target.vector for target in made]) if made else torch.empty(len(part), 0)
            method.write(draft, part, goal.double())
    provenance = {
        **work.statistics.identity,
        "method": config.method,
        "settings": used.resolved(work.adapter, config).as_dict(),
        "requests": [dataclasses.asdict(request) for request in batch],
        "statistics": dict(used.provenance),
        "contexts": list(draft.contexts),
        "on_top_of": stack.digests(),
        "seed": work.contexts.seed,
        "versions": versions(),
    }
    if commit := getattr(work.adapter.model.config, "_commit_hash", None):  # of a model from the hub
        provenance["model_revision"] = commit
    if preserved is not None:
        provenance["preserved"] = [edit.delta.digest() for edit in earlier]
    if about is not None:
        provenance["preserved_text"] = about
    if draft.moments:
        provenance["tokens"] = draft.tokens
    if targets is not None:
        provenance["targets"] = "given"
    edit = Edit(Delta(draft.factors, provenance, draft.moments), stack)
    if own is not None:
        own.add(edit, draft.keys)
    if preserved is not None:  # in the computer's memory: most are never asked for
        work.preserved.add(edit, {name: [k.cpu() for k in blocks] for name, blocks in draft.keys.items()})
    return edit


def _given(
    facts: Sequence[EditRequest], config: EditConfig, targets: Mapping[EditRequest, Target] | None
) -> list[Target]:
    """The target vectors of facts that are given; none where none are."""
    if targets is None:
        return []
    if not isinstance(config, TargetConfig):
        raise BadConfig(f"{config.method} has no target vectors, so none can be given for it; leave them out.")
    lacking = [fact.text for fact in facts if fact not in targets]
    if lacking:
        raise BadRequest(f"No target vector is given for {lacking[0]!r}; make one of each fact, by Editor.targets.")
    return [targets[fact] for fact in facts]


def averaged_keys(keys: Tensor) -> Tensor:
    """Half the bare prompt's key, half the mean of the others' (MEMIT, equation 19): (B, contexts, d_k) to (d_k, B)."""
    bare = keys[:, 0]
    if keys.shape[1] == 1:
        return bare.T
    return (0.5 * bare + 0.5 * keys[:, 1:].mean(1)).T
