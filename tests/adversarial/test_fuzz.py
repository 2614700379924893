"""A few hundred damaged files of every reader; benchmarks/fuzz.py reads thousands."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from benchmarks import fuzz_mutations
from benchmarks.fuzz_readers import Reader, readers
from benchmarks.fuzz_workers import Outcome, is_defect, run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and pipes are those of Linux")
SEED, EACH = 1, 16


def defects(reader: Reader, outcomes: list[Outcome]) -> list[str]:
    return [f"{o.number} ({o.kind}): {o.result} {o.error}\n{o.message}" for o in outcomes
            if is_defect(reader, o)]  # fmt: skip


@pytest.mark.parametrize("name", readers())
def test_damaged_files_are_refused_or_read_as_they_were(name: str) -> None:
    reader = readers()[name]
    outcomes = list(run(reader, range(EACH), SEED))
    assert [outcome.number for outcome in outcomes] == list(range(EACH))
    assert not defects(reader, outcomes)
    places = Counter(outcome.result for outcome in outcomes[: len(fuzz_mutations.PLACES)])
    if name in ("report-timings", "shown-requests"):  # a sweep may have none; what is said
        places.pop("other")
    assert set(places) <= {"refused", "unreadable"}, "what is no file was read"


def broken(name: str, read: object, strict: bool = False) -> Reader:
    made = readers()[name]
    return Reader(made.name, made.family, made.make, read, strict)  # type: ignore[arg-type]  # stands where a function does


def test_the_fuzz_sees_a_crash_a_hang_a_death_memory_and_changed_content(monkeypatch) -> None:
    """A reader that is as bad as can be: what the other tests do not find is not there."""

    def read(path):
        if path.is_fifo():
            path.read_bytes()  # waits for somebody to write
        if path.is_symlink() and path.resolve().name == "zero":
            return len(bytearray(200 << 20))
        if path.is_dir():
            raise KeyError("folder")
        if not path.exists():
            sys.exit(3) if path.is_symlink() else None
            raise FileNotFoundError(path)
        return path.read_bytes()[:40]

    bad = broken("moment", read, strict=True)
    monkeypatch.setattr("benchmarks.fuzz_workers.readers", lambda: {"moment": bad})
    found = [outcome.result for outcome in run(bad, range(6), SEED, patience=4.0)]
    assert found == ["crash", "hang", "crash", "crash", "unreadable", "memory"]
    more = list(run(bad, range(6, 40), SEED, patience=8.0))
    assert {"same", "other"} <= {outcome.result for outcome in more}
    assert any(outcome.result == "other" and is_defect(bad, outcome) for outcome in more)


def test_a_mutant_is_made_again_from_its_seed_and_number(tmp_path) -> None:
    from benchmarks.fuzz_workers import mutant

    reader = readers()["delta"]
    valid = reader.make(tmp_path).read_bytes()
    made = [mutant(reader, valid, 3, number, [b"x"]) for number in range(40)]
    again = [mutant(reader, valid, 3, number, [b"x"]) for number in reversed(range(40))]
    same = [kind == other and data == more for (kind, data, _), (other, more, _)
            in zip(made, again[::-1], strict=True) if "pickle" not in kind]  # fmt: skip
    assert all(same)
    assert len({data for _, data, _ in made}) > 25
