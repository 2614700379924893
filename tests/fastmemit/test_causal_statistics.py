"""What a causal model computes for a key does not depend on the padding behind it."""

from __future__ import annotations

import pytest
import torch

import fastcov
from fastmemit.models import find_adapter
from tiny_models import ARCHITECTURES, tiny_model

DOCUMENTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_without_the_padding_mask_are_the_same(architecture: str) -> None:
    adapter = find_adapter(tiny_model(architecture))
    names = [adapter.projection_name(layer) for layer in (0, 1)]
    masked, causal, alone = (
        fastcov.collect_moments(
            adapter.model,
            names,
            fastcov.bucket(DOCUMENTS, tokens, max_padding=0.9),
            None,
            dtype=torch.float64,
            causal=causal,
        )
        for tokens, causal in ((100, False), (100, True), (1, False))
    )
    for name in names:
        assert masked[name].count == causal[name].count == 15
        for other in (masked, alone):  # in one padded batch with its mask, and one by one
            torch.testing.assert_close(causal[name].sum, other[name].sum, rtol=1e-4, atol=1e-5)
