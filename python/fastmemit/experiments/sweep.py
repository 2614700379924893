"""A sweep over multipliers, methods and batch sizes: everything is paid for once, nothing is lost.

The protocol is Table 1's of arXiv 2506.04226: batches of records with distinct subjects, each edited into the unedited
weights, scored, and taken out again bit for bit. Statistics of all multipliers come from one pass, target vectors from
one optimisation for every multiplier, batch size and method that can share them, and the unedited scores are taken
once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, cast

import torch

from fastcov import collect_moments
from fastcov.files import atomic_file
from fastmemit.data import Record, batches
from fastmemit.display import Rows, bar, duration
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, BadData, WrongModel
from fastmemit.evaluation.perplexity import PerplexityResult, before_and_after, edited_nll, perplexity
from fastmemit.evaluation.runner import edited, stage
from fastmemit.evaluation.scores import NllPair, RecordScore, ScoreTable, count_questions, score_means, score_records
from fastmemit.experiments import results
from fastmemit.experiments.results import Cell, Inputs, as_published
from fastmemit.methods import METHODS, EditConfig, ReadCache
from fastmemit.statistics import Collection, Statistics
from fastmemit.targets import TargetSettings, optimise
from fastmemit.text import encode

log = logging.getLogger(__name__)

#: How many batches of each size Table 1 of arXiv 2506.04226 edits and scores.
TABLE_1 = {1: 1000, 16: 10, 64: 5, 256: 5, 1024: 3}
MULTIPLIERS: tuple[float | None, ...] = (1.0, 2.0, 3.0, 4.0, 10.0, None)
FULL = "full"
_TARGETS_TOGETHER = 64  # requests between two times that target vectors are stored
_TRIED = 4  # records of a forecast
_EDITING = 0.2  # what writing a record takes beside scoring it; 0.1 to 0.2 in docs/results/smollm2-held-out


@dataclass(frozen=True)
class Place:
    """One cell of the grid, see `Cell`."""

    method: str
    batch_size: int
    batches: int
    multiplier: float | None
    settings: tuple[tuple[str, Any], ...] = ()  # by name, in the order given
    bos: bool = True
    seed: int = 0

    @property
    def key(self) -> str:
        """The cell's name, such as ``memit/b16x10/x2+relative_ridge=0.001``."""
        name = f"{self.method}/b{self.batch_size}x{self.batches}/{multiplier_name(self.multiplier)}"
        name += "".join(f"+{setting}={_shown(value)}" for setting, value in self.settings)
        return name + ("" if self.bos else "-bos") + (f"/seed{self.seed}" if self.seed else "")

    def as_dict(self) -> dict[str, Any]:
        """The place as the results file has it."""
        return {**vars(self), "settings": dict(self.settings)}

    def config(self, editor: Editor) -> EditConfig:
        """The cell's settings on a model."""
        return editor.config(self.method, **as_published(self.method, dict(self.settings)))


@dataclass(frozen=True)
class Grid:
    """All cells of a sweep."""

    #: In the order in which they run: names, or settings in the place of a model's preset, one for each method.
    methods: tuple[str | EditConfig, ...] = ("emmet", "memit", "rome")
    batches: Mapping[int, int] = field(default_factory=lambda: dict(TABLE_1))  # batch size -> how many batches
    multipliers: tuple[float | None, ...] = MULTIPLIERS  # None stands for the full precompute
    variants: tuple[Mapping[str, Any], ...] = ({},)  # settings that replace the methods' own; each set is a cell
    bos: tuple[bool, ...] = (True,)  # with the first position of a document among the keys, without it, or both
    seeds: tuple[int, ...] = (0,)  # seeds for the order of the corpus
    #: Further multipliers at which sums are stored on the way. Sweeps with the same way share one pass over the corpus.
    snapshots: tuple[float | None, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # method -> settings in all of its cells

    def of_model(self, config: Callable[[str | EditConfig], EditConfig]) -> Grid:
        """The grid with names for methods, and what settings change of a model's (`Editor.config`) in `settings`."""
        changed = dict(self.settings)
        for given in self.methods:
            if isinstance(given, EditConfig):
                usual = config(given.method).as_dict()
                own = config(given).as_dict()
                own = {name: own[name] for name in given.settings() if own[name] != usual[name]}
                changed[given.method] = {**own, **self.settings.get(given.method, {})}
        return dataclasses.replace(self, methods=tuple(map(_name, self.methods)), settings=changed)

    def way(self, multiplier: float | None) -> list[float | None]:
        """Where sums are stored on the way to a multiplier, itself the last.

        It does not depend on what is finished: the last bits of a sum depend on it.
        """
        stops = {math.inf if m is None else m for m in (*self.multipliers, *self.snapshots)}
        last = math.inf if multiplier is None else multiplier
        return [None if m == math.inf else m for m in sorted(stops) if m <= last]

    def places(self) -> list[Place]:
        """The cells, those that share statistics one after the other, small multipliers first.

        ROME writes one fact at a time, so it has cells of batch size 1 alone.
        """
        return [
            Place(method, size, count, multiplier, tuple({**self.settings.get(method, {}), **variant}.items()), bos, s)
            for s in self.seeds
            for bos in self.bos
            for multiplier in self.multipliers
            for variant in self.variants
            for method in map(_name, self.methods)
            for size, count in self.batches.items()
            if method != "rome" or size == 1
        ]


def _name(method: str | EditConfig) -> str:
    return method.method if isinstance(method, EditConfig) else method


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def multiplier_name(multiplier: float | None) -> str:
    """``"x2"``, or ``"full"``."""
    return FULL if multiplier is None else f"x{multiplier:g}"


def parse_multipliers(text: str) -> tuple[float | None, ...]:
    """``"1,2,10,full"`` in ascending order, ``full`` last, as None."""

    def number(part: str) -> float | None:
        if part == FULL:
            return math.inf
        try:
            value = float(part)
        except ValueError:
            return None
        return value if 0 < value < math.inf else None

    wrong = "The multiplier {} is neither a number above 0 nor 'full'; write 1,2,10,full."
    return tuple(None if value == math.inf else value for value in sorted(_each("multiplier", text, number, wrong)))


def parse_methods(text: str) -> tuple[str, ...]:
    """``"emmet,memit"`` as method names."""
    wrong = "There is no method {}; choose from " + f"{', '.join(METHODS)}."
    return _each("method", text, lambda name: name if name in METHODS else None, wrong)


def parse_batches(sizes: str | None, numbers: str | None) -> dict[int, int]:
    """``"1,16"`` and ``"1000,10"``, or one for all, as batch sizes and how many; None is Table 1's; or a BadConfig."""
    wrong = "{} is not a whole number above 0; write batch sizes, and how many, as 1,16,64."
    wanted = tuple(TABLE_1) if sizes is None else _each("batch size", sizes, lambda part: _whole(part, 1), wrong)
    if numbers is None:
        for size in wanted:
            if size not in TABLE_1:
                raise BadConfig(f"Table 1 has no batches of {size}; say how many of each size with --num-batches.")
        return {size: TABLE_1[size] for size in wanted}
    counts = _each("number of batches", numbers, lambda part: _whole(part, 1), wrong, once=False)
    if len(counts) not in (1, len(wanted)):
        raise BadConfig(
            f"There are {len(counts)} numbers of batches for {len(wanted)} batch sizes; give one for each, or for all."
        )
    return {size: counts[index % len(counts)] for index, size in enumerate(wanted)}


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"0,1,2"`` as seeds."""
    wrong = "The seed {} is not a whole number from 0 on; write 0,1,2."
    return _each("seed", text, lambda part: _whole(part, 0, 2**32 - 1), wrong)


def parse_shard(text: str | None) -> tuple[int, int]:
    """``"2/4"`` as (2, 4); None is the whole, (1, 1)."""
    number, slash, of = (text or "1/1").partition("/")
    if not slash or not number.isdecimal() or not of.isdecimal() or not 1 <= int(number) <= int(of):
        raise BadConfig(f"The shard {text!r} is not a share such as 1/4 with 1 to 4 of 4.")
    return int(number), int(of)


def _whole(text: str, low: int, high: float = math.inf) -> int | None:
    return int(text) if text.isdecimal() and low <= int(text) <= high else None


def _each(what: str, text: str, read: Callable[[str], Any], wrong: str, *, once: bool = True) -> tuple[Any, ...]:
    """The parts of a list, read one by one; what reads as None is refused, and by default what is there twice."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise BadConfig(f"{text!r} has an empty part; separate each {what} by a single comma.")
    found = []
    for part in parts:
        value = read(part)
        if value is None:
            raise BadConfig(wrong.format(repr(part)))
        if once and value in found:
            raise BadConfig(f"The {what} {value} is there twice; name each once.")
        found.append(value)
    return tuple(found)


def precompute_multipliers(
    editor: Editor,
    inputs: Inputs,
    multipliers: Sequence[float | None],
    layers: Sequence[int],
    *,
    bos: bool = True,
    seed: int | None = None,
    quartic: bool = False,
) -> dict[float | None, Statistics | None]:
    """Statistics of several multipliers, each with the keys of the smaller ones and some more; None of no layers.

    A budget's keys are the first of the next one's. So the corpus is run once, up to the largest budget, and the sum is
    stored at each of them. What is stored already is not run again: a pass that was interrupted goes on at the last
    budget it met. Multipliers are in ascending order; None, which comes last, is the full precompute, or as much as the
    corpus has.
    """
    if not layers:
        return dict.fromkeys(multipliers)
    width = max(editor.adapter.d_k(layer) for layer in layers)
    found: dict[float | None, Statistics | None] = {}
    before: Statistics | None = None
    for multiplier in multipliers:
        found[multiplier] = before = editor.store.collect(
            Collection(
                inputs.corpus,
                layers,
                inputs.full_keys / width if multiplier is None else multiplier,
                allow_fewer=multiplier is None,
                max_length=inputs.max_length,
                bos=bos,
                seed=seed,
                quartic=quartic,
            ),
            after=before,
            aside=True,
        )
    return found


def unedited_scores(
    editor: Editor, folder: Path, records: Sequence[Record], progress: bool
) -> dict[int, dict[str, Any]]:
    """case_id -> the unedited model's score as a file has it, from the folder where it is there."""
    path = folder / "unedited.json"
    cases = [record.case_id for record in records]
    stored = results.read_unedited(path, editor.fingerprint, cases)
    if stored is not None:
        return stored
    with bar("unedited scores", count_questions(records), progress) as advance:
        scores = score_records(editor.adapter, editor.tokenizer, records, progress=advance)
    content = {"fingerprint": editor.fingerprint, "cases": cases, "scores": [score.as_dict() for score in scores]}
    with atomic_file(path) as file:
        file.write((json.dumps(content) + "\n").encode())
    return {score.case_id: score.as_dict() for score in scores}


def scored_or_failed(editor: Editor, batch: Sequence[Record]) -> list[RecordScore]:
    """Scores of edited records; a model whose output is NaN answers nothing."""
    try:
        return score_records(editor.adapter, editor.tokenizer, batch)
    except BadData as broken:
        log.warning("%s Its records count as failures.", broken)
        return [
            RecordScore(
                record.case_id,
                es=0.0,
                ps=0.0 if record.paraphrases else None,
                ns=0.0 if record.neighbourhood else None,
                ea=0.0,
                pa=0.0 if record.paraphrases else None,
                na=0.0 if record.neighbourhood else None,
                rewrite=NllPair(math.inf, math.inf, False),
            )
            for record in batch
        ]


@dataclass(frozen=True)
class Rates:
    """What a sweep is made of, in seconds on this machine."""

    key: float  # one token of the corpus, for all edited layers
    target: float  # one target vector with all its steps
    alone: float  # one record scored alone, as in batches of one
    together: float  # one of several scored together


@dataclass(frozen=True)
class Forecast:
    """What the unfinished cells of a sweep will take, at most: early stopping and what is stored take off."""

    grid: Grid  # with names for methods
    places: Sequence[Place]  # the cells that are not finished
    targets: Mapping[str, TargetSettings]  # of the target vectors of each, by its key
    rates: Rates  # as measured
    full: float  # keys of the full precompute, as far as the corpus is known to go
    width: int  # of the widest edited layer

    def seconds(self, batches: Mapping[int, int] | None = None, full: float = math.inf) -> dict[str, float]:
        """Stage -> seconds; those of other numbers of batches, by size, or of a smaller full precompute."""
        counts = self.grid.batches if batches is None else batches
        cells = [place for place in self.places if place.batch_size in counts]
        passes = {(place.seed, place.bos): 0.0 for place in cells}
        for place in cells:
            keys = min(self.full, full) if place.multiplier is None else place.multiplier * self.width
            passes[place.seed, place.bos] = max(passes[place.seed, place.bos], keys)
        rates, sizes = self.rates, {place.batch_size for place in cells}
        records = max((size * counts[size] for size in sizes), default=0)  # each size begins with the same
        vectors: dict[Any, int] = {}  # by their settings
        for place in cells:
            settings = self.targets[place.key]
            vectors[settings] = max(vectors.get(settings, 0), place.batch_size * counts[place.batch_size])
        scored = sum(
            place.batch_size * counts[place.batch_size] * (rates.alone if place.batch_size == 1 else rates.together)
            for place in cells
        )
        return {
            "statistics": sum(passes.values()) * rates.key,
            "target vectors": sum(vectors.values()) * rates.target,
            "editing and scoring": records * rates.together + scored * (1 + _EDITING),
        }

    def describe(self) -> str:
        """One line for people: cells, records, and how long each stage will take."""
        seconds = self.seconds()
        count = sum(place.batch_size * place.batches for place in self.places)
        parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        return (
            f"{len(self.places):,} cells, {count:,} records to edit and score: about {duration(sum(seconds.values()))} "
            f"here ({parts}; measured with a few records just now)"
        )

    def flags_for(self, limit: float = 3600.0) -> str:
        """Flags that bring the sweep below a number of seconds; empty where it is, or where these cannot."""
        if sum(self.seconds().values()) <= limit:
            return ""
        share = float(f"{limit / 4 / self.rates.key:.0e}")  # a quarter for the corpus
        full = share if share < self.full and any(place.multiplier is None for place in self.places) else math.inf
        for shrink in (2**power for power in range(16)):
            batches = {size: count // shrink for size, count in self.grid.batches.items() if count >= shrink}
            if batches and sum(self.seconds(batches, full).values()) <= limit:
                sizes, counts = (",".join(map(str, values)) for values in (batches.keys(), batches.values()))
                keys = f" --full-keys {full:.0f}" if full < math.inf else ""
                return f"--batch-sizes {sizes} --num-batches {counts}{keys}"
        return ""


def forecast(
    editor: Editor, grid: Grid, records: Sequence[Record], inputs: Inputs, *, shard: tuple[int, int] = (1, 1)
) -> Forecast | None:
    """What `run_sweep` will take here, measured with a few records, steps of target vectors and tokens.

    None where every cell is finished. Nothing is stored. Errors are those of `run_sweep`.
    """
    grid = grid.of_model(editor.config)
    finished = results.read_results(inputs.folder) if inputs.folder.is_dir() else {}
    places, configs, targets = [], [], {}
    for place in grid.places()[shard[0] - 1 :: shard[1]]:
        config = place.config(editor)
        settings = config.targets()
        if place.key not in finished and settings is not None:  # without target vectors a cell costs little
            places.append(place)
            configs.append(config)
            targets[place.key] = settings
    if not places:
        return None
    size = max(grid.batches)
    order = editor.seed if inputs.cases is None else None
    few = batches(records, size, grid.batches[size], seed=order)[0][:_TRIED]
    few += [record for record in records if record not in few][: _TRIED - len(few)]
    names = [editor.adapter.projection_name(layer) for layer in sorted({x for each in configs for x in each.layers})]
    settings = targets[places[0].key]
    steps = min(settings.steps, 3)

    def timed(work: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    def score(some: Sequence[Record]) -> float:
        return timed(lambda: score_records(editor.adapter, editor.tokenizer, some)) / len(some)

    score(few[:1])  # the first run of a model pays for more than itself
    made = timed(
        lambda: optimise(
            editor.adapter,
            editor.tokenizer,
            [record.request for record in few[:2]],
            editor.contexts(configs[0].method),
            dataclasses.replace(settings, steps=steps),
        )
    )
    documents = list(islice(inputs.corpus.documents(editor.seed), 64))
    lengths = [len(encode(editor.tokenizer, text)) for text in documents]
    context = min(inputs.max_length or editor.adapter.max_context, 512)
    ids = max((encode(editor.tokenizer, text).ids[:context] for text in documents[:16]), key=len)
    read = {"input_ids": torch.tensor([ids])}
    rates = Rates(
        key=timed(lambda: collect_moments(editor.adapter.model, names, [read], None)) / len(ids),
        target=made / steps * settings.steps / len(few[:2]),
        alone=score(few[:1]),
        together=score(few),
    )
    number = inputs.corpus.n_documents
    there = math.inf if number is None else number * sum(lengths) / len(lengths)
    width = max(editor.adapter.d_k(layer) for each in configs for layer in each.layers)
    return Forecast(grid, places, targets, rates, min(inputs.full_keys, there), width)


def table_of(records: Sequence[Mapping[str, Any]], when: str = "after") -> ScoreTable:
    """The means over records, in percent."""
    return cast(ScoreTable, score_means([record[when] for record in records]))


def run_sweep(
    editor: Editor,
    grid: Grid,
    records: Sequence[Record],
    inputs: Inputs,
    *,
    shard: tuple[int, int] = (1, 1),
    progress: bool = False,
) -> list[Cell]:
    """Run the cells of a grid that are not finished yet, and append each one when it is.

    Killed at any moment and started again it goes on where it was, and gives the same lines. Batches are dealt from
    `records`. A shard (i, n) is every n-th cell from the i-th on, into a file of its own; the whole sweep, run
    afterwards, finds them finished and puts all into one file. Returns all finished cells of the grid, in its order; of
    a shard those that are finished so far.

    Raises:
        WrongModel: The model is edited already.
        BadData: There are too few records; the folder holds the results of another sweep, or a damaged line; or another
            process is writing there.
        FastcovError, FastmemitError: What can go wrong with statistics, targets and edits.
    """
    if editor.edits:
        raise WrongModel("The model is edited already; undo its edits before a sweep.")
    grid = grid.of_model(editor.config)
    places = grid.places()
    order = editor.seed if inputs.cases is None else None
    dealt = {size: batches(records, size, count, seed=order) for size, count in grid.batches.items()}
    folder = inputs.folder
    configs = [editor.config(method, **as_published(method)) for method in map(_name, grid.methods)]
    header = results.make_header(editor, inputs, configs)
    if header["perplexity"] is not None:
        header["perplexity"]["batches"] = inputs.perplexity_batches
    number, of = shard
    suffix = "" if of == 1 else f"-{number}of{of}"
    names = (results.SWEEP, f"results{suffix}.jsonl", f"timings{suffix}.jsonl")
    with results.written(folder, header, names) as (lines, timings):
        finished = results.read_results(folder)
        todo = [place for place in places[number - 1 :: of] if place.key not in finished]
        if todo:
            every = [place.config(editor) for place in places]  # whose layers a C is collected of
            layers = sorted({layer for config in every if config.needs_statistics for layer in config.layers})
            quartic = any(config.quartic for config in every)
            run = _Run(editor, inputs, dealt, places, progress)
            run.prepare(todo)
            with bar("records", sum(place.batch_size * place.batches for place in todo), progress) as advance:
                for (seed, bos, multiplier), cells in groupby(todo, lambda p: (p.seed, p.bos, p.multiplier)):
                    # Collected no further than the next cells need.
                    way = grid.way(multiplier)
                    found = precompute_multipliers(editor, inputs, way, layers, bos=bos, seed=seed, quartic=quartic)
                    used = found[multiplier]
                    if used is not None:
                        editor.store.use(used)
                    for place in cells:
                        advance.note(place.key)
                        cell, seconds = run.cell(place, 0 if used is None else used.keys, advance)
                        timings.append(results.timing(editor, place.key, seconds))
                        lines.append(cell)
        if of == 1:
            results.gather(folder, [place.key for place in places])
        finished = results.read_results(folder)
    return Rows((finished[place.key] for place in places if place.key in finished), results.cell_columns)


@dataclass
class _Run:
    """A running sweep: what its cells share."""

    editor: Editor
    inputs: Inputs
    dealt: dict[int, list[list[Record]]]  # batch size -> batches
    places: Sequence[Place]  # of the whole grid
    progress: bool
    before: dict[int, dict[str, Any]] = field(default_factory=dict)  # case_id -> the unedited model's stored score
    unedited: PerplexityResult | None = None  # of the unedited model
    reads: ReadCache = field(default_factory=ReadCache)  # of the unedited weights, the same at every multiplier

    def prepare(self, todo: Sequence[Place]) -> None:
        """Unedited scores and target vectors, for the records of the whole grid.

        Not only for what is left to do: rows of a batch differ in their last bits with what stands beside them, so the
        same records are always run together.
        """

        def distinct(sizes: Iterable[int]) -> list[Record]:  # each once, in the order in which they come
            sets = (batch for size, sets in self.dealt.items() if size in sizes for batch in sets)
            return list({record.case_id: record for batch in sets for record in batch}.values())

        self.before = unedited_scores(self.editor, self.inputs.folder, distinct(self.dealt), self.progress)
        if self.inputs.text is not None:
            self.unedited = perplexity(self.editor.adapter, self.inputs.text)
        for settings in dict.fromkeys(place.config(self.editor).targets() for place in todo):
            if settings is None:
                continue  # a method without target vectors
            # The batch sizes of the whole grid: ROME, for one, edits no batches but those of one.
            using = [place for place in self.places if place.config(self.editor).targets() == settings]
            wanted = distinct({place.batch_size for place in using})
            with bar("target vectors", len(wanted), self.progress) as advance:
                for start in range(0, len(wanted), _TARGETS_TOGETHER):
                    requests = [record.request for record in wanted[start : start + _TARGETS_TOGETHER]]
                    self.editor.targets(requests, using[0].config(self.editor), together=True)
                    advance(len(requests))

    def cell(self, place: Place, keys: int, advance: Callable[[int], None]) -> tuple[dict[str, Any], dict[str, float]]:
        """Edit and score the batches of a cell, each on the unedited weights; also the seconds of each stage."""
        editor, text, config = self.editor, self.inputs.text, place.config(self.editor)
        seconds: dict[str, float] = {}
        records: list[dict[str, Any]] = []
        costs: list[float] = []
        with stage(seconds, "factor"):
            jitter = {str(layer): value for layer, value in editor.store.prepare(config).items()}
        for number, batch in enumerate(self.dealt[place.batch_size]):
            with edited(editor, batch, config, seconds, self.reads):
                with stage(seconds, "evaluate"):
                    scores = scored_or_failed(editor, batch)
                if text is not None and number < self.inputs.perplexity_batches:
                    with stage(seconds, "perplexity"):
                        costs.append(edited_nll(editor.adapter, text))
            for record, score in zip(batch, scores, strict=True):
                stored = self.before[record.case_id]
                before = {name: value for name, value in stored.items() if name not in ("case_id", "nll")}
                records.append({"case_id": record.case_id, "batch": number, "before": before, "after": score.shares()})
            advance(len(batch))
        cell = {
            "key": place.key,
            **place.as_dict(),
            "keys": keys,
            "scores": table_of(records),
            "before": table_of(records, "before"),
            "records": records,
            "perplexity": before_and_after(self.unedited, costs) if self.unedited and costs else None,
            "jitter": jitter,
        }
        return cell, {name: round(value, 3) for name, value in seconds.items()}
