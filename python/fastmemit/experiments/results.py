"""The files of sweeps and sequences: written a line at a time, put in order at the end, read back and checked.

``sweep.json`` and ``sequential.json`` (`make_header`) say what all lines of a folder share. ``results.jsonl`` holds one
finished cell (`Cell`) a line, and nothing that differs from run to run: the same plan gives the same lines. What
differs, the seconds and the machine, is in ``timings.jsonl`` (`timing`). Shares of a sweep that several processes
divide are in ``results-1of4.jsonl`` and so on. ``sequential.jsonl`` has the steps of sequences (`Step`).
"""

from __future__ import annotations

import json
import lzma
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch

from fastcov.files import StrPath, atomic_file, parse_json, printable, printable_logger
from fastcov.machine import this_machine
from fastmemit.capacity import FULL_KEYS
from fastmemit.data import Corpus
from fastmemit.display import data_frame
from fastmemit.editor import Editor
from fastmemit.errors import BadData, DamagedFile, WrongModel
from fastmemit.evaluation.perplexity import Perplexity, PerplexityText
from fastmemit.evaluation.scores import SHARES, ScoreTable, score_means
from fastmemit.files import alone, sha256_of
from fastmemit.methods import CONFIGS, EditConfig
from fastmemit.methods.config import config_class
from fastmemit.statistics import versions

log = printable_logger(__name__)

SWEEP, RESULTS, TIMINGS = "sweep.json", "results.jsonl", "timings.jsonl"
SEQUENTIAL, STEPS, STEP_TIMINGS = "sequential.json", "sequential.jsonl", "sequential-timings.jsonl"
_UNBOUNDED = "inf"  # in files for a perplexity without bound, for which JSON has no number
_MAX_BYTES = 1 << 28  # of lines in a compressed file; 80 times the largest recorded
_LARGEST = 2**53  # of whole numbers: all up to it are floats as well
_PRINTED = 0.005  # stored scores and those of the records may differ by rounding, not in what is printed (0.01)
# What must be equal for cells of two folders to stand in one table.
_SHARED = ("format", "tokenizer", "dtype", "data", "corpus", "seed", "max_length")


class Cell(TypedDict):
    """One finished cell: where it stands in the grid, which tells it from the others, and what was found."""

    key: str  # its name: memit/b16x10/x2, with +name=value, -bos and /seed1 where they apply
    method: str
    batch_size: int
    batches: int  # edited one after the other, each on the unedited weights
    multiplier: float | None  # d_m; None: the full precompute
    settings: dict[str, Any]  # overrides of the method's settings, such as {"relative_ridge": 1e-3}
    bos: bool  # whether the first position of a document is a key
    seed: int  # seed for the order of the corpus, and so for which keys are preserved
    keys: int  # preserved keys a layer (of the widest layer)
    scores: ScoreTable  # after the edits, in percent
    before: ScoreTable  # the unedited model, on the same records
    #: case_id, batch (counted from 0), before and after: es, ps, ns, ea, pa, na and others as shares in [0, 1], None
    #: where the record has no such prompts.
    records: list[dict[str, Any]]
    perplexity: Perplexity | None  # None where it was not asked for
    jitter: dict[str, float]  # layer -> what its factor had to add, relative to the diagonal


class Step(TypedDict):
    """The state of a run after some batches; scores in percent, over all facts so far."""

    edits: int  # batches so far
    facts: int  # records in them
    failed: int  # batches that could not be written, because the model had broken down before
    preserved: int  # keys of earlier edits that the next batch would preserve at a layer
    scores: ScoreTable  # of the model as it is now
    before: ScoreTable  # of the unedited model on the same records
    by_batch: list[ScoreTable]  # `scores` of each batch alone, the oldest first
    perplexity: float | None  # of the model as it is now; None where it was not asked for
    entropy: float | None  # n-gram entropy of what it writes, in bits; None where it was not asked for
    records: list[dict[str, Any]]  # see `Cell`; of all facts so far; earlier versions wrote none


def cell_columns(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a table shows of a cell or step: its scores in percent, and all of it that has no parts."""
    place = {name: value for name, value in line.items() if not isinstance(value, (list, Mapping))}
    if "settings" in line:
        place["settings"] = settings_name(line["settings"])
    cost = line["perplexity"]
    after = cost["after"] if isinstance(cost, Mapping) else cost
    before = {f"{name}_before": value for name, value in line["before"].items()}
    return {**place, **line["scores"], "perplexity": after, **before}


@dataclass(frozen=True)
class Inputs:
    """What a sweep or sequences run on, and where their results go."""

    corpus: Corpus  # where the statistics come from
    folder: Path  # where the results go; given as any `StrPath`
    data: Mapping[str, Any]  # name and sha256 of the records, see `file_identity`
    cases: Mapping[str, Any] | None = None  # the same of a fixed list of them, whose order is kept; None shuffles
    full_keys: int = FULL_KEYS  # keys of the full precompute, if the corpus has so many
    max_length: int | None = None  # cut documents at so many tokens
    text: PerplexityText | None = None  # what perplexity is measured on; None measures none
    perplexity_batches: int = 1  # measured after so many of a cell's batches, at most

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))


@dataclass(frozen=True)
class Collected:
    """The cells or steps of one model, from one folder or several."""

    folders: tuple[Path, ...]
    headers: tuple[dict[str, Any], ...]  # sweep.json or sequential.json of each folder
    #: Every finished cell once, ordered by where it stands in the grid; or each `Step` of sequences, as it was written.
    cells: tuple[Any, ...]
    timings: tuple[dict[str, Any], ...]  # what is known of their cost and of the machines
    sequential: bool = False  # whether they are sequences

    def to_pandas(self) -> Any:
        """The cells as a pandas data frame, a row each."""
        return data_frame(map(cell_columns, self.cells))


def make_header(editor: Editor, inputs: Inputs, configs: Sequence[EditConfig]) -> dict[str, Any]:
    """What all lines of a folder share: the unedited model, the inputs, and the settings of the methods."""
    text = inputs.text
    return {
        "format": 1,
        "model": editor.name,
        "fingerprint": editor.fingerprint,
        "tokenizer": str(editor.store.identity["tokenizer"]),
        "dtype": str(editor.model.dtype).removeprefix("torch."),
        "data": dict(inputs.data) if inputs.cases is None else {**inputs.data, "cases": dict(inputs.cases)},
        "corpus": {"name": inputs.corpus.name, "fingerprint": inputs.corpus.fingerprint},
        "seed": editor.seed,  # for the choice and order of records, and for the contexts
        "max_length": inputs.max_length,
        "full_keys": inputs.full_keys,
        "perplexity": None if text is None else {"name": text.name, "sha256": text.sha256, "tokens": len(text.ids)},
        "methods": {config.method: config.as_dict() for config in configs},
    }


def as_published(method: str | EditConfig, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings by name for an experiment, which takes few keys as they are, as the papers do."""
    if isinstance(method, EditConfig) and getattr(method, "relative_ridge", None) is not None:
        return dict(settings or {})
    own = method if isinstance(method, EditConfig) else config_class(method)
    default = own.settings().get("relative_ridge", 0.0)  # RLSEdit's is its own
    return {**({"relative_ridge": 0.0} if default is None else {}), **(settings or {})}


def check_header(path: Path, header: Mapping[str, Any]) -> None:
    """Write a new folder's header, or see that it is that of the lines there (BadData); methods may be added."""
    what = "a sweep" if path.name == SWEEP else "sequences"
    wanted = json.loads(json.dumps(header))
    if path.is_file():
        try:
            stored = parse_json(path.read_bytes())
            before = dict(stored["methods"])
            known = {method: with_defaults(method, settings) for method, settings in before.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise BadData(f"{str(path)!r} is not the header of {what} ({error}); name another folder.") from error
        holds, fix = f"{str(path.parent)!r} holds {what} with", "name another folder, or give the same"
        for name, value in wanted.items():
            if name != "methods" and stored.get(name) != value:
                there, now = (json.dumps(each, ensure_ascii=False) for each in (stored.get(name), value))
                raise BadData(f"{holds} another {name}; {fix} (there {there:.80}, now {now:.80}).")
        for method, settings in wanted["methods"].items():
            full = with_defaults(method, settings)
            if known.get(method, full) != full:
                raise BadData(f"{holds} other settings of {method}; {fix}.")
        wanted["methods"] = {**before, **wanted["methods"]}
        if wanted == stored:
            return
    with atomic_file(path) as file:
        file.write((json.dumps(wanted, indent=1, ensure_ascii=False) + "\n").encode())


def with_defaults(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings with the defaults that were added since, without those of other methods; else a TypeError."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"the settings of {method:.40} are {settings!r:.40}")
    own = {**CONFIGS[method].settings(), **as_published(method)}
    before = {"scale": "published", "optimiser": "adam", "v_lr": 0.5}  # there was no other, and none was written down
    own |= {name: value for name, value in before.items() if name in own}
    known = {name: settings.get(name, value) for name, value in own.items()}
    return {"method": method, **known, "preset": settings.get("preset", "default")}


def file_identity(path: StrPath) -> dict[str, str]:
    """Name and sha256 of a file, for a header; of what is no file the name alone."""
    found = Path(path)
    if not found.is_file():
        return {"name": os.fspath(path)}
    return {"name": found.name, "sha256": sha256_of(found)}


def timing(editor: Editor, key: str, seconds: Any) -> dict[str, Any]:
    """The seconds of a cell (by stage) or a sequence that ends now, and the processor that did the work, in words."""
    device = editor.adapter.device
    if device.type == "cuda":
        hardware = str(torch.cuda.get_device_name(device))
    else:
        found = this_machine(device)
        hardware = f"{found.cpu} ({', '.join(found.isa)}), {found.cores} cores, {torch.get_num_threads()} threads"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"key": key, "seconds": seconds, "hardware": hardware, "versions": versions(), "finished": now}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines, without what a killed process left of the last; a BadData names a bad line."""
    if not path.is_file():
        raise BadData(f"{str(path)!r} is not a file; put the results there that a sweep or sequences wrote.")
    lines = _content(path).split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            value = parse_json(line)
            if not isinstance(value, dict) or not isinstance(value.get("key"), str):
                raise ValueError("it has no key")
            found.append(_with_perplexity(value, _UNBOUNDED, math.inf))
        except ValueError as error:
            if number < len(lines):
                fix = _AGAIN if path.name.startswith(SEQUENTIAL.removesuffix(".json")) else _FIX
                raise BadData(f"Line {number} of {str(path)!r} is not a result ({error}); {fix}.") from error
            log.warning("%s ends in the middle of a line, which is left out", path)  # no end of line behind it
    return found


def _content(path: Path) -> bytes:
    """The bytes of a plain file, or of one that `xz` compressed."""
    data = path.read_bytes()
    if path.suffix != ".xz":
        return data
    try:
        reader = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 27)
        found = reader.decompress(data, max_length=_MAX_BYTES)
    except lzma.LZMAError as error:
        raise BadData(f"{str(path)!r} cannot be decompressed ({error}); restore it from a copy.") from None
    if not reader.eof or reader.unused_data:
        raise BadData(f"{str(path)!r} is cut short, or holds more than {_MAX_BYTES >> 20} MiB; restore it from a copy.")
    return found


def read_results(*folders: Path, name: str = RESULTS) -> dict[str, dict[str, Any]]:
    """Finished cells, steps or timings by key, of shards and compressed files too; BadData where two results differ."""
    found: dict[str, dict[str, Any]] = {}
    where: dict[str, Path] = {}
    for path in (path for folder in folders for path in _files(folder, name)):
        for value in read_lines(path):
            key = value["key"] if "run" not in value else f"{value['run']}: {value['key']}"  # of several in one file
            if found.setdefault(key, value) != value and name in (RESULTS, STEPS):
                raise BadData(
                    f"{str(where[key])!r} and {str(path)!r} have different results of {key}; delete the line that does "
                    "not belong there, or report on them apart."
                )
            where.setdefault(key, path)
    return found


def _files(folder: Path, name: str) -> list[Path]:
    """A file of lines as it may lie in a folder: whole, in shards, and both compressed."""
    stem = name.removesuffix(".jsonl")
    return [
        path
        for end in ("", ".xz")
        for which in ("", "-*of*")
        for path in sorted(folder.glob(f"{stem}{which}.jsonl{end}"))
    ]


def read_unedited(path: Path, fingerprint: str, cases: Sequence[int]) -> dict[int, dict[str, Any]] | None:
    """The scores in ``unedited.json`` by case, None if of another model or other cases; BadData for anything else."""
    if not path.is_file():
        return None
    try:
        stored = parse_json(path.read_bytes())
        if (stored["fingerprint"], stored["cases"]) != (fingerprint, list(cases)):
            return None
        found = {value["case_id"]: dict(value) for value in stored["scores"]}
        if list(found) != list(cases):
            raise ValueError("its scores are not those of its cases")
        return found
    except (ValueError, TypeError, KeyError) as error:
        raise BadData(
            f"{str(path)!r} is not what was written ({error}); delete it, and the unedited scores are taken again."
        ) from error


class ResultsFile:
    """A file of lines that one process writes and that is whole after every line; it may be there already."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def repair(self) -> None:
        """Cut off what a killed process left of its last line."""
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with open(self.path, "r+b") as file:
                file.truncate(whole)

    def append(self, value: Mapping[str, Any]) -> None:
        """Add a line, and see that it is on the disk; if that fails the lines before stay, and no part of this one."""
        left = memoryview(line_of(value))
        with open(self.path, "ab", buffering=0) as file:  # closing has nothing left to write
            before = file.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):
                    file.truncate(before)
                raise


@contextmanager
def written(folder: Path, header: Mapping[str, Any], names: Sequence[str]) -> Iterator[list[ResultsFile]]:
    """The files of lines that only this process writes inside, whole, in a folder of these results; else a BadData.

    Of the names the header's comes first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    of_header, *of_lines = names
    with locked(folder / of_lines[0]):
        check_header(folder / of_header, header)
        files = [ResultsFile(folder / name) for name in of_lines]
        for file in files:
            file.repair()
        yield files


def line_of(value: Mapping[str, Any]) -> bytes:
    """One line of a results file; ValueError if a number is not finite, other than a perplexity without bound."""
    text = json.dumps(
        _with_perplexity(value, math.inf, _UNBOUNDED), ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    return (text + "\n").encode()


def _with_perplexity(value: Mapping[str, Any], one: Any, other: Any) -> dict[str, Any]:
    """A line with `other` for `one` in its perplexity, a number (sequences) or several (sweeps)."""
    found = value.get("perplexity")
    if isinstance(found, Mapping):
        found = {name: other if part == one else part for name, part in found.items()}
    elif found == one:
        found = other
    return {**value, "perplexity": found} if "perplexity" in value else dict(value)


def gather(folder: Path, keys: Sequence[str]) -> None:
    """Gather results and timings of all shards into one file each, in the order of the plan.

    Nothing is lost on the way: the whole file is there before a shard's goes, and that of a shard that runs at this
    time stays; the next sweep gathers the rest of it. Cells of another plan in the same folder stay, behind the others.
    """
    with ExitStack() as stack:
        ended = []
        for path in sorted(folder.glob("results-*of*.jsonl")):
            try:
                stack.enter_context(locked(path))
            except BadData:
                log.warning("%s is still being written; what it has now is gathered", path)
            else:
                ended.append(path)
        for name in (RESULTS, TIMINGS):
            write_in_order(folder / name, keys, read_results(folder, name=name))
        for path in ended:
            for name in ("results", "timings"):
                path.with_name(path.name.replace("results", name, 1)).unlink(missing_ok=True)


def write_in_order(path: Path, keys: Sequence[str], found: Mapping[str, Any]) -> None:
    """Write found lines, or lists of them, by key: those of the plan in its order, and the others behind them."""
    planned = [key for key in keys if key in found]
    with atomic_file(path) as file:
        for key in [*planned, *(key for key in found if key not in set(planned))]:
            for line in found[key] if isinstance(found[key], list) else [found[key]]:
                file.write(line_of(line))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else writes this file inside; BadData if another process does so now."""
    lock = path.with_name(f".{path.name}.lock")
    with alone(lock, "writing these results", wait=False) as ours:
        if not ours and lock.exists():  # where there are no locks, no file of one stays
            raise BadData(
                f"Another process is writing {str(path)!r}; wait for it, or divide the cells with --shard 1/2 and "
                "--shard 2/2."
            )
        yield


def collect(folders: StrPath | Sequence[StrPath]) -> Collected:
    """Read the folders of sweeps, or of sequences, of the same model; for its errors see `report.write_report`."""
    places: dict[Path, Path] = {}
    for folder in map(Path, [folders] if isinstance(folders, str | os.PathLike) else folders):
        places.setdefault(folder.resolve(), folder)  # one that is named twice is read once
    paths = tuple(places.values())
    if not paths:
        raise BadData("No folder to report on; name at least one that a sweep has written.")
    names = ", ".join(repr(str(folder)) for folder in paths)
    headers = tuple(_read_header(folder) for folder in paths)
    kinds = {(folder / SWEEP).is_file() for folder in paths}
    if len(kinds) > 1:
        raise BadData(f"Of {names} some are of sweeps and some of sequences; report on these apart.")
    sequential = kinds == {False}
    for (first, one), (second, other) in combinations(zip(paths, headers, strict=True), 2):
        _check_same(first, one, second, other, settings=not sequential)
    lines = [read_results(folder, name=STEPS if sequential else RESULTS) for folder in paths]
    what = "step of a sequence" if sequential else "cell"
    if not any(lines):
        raise BadData(f"No finished {what} in {names}; run the sweep or the sequences until there is one.")
    for folder in (folder for folder, found in zip(paths, lines, strict=True) if not found):
        log.warning("There is no finished %s in %r, so the report has nothing of it.", what, str(folder))
    cells, timings = _read_steps(paths, headers, lines) if sequential else _read_cells(paths, lines)
    return Collected(paths, headers, tuple(cells), tuple(timings), sequential)


def _read_cells(folders: Sequence[Path], lines: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[dict[str, Any]]]:
    """The cells of sweeps in the order of a grid, and the timings that there are of them."""
    for folder, found in zip(folders, lines, strict=True):  # each for itself, so that an error names it
        for key, value in found.items():
            _check_cell(f"The cell {key!r} of {str(folder)!r}", value)
        for key, value in read_results(folder, name=TIMINGS).items():
            _check_timing(f"The timing of {key!r} in {str(folder)!r}", value)
    cells = sorted(_cleaned(read_results(*folders)).values(), key=_order)
    timings = _cleaned(read_results(*folders, name=TIMINGS))
    return cells, [timings[cell["key"]] for cell in cells if cell["key"] in timings]


def _read_steps(
    folders: Sequence[Path], headers: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """The steps of sequences, with the settings by which the folders differ for a method, and the timings."""
    steps: list[Any] = []
    timings: list[dict[str, Any]] = []
    for folder, header, found in zip(folders, headers, lines, strict=True):
        for line in found.values():
            check_step(f"The step {line['key']!r:.80} of {str(folder)!r}", line)
            own = header["methods"].get(line.get("method"), {})
            others = [other["methods"].get(line.get("method"), own) for other in headers]
            differing = {name: own[name] for name in own if any(other.get(name) != own[name] for other in others)}
            steps.append(_cleaned({**line, "settings": differing}))
        # By the whole line, since runs that a report has named may share a key.
        times = {line_of(line): line for path in _files(folder, STEP_TIMINGS) for line in read_lines(path)}
        for line in times.values():
            line = {**line, "seconds": {"sequences": line.get("seconds")}}
            _check_timing(f"The timing of {line['key']!r} in {str(folder)!r}", line)
            timings.append(_cleaned(line))
    return steps, timings


def method_title(method: str) -> str:
    """A method's name as it is written in titles."""
    return {"alphaedit": "AlphaEdit", "ultraedit": "UltraEdit", "rlsedit": "RLSEdit"}.get(method, method.upper())


def settings_name(settings: Mapping[str, Any]) -> str:
    """``{"ridge": 0.1, "steps": 5}`` as ``ridge=0.1, steps=5``; the empty text for none."""
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value, sort_keys=True)}"
        for name, value in sorted(settings.items())
    )


def _cleaned(value: Any) -> Any:
    """A value of a file with all text printable: whatever a report is written as, it is that."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_cleaned(name): _cleaned(inner) for name, inner in value.items()}
    return [_cleaned(inner) for inner in value] if isinstance(value, list) else value


def _order(cell: Cell) -> tuple[Any, ...]:
    multiplier = math.inf if cell["multiplier"] is None else cell["multiplier"]
    group = (cell["method"], settings_name(cell["settings"]), not cell["bos"], cell["seed"])
    return (*group, cell["batch_size"], cell["batches"], multiplier, cell["key"])


def _read_header(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise BadData(f"The folder {str(folder)!r} does not exist; name one that a sweep wrote.")
    path = next((folder / name for name in (SWEEP, SEQUENTIAL) if (folder / name).is_file()), None)
    if path is None:
        raise BadData(
            f"{str(folder)!r} holds neither sweep.json nor sequential.json; name a folder that a sweep or sequences "
            "wrote."
        )
    try:
        found = _cleaned(parse_json(path.read_bytes()))
    except ValueError as bad:
        raise DamagedFile(f"{path} is not JSON ({bad}); restore it from a copy.") from None
    kinds = {"format": Kind((int,)), "model": _TEXT, "fingerprint": _TEXT, "methods": _OBJECT}
    check_fields(str(path), found, kinds, "restore it from a copy")
    methods = dict.fromkeys(found["methods"], _OBJECT)
    check_fields(f"{path}, methods,", found["methods"], methods, "restore it from a copy")
    return found


def _check_same(first: Path, one: Mapping[str, Any], second: Path, other: Mapping[str, Any], *, settings: bool) -> None:
    if one["fingerprint"] != other["fingerprint"]:
        raise WrongModel(
            f"{str(first)!r} is of the model {one['model']} and {str(second)!r} of {other['model']}, whose weights "
            "differ; report on each model apart."
        )
    pairs = [(name, one.get(name), other.get(name)) for name in _SHARED]
    both = [method for method in one["methods"] if method in other["methods"]] if settings else []
    pairs += [(f"settings of {method}", one["methods"][method], other["methods"][method]) for method in both]
    texts = [found for header in (one, other) if isinstance(found := header.get("perplexity"), dict)]
    if len(texts) == 2:  # where one has none there is nothing to compare
        ours, theirs = ({name: text.get(name) for name in ("sha256", "tokens")} for text in texts)
        pairs.append(("text of perplexity", ours, theirs))
    for name, a, b in pairs:
        if a != b:
            raise BadData(
                f"The {name} of {str(first)!r} is {a!r} and of {str(second)!r} {b!r}, so their scores cannot be "
                "compared; report on them apart."
            )


class Kind(NamedTuple):
    """What a field of a file may be: one of these types, and a number in this range."""

    types: tuple[type, ...]
    low: float = -math.inf
    high: float = math.inf


COUNT, COUNT_FROM_1 = Kind((int,), 0, _LARGEST), Kind((int,), 1, _LARGEST)
NUMBER, SHARE = Kind((int, float), 0, sys.float_info.max), Kind((int, float, type(None)), 0, 1)
PERCENT = Kind((int, float, type(None)), 0, 100)
MULTIPLIER = Kind((int, float, type(None)), math.ulp(0.0), sys.float_info.max)
_TEXT, _OBJECT = Kind((str,)), Kind((dict,))
_CELL = {
    **dict.fromkeys(("method", "key"), _TEXT),
    **dict.fromkeys(("batch_size", "batches", "keys"), COUNT_FROM_1),
    **dict.fromkeys(("settings", "scores", "before"), _OBJECT),
    "multiplier": MULTIPLIER,
    "bos": Kind((bool,)),
    "seed": COUNT,
    "records": Kind((list,)),
    "perplexity": Kind((dict, type(None))),
}
_RECORD = {"case_id": Kind((int,)), "before": _OBJECT, "after": _OBJECT}
# The exponential of a mean cost is never below 1.
_COST = Kind((int, float), 1.0)
_FIX = "delete the line, and the sweep will run its cell again"
_PLACE_OF_RUN = {**dict.fromkeys(("method", "run", "targets"), _TEXT), **dict.fromkeys(("batch_size", "keys"), COUNT)}
_AGAIN = "delete the lines of its run, which is then run again"


def check_fields(place: str, value: Any, kinds: Mapping[str, Kind], fix: str = _FIX) -> None:
    """Raise a DamagedFile that begins with `place` if an object lacks a field, or has one of another kind."""
    for name, (types, low, high) in kinds.items():
        if not isinstance(value, dict) or name not in value:
            raise DamagedFile(f"{place} lacks the field {name!r}; {fix}.")
        found = value[name]
        fits = isinstance(found, types)
        if isinstance(found, bool):  # an int to Python, not to this file
            fits = bool in types
        elif isinstance(found, int):  # a whole number in JSON has no largest, a float has
            fits = fits and low <= found <= min(high, _LARGEST)
        elif isinstance(found, float):
            fits = fits and low <= found <= high
        if not fits:
            numeric = type(found) in (int, float) and math.isfinite(low)
            bounds = f", which is not from {low:g} to {high:g}" if numeric else ""
            raise DamagedFile(f"{place} has {name} = {found!r:.80}{bounds}; {fix}.")


def check_records(place: str, records: Sequence[Any], fix: str = _FIX) -> None:
    """Raise a DamagedFile for what are no records of a cell or step (see `Cell`), or name a case twice."""
    seen: set[int] = set()
    for record in records:
        check_fields(f"{place}, a record,", record, _RECORD, fix)
        case = record["case_id"]
        for when in ("before", "after"):
            known = dict.fromkeys((name for name in SHARES if name in record[when]), SHARE)
            check_fields(f"{place}, {when} the edit of case {case},", record[when], known, fix)
        if case in seen:
            raise DamagedFile(f"{place} has case {case} twice; {fix}.")
        seen.add(case)


def _check_cell(place: str, value: dict[str, Any]) -> None:
    check_fields(place, value, _CELL)
    for name in ("method", "records"):
        if not value[name]:
            raise DamagedFile(f"{place} has no {name}; {_FIX}.")
    check_records(place, value["records"])
    records, wanted = value["records"], value["batch_size"] * value["batches"]
    if len(records) != wanted:
        raise DamagedFile(f"{place} has {len(records)} records, and its batches make {wanted:,}; {_FIX}.")
    for when, scores in (("before", value["before"]), ("after", value["scores"])):
        for name, right in score_means([record[when] for record in records]).items():
            if name not in scores and name in ("ea", "pa", "na"):
                continue  # the tables of earlier versions lack what the records have
            said = scores.get(name)
            if said is None or right is None:
                same = said is right
            else:  # without a difference: a whole number of hundreds of digits has none from a float
                same = isinstance(said, (int, float)) and right - _PRINTED < said < right + _PRINTED
            if not same:
                raise DamagedFile(
                    f"{place} says that {name.upper()} {when} the edits is {said!s:.40}, and its records make it "
                    f"{right}; {_FIX}."
                )
    _check_numbers(place, "jitter", value.get("jitter", {}))
    found = value["perplexity"]
    if found is not None:
        counts = dict.fromkeys((name for name in ("batches", "tokens") if name in found), COUNT_FROM_1)
        check_fields(f"{place}, perplexity,", found, dict.fromkeys(("before", "after"), _COST) | counts)


def check_step(place: str, line: Mapping[str, Any]) -> None:
    """Refuse, by a DamagedFile that begins with `place`, what is no `Step` beside its multiplier and `preserve`."""
    kinds = {
        **dict.fromkeys(("edits", "facts", "failed"), COUNT),
        **dict.fromkeys(("scores", "before"), Kind((dict,))),
        "perplexity": Kind((int, float, type(None)), 1.0),
        **({"entropy": Kind((int, float, type(None)), 0.0)} if "entropy" in line else {}),
        "multiplier": MULTIPLIER,
        "preserve": Kind((bool,)),
        **{name: kind for name, kind in _PLACE_OF_RUN.items() if name in line},
        "by_batch": Kind((list,)),
        **({"records": Kind((list,))} if "records" in line else {}),
    }
    check_fields(place, line, kinds, _AGAIN)
    if not line["by_batch"]:
        raise DamagedFile(f"{place} has no by_batch; {_AGAIN}.")
    for name in ("scores", "before", "by_batch"):
        for table in line[name] if name == "by_batch" else [line[name]]:
            # Lines of earlier versions have no exact matches.
            known = ("es", "ps", "ns", "s", *(score for score in SHARES if isinstance(table, dict) and score in table))
            check_fields(f"{place} in {name}", table, dict.fromkeys(known, PERCENT), _AGAIN)
    check_records(place, line.get("records", ()), _AGAIN)


def _check_timing(place: str, value: Mapping[str, Any]) -> None:
    check_fields(place, value, {"hardware": _TEXT, "versions": _OBJECT, "seconds": _OBJECT})
    _check_numbers(place, "seconds", value["seconds"])


def _check_numbers(place: str, name: str, values: Any) -> None:
    check_fields(place, {name: values}, {name: _OBJECT})
    check_fields(f"{place}, {name},", values, dict.fromkeys(values, NUMBER))
