from __future__ import annotations

import torch
from torch import nn

from fastcov import rank_k_update
from fastcov.bench.counting import CountFlops


def test_products_are_counted_and_updates_of_this_package_are_not():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))
    C = torch.zeros(5, 5)
    with torch.no_grad(), CountFlops() as counted:
        model(torch.ones(4, 5))
        rank_k_update(C, torch.ones(4, 5))
    assert counted.total == 2 * 4 * (5 * 7 + 7 * 3)
    assert C[1, 0] == 4


def test_batches_of_products_count_each():
    with CountFlops() as counted:
        torch.ones(3, 4, 5) @ torch.ones(3, 5, 6)
        torch.ones(4, 5).mul(2)
    assert counted.total == 2 * 3 * 4 * 5 * 6
