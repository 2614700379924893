"""Data sets by name: parts of the name, streams in a seeded order, splits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastcov import between
from fastmemit.data import Corpus, load_corpus, load_records
from fastmemit.data.reading import parse_name
from fastmemit.errors import BadCorpus, BadData


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def documents(corpus: Corpus, seed: int = 0) -> list[str]:
    return sorted(corpus.documents(seed))


class Stream:
    """What `datasets` gives for a stream: shuffled by seed, rows as dicts."""

    column_names = ("id", "text")

    def __init__(self, rows: list, breaks_after: int | None = None) -> None:
        self.rows, self.breaks_after = rows, breaks_after

    def shuffle(self, seed: int, buffer_size: int) -> Iterator[dict]:
        assert buffer_size >= 1000
        for index, row in enumerate(self.rows[seed:] + self.rows[:seed]):
            if index == self.breaks_after:
                raise OSError("Connection lost\nand more")
            yield row


def use_hub(monkeypatch: pytest.MonkeyPatch, stream: Stream, revision: str = "abc") -> list:
    asked = []

    def load_dataset_builder(name: str, config: str | None) -> SimpleNamespace:
        asked.append((name, config))
        return SimpleNamespace(hash=revision, as_streaming_dataset=lambda split: stream)

    fake = SimpleNamespace(load_dataset_builder=load_dataset_builder)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked


ROWS = [{"id": 0, "text": "One"}, {"id": 1, "text": " "}, {"id": 2, "text": "Three"}]


def test_hub_streams_with_a_seeded_shuffle(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = use_hub(monkeypatch, Stream(ROWS))
    corpus = load_corpus("wikipedia")
    assert asked == [("wikimedia/wikipedia", "20231101.en")]
    assert list(corpus.documents(0)) == ["One", "Three"]
    assert list(corpus.documents(2)) == ["Three", "One"]
    assert corpus  # though its length is not known
    with pytest.raises(TypeError, match="not known"):
        len(corpus)
    same = load_corpus("hub:wikimedia/wikipedia:20231101.en")
    assert same.fingerprint == corpus.fingerprint
    use_hub(monkeypatch, Stream(ROWS), revision="another")
    assert load_corpus("wikipedia").fingerprint != corpus.fingerprint


def test_hub_without_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, Stream(ROWS))
    with pytest.raises(BadCorpus, match=r"has no field 'body' \(its fields: id, text\)"):
        load_corpus("hub:someone/texts", field="body")


def test_hub_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, Stream(ROWS, breaks_after=1))
    with pytest.raises(BadCorpus, match=r"broke off after 1 .*\(OSError: Connection lost\)"):
        list(load_corpus("wikipedia").documents())


def test_wikipedia_without_a_network() -> None:
    """With the real `datasets`, which the tests keep offline."""
    with pytest.raises(BadCorpus) as caught:
        load_corpus("wikipedia")
    message = str(caught.value)
    assert message.startswith("The hub data set wikimedia/wikipedia (20231101.en) could not be")
    assert message.endswith("pass a text file, --corpus self or --corpus builtin.")
    assert "\n" not in message


def test_real_datasets_on_a_local_folder(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": f"Document {i}"}) for i in range(20))
    write(tmp_path / "train.jsonl", lines)
    corpus = load_corpus(f"hub:{tmp_path}")
    assert documents(corpus) == sorted(f"Document {i}" for i in range(20))
    assert list(corpus.documents(1)) == list(corpus.documents(1)) != list(corpus.documents(2))


def shelves(folder: Path) -> str:
    """A data set with two splits, one of them in several files, as its folder."""
    for shelf in range(3):
        lines = (json.dumps({"id": i, "body": f"{shelf}-{i}"}) for i in range(40))
        write(folder / "data" / f"train-{shelf}.jsonl", "\n".join(lines))
    write(folder / "data" / "test.jsonl", json.dumps({"id": 0, "body": "a test"}))
    return f"hub:{folder}"


def test_a_split_of_a_data_set(tmp_path: Path) -> None:
    spec = shelves(tmp_path)
    assert documents(load_corpus(f"{spec}@test", field="body")) == ["a test"]
    plain, train = (load_corpus(s, field="body") for s in (spec, f"{spec}@train"))
    assert len(documents(plain)) == 120
    assert plain.fingerprint == train.fingerprint
    assert load_corpus(f"{spec}@test", field="body").fingerprint != plain.fingerprint
    with pytest.raises(BadCorpus) as caught:
        load_corpus(f"{spec}@validation", field="body")
    assert str(caught.value) == (
        f"The hub data set {tmp_path} has no split 'validation' (its splits: train, test); name "
        f"one of them, as in hub:{tmp_path}@train."
    )


def test_a_stream_is_in_one_order_for_a_seed_and_shuffles_its_files(tmp_path: Path) -> None:
    spec = shelves(tmp_path)
    orders = [list(load_corpus(spec, field="body").documents(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert all(len({text[0] for text in order[:20]}) == 3 for order in orders)
    assert sorted(orders[0]) == sorted(orders[2])


def test_a_stream_is_read_only_as_far_as_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, Stream(ROWS, breaks_after=1))
    assert next(load_corpus("wikipedia").documents()) == "One"


@pytest.mark.parametrize(
    ("spec", "name", "config", "split"),
    [
        ("hub:a/b", "a/b", None, None),
        ("hub:a/b:c.d", "a/b", "c.d", None),
        ("hub:a/b@test", "a/b", None, "test"),
        ("hub:wikimedia/wikipedia:20231101.en@train", "wikimedia/wikipedia", "20231101.en", "train"),
        ("hub: a/b : c @x_1.2", "a/b", "c", "x_1.2"),
    ],
)
def test_the_parts_of_a_name(spec: str, name: str, config: str | None, split: str | None) -> None:
    found = parse_name(spec, BadCorpus)
    assert (found.name, found.config, found.split) == (name, config, split)


@pytest.mark.parametrize("spec", ["hub:a/b@", "hub:a/b@train[:10%]", "hub:a@b/c"])
def test_a_split_that_is_no_name(spec: str) -> None:
    with pytest.raises(BadCorpus, match="names no split behind its @"):
        load_corpus(spec)


def test_a_folder_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "me@home"
    write(folder / "train.jsonl", json.dumps({"text": "Hello"}))
    assert documents(load_corpus(f"hub:{folder}")) == ["Hello"]


def test_records_of_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"case_id": 3, "subject": "France", "prompt": "The capital of {} is",
           "target_new": "Berlin", "target_true": "Paris"}  # fmt: skip
    splits = {"train": [], "test": [row]}
    fake = SimpleNamespace(load_dataset=lambda name, config: splits)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert len(load_records("hub:someone/facts@test")) == 1
    with pytest.raises(BadData, match=r"has no split 'dev' \(its splits: train, test\); name one"):
        load_records("hub:someone/facts@dev")


def test_keys_between_two_budgets_of_a_stream_are_the_rest_of_the_larger(tmp_path: Path) -> None:
    """How a pass over a stream goes on: the same documents again, those before passed over."""
    corpus = load_corpus(shelves(tmp_path), field="body")
    ids = [[ord(letter) for letter in text] for text in corpus.documents(3)]
    again = ([ord(letter) for letter in text] for text in corpus.documents(3))
    rest = [token for span in between(again, 50, 110, 64) for token in span[span.first_key :]]
    assert rest == [token for row in ids for token in row][50:110]
