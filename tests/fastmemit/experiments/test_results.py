from __future__ import annotations

import logging
import lzma
import math
from pathlib import Path

import pytest

from fastmemit.errors import BadData
from fastmemit.experiments import results
from fastmemit.experiments.results import ResultsFile, collect, gather, line_of, locked, read_lines, read_results


def cell(key: str, value: int = 0) -> dict[str, object]:
    return {"key": key, "value": value}


def test_what_a_killed_process_left_of_a_line_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = ResultsFile(tmp_path / "results.jsonl")
    file.append(cell("a"))
    file.append(cell("ü"))
    whole = file.path.read_bytes()
    for left in range(1, len(line_of(cell("b")))):
        file.path.write_bytes(whole + line_of(cell("b"))[:left])
        if left < len(line_of(cell("b"))) - 1:
            with caplog.at_level(logging.WARNING):
                assert [value["key"] for value in read_lines(file.path)] == ["a", "ü"]
            assert "in the middle of a line" in caplog.text
        file.repair()
        assert file.path.read_bytes() == whole
    file.append(cell("b"))
    assert [value["key"] for value in read_lines(file.path)] == ["a", "ü", "b"]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"value": 1}', b"\xff"])
def test_another_damaged_line_is_refused_by_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(line_of(cell("a")) + line + b"\n" + line_of(cell("b")))
    with pytest.raises(BadData, match=r"Line 2 of '.*results.jsonl' is not a result"):
        read_lines(path)


def test_shards_are_put_into_one_file_in_the_order_of_the_plan(tmp_path: Path) -> None:
    for name, keys in (("-1of2", "ac"), ("-2of2", "bd"), ("", "x")):
        file = ResultsFile(tmp_path / f"results{name}.jsonl")
        for key in keys:
            file.append(cell(key))
    assert set(read_results(tmp_path)) == set("abcdx")
    gather(tmp_path, "abcd")
    assert [value["key"] for value in read_lines(tmp_path / "results.jsonl")] == list("abcdx")
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "timings.jsonl"}


def test_a_shard_that_still_runs_keeps_its_file_and_loses_no_cell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running, ended = (tmp_path / f"results-{n}of2.jsonl" for n in (1, 2))
    for stem in ("results", "timings"):
        ResultsFile(tmp_path / f"{stem}-1of2.jsonl").append(cell("a"))
        ResultsFile(tmp_path / f"{stem}-2of2.jsonl").append(cell("b"))
    with locked(running):
        gather(tmp_path, "abc")
        assert "results-1of2.jsonl is still being written" in caplog.text
        assert running.is_file() and not ended.is_file()
        assert not (tmp_path / "timings-2of2.jsonl").is_file()
        for stem in ("results", "timings"):
            ResultsFile(tmp_path / f"{stem}-1of2.jsonl").append(cell("c"))
    assert set(read_results(tmp_path)) == set("abc")
    gather(tmp_path, "abc")
    for name in ("results.jsonl", "timings.jsonl"):
        assert [value["key"] for value in read_lines(tmp_path / name)] == list("abc")
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "timings.jsonl"}


def test_two_results_of_one_cell_must_be_the_same(tmp_path: Path) -> None:
    ResultsFile(tmp_path / "results-1of2.jsonl").append(cell("a", 1))
    ResultsFile(tmp_path / "results-2of2.jsonl").append(cell("a", 1))
    assert read_results(tmp_path) == {"a": cell("a", 1)}
    ResultsFile(tmp_path / "results.jsonl").append(cell("a", 2))
    with pytest.raises(BadData, match="different results of a"):
        read_results(tmp_path)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with locked(path):
        with pytest.raises(BadData, match="Another process is writing"), locked(path):
            raise AssertionError("both hold it")
        with locked(tmp_path / "results-1of2.jsonl"):
            pass
    with locked(path):
        pass


def test_a_perplexity_without_bound_comes_back_and_another_number_is_not_written(tmp_path):
    lines = [
        {"key": "a", "perplexity": math.inf},
        {"key": "b", "perplexity": {"before": 1.5, "after": math.inf}},
        {"key": "c", "perplexity": None},
        {"key": "d"},
    ]
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(map(line_of, lines)))
    assert '{"before":1.5,"after":"inf"}' in path.read_text()  # JSON has no number for it
    assert read_lines(path) == lines
    for value in ({"x": math.nan}, {"perplexity": math.nan}, {"x": [math.inf]}):
        with pytest.raises(ValueError, match="JSON compliant"):
            line_of(value)
    path.write_text('{"key": "a", "perplexity": Infinity}\n')
    with pytest.raises(BadData, match="Infinity is no number"):
        read_lines(path)


def test_compressed_lines_are_read_as_plain_ones(tmp_path: Path) -> None:
    lines = b"".join(line_of(cell(key)) for key in "ab")
    (tmp_path / "results.jsonl.xz").write_bytes(lzma.compress(lines))
    ResultsFile(tmp_path / "results.jsonl").append(cell("c"))
    assert list(read_results(tmp_path)) == ["c", "a", "b"]
    (tmp_path / "results.jsonl").write_bytes(line_of(cell("a", 1)))
    with pytest.raises(BadData, match="have different results of a"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[:-9], "is cut short"),
        (lambda data: data + data, "is cut short"),
        (lambda data: data[:20] + b"spoilt" + data[26:], "cannot be decompressed"),
        (lambda data: b"{}", "cannot be decompressed|is cut short"),
    ],
)
def test_damaged_compressed_lines_are_refused(tmp_path: Path, spoil, words: str) -> None:
    path = tmp_path / "results.jsonl.xz"
    path.write_bytes(spoil(lzma.compress(line_of(cell("a")))))
    with pytest.raises(BadData, match=rf"results.jsonl.xz' ({words})"):
        read_lines(path)


def test_what_grows_without_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl.xz"
    path.write_bytes(lzma.compress(b"\n" * 10_000))
    assert read_lines(path) == []
    monkeypatch.setattr(results, "_MAX_BYTES", 9_999)
    with pytest.raises(BadData, match="or holds more than"):
        read_lines(path)


ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in ROOT.glob("docs/results/*/results.jsonl.xz")}))
def test_the_recorded_sweeps_can_be_read(folder: str) -> None:
    assert collect([ROOT / "docs" / "results" / folder]).cells


def test_what_is_recorded_stays_small() -> None:
    files = [path for path in ROOT.glob("docs/results/*/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000


@pytest.mark.parametrize(
    "folder", sorted({path.parent.name for path in ROOT.glob("docs/results/*/sequential.jsonl.xz")})
)
def test_the_recorded_sequences_can_be_read(folder: str) -> None:
    found = collect([ROOT / "docs" / "results" / folder])
    assert found.sequential and found.cells and found.timings
