"""The feed gives the same batches with and without a thread, and leaves none behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcov
from fastmemit.data import Corpus, corpora
from fastmemit.data.corpora import corpus_batches
from fastmemit.models import find_adapter
from tiny_editors import texts, tiny_corpus, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastcov-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert reading_threads() == []


def unthreaded(corpus: Corpus) -> Corpus:
    return Corpus(corpus.name, corpus.fingerprint, corpus.read, corpus.n_documents, by_model=True)


def given(corpus: Corpus, tokens: int = 700, **more: Any) -> list[dict[str, Any]]:
    with corpus_batches(corpus, tiny_tokenizer(), CPU, tokens=tokens, context=32, seed=2, **more) as batches:
        return [dict(batch) for batch in batches]


def test_the_batches_are_the_same_whoever_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "BATCH_TOKENS", 128)
    ahead, here = given(tiny_corpus()), given(unthreaded(tiny_corpus()))
    assert len(ahead) == len(here) > 3
    for one, other in zip(ahead, here, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert sum(int(batch["attention_mask"].sum()) for batch in ahead) == 700
    assert max(batch["input_ids"].numel() for batch in ahead) <= 128


def test_the_sums_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    found = [
        tiny_editor(tmp_path / name, layers=None).precompute(corpus, multiplier=9, layers=[0, 2])
        for name, corpus in (("ahead", tiny_corpus()), ("here", unthreaded(tiny_corpus())))
    ]
    for name in found[0].paths:
        assert torch.equal(found[0].second_moment(name), found[1].second_moment(name))


def test_only_text_that_the_model_does_not_write_is_read_by_a_thread() -> None:
    readers: list[int] = []

    def read(seed: int) -> Iterator[str]:
        for text in texts(20):
            readers.append(threading.get_ident())
            yield text

    given(Corpus("mine", "0" * 64, read), tokens=100)
    assert set(readers) and threading.get_ident() not in readers
    readers.clear()
    given(Corpus("self", "0" * 64, read, by_model=True), tokens=100)
    assert set(readers) == {threading.get_ident()}


def test_the_model_writes_only_in_the_thread_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "WRITTEN_TOKENS", 3)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    threads: list[int] = []
    model.register_forward_pre_hook(lambda *_: threads.append(threading.get_ident()))
    corpus = corpora.self_written(model, tokenizer, "f")
    with corpus_batches(corpus, tokenizer, CPU, tokens=60, context=32) as batches:
        name = find_adapter(model).projection_name(0)
        assert fastcov.collect_moments(model, [name], batches, 60)[name].count == 60
    assert set(threads) == {threading.get_ident()}


def test_reading_is_told_in_the_callers_thread_before_the_batch() -> None:
    told: list[tuple[int, int]] = []
    with corpus_batches(
        tiny_corpus(),
        tiny_tokenizer(),
        CPU,
        tokens=300,
        context=32,
        reading=lambda n: told.append((threading.get_ident(), n)),
    ) as batches:
        taken = 0
        for batch in batches:
            taken += int(batch["attention_mask"].sum())
            assert sum(n for _, n in told) >= taken
    assert taken == 300 and {thread for thread, _ in told} == {threading.get_ident()}


def test_no_document_is_read_after_the_last_token() -> None:
    read: list[str] = []

    def documents(seed: int) -> Iterator[str]:
        for text in texts(2000):
            read.append(text)
            yield text

    given(Corpus("long", "0" * 64, documents), tokens=50)
    assert len(read) == 16  # what is tokenised together


def test_an_error_of_the_corpus_is_the_callers() -> None:
    class Broken(Exception):
        pass

    def read(seed: int) -> Iterator[str]:
        yield from texts(3)
        raise Broken("line 4")

    with pytest.raises(Broken, match="line 4"):
        given(Corpus("broken", "0" * 64, read))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_collect_leaves_no_hook_and_no_thread(tmp_path: Path, error: type[BaseException]) -> None:
    model = tiny_model("llama")
    calls: list[int] = []

    def interrupt(module: Any, args: Any) -> None:
        calls.append(1)
        raise error("in the middle")

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error, match="in the middle"):
        tiny_editor(tmp_path, model=model, layers=(0, 2))
    handle.remove()
    # A part of the model that raises an Exception is tried once more, as a whole.
    assert len(calls) == (2 if issubclass(error, Exception) else 1) and reading_threads() == []
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_batches_are_larger_where_launches_must_be_fed() -> None:
    assert corpora.BATCH_TOKENS == 4096
    assert corpora.DEVICE_BATCH_TOKENS >= 8192
    corpus = Corpus("words", "0" * 64, lambda seed: iter(["a b c d e f g h"] * 4000))
    with corpus_batches(corpus, tiny_tokenizer(), torch.device("meta"), tokens=20_000, context=8) as batches:
        sizes = [batch["input_ids"].numel() for batch in batches]
    assert max(sizes) > corpora.BATCH_TOKENS and max(sizes) <= corpora.DEVICE_BATCH_TOKENS
