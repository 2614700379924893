"""The layout that servers read of an exported adapter, by a reader written to their description: vLLM's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastmemit.delta import Delta
from fastmemit.models import find_adapter
from fastmemit.sharing import save_adapter
from tiny_models import tiny_model

START = "base_model.model."


def served(folder: Path) -> dict[str, torch.Tensor]:
    """What is added to each module's weight, (out, in) in float64, from one rank and one scaling for all of them."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    rank, alpha = config["r"], config["lora_alpha"]
    assert type(rank) is type(alpha) is int and rank >= 1 and config["target_modules"]
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and config["modules_to_save"] is None
    assert not config["use_dora"] and not config["use_rslora"]
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, kind, last = name.removeprefix(START).rsplit(".", 2)
        assert name.startswith(START) and kind in ("lora_A", "lora_B") and last == "weight"
        assert tensor.shape[0 if kind == "lora_A" else 1] == rank
        pairs.setdefault(module, {})[kind] = tensor.double()
    return {module: alpha / rank * pair["lora_B"] @ pair["lora_A"] for module, pair in pairs.items()}


@pytest.mark.parametrize("architecture", ["llama", "gptj", "opt"])
def test_what_a_server_adds_is_the_edit(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    adapter, generator = find_adapter(model), torch.Generator().manual_seed(0)
    factors = {}
    for layer, rank in ((0, 2), (1, 5)):  # of one block nothing, of the others unequal ranks
        out, into = adapter.projection(layer).weight.shape
        factors[adapter.weight_name(layer)] = tuple(torch.randn(n, rank, generator=generator) for n in (out, into))
    save_adapter(Delta(factors, {"model_name": "me/tiny"}), model, tmp_path / "adapter")
    found = served(tmp_path / "adapter")
    assert {f"{module}.weight" for module in found} == factors.keys()
    for name, (left, right) in factors.items():
        expected = left.double() @ right.double().T
        torch.testing.assert_close(found[name.removesuffix(".weight")], expected, rtol=1e-12, atol=1e-12)
        assert model.get_parameter(name).shape == found[name.removesuffix(".weight")].shape
    # The last part of a module's name is what a server compares with the linear maps that it can adapt.
    assert {module.rsplit(".", 1)[1] for module in found} == {adapter.template.rsplit(".", 1)[1]}
