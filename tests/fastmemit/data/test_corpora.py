"""Corpora: how documents are cut and ordered, and every way a source can be wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fastmemit.data import Corpus, corpus_from_texts, load_corpus
from fastmemit.errors import BadCorpus


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def documents(corpus: Corpus, seed: int = 0) -> list[str]:
    return sorted(corpus.documents(seed))


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    text = "\ufeff\n  \nOne,\nstill one.\n\n\n \t \nTwo: café.\r\nStill two.\r\n\r\nThree"
    corpus = load_corpus(write(tmp_path / "a.txt", text))
    assert documents(corpus) == ["One,\nstill one.", "Three", "Two: café.\nStill two."]
    assert len(corpus) == 3


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert documents(load_corpus(write(tmp_path / "a.txt", "\ufeffOne.\n\nTwo."))) == ["One.", "Two."]
    line = '\ufeff{"text": "One."}\n'
    assert documents(load_corpus(write(tmp_path / "a.jsonl", line))) == ["One."]


def test_a_file_without_blank_lines_is_one_document(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(write(tmp_path / "a.txt", "One\nline\nafter another\n"))
    assert documents(corpus) == ["One\nline\nafter another"]
    assert "one document" in caplog.text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_as_lines_and_as_list(name: str, tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "One"}, {"text": " \n"}, "Two", {"text": "Three ", "id": None}]
    lines = "\n\n".join(map(json.dumps, rows))
    expected = ["One", "Three", "Two"]
    assert documents(load_corpus(write(tmp_path / name, lines))) == expected
    assert documents(load_corpus(write(tmp_path / name, json.dumps(rows, indent=1)))) == expected


def test_another_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "One", "text": "Title"}\n')
    assert documents(load_corpus(path, field="body")) == ["One"]
    assert load_corpus(path, field="body").fingerprint != load_corpus(path).fingerprint


@pytest.mark.parametrize("kind", ["txt", "jsonl", "texts"])
def test_the_order_is_drawn_from_the_seed_alone(kind: str, tmp_path: Path) -> None:
    texts = [f"Document {i}" for i in range(50)]
    if kind == "texts":
        corpus = corpus_from_texts("memory", texts)
    elif kind == "txt":
        corpus = load_corpus(write(tmp_path / "a.txt", "\n\n".join(texts)))
    else:
        corpus = load_corpus(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, texts))))
    first = list(corpus.documents(7))
    assert sorted(first) == sorted(texts)
    assert list(corpus.documents(7)) == first
    assert list(corpus.documents(8)) != first
    # Pinned, so that a precompute can be repeated elsewhere, and the same for every kind of source.
    assert first[:4] == ["Document 24", "Document 35", "Document 14", "Document 31"]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one = load_corpus(write(tmp_path / "a.txt", "One.\n\nTwo."))
    elsewhere = load_corpus(write(tmp_path / "b.txt", "One.\n\nTwo."))
    other = load_corpus(write(tmp_path / "c.txt", "One.\n\nTwo!"))
    assert one.fingerprint == elsewhere.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 64
    split = corpus_from_texts("x", ["ab", "c"]).fingerprint
    assert split != corpus_from_texts("x", ["a", "bc"]).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n\n\t\n", "holds no text"),
        ("a.jsonl", "\n\n", "holds no text"),
        ("a.json", "[]", "holds no text"),
        ("a.jsonl", '{"text": ""}', "holds no text"),
        ("a.txt", b"good\n\ncaf\xe9", r"not UTF-8 text: byte 9 \(0xe9\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"not UTF-8 text: byte 24 \(0xff\)"),
        ("a.json", b'[{"text": "\xff"}]', r"not UTF-8 text: byte 11 \(0xff\)"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"id": 1, "title": "b"}',
            r"Line 3 of .* no field 'text' \(its fields: id, title\); .* with field=",
        ),
        ("a.json", '[{"text": "a"}, {"id": 1}]', r"Item 1 of .* no field 'text' \(its fields: id\)"),
        ("a.jsonl", '{"text": null}', r"Field 'text' of line 1 of .* is not text \(None\)"),
        ("a.jsonl", '"a"\n5', r"Line 2 of .* is not text \(5\)"),
        ("a.jsonl", '{"text": "\\ud800"}', "Field 'text' of line 1 of .* is broken Unicode"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "Line 2 of .* is not JSON"),
        ("a.csv", "text\na", r"ends in '\.csv'; give a \.txt, \.json or \.jsonl file, builtin"),
        ("corpus", "text\na", "has no ending; give a"),
    ],
)
def test_bad_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadCorpus, match=message):
        load_corpus(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikipdia", "There is no corpus or file 'wikipdia'; give .* wikipedia"),
        ("folder/none.txt", r"There is no file 'folder/none\.txt'"),
        ("self", "written by a model.*--corpus self"),
        ("hub:", "names no data set"),
    ],
)
def test_bad_names(spec: str, message: str) -> None:
    with pytest.raises(BadCorpus, match=message):
        load_corpus(spec)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadCorpus, match="is a folder; give one file"):
        load_corpus(tmp_path)


def test_no_texts() -> None:
    with pytest.raises(BadCorpus, match="self holds no text"):
        corpus_from_texts("self", [" ", ""])


def test_a_document_too_large_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmemit.data.corpora.MAX_LINE", 64)
    path = write(tmp_path / "a.txt", "short\n\n" + "a line\n" * 20)
    with pytest.raises(BadCorpus, match=r"document at byte 7 of .* blank lines between"):
        load_corpus(path)


def test_a_file_that_changes_under_us(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "One.\n\nTwo.")
    corpus = load_corpus(path)
    write(path, "Something else.")
    with pytest.raises(BadCorpus, match="has changed since it was opened"):
        list(corpus.documents())
    path.unlink()
    with pytest.raises(BadCorpus, match="has changed since it was opened"):
        list(corpus.documents())


def test_the_wikipedia_sample(data_dir: Path) -> None:
    corpus = load_corpus(data_dir / "wikipedia_en_sample.jsonl")
    assert len(corpus) == 918
    assert sum(map(len, corpus.documents(3))) > 15_000_000


@pytest.mark.parametrize(("suffix", "text"), [("txt", "a\n\nb"), ("jsonl", '"a"\n'), ("json", '["a"]')])
def test_a_corpus_bears_the_name_of_its_file_and_no_folder(tmp_path, suffix, text):
    path = tmp_path / f"articles.{suffix}"
    path.write_text(text, encoding="utf-8")
    assert load_corpus(path).name == f"articles.{suffix}"
