"""A fact that SmolLM2-135M knows, traced in the batched and in the literal way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastmemit.data import builtin_facts
from fastmemit.models import find_adapter
from fastmemit.tracing import TraceSettings, choose_facts, subject_noise, trace, window_at
from reference.literal_tracing import literal_effects

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_a_known_fact_is_hidden_by_noise_and_comes_back(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    adapter = find_adapter(model)
    settings = TraceSettings(samples=1, limit=1, kinds=("mlp", "hidden"))
    requests = [record.request for record in builtin_facts()]
    (fact,) = choose_facts(adapter, tokenizer, requests, settings).facts
    with torch.no_grad():
        logits = model(torch.tensor([fact.ids])).logits[0, -1]
    assert int(logits.argmax()) == fact.answer  # known
    found = trace(adapter, [fact], settings)
    assert found.windows == {"mlp": 6, "hidden": 1}
    layers = model.model.layers
    modules = {"mlp": [layer.mlp for layer in layers], "hidden": list(layers)}
    windows = {}
    for kind, window in found.windows.items():
        ends = [window_at(layer, window, len(layers)) for layer in range(len(layers))]
        windows[kind] = [range(first, last + 1) for first, last in ends]
    noise = subject_noise(fact, 1, adapter.d, found.std, settings.seed)
    some = [1, 4, 12, 29]
    clean, corrupted, effects = literal_effects(
        model, modules, fact.ids, fact.first, fact.answer, noise, windows, [fact.last], some
    )
    assert found.clean == pytest.approx([clean], rel=1e-4)
    assert found.corrupted == pytest.approx([corrupted], rel=1e-3, abs=1e-6)
    assert clean > corrupted
    for kind in modules:
        expected = [effects[kind, fact.last, layer] for layer in some]
        ours = found.effects[kind]["last subject"][0, some]
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
    assert found.effects["hidden"]["last subject"][0].max() > 0.1 * (clean - corrupted)
    # Nothing leads from the subject's token at the top to the token that is read.
    assert found.effects["hidden"]["last subject"][0, -1] == pytest.approx(0, abs=1e-6)
