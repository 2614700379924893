"""Windows, and settings that make no sense."""

from __future__ import annotations

from typing import Any

import pytest

from fastmemit.errors import BadConfig
from fastmemit.tracing import TraceSettings, window_at


@pytest.mark.parametrize(
    ("n_layers", "window"), [(1, 1), (3, 1), (12, 2), (24, 5), (28, 5), (30, 6), (48, 10), (96, 10)]
)
def test_the_window_is_the_papers_scaled_down(n_layers: int, window: int) -> None:
    settings = TraceSettings()
    assert settings.window_of("mlp", n_layers) == window
    assert settings.window_of("attention", n_layers) == window
    assert settings.window_of("hidden", n_layers) == 1
    assert TraceSettings(window=1, hidden_window=n_layers).window_of("mlp", n_layers) == 1


@pytest.mark.parametrize(
    ("layer", "window", "expected"),
    [(20, 10, (15, 24)), (2, 10, (0, 6)), (47, 10, (42, 47)), (5, 1, (5, 5)), (5, 3, (4, 6))],
)
def test_the_window_around_a_layer(layer: int, window: int, expected: tuple[int, int]) -> None:
    assert window_at(layer, window, 48) == expected


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"samples": 0}, "samples must be a whole number above 0 but is 0"),
        ({"samples": None}, "samples must be"),
        ({"samples": True}, "samples must be"),
        ({"window": 2.0}, "window must be"),
        ({"limit": -1}, "limit must be"),
        ({"hidden_window": 0}, "hidden_window must be"),
        ({"batch_tokens": "8"}, "batch_tokens must be"),
        ({"noise": 0}, "noise must be"),
        ({"noise": float("inf")}, "noise must be"),
        ({"noise": "3"}, "noise must be"),
        ({"positions": "first"}, "positions must be one of last-subject, all"),
        ({"kinds": ()}, "kinds must be .* but are none"),
        ({"kinds": ("mlp", "mlp")}, "kinds must be different"),
        ({"kinds": ("neuron",)}, "'neuron'"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], part: str) -> None:
    with pytest.raises(BadConfig, match=part):
        TraceSettings(**values)


def test_a_window_of_more_layers_than_there_are() -> None:
    with pytest.raises(BadConfig, match="window of 9 layers is more than the model's 8"):
        TraceSettings(window=9).window_of("mlp", 8)
