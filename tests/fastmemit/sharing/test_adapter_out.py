"""An exported edit is, to PEFT, the same change; and off, no change at all."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastmemit.delta import Delta
from fastmemit.errors import BadData, WrongModel
from fastmemit.models import find_adapter, load_skeleton
from fastmemit.sharing import compose, save_adapter
from tiny_editors import FACTS, QUICK, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft")


def loaded(model: Any, folder: Path, name: str = "default") -> Any:
    """The model with an adapter, which PEFT must take without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # how PEFT complains
        return peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name)


def inputs() -> dict[str, torch.Tensor]:
    text = "The capital of France is Paris and Eiffel Tower is located in the city of"
    return dict(tiny_tokenizer()([text], return_tensors="pt"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    model.eval()
    return model(**inputs()).logits


def random_delta(model: Any, ranks: dict[int, int], seed: int = 0) -> Delta:
    """A change of given rank in each layer, large enough to be seen in the logits."""
    adapter, generator = find_adapter(model), torch.Generator().manual_seed(seed)
    factors = {}
    for layer, rank in ranks.items():
        name = adapter.weight_name(layer)
        rows, columns = model.get_parameter(name).shape
        factors[name] = (
            0.3 * torch.randn(rows, rank, generator=generator),
            0.3 * torch.randn(columns, rank, generator=generator),
        )
    return Delta(factors, {"model_name": "tiny"})


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "gpt_neox", "opt"])
def test_peft_gives_the_outputs_of_the_edited_model(architecture: str, tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", architecture)
    before = logits(editor.model)
    edit = editor.edit(FACTS, method="memit", **QUICK)
    assert len(edit.delta.factors) == 2
    edited = logits(editor.model)
    edit.undo()
    save_adapter(edit.delta, editor.adapter, tmp_path / "adapter")
    model = loaded(editor.model, tmp_path / "adapter")
    assert not torch.allclose(edited, before, atol=1e-3)
    torch.testing.assert_close(logits(model), edited, atol=1e-5, rtol=0)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), edited, atol=1e-5, rtol=0)


def test_layer_1_is_edited_and_layer_11_is_not(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=12)
    delta = random_delta(model, {1: 2})
    save_adapter(delta, model, tmp_path / "adapter")
    found = loaded(model, tmp_path / "adapter")
    wrapped = [n for n, m in found.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert wrapped == ["base_model.model.model.layers.1.mlp.down_proj"]


def test_a_module_whose_name_ends_in_an_edited_one_stays_out(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"map": nn.Linear(4, 3, bias=False)})
            self.tower = nn.ModuleDict({"a": nn.ModuleDict({"map": nn.Linear(4, 3, bias=False)})})

    net = Net()
    save_adapter(Delta({"a.map.weight": (torch.ones(3, 1), torch.ones(4, 1))}), net, tmp_path / "x")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "x"))
    found = peft.PeftModel(net, config)
    wrapped = [n for n, m in found.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert wrapped == ["base_model.model.a.map"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("pad", [True, False])
def test_ranks_that_differ(architecture: str, pad: bool, tmp_path: Path) -> None:
    model = tiny_model(architecture, **({} if architecture == "gpt2" else {"num_hidden_layers": 3}))
    delta = random_delta(model, {0: 1, 1: 5, 2: 2})
    save_adapter(delta, model, tmp_path / "adapter", pad=pad)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = [t.shape[0] for n, t in sorted(stored.items()) if "lora_A" in n]
    assert ranks == ([5, 5, 5] if pad else [1, 5, 2])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == (0 if pad else 2)
    found = loaded(tiny_model(architecture), tmp_path / "adapter")
    delta.add_to(model)
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=0)


def test_two_adapters_together_are_both_edits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    a, b = random_delta(model, {0: 2, 1: 2}, seed=1), random_delta(model, {1: 3, 2: 3}, seed=2)
    for name, delta in (("a", a), ("b", b)):
        save_adapter(delta, model, tmp_path / name)
    save_adapter(compose([a, b]), model, tmp_path / "both")
    found = loaded(model, tmp_path / "a", "a")
    found.load_adapter(str(tmp_path / "b"), adapter_name="b")
    found.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="cat")
    found.load_adapter(str(tmp_path / "both"), adapter_name="both")
    edited = tiny_model("llama")
    a.add_to(edited)
    expected_a = logits(edited)
    b.add_to(edited)
    expected = logits(edited)
    found.set_adapter("a")
    torch.testing.assert_close(logits(found), expected_a, atol=1e-5, rtol=0)
    for active in (["a", "b"], "sum", "both"):
        found.base_model.set_adapter(active)
        torch.testing.assert_close(logits(found), expected, atol=2e-5, rtol=0)


def test_a_skeleton_without_weights_is_enough(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "model")
    skeleton = load_skeleton(str(tmp_path / "model"))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    delta = random_delta(model, {1: 2})
    files = []
    for name, of in (("a", model), ("b", skeleton)):
        save_adapter(delta, of, tmp_path / name)
        files.append((tmp_path / name / "adapter_config.json").read_bytes())
        files.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert files[0] == files[2]
    assert all(torch.equal(files[1][name], files[3][name]) for name in files[1])
    assert json.loads(files[0])["fan_in_fan_out"] is True


def test_the_config_says_which_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_adapter(random_delta(model, {0: 1}), model, tmp_path / "a")
    save_adapter(random_delta(model, {0: 1}), model, tmp_path / "b", base_model="me/tiny")
    forged = Delta(random_delta(model, {0: 1}).factors, {"model_name": {"a": 1}})
    save_adapter(forged, model, tmp_path / "c")
    names = [
        json.loads((tmp_path / f / "adapter_config.json").read_text())["base_model_name_or_path"]
        for f in ("a", "b", "c")
    ]
    assert names == ["tiny", "me/tiny", None]
    assert sorted(os.listdir(tmp_path / "a")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_in_bfloat16_the_adapter_is_nearly_as_good_as_the_edited_weights(tmp_path: Path) -> None:
    exact, rounded = tiny_model("llama"), tiny_model("llama").to(torch.bfloat16)
    delta = random_delta(exact, {0: 2, 1: 2})
    save_adapter(delta, exact, tmp_path / "adapter")
    exact.load_state_dict(rounded.state_dict())  # the rounded weights, computed with in float32
    found = loaded(rounded, tmp_path / "adapter")
    beside = logits(found).float()
    inside = found.unload()
    delta.add_to(inside)
    delta.add_to(exact)
    expected = logits(exact)
    errors = [float((x - expected).norm()) for x in (beside, logits(inside).float())]
    assert errors[0] < 1.2 * errors[1]  # the sum is rounded once more


def test_what_no_adapter_can_hold_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    head, norm = "lm_head.weight", "model.layers.0.input_layernorm.weight"
    rows, columns = model.get_parameter(head).shape
    tied = Delta({head: (torch.ones(rows, 1), torch.ones(columns, 1))})
    with pytest.raises(BadData, match=r"embed_tokens\.weight shares"):
        save_adapter(tied, model, tmp_path / "x")
    table = Delta({"model.embed_tokens.weight": (torch.ones(rows, 1), torch.ones(columns, 1))})
    with pytest.raises(BadData, match="not the weight of a linear map"):
        save_adapter(table, model, tmp_path / "x")
    with pytest.raises(BadData, match="changes no weight"):
        save_adapter(Delta({}), model, tmp_path / "x")
    with pytest.raises(WrongModel, match="layernorm"):
        save_adapter(Delta({norm: (torch.ones(32, 1), torch.ones(1, 1))}), model, tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_adapter(random_delta(model, {0: 1}), model, tmp_path)
    assert os.listdir(tmp_path) == ["kept"]
