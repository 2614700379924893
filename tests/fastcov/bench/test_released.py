from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcov.bench import released


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.first = nn.Linear(3, 3, bias=False)
        self.last = nn.Linear(3, 2, bias=False)
        self.above = 0

    def forward(self, input_ids, attention_mask):
        assert input_ids.shape[0] == 1  # one document at a time
        x = self.last(self.first(self.embed(input_ids)))
        self.above += 1
        return x


def test_each_layer_has_a_pass_of_its_own_that_stops_there():
    model = TwoLayers()
    documents = [[0, 1, 2], [3], [4, 4]]
    sums = released.covariances(model, ["first", "last"], documents)
    keys = model.embed.weight[torch.tensor([0, 1, 2, 3, 4, 4])].detach().double()
    inner = keys @ model.first.weight.detach().double().T
    torch.testing.assert_close(sums["first"].double(), keys.T @ keys, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums["last"].double(), inner.T @ inner, rtol=1e-5, atol=1e-6)
    assert sums["first"].dtype == torch.float32
    assert model.above == 0
    assert not model.first._forward_hooks and not model.last._forward_hooks


def test_a_hook_does_not_outlive_an_error():
    model = TwoLayers()
    with pytest.raises(IndexError):
        released.covariances(model, ["first"], [[99]])
    assert not model.first._forward_hooks


def test_the_update_of_one_key_by_hand():
    A, K, R = torch.eye(2).double() * 3, torch.tensor([[1.0], [0.0]]).double(), torch.ones(1, 1)
    ((update,),) = [released.memit(A, [(K, R.double())])]
    assert update.tolist() == [[0.25, 0.0]]  # r k^T / (3 + 1)
