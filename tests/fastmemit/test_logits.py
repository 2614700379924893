"""Logits at chosen positions only, with all that the model does to them afterwards."""

from __future__ import annotations

import pytest
import torch

from fastmemit.errors import UnknownArchitecture
from fastmemit.models import find_adapter
from fastmemit.models.running import head_reads
from tiny_models import ARCHITECTURES

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]])
ROWS, COLUMNS = [2, 0, 0, 1], [4, 0, 3, 2]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_they_are_those_of_the_whole_forward(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    adapter = find_adapter(model)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits  # (3, 5, vocabulary)
        with head_reads(adapter, ROWS, COLUMNS):
            read = model(input_ids=IDS).logits
        again = model(input_ids=IDS).logits
    assert read.shape == (1, 4, whole.shape[-1])
    assert torch.allclose(read[0], whole[ROWS, COLUMNS], atol=1e-5)
    assert torch.equal(again, whole)  # nothing stays behind


def test_an_error_inside_takes_the_hook_off() -> None:
    model = ARCHITECTURES["llama"]()
    with pytest.raises(IndexError), head_reads(find_adapter(model), [3], [0]):
        model(input_ids=IDS)
    assert model(input_ids=IDS).logits.shape[:2] == (3, 5)


def test_a_head_that_the_model_does_not_call_is_refused() -> None:
    model = ARCHITECTURES["llama"]()
    head = torch.nn.Linear(32, 640)
    model.get_output_embeddings = lambda: head
    refused = pytest.raises(UnknownArchitecture, match="does not call Linear")
    with refused, head_reads(find_adapter(model), [0], [0]):
        model(input_ids=IDS)
