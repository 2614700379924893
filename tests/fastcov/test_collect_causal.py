from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcov import bucket, collect_moments
from fastcov.collecting import _only_pads_right

DOCUMENTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


class Heard(nn.Module):
    """Remembers which masks it was given."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.down_proj = nn.Linear(4, 4)
        self.masks = []

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.masks.append(attention_mask)
        return self.down_proj(self.embed(input_ids))


def left_padded():
    (batch,) = bucket(DOCUMENTS, 100, max_padding=0.9)
    return {name: value.flip(1) for name, value in batch.items()}


def test_a_mask_that_only_pads_on_the_right_is_not_given_to_a_causal_model():
    model = Heard()
    sums = []
    for causal in (False, True):
        batches = bucket(DOCUMENTS, 100, max_padding=0.9)
        sums.append(collect_moments(model, ["down_proj"], batches, None, causal=causal)["down_proj"])
    assert model.masks[0] is not None and model.masks[1] is None
    assert sums[0].count == sums[1].count == 9  # the keys are cut by the mask all the same
    assert torch.equal(sums[0].sum, sums[1].sum)


def test_any_other_mask_is_given_to_it():
    model = Heard()
    got = collect_moments(model, ["down_proj"], [left_padded()], None, causal=True)
    assert model.masks[0] is not None and got["down_proj"].count == 9


@pytest.mark.parametrize(
    ("mask", "right"),
    [
        ([[1, 1, 0], [1, 0, 0]], True),
        ([[1, 1, 1]], True),
        ([[0, 0, 0]], True),
        ([[0, 1, 1], [1, 1, 1]], False),
        ([[1, 0, 1]], False),
        ([[[1, 1, 0]]], False),
    ],
)
def test_what_pads_on_the_right_alone(mask, right):
    assert _only_pads_right(torch.tensor(mask)) is right
    assert not _only_pads_right(None)
