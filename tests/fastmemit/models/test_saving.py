"""A saved model loads again, bit for bit; a failed save leaves nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmemit.errors import WrongModel
from fastmemit.models import fingerprint, load_model, save_model, tokenizer_fingerprint
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_model(name: str, tied: bool, tmp_path: Path) -> None:
    if name == "phi" and tied:
        pytest.skip("phi has a head with a bias of its own")
    model = ARCHITECTURES[name](tie_word_embeddings=tied)
    folder = save_model(model, tiny_tokenizer(), tmp_path / "deep" / "model")
    again, tokenizer = load_model(str(folder), device="cpu")
    assert fingerprint(again) == fingerprint(model)
    if name == "qwen2":  # transformers 5 gives a generic tokenizer of such a model Qwen's rules
        assert tokenizer("The city")["input_ids"] == tiny_tokenizer()("The city")["input_ids"]
    else:
        assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(tiny_tokenizer())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_existing_empty_folder_is_filled_and_a_full_one_left_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_model(model, None, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_model(model, None, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(FileExistsError, match=r"config\.json"):
        save_model(model, None, tmp_path / "config.json")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    class FullDisk:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "half").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_model(tiny_model("llama"), FullDisk(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


class Quantizer:
    """What transformers leaves on a model that it read from a quantised file."""

    def __init__(self, method: str) -> None:
        self.quantization_config = SimpleNamespace(quant_method=method)

    def is_serializable(self, **_: Any) -> bool:
        return False


def test_a_model_expanded_from_gguf_can_be_saved_and_keeps_its_mark(tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantizer = Quantizer("gguf")
    model.hf_quantizer = quantizer
    model.config.quantization_config = {"quant_method": "gguf"}
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    assert model.hf_quantizer is quantizer
    assert model.config.quantization_config == {"quant_method": "gguf"}
    assert "quantization_config" not in (tmp_path / "model" / "config.json").read_text()
    assert fingerprint(load_model(str(tmp_path / "model"), device="cpu")[0]) == fingerprint(model)


@pytest.mark.parametrize("method", ["gguf", "bitsandbytes"])
def test_weights_that_are_still_quantised_are_refused(method: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.hf_quantizer = Quantizer(method)
    model.config.quantization_config = {"quant_method": method}
    if method == "gguf":
        head = model.model.layers[0].mlp.down_proj
        head.weight = torch.nn.Parameter(head.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(WrongModel, match="cannot be saved; load the model in floating point"):
        save_model(model, None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_all_files_of_a_saved_model_can_be_read_by_the_same_people(tmp_path: Path) -> None:
    folder = save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "model")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize("odd", [True, False])
def test_generation_settings_are_saved_as_they_are(odd: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 5]
    if odd:  # which transformers refuses to save
        model.generation_config.do_sample, model.generation_config.temperature = False, 0.9
    else:
        model.save_pretrained(tmp_path / "plain")
    own = model.generation_config
    save_model(model, tiny_tokenizer(), tmp_path / "m")
    assert model.generation_config is own
    loaded, _ = load_model(str(tmp_path / "m"))
    assert loaded.generation_config.eos_token_id == [2, 5]
    if odd:
        assert loaded.generation_config.temperature == 0.9
    else:
        name = "generation_config.json"
        assert (tmp_path / "m" / name).read_text() == (tmp_path / "plain" / name).read_text()


def test_a_model_without_generation_settings_is_saved(tmp_path: Path) -> None:
    model = tiny_model("llama").model
    assert getattr(model, "generation_config", None) is None
    save_model(model, None, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()
