"""Where other codebases look, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmemit.compat import StatsPlace, module_of
from fastmemit.errors import BadConfig

MODULE = "transformer.h.17.mlp.c_proj"


@pytest.mark.parametrize(
    ("layout", "name", "folder"),
    [
        ("rome", "gpt2-xl", "gpt2-xl"),
        ("rome", "EleutherAI/gpt-j-6B", "EleutherAI_gpt-j-6B"),
        ("memit", "EleutherAI/gpt-j-6B", "EleutherAI_gpt-j-6B"),
        ("easyedit", "EleutherAI/gpt-j-6B", "gpt-j-6B"),
        ("alphaedit", "meta-llama/Meta-Llama-3-8B", "Meta-Llama-3-8B"),
        ("easyedit", "./hugging_cache/llama-2-7b/", "llama-2-7b"),
        ("alphaedit", "C:\\models\\gpt2-xl", "gpt2-xl"),
        ("memit", "/data/models/gpt2-xl", "_data_models_gpt2-xl"),
        ("rome", "./my/gpt2", "._my_gpt2"),
        ("efficient", "gpt2-xl", "gpt2-xl"),
        ("efficient", "EleutherAI/gpt-j-6B", "EleutherAI_gpt-j-6B"),
        ("efficient", "/a/my-gpt-j-copy", "EleutherAI_gpt-j-6B"),
        ("efficient", "meta-llama/Llama-2-13b-chat-hf", "Llama-2-7b-hf"),
        ("efficient", "meta-llama/Meta-Llama-3-8B", "Llama-3-8b-hf"),
        ("efficient", "meta-llama/Llama-3.1-8B", "Llama-3-8b-hf"),
        ("efficient", "models/llama-2-7b", "models_llama-2-7b"),
    ],
)
def test_the_path_of_a_file(layout: Any, name: str, folder: str) -> None:
    place = StatsPlace(Path("data/stats"), layout, name)
    path = place.path(MODULE)
    assert path.as_posix() == (f"data/stats/{folder}/wikipedia_stats/{MODULE}_float32_mom2_100000.npz")
    assert module_of(path) == MODULE


def test_other_settings_are_in_the_name() -> None:
    place = StatsPlace("s", "memit", "m", dataset="wikitext", precision="float64", sample_size=5)
    assert place.path("a_b.c").as_posix() == "s/m/wikitext_stats/a_b.c_float64_mom2_5.npz"
    assert module_of(place.path("a_b.c")) == "a_b.c"


@pytest.mark.parametrize("name", ["a.npz", "a_float32_mom2_.npz", "a_float32_mean_100.npz", "a_float32_mom2_1.npy"])
def test_other_names_say_no_module(name: str) -> None:
    assert module_of(Path(name)) is None


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"layout": "pmet2"}, "no layout 'pmet2'; choose from rome, memit, easyedit, alphaedit, eff"),
        ({"model_name": ""}, r"The model name '' gives no folder's name; .* \(--model-name\)"),
        ({"model_name": ".."}, r"'\.\.' gives no folder"),
        ({"layout": "easyedit", "model_name": "a/.."}, r"'a/\.\.' gives no folder"),
        ({"dataset": "../wikipedia"}, "'../wikipedia' is no plain name"),
        ({"dataset": ".."}, r"'\.\.' is no plain name"),
        ({"dataset": ""}, "'' is no plain name"),
        ({"precision": "bfloat16"}, "'bfloat16' are not exchanged; choose float32 or float64"),
        ({"sample_size": 0}, "above 0 but is 0"),
    ],
)
def test_places_that_make_no_sense(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(BadConfig, match=match):
        StatsPlace(**{"stats_dir": "s", "layout": "rome", "model_name": "m", **changed})
