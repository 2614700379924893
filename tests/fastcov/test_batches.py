from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcov import BadInput, bucket, take
from fastcov.batching import pinned, sent

documents_of = st.lists(st.lists(st.integers(1, 99), max_size=40), max_size=40)


def flat(documents):
    return [token for document in documents for token in document]


def test_take_truncates_each_document_and_cuts_the_last():
    documents = [[1, 2, 3, 4, 5], [], [6, 7], [8, 9, 10], [11]]
    assert list(take(documents, 7, max_length=3)) == [[1, 2, 3], [6, 7], [8, 9]]


def test_take_reads_no_document_after_the_budget():
    read = []

    def source():
        for i in range(10):
            read.append(i)
            yield [i, i]

    assert len(flat(take(source(), 4, max_length=8))) == 4
    assert read == [0, 1]


@settings(deadline=None)
@given(documents_of, st.integers(1, 300), st.integers(1, 20))
def test_take_meets_the_budget_exactly_or_takes_all(documents, budget, max_length):
    whole = flat(document[:max_length] for document in documents)
    taken = list(take(documents, budget, max_length))
    assert flat(taken) == whole[:budget]
    assert all(0 < len(document) <= max_length for document in taken)
    assert flat(take(documents, None, max_length)) == whole


@pytest.mark.parametrize("budget", [0, -1, 2.5, True])
def test_take_refuses_a_bad_budget_at_once(budget):
    with pytest.raises(BadInput):
        take([[1]], budget, 10)


def test_take_refuses_a_bad_length_and_text():
    with pytest.raises(ValueError, match="max_length"):
        take([[1]], 1, 0)
    with pytest.raises(TypeError, match="tokenise"):
        list(take(["some text"], 5, 10))


def test_bucket_by_hand():
    batches = list(bucket([[1], [2, 3, 4], [5, 6, 7], [], [8]], tokens_per_batch=6))
    assert [batch["input_ids"].tolist() for batch in batches] == [[[2, 3, 4], [5, 6, 7]], [[1], [8]]]
    assert batches[0]["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert all(value.dtype == torch.int64 for batch in batches for value in batch.values())


def test_bucket_pads_on_the_right_and_masks_what_it_padded():
    (batch,) = bucket([[7, 8], [1, 2, 3]], tokens_per_batch=6, max_padding=0.2)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@settings(max_examples=60, deadline=None)
@given(documents_of, st.integers(1, 200), st.sampled_from([0.0, 0.05, 0.3]), st.integers(1, 50))
def test_bucket_keeps_every_token_and_its_limits(documents, tokens_per_batch, max_padding, window):
    seen, padded = [], 0
    for batch in bucket(documents, tokens_per_batch, max_padding, window):
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        assert ids.numel() <= tokens_per_batch or ids.shape[0] == 1
        assert (ids[~mask] == 0).all()
        assert (mask.int().diff(dim=1) <= 0).all()  # padding is on the right
        padded += ids.numel()
        seen += [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    assert sorted(seen) == sorted(document for document in documents if document)
    assert padded - len(flat(seen)) <= max_padding * padded + 1e-9


def test_bucket_makes_large_batches_of_a_natural_corpus_with_little_padding():
    rng = random.Random(0)
    lengths = [min(2048, max(1, int(rng.lognormvariate(5.5, 1.0)))) for _ in range(2000)]
    documents = [[1] * length for length in lengths]
    batches = list(bucket(documents, tokens_per_batch=8192))
    padded = sum(batch["input_ids"].numel() for batch in batches)
    assert 1 - sum(lengths) / padded <= 0.05
    # Not bought with tiny batches: at most twice as many as without any limit on padding.
    assert len(batches) <= 2 * (sum(lengths) / 8192)


def test_bucket_is_deterministic_and_reads_one_window_at_a_time():
    read = []

    def source():
        for i in range(100):
            read.append(i)
            yield [i] * (1 + i % 7)

    first = next(bucket(source(), 64, window=10))
    assert len(read) == 10
    assert torch.equal(first["input_ids"], next(bucket(source(), 64, window=10))["input_ids"])


@pytest.mark.parametrize("bad", [{"tokens_per_batch": 0}, {"window": 0}, {"max_padding": 1.0}])
def test_bucket_refuses_bad_settings_at_once(bad):
    with pytest.raises(ValueError):
        bucket([[1]], **{"tokens_per_batch": 8, **bad})


def test_batches_for_the_cpu_are_not_pinned_and_tensors_there_are_not_copied():
    batches = list(bucket([[1, 2], [3]], 4))
    got = list(pinned(iter(batches), torch.device("cpu")))
    assert all(batch is given for batch, given in zip(got, batches, strict=True))
    ids = batches[0]["input_ids"]
    assert sent(ids, torch.device("cpu")) is ids
    assert sent(ids, torch.device("meta")).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_for_a_gpu_are_pinned_and_arrive_whole():
    device = torch.device("cuda")
    batch = {**next(bucket([[1, 2], [3, 4]], 4)), "use": True}
    (got,) = pinned([batch], device)
    assert got["use"] is True and got["input_ids"].is_pinned()
    for ids in (got["input_ids"], batch["input_ids"], batch["input_ids"].to(device)):
        there = sent(ids, device)
        assert there.device.type == "cuda" and there.tolist() == [[1, 2], [3, 4]]
