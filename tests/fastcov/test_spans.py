from __future__ import annotations

import itertools

import pytest
import torch

from fastcov import BadInput, Span, between, bucket, collect_moments
from fastmemit.models import find_adapter
from tiny_models import tiny_model

DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8], [9, 10]]


def listed(*args, **kwargs):
    return [(list(span), span.first_key) for span in between(DOCUMENTS, *args, **kwargs)]


def test_keys_are_counted_over_documents_and_what_lies_before_them_is_read():
    assert listed(0, 4, 10) == [([1, 2, 3], 0), ([4], 0)]
    assert listed(2, 6, 10) == [([1, 2, 3], 2), ([4], 0), ([5, 6], 0)]
    assert listed(6, None, 10) == [([5, 6, 7, 8], 2), ([9, 10], 0)]
    assert listed(5, 6, 10) == [([5, 6], 1)]


def test_documents_are_cut_and_their_first_tokens_can_be_no_keys():
    assert listed(0, 4, 2) == [([1, 2], 0), ([4], 0), ([5], 0)]
    # One key less a document, and none of a document with one token.
    assert listed(0, None, 10, skip=1) == [([1, 2, 3], 1), ([5, 6, 7, 8], 1), ([9, 10], 1)]
    assert listed(1, 4, 10, skip=1) == [([1, 2, 3], 2), ([5, 6, 7], 1)]


def test_no_document_is_asked_for_after_the_last_key():
    def documents():
        yield [1, 2]
        raise AssertionError("read on")

    assert list(between(documents(), 0, 2, 10)) == [[1, 2]]


@pytest.mark.parametrize("splits", [(0, 40), (0, 1, 40), (0, 7, 8, 23, 40)])
@pytest.mark.parametrize("skip", [0, 1])
def test_the_parts_of_a_budget_add_up_to_it(splits, skip):
    model = tiny_model("llama")
    name = find_adapter(model).projection_name(1)
    draw = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, 60, (length,), generator=draw).tolist() for length in (9, 4, 17, 1, 12, 30)]

    def part(start, stop):
        batches = bucket(between(documents, start, stop, 16, skip), 40)
        return collect_moments(model, [name], batches, stop - start, dtype=torch.float64)[name]

    total = part(splits[0], splits[1])
    for start, stop in itertools.pairwise(splits[1:]):
        total.merge(part(start, stop))
    rows = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0][0, skip:]))
    with torch.no_grad():
        for document in documents:
            model(input_ids=torch.tensor([document[:16]]))
    hook.remove()
    keys = torch.cat(rows)[:40].double()
    assert total.count == 40 == len(keys)
    wanted = keys.mT @ keys  # of keys in float32, which differ a little with their batch
    assert (total.sum - wanted).norm() < 1e-5 * wanted.norm()


def test_a_batch_has_a_mask_of_keys_only_where_some_token_is_none():
    (plain,) = bucket([Span([1, 2]), [3, 4]], 10)
    assert "key_mask" not in plain
    (batch,) = bucket([Span([1, 2, 3], 2), [4, 5]], 10, max_padding=0.2)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["key_mask"].tolist() == [[0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("numbers", [(-1, 3), (3, 3), (4, 2)])
def test_no_keys_are_refused(numbers):
    with pytest.raises(BadInput, match="are none"):
        between(DOCUMENTS, *numbers, 10)


@pytest.mark.parametrize(("max_length", "skip"), [(0, 0), (1, 1), (5, -1)])
def test_a_context_without_room_for_a_key_is_refused(max_length, skip):
    with pytest.raises(ValueError, match="max_length"):
        between(DOCUMENTS, 0, 3, max_length, skip)
