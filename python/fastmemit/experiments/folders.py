"""What sweeps left in their folders, read back and checked; ``schema.py`` describes the files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastcov.parsing import parse_json
from fastcov.printable import printable
from fastmemit.errors import BadData, DamagedFile, WrongModel
from fastmemit.evaluation.scores import harmonic_mean
from fastmemit.experiments.intervals import HARMONIC, SCORES, SHARES
from fastmemit.experiments.results import RESULTS, TIMINGS, read_results
from fastmemit.experiments.schema import Cell, Sweep, Timing

# What a report reads of sweep.json.
_READ = {"format": int, "model": str, "fingerprint": str, "methods": dict}
# What must be equal for cells of two folders to stand in one table.
_SHARED = ("format", "tokenizer", "dtype", "data", "corpus", "seed", "max_length")
_FIELDS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "batch_size": (int,),
    "batches": (int,),
    "multiplier": (int, float, type(None)),
    "settings": (dict,),
    "bos": (bool,),
    "seed": (int,),
    "key": (str,),
    "keys": (int,),
    "scores": (dict,),
    "before": (dict,),
    "records": (list,),
    "perplexity": (dict, type(None)),
}
# Stored scores and those of the records may differ by rounding, not in what is printed (0.01).
_PRINTED = 0.005
_LARGEST = 2**53  # of whole numbers: all up to it are floats as well
_MEND = "delete the line, and the sweep will run its cell again"


@dataclass(frozen=True)
class Collected:
    """The cells of one model, from one folder or several.

    Attributes:
        folders: Where they were found.
        sweeps: ``sweep.json`` of each folder.
        cells: Every finished cell once, ordered by where it stands in the grid.
        timings: What is known of their cost and of the machines.
    """

    folders: tuple[Path, ...]
    sweeps: tuple[Sweep, ...]
    cells: tuple[Cell, ...]
    timings: tuple[Timing, ...]


def collect(folders: Sequence[Path]) -> Collected:
    """Read the folders of one or several sweeps of the same model.

    Equal cells are merged. A last line without its end is what a killed process leaves; it is left out, with a warning.

    Raises:
        BadData: A folder does not exist or holds no sweep, no cell is finished, a line is damaged, or two files hold
            different results of one cell.
        DamagedFile: A cell is not what a sweep writes; the message names its key and the field.
        WrongModel: The folders are of different models.
    """
    if not folders:
        raise BadData("No folder to report on; name at least one that a sweep has written.")
    sweeps = tuple(_read_sweep(folder) for folder in folders)
    for folder, sweep in zip(folders[1:], sweeps[1:], strict=True):
        _check_same(folders[0], sweeps[0], folder, sweep)
    cells: dict[str, tuple[Path, Cell]] = {}
    timings: dict[str, Timing] = {}
    for folder in folders:
        for key, value in _cleaned(read_results(folder, RESULTS)).items():
            cell = _cell(f"The cell {key!r} of {str(folder)!r}", value)
            known = cells.setdefault(key, (folder, cell))
            if known[1] != cell:
                raise BadData(
                    f"{str(known[0])!r} and {str(folder)!r} have different results of {key}; report on them apart."
                )
        for key, value in _cleaned(read_results(folder, TIMINGS)).items():
            place = f"The timing of {key!r} in {str(folder)!r}"
            fields = {"seconds": (dict,), "hardware": (str,), "versions": (dict,)}
            _check_fields(place, value, fields)
            _check_numbers(place, "seconds", value["seconds"])
            timings.setdefault(key, cast(Timing, value))
    if not cells:
        names = ", ".join(repr(str(folder)) for folder in folders)
        raise BadData(f"No finished cell in {names}; run the sweep until there is one.")
    chosen = sorted((cell for _, cell in cells.values()), key=_order)
    return Collected(
        tuple(folders), sweeps, tuple(chosen), tuple(timings[cell["key"]] for cell in chosen if cell["key"] in timings)
    )


def settings_name(settings: dict[str, Any]) -> str:
    """``{"ridge": 0.1, "steps": 5}`` as ``ridge=0.1, steps=5``; the empty text for none."""
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value, sort_keys=True)}"
        for name, value in sorted(settings.items())
    )


def multiplier_text(multiplier: float | None) -> str:
    """``2``, ``0.5``, or ``full`` for the full precompute."""
    return "full" if multiplier is None else f"{multiplier:g}"


def _cleaned(value: Any) -> Any:
    """A value of a file with all text printable: whatever a report is written as, it is that."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_cleaned(name): _cleaned(inner) for name, inner in value.items()}
    return [_cleaned(inner) for inner in value] if isinstance(value, list) else value


def _order(cell: Cell) -> tuple[Any, ...]:
    multiplier = math.inf if cell["multiplier"] is None else cell["multiplier"]
    return (
        cell["method"],
        settings_name(cell["settings"]),
        not cell["bos"],
        cell["seed"],
        cell["batch_size"],
        cell["batches"],
        multiplier,
        cell["key"],
    )


def _read_sweep(folder: Path) -> Sweep:
    path = folder / "sweep.json"
    if not folder.is_dir():
        raise BadData(f"The folder {str(folder)!r} does not exist; name one that a sweep wrote.")
    if not path.is_file():
        raise BadData(f"{str(folder)!r} holds no sweep.json; name a folder that a sweep wrote.")
    try:
        found = _cleaned(parse_json(path.read_bytes()))
    except ValueError as bad:
        raise DamagedFile(f"{path} is not JSON ({bad}); restore it from a copy.") from None
    found = found if isinstance(found, dict) else {}
    missing = [name for name, kind in _READ.items() if not isinstance(found.get(name), kind)]
    if missing:
        raise DamagedFile(f"{path} lacks {', '.join(missing)}; restore it from a copy.")
    for method, settings in found["methods"].items():
        if not isinstance(settings, dict):
            raise DamagedFile(f"{path} has no settings of {method:.80}; restore it from a copy.")
    return cast(Sweep, found)


def _check_same(first: Path, one: Sweep, second: Path, other: Sweep) -> None:
    if one["fingerprint"] != other["fingerprint"]:
        raise WrongModel(
            f"{str(first)!r} is of the model {one['model']} and {str(second)!r} of "
            f"{other['model']}, whose weights differ; report on each model apart."
        )
    left, right = cast(dict[str, Any], one), cast(dict[str, Any], other)
    pairs = [(name, left.get(name), right.get(name)) for name in _SHARED]
    pairs += [
        (f"settings of {method}", settings, right["methods"][method])
        for method, settings in left["methods"].items()
        if method in right["methods"]
    ]
    for name, a, b in pairs:
        if a != b:
            raise BadData(
                f"The {name} of {str(first)!r} is {a!r} and of {str(second)!r} {b!r}, so their "
                "scores cannot be compared; report on them apart."
            )


def _cell(place: str, value: dict[str, Any]) -> Cell:
    _check_fields(place, value, _FIELDS)
    multiplier = value["multiplier"]
    if multiplier is not None and not 0 < multiplier <= sys.float_info.max:
        raise DamagedFile(f"{place} has a multiplier of {multiplier!r:.80}; {_MEND}.")
    if not value["method"]:
        raise DamagedFile(f"{place} has no method; {_MEND}.")
    _check_counts(place, value, {"batch_size": 1, "batches": 1, "keys": 1, "seed": 0})
    if not value["records"]:
        raise DamagedFile(f"{place} has no records; {_MEND}.")
    seen: set[int] = set()
    for record in value["records"]:
        _check_record(place, record)
        if record["case_id"] in seen:
            raise DamagedFile(f"{place} has case {record['case_id']} twice; {_MEND}.")
        seen.add(record["case_id"])
    wanted = value["batch_size"] * value["batches"]
    if len(seen) != wanted:
        raise DamagedFile(f"{place} has {len(seen)} records, and its batches make {wanted:,}; {_MEND}.")
    for when, scores in (("before", value["before"]), ("after", value["scores"])):
        for name, mean in score_means([record[when] for record in value["records"]]).items():
            if name not in scores and name in ("ea", "pa", "na"):
                continue  # the tables of earlier versions lack what the records have
            said = scores.get(name)
            right = None if mean is None else 100 * mean
            same = said is right if said is None or right is None else _equal(said, right)
            if not same:
                raise DamagedFile(
                    f"{place} says that {name.upper()} {when} the edits is {said!s:.40}, and its "
                    f"records make it {right}; {_MEND}."
                )
    _check_numbers(place, "jitter", value.get("jitter", {}))
    if value["perplexity"] is not None:
        here, found = f"{place}, perplexity,", value["perplexity"]
        _check_fields(here, found, dict.fromkeys(("before", "after"), (int, float)))
        for when in ("before", "after"):
            # The exponential of a mean cost, which is never below 0.
            if not found[when] >= 1 or (type(found[when]) is int and found[when] > _LARGEST):
                raise DamagedFile(f"{here} has {when} = {found[when]!r:.80}, which is not 1 or more; {_MEND}.")
        _check_counts(here, found, {"batches": 1, "tokens": 1})
    return cast(Cell, value)


def _equal(said: Any, right: float) -> bool:
    # Without a difference: a whole number of hundreds of digits has none from a float.
    return isinstance(said, (int, float)) and right - _PRINTED < said < right + _PRINTED


def _check_record(place: str, record: Any) -> None:
    here = f"{place}, a record,"
    fields = {"case_id": (int,), "before": (dict,), "after": (dict,)}
    _check_fields(here, record if isinstance(record, dict) else {}, fields)
    for when in ("before", "after"):
        for name in SHARES:
            share = record[when].get(name)
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if share is not None and not (number and 0 <= share <= 1):
                raise DamagedFile(
                    f"{place} has {name} = {share!r:.80} {when} the edit of case "
                    f"{record['case_id']}, which is no share from 0 to 1; {_MEND}."
                )


def _check_numbers(place: str, name: str, values: Any) -> None:
    """Refuse what is not an object of numbers of 0 or above."""
    _check_fields(place, {name: values}, {name: (dict,)})
    for key, found in values.items():
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        if not number or not 0 <= found <= sys.float_info.max:
            raise DamagedFile(f"{place} has {found!r:.80} for {name} of {key:.40}; {_MEND}.")


def _check_counts(place: str, value: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Refuse fields that are no whole numbers from their least value on; absent ones are fine."""
    for name, low in least.items():
        found = value.get(name, low)
        if type(found) is not int or not low <= found <= _LARGEST:
            raise DamagedFile(f"{place} has {name} = {found!r:.80}; {_MEND}.")


def _check_fields(place: str, value: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]) -> None:
    for name, types in fields.items():
        if name not in value:
            raise DamagedFile(f"{place} lacks the field {name!r}; {_MEND}.")
        found = value[name]
        # bool is an int to Python, not to this file.
        if not isinstance(found, types) or (isinstance(found, bool) and bool not in types):
            raise DamagedFile(f"{place} has {name} = {found!r:.80}; {_MEND}.")


def score_means(shares: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """All of `SCORES` of records, as shares: means over those that have one, and their S."""
    means: dict[str, float | None] = {}
    for name in SHARES:
        found = [share for record in shares if (share := record.get(name)) is not None]
        means[name] = math.fsum(found) / len(found) if found else None
    means["s"] = harmonic_mean([means[name] for name in HARMONIC["s"]])
    return {name: means[name] for name in SCORES}
