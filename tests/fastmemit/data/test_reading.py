"""Files that cannot be read, and the sentence that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmemit.data import load_records, load_requests
from fastmemit.errors import BadData


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "no readable record"),
        (b"[]", "no readable record"),
        (b'{"case_id": 1}\n{"case_id": 2,\n', "Line 2 of .* is not JSON"),
        (b"[1,\n2,,]", r"is not JSON \(line 2, column 3"),
        (b"caf\xe9\n", r"not UTF-8 text: byte 3 \(0xe9\)"),
        (b'{"a": 1}\n{"caf\xe9"\n', r"not UTF-8 text: byte 14 \(0xe9\)"),
        (b"\xef\xbb\xbf[\xe9]", r"not UTF-8 text: byte 4 \(0xe9\)"),
        (b'{"train": [1, 2]}', r"one JSON object at line 1 \(fields: train\).*write a list"),
        (b'{\n "train": []\n}', "Line 1 .*goes on over several lines; write a list"),
        (b"[" * 100_000, "cannot be read as JSON"),
    ],
    ids=range(11),
)
def test_unreadable_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(BadData, match=message):
        load_records(path)


def test_what_the_one_record_of_a_list_lacks_is_said_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"example_type": "recent", "edit": {}}]')
    with pytest.raises(BadData, match=r"request 0 \(item 0\): The request has no prompt"):
        load_requests(path)
    with pytest.raises(BadData, match=r"record 0 \(item 0\), field edit.prompt: is missing"):
        load_records(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"nowhere\.json does not exist"):
        load_records(tmp_path / "nowhere.json")
    with pytest.raises(BadData, match="is a folder"):
        load_requests(tmp_path)


def test_a_list_too_large_to_parse_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" + "1, " * 100 + "1]")
    monkeypatch.setattr("fastmemit.data.reading.MAX_WHOLE_FILE", 100)
    with pytest.raises(BadData, match="write one object a line"):
        load_records(path)
    path.write_text('{"a": "' + 100 * "b" + '"}')
    monkeypatch.setattr("fastmemit.data.reading.MAX_LINE", 100)
    with pytest.raises(BadData, match=r"Line 1 of .* is longer than"):
        load_records(path)
