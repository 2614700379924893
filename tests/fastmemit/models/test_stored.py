"""Offloaded and quantised weights: who they are, what can be collected, what cannot be edited."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcov
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, WrongModel
from fastmemit.models import fingerprint, load_model, loading
from fastmemit.models.fingerprint import stored_tensors
from tiny_editors import FACTS, tiny_corpus, tiny_editor
from tiny_models import D_K, D, tiny_model, tiny_tokenizer

DOWN = "model.layers.{}.mlp.down_proj"


def needs(name: str) -> Any:
    return pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"{name} not installed")


def dispatched(model: Any, folder: Path, *offloaded: int) -> Any:
    """A model with hooks on every module and the weights of some blocks on the disk."""
    from accelerate import dispatch_model

    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu")
    places |= {f"model.layers.{i}": "disk" if i in offloaded else "cpu" for i in range(3)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "off"), force_hooks=True)


# -- spread over devices --------------------------------------------------------------------------


@needs("accelerate")
@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_model_is_the_same_model(tmp_path: Path, tied: bool) -> None:
    from accelerate import cpu_offload, disk_offload

    made = lambda: tiny_model("llama", tie_word_embeddings=tied)  # noqa: E731
    whole = fingerprint(made())
    assert fingerprint(dispatched(made(), tmp_path, 1, 2)) == whole
    assert fingerprint(cpu_offload(made(), "cpu")) == whole
    offloaded = disk_offload(made(), str(tmp_path / "all"), "cpu")
    assert fingerprint(offloaded) == whole
    other = disk_offload(tiny_model("llama", 1), str(tmp_path / "other"), "cpu")
    assert fingerprint(other) != whole


def test_a_tensor_that_is_nowhere_cannot_be_identified() -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(WrongModel, match="has no values to identify"):
        fingerprint(model)


@needs("accelerate")
def test_statistics_of_a_model_that_is_partly_on_the_disk(tmp_path: Path) -> None:
    layers = [0, 1, 2]
    plain = tiny_editor(tmp_path / "a", layers=None).precompute(tiny_corpus(), multiplier=4, layers=layers)
    spread = Editor(dispatched(tiny_model("llama"), tmp_path, 0, 2), tiny_tokenizer(), cache_dir=tmp_path / "b")
    found = spread.precompute(tiny_corpus(), multiplier=4, layers=layers)
    assert found.provenance == plain.provenance
    for layer in layers:
        name = DOWN.format(layer)
        assert torch.equal(found.second_moment(name), plain.second_moment(name))


@needs("accelerate")
@pytest.mark.parametrize("method", ["memit", "emmet", "rome"])
def test_edits_of_blocks_in_memory_between_offloaded_ones(tmp_path: Path, method: str) -> None:
    layers = (0, 1) if method == "memit" else (1,)
    settings: dict[str, Any] = {"layers": layers, "steps": 3}
    facts = FACTS[:1] if method == "rome" else FACTS
    plain = tiny_editor(tmp_path / "a")
    model = dispatched(tiny_model("llama"), tmp_path, 2)
    spread = tiny_editor(tmp_path / "b", model=model)
    expected = plain.plan(facts, method, **settings).delta
    before = fingerprint(model)
    edit = spread.edit(facts, method, **settings)
    assert edit.delta.factors.keys() == expected.factors.keys()
    for name, (left, right) in edit.delta.factors.items():
        wanted = expected.factors[name]
        torch.testing.assert_close(left @ right.T, wanted[0] @ wanted[1].T, rtol=1e-4, atol=1e-5)
    assert fingerprint(model) != before
    edit.undo()
    assert fingerprint(model) == before


@needs("accelerate")
def test_offloaded_weights_are_not_edited_and_nothing_is_optimised_first(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path, model=dispatched(tiny_model("llama"), tmp_path, 1))
    editor.workspace.contexts_of = None  # type: ignore[assignment,method-assign]  # so that a call of it fails
    with pytest.raises(WrongModel, match=r"down_proj is not in memory .* without offloading"):
        editor.edit(FACTS, layers=(0, 1))


@needs("accelerate")
def test_writing_text_with_offloaded_embeddings(tmp_path: Path) -> None:
    from accelerate import disk_offload

    editor = Editor(tiny_model("llama"), tiny_tokenizer(), cache_dir=tmp_path)
    text = editor.generate(["The capital of"], 5)
    off = disk_offload(tiny_model("llama"), str(tmp_path / "off"), "cpu")
    assert Editor(off, tiny_tokenizer(), cache_dir=tmp_path).generate(["The capital of"], 5) == text


@needs("accelerate")
def test_a_device_map_when_loading(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    places = {"model": "cpu", "lm_head": "cpu"}
    for given in ("auto", "balanced", places):
        model, _ = load_model(str(tmp_path), device_map=given, dtype="float32")
        assert fingerprint(model) == fingerprint(tiny_model("llama"))
    assert Editor.from_pretrained(str(tmp_path), device_map="auto").adapter.n_layers == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device_map": "even"}, "There is no device map 'even'; choose auto, balanced"),
        ({"device_map": "auto", "device": "cpu"}, "'cpu' and the device map 'auto' contradict"),
        ({"load_in": "2bit"}, "cannot be loaded in '2bit'; choose 8bit or 4bit"),
    ],
)
def test_what_makes_no_sense_when_loading(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        load_model("./anything", **given)


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadConfig, match=r"bitsandbytes; pip install 'fastmemit\[quantised\]'"):
        load_model("./anything", device="cpu", load_in="8bit")
    with pytest.raises(BadConfig, match="The device map 'auto' needs the package accelerate"):
        load_model("./anything", device_map="auto")


@needs("accelerate")
def test_a_process_spreads_over_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 10, 1: 11, 2: 12, 3: 13, "cpu": 99}
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: free)
    assert loading.memory_of_own_gpus() is None
    monkeypatch.setattr(loading.parallel, "own_gpus", lambda: [2, 3])
    assert loading.memory_of_own_gpus() == {2: 12, 3: 13, "cpu": 99}


# -- quantised ------------------------------------------------------------------------------------


def torchao_config(name: str) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    if name == "int8":
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))


def quantised(folder: Path, form: str, seed: int = 0, scale: float = 1.0) -> Any:
    """A tiny model in one of the forms; one row of a projection is `scale` times as large."""
    model = tiny_model("llama", seed)
    with torch.no_grad():
        model.get_parameter(f"{DOWN.format(2)}.weight")[3] *= scale
    at = folder / f"{seed}-{scale}"
    model.save_pretrained(at)
    tiny_tokenizer().save_pretrained(at)
    if form.startswith("bnb"):
        return load_model(str(at), device="cpu", dtype="bfloat16", load_in=f"{form[3]}bit")[0]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        at, dtype=torch.bfloat16, device_map="cpu", quantization_config=torchao_config(form)
    )


FORMS = [
    *(pytest.param(f"bnb{bits}", marks=needs("bitsandbytes")) for bits in (8, 4)),
    *(pytest.param(form, marks=needs("torchao")) for form in ("int8", "int4")),
]


@pytest.mark.parametrize("form", FORMS)
def test_statistics_of_a_quantised_model(tmp_path: Path, form: str) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = quantised(tmp_path, form)
    editor = Editor(model, tiny_tokenizer(), cache_dir=tmp_path)
    assert [editor.adapter.d_k(layer) for layer in range(3)] == [D_K] * 3
    assert editor.adapter.d == D
    rows: list[torch.Tensor] = []
    handle = editor.adapter.projection(1).register_forward_pre_hook(lambda _, args: rows.append(args[0].double()))
    found = editor.precompute(tiny_corpus(), multiplier=4, layers=[1])
    handle.remove()
    moment = found.moment(DOWN.format(1))
    assert moment.count == 4 * D_K
    trace = sum(float(part.square().sum()) for part in rows)  # padding and the rest included
    assert 0 < float(moment.sum.trace()) <= trace * 1.001
    # They are of this model and of no other: not of the one that it was made of.
    whole = tiny_editor(tmp_path / "whole", model=tiny_model("llama").bfloat16(), layers=None)
    assert whole.fingerprint != editor.fingerprint
    assert whole.store.find([1]) is None
    with pytest.raises(WrongModel, match="cannot be edited; load the model in floating point"):
        editor.edit(FACTS[:1], layers=(1,))
    with pytest.raises(fastcov.FastcovError):
        whole.edit(FACTS[:1], layers=(1,))


@pytest.mark.parametrize("form", FORMS)
def test_scales_belong_to_the_model(tmp_path: Path, form: str) -> None:
    # A row twice as large has the same integers and another scale.
    first, again, other = (quantised(tmp_path, form, scale=s) for s in (1.0, 1.0, 2.0))
    before = fingerprint(first)
    assert fingerprint(again) == before != fingerprint(other)
    with torch.no_grad():
        first(input_ids=torch.ones(1, 3, dtype=torch.int64))  # some unpack at their first use
    assert fingerprint(first) == before
    names = [name for name, _ in stored_tensors(first)]
    assert len(set(names)) == len(names)
    assert all(any(DOWN.format(i) in name for name in names) for i in range(3))
