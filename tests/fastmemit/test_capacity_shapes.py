"""Shapes: weights by hand, of published models, and of any model's config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastmemit.capacity import SHAPES, Shape, shape_of
from fastmemit.errors import BadConfig, ModelNotFound
from fastmemit.models import find_adapter, load_skeleton
from tiny_models import ARCHITECTURES, tiny_model

# Two blocks, d 4, d_k 8, two heads of width 2 on one of keys and values, 10 tokens.
SMALL = Shape(2, 4, 8, 2, 1, 2, 10, gated=True, tied=False)


def test_weights_by_hand() -> None:
    # q and o: 4 x 4 each, k and v: 4 x 2 each; gate and up: 4 x 8 each; down: 8 x 4
    assert (SMALL.attention, SMALL.before_key, SMALL.block) == (48, 64, 144)
    assert SMALL.weights == 2 * 144 + 2 * 40
    plain = dataclasses.replace(SMALL, gated=False, tied=True)
    assert (plain.before_key, plain.block, plain.weights) == (32, 112, 2 * 112 + 40)
    assert SMALL.run(0) == 48 + 64  # attention, gate and up of the first block
    assert SMALL.run(1) == 144 + 48 + 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shape_of_a_folder_is_that_of_its_model(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path)
    shape, adapter = shape_of(str(tmp_path)), find_adapter(model)
    assert (shape.layers, shape.d, shape.d_k) == (adapter.n_layers, adapter.d, adapter.d_k(0))
    matrices = sum(p.numel() for p in adapter.block(1).parameters() if p.ndim == 2)
    assert shape.block == matrices
    assert shape.tied is False and shape.vocabulary == model.config.vocab_size


def test_a_tied_head_is_found(tmp_path: Path) -> None:
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    assert shape_of(str(tmp_path)).tied


@pytest.mark.parametrize("name", ["gpt-5", "", "nowhere/at/all"])
def test_a_shape_that_is_not_there(name: str) -> None:
    with pytest.raises(BadConfig, match=r"There is no shape .* llama-3-70b, .*config\.json"):
        shape_of(name)


@pytest.mark.parametrize(
    "odd",
    [
        {"model_type": None},
        {"model_type": []},
        {"hidden_size": "x"},
        {"hidden_size": 10**30},
        {"num_attention_heads": 0},
        {"vocab_size": -1},
        {"hidden_act": "nope"},
    ],
)
def test_a_config_that_describes_nothing(odd: dict[str, Any], tmp_path: Path) -> None:
    config = {**tiny_model("llama").config.to_dict(), **odd}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadConfig, match="describes no model that can be built"):
        shape_of(str(tmp_path))
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        load_skeleton(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2-xl", "gpt-j-6b", "llama-2-7b", "llama-3-8b", "smollm2"])
def test_known_models_have_the_weights_that_their_names_say(name: str) -> None:
    stated = {"gpt2-xl": 1.56, "gpt-j-6b": 6.05, "llama-2-7b": 6.74, "llama-3-8b": 8.03,
              "smollm2": 0.1345}[name]  # fmt: skip
    assert SHAPES[name].weights / 1e9 == pytest.approx(stated, rel=0.01)
