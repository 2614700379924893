"""A model on several devices: nothing meets a tensor of another one. No GPU is needed here.

The device meta knows shapes and holds no numbers; an operation on it and another device raises.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastcov import LowRank
from fastmemit.methods import REGISTRY, solve

B, D, D_K = 3, 8, 16
PLACES = ("meta", "cpu")  # of two layers, the second of which is the last edited


def on(device: str, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize("method", ["memit", "emmet"])
def test_the_last_block_is_on_another_device_than_the_layer(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    written: list[tuple[int, LowRank, torch.Tensor]] = []

    def solved(factor: Any, keys: torch.Tensor, residual: torch.Tensor, *_: Any) -> LowRank:
        return LowRank(residual, factor @ keys)  # what is on two devices cannot be multiplied

    monkeypatch.setattr(solve.closed_form, method, solved)
    layers = (0, 1) if method == "memit" else (0,)
    norms = [nn.RMSNorm(D, device=place) for place in PLACES]
    reading = [
        SimpleNamespace(keys=on(place, B, D_K), outputs=on(place, B, D), block=on(PLACES[-1], B, D)) for place in PLACES
    ]
    work: Any = SimpleNamespace(
        config=SimpleNamespace(
            layers=layers, lambda_e=0.1, spread="linear", iterations=1, targets=lambda: SimpleNamespace(site="block")
        ),
        keys={},
        adapter=SimpleNamespace(projection_residual=lambda layer, out, r, rows: norms[layer](out.float() + r) - out),
        subjects=lambda requests: SimpleNamespace(bare_ids=[]),
        read=lambda subjects, layer, known: reading[layer],
        work=SimpleNamespace(statistics=SimpleNamespace(factor=lambda _, layer: on(PLACES[layer], D_K, D_K))),
        preserving=lambda _, factor: factor,
        write=lambda layer, change, keys: written.append((layer, change, keys)),
    )
    facts: list[Any] = [None] * B  # nothing reads them here
    REGISTRY[method].write(work, facts, torch.stack([on("cpu", D)] * B).double())
    assert [layer for layer, _, _ in written] == list(layers)
    for layer, change, keys in written:
        assert {t.device.type for t in (change.left, change.right, keys)} == {PLACES[layer]}
