"""Adapters as edits: ours bit for bit, others with their scaling, the rest refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmemit.delta import Delta
from fastmemit.errors import BadData, DamagedFile, WrongModel
from fastmemit.models import fingerprint
from fastmemit.sharing import load_adapter, save_adapter
from tiny_editors import FACTS, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer

DOWN = "model.layers.{}.mlp.down_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def by_hand(folder: Path, *, fields: Any = (), tensors: Any = ()) -> Path:
    """An adapter as others write it: rank 2, alpha 6, on one module of a tiny llama."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "someone/llama",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["down_proj"],
        "bias": "none",
        "peft_version": "0.15.1",
        "megatron_core": "megatron.core",
        "loftq_config": {},
        **dict(fields),
    }
    factors = {
        f"base_model.model.{DOWN.format(1)}.lora_A.weight": torch.randn(2, 64),
        f"base_model.model.{DOWN.format(1)}.lora_B.weight": torch.randn(32, 2),
        **dict(tensors),
    }
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(factors, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_our_own_comes_back_bit_for_bit_and_is_an_edit_again(architecture: str, tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path / "cache", architecture)
    delta = editor.plan(FACTS, method="memit", layers=(0, 1), steps=3).delta
    narrower = {n: (a[:, :2].contiguous(), b[:, :2].contiguous()) for n, (a, b) in
                list(delta.factors.items())[:1]}  # fmt: skip
    uneven = Delta({**delta.factors, **narrower}, delta.provenance)
    for number, made in enumerate((delta, uneven)):
        save_adapter(made, editor.model, tmp_path / f"adapter{number}")
        found = load_adapter(tmp_path / f"adapter{number}", editor.model)
        assert found.digest() == made.digest()
        assert found.provenance == json.loads(json.dumps(made.provenance))
    found.save(tmp_path / "edit.safetensors")
    editor.load(tmp_path / "edit.safetensors").apply().undo()


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 1}}, 0.5),
        ({"alpha_pattern": {"layers.11.mlp.down_proj": 1, r"^model\..*\.down_proj": 4}}, 2.0),
        ({"alpha_pattern": {"up_proj": 1}, "rank_pattern": {"up_proj": 7}}, 3.0),
    ],
)
def test_the_scaling_is_as_in_peft(fields: Any, scaling: float, tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "adapter", fields=fields)
    model = tiny_model("llama")
    delta = load_adapter(folder, model)
    stored = load_file(folder / WEIGHTS)
    a, b = (stored[f"base_model.model.{DOWN.format(1)}.lora_{x}.weight"].double() for x in "AB")
    left, right = delta.factors[DOWN.format(1) + ".weight"]
    torch.testing.assert_close(left.double() @ right.double().T, scaling * b @ a, rtol=1e-6, atol=1e-6)
    assert delta.provenance["model"] == fingerprint(model)
    assert (delta.provenance["method"], delta.provenance["requests"]) == ("lora", [])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_peft_trains_and_saves_is_read_as_peft_applies_it(architecture: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(architecture)
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[architecture]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=architecture == "gpt2",
        rank_pattern={targets[0]: 2}, alpha_pattern={targets[1]: 7}, task_type="CAUSAL_LM",
    )  # fmt: skip
    trained = peft.get_peft_model(model, config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    trained.save_pretrained(tmp_path / "adapter")
    ids = tiny_tokenizer()(["The capital of France is"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = trained.eval()(ids).logits
        plain = tiny_model(architecture)
        load_adapter(tmp_path / "adapter", plain).add_to(plain)
        torch.testing.assert_close(plain(ids).logits, expected, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(tiny_model(architecture)(ids).logits, expected, atol=1e-2)


A = f"base_model.model.{DOWN.format(1)}.lora_A.weight"
B = f"base_model.model.{DOWN.format(1)}.lora_B.weight"


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"peft_type": "LOHA"}, {}, "'LOHA' and not LoRA"),
        ({"use_dora": True}, {}, "uses use_dora"),
        ({"bias": "all"}, {}, "trains biases"),
        ({"lora_bias": True}, {}, "uses lora_bias"),
        ({"modules_to_save": ["lm_head"]}, {}, "uses modules_to_save"),
        ({"target_parameters": ["x"]}, {}, "uses target_parameters"),
        ({"not_invented_yet": 1}, {}, "uses not_invented_yet"),
        ({"init_lora_weights": "pissa"}, {}, "started by 'pissa'"),
        ({"alpha_pattern": {"(a+)+b": 1}}, {}, "which is more than names"),
        ({"alpha_pattern": {"(": 1}}, {}, "which is more than names"),
        ({"alpha_pattern": {"a" * 100_001: 1}}, {}, "more than 100000 characters"),
        ({}, {"base_model.model.m.lora_embedding_A": torch.ones(2, 2)}, "LoRA on an embedding"),
        ({}, {B.replace("weight", "bias"): torch.ones(3)}, "which is a bias"),
        ({}, {B.replace("lora_B", "lora_magnitude_vector"): torch.ones(3)}, "which is DoRA"),
        ({}, {A: torch.ones(2, 64, 1)}, "of 3 sides"),
        ({}, {A: torch.ones(2, 64, dtype=torch.int8)}, "as torch.int8"),
        (
            {},
            {A.replace("mlp.down_proj", "input_layernorm"): torch.ones(2, 64),
             B.replace("mlp.down_proj", "input_layernorm"): torch.ones(32, 2)},
            "no linear map",
        ),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused(fields: Any, tensors: Any, message: str, tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "adapter", fields=fields, tensors=tensors)
    with pytest.raises(BadData, match=message):
        load_adapter(folder, tiny_model("llama"))


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({}, {A: torch.ones(3, 64)}, "do not fit each other"),
        ({}, {A.replace("1", "2"): torch.ones(2, 64)}, "do not fit each other"),
        ({"lora_alpha": "much"}, {}, "alpha of 'much'"),
        ({"lora_alpha": None}, {}, "alpha of None"),
        ({"lora_alpha": True}, {}, "alpha of True"),
        ({"lora_alpha": float("nan")}, {}, "NaN is no number"),
        ({"lora_alpha": 10**400}, {}, "alpha of 1000"),
        ({"alpha_pattern": {"down_proj": [1]}}, {}, r"alpha of \[1\]"),
        ({"alpha_pattern": ["down_proj"]}, {}, "alpha_pattern"),
    ],
)
def test_what_does_not_fit_is_refused(fields: Any, tensors: Any, message: str, tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "adapter", fields=fields, tensors=tensors)
    with pytest.raises(DamagedFile, match=message):
        load_adapter(folder, tiny_model("llama"))


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "adapter")
    with pytest.raises(WrongModel, match="has no such weight"):
        load_adapter(folder, tiny_model("gpt2"))
    with pytest.raises(WrongModel, match=r"has it as \(32, 16\)"):
        load_adapter(folder, tiny_model("llama", intermediate_size=16))
    model = tiny_model("llama")
    part = model.model.layers[1].mlp.down_proj
    part.weight = torch.nn.Parameter(part.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(WrongModel, match=r"stored as torch\.int8"):
        load_adapter(folder, model)
    packed = torch.zeros(1024, 1, dtype=torch.uint8)  # two numbers to a byte
    part.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(WrongModel, match=r"stored as torch\.uint8"):
        load_adapter(folder, model)


def test_a_shared_weight_is_refused(tmp_path: Path) -> None:
    head = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(2, 32),
        "base_model.model.lm_head.lora_B.weight": torch.ones(640, 2),
    }
    folder = by_hand(tmp_path / "adapter", tensors=head)
    with pytest.raises(BadData, match=r"embed_tokens\.weight shares"):
        load_adapter(folder, tiny_model("llama", tie_word_embeddings=True))
    delta = load_adapter(folder, tiny_model("llama", tie_word_embeddings=False))
    assert "lm_head.weight" in delta.factors


def _truncated(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])


def _no_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def _a_list(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


def _huge(folder: Path) -> None:
    (folder / CONFIG).write_text(" " * (1 << 20) + "{}")


def _deep(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 200_000)


def _deep_metadata(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"fastmemit": "[" * 200_000})


@pytest.mark.parametrize("harm", [_truncated, _no_json, _a_list, _huge, _deep, _deep_metadata])
def test_damaged_files_are_refused(harm: Callable[[Path], None], tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "adapter")
    harm(folder)
    with pytest.raises(DamagedFile, match=str(folder)):
        load_adapter(folder, tiny_model("llama"))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "adapter")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_adapter(folder, tiny_model("llama"))


def test_our_own_that_was_altered_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny_model("llama")
    factors = {DOWN.format(1) + ".weight": (torch.randn(32, 2), torch.randn(64, 2)),
               DOWN.format(0) + ".weight": (torch.randn(32, 1), torch.randn(64, 1))}  # fmt: skip
    save_adapter(Delta(factors, {"method": "memit"}), model, tmp_path / "whole")
    with safe_open(tmp_path / "whole" / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    padded = f"base_model.model.{DOWN.format(0)}.lora_A.weight"
    for name, place in ((A, (0, 0)), (padded, (1, 5))):  # a number, and one in the padding
        folder = tmp_path / f"altered{place[0]}"
        shutil.copytree(tmp_path / "whole", folder)
        stored = load_file(folder / WEIGHTS)
        stored[name][place] += 1
        save_file(stored, folder / WEIGHTS, metadata)
        with pytest.raises(DamagedFile, match="other numbers than were exported"):
            load_adapter(folder, model)
