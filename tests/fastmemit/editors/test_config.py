"""Settings: presets by architecture and size, defaults by shape, overrides by name."""

import dataclasses
from types import SimpleNamespace

import pytest

from fastmemit.editors import METHODS, EditConfig, find_config, parse_overrides
from fastmemit.editors.defaults import SINGLE, load_presets
from fastmemit.editors.layers import parse_layers
from fastmemit.errors import BadConfig, BadLayer
from fastmemit.models import find_adapter
from tiny_models import tiny_model


def shaped(model_type, n_layers, d, d_k):
    """A stand-in with the shape of a large model."""
    return SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(model_type=model_type)),
        n_layers=n_layers,
        d=d,
        d_k=lambda _layer: d_k,
        check_layer=lambda _layer: None,
    )


GPT2_XL = shaped("gpt2", 48, 1600, 6400)
LLAMA_2 = shaped("llama", 32, 4096, 11008)
LLAMA_3 = shaped("llama", 32, 4096, 14336)


def test_the_published_settings():
    memit = find_config(GPT2_XL, "memit")
    assert (memit.layers, memit.weight, memit.clamp) == ((13, 14, 15, 16, 17), 2e4, 0.75)
    emmet = find_config(GPT2_XL, "emmet")
    assert (emmet.layers, emmet.weight, emmet.lambda_e, emmet.steps) == ((17,), 1e4, 0.1, 20)
    rome = find_config(GPT2_XL, "rome")
    assert (rome.layers, rome.clamp, rome.steps, rome.weight_decay) == ((17,), 4, 20, 0.5)


def test_models_of_like_names_are_told_apart_by_their_width():
    assert find_config(LLAMA_2, "memit").ridge == 0.01
    assert find_config(LLAMA_3, "memit").v_lr == 0.1
    assert find_config(LLAMA_3, "memit").preset == "llama-3-8b"


def test_a_preset_without_a_method_leaves_the_default_for_it():
    config = find_config(shaped("gpt2", 24, 1024, 4096), "memit")
    assert config.preset == "default"
    assert config.weight is None


def test_every_preset_makes_valid_settings():
    presets = load_presets()
    assert len(presets) >= 10
    assert len({tuple(sorted(p["match"].items())) for p in presets}) == len(presets)
    for preset in presets:
        match = preset["match"]
        adapter = shaped(match["model_type"], match["n_layers"], match["d"], match["d_k"])
        assert preset["source"]
        for method in METHODS:
            config = find_config(adapter, method)
            assert max(config.layers) < match["n_layers"]
            # MEMIT's relatives take what is known of MEMIT.
            known = {method} if method in SINGLE else {method, "memit"}
            assert (config.preset == preset["name"]) == bool(known & preset["methods"].keys())


@pytest.mark.parametrize(
    ("n_layers", "memit", "single"),
    [(32, (4, 5, 6, 7, 8), 5), (30, (4, 5, 6, 7, 8), 5), (3, (0, 1, 2), 1), (1, (0,), 0)],
)
def test_defaults_follow_the_depth(n_layers, memit, single):
    adapter = shaped("new", n_layers, 64, 256)
    assert find_config(adapter, "memit").layers == memit
    assert find_config(adapter, "emmet").layers == (single,)
    assert find_config(adapter, "rome").layers == (single,)
    assert find_config(adapter, "rome").clamp == 4


def test_relatives_take_what_is_known_of_memit_and_keep_what_makes_them_others():
    memit = find_config(LLAMA_2, "memit")
    expected = {
        "pmet": {"spread": "sqrt"},
        "encore": {"ridge": 10.0, "stop": "most-probable"},
        "alphaedit": {},
    }
    for method, own in expected.items():
        found = find_config(LLAMA_2, method)
        assert found == dataclasses.replace(memit, method=method, **own)
        assert find_config(shaped("new", 32, 64, 256), method).layers == (4, 5, 6, 7, 8)
    # As released for Llama-3-8B.
    alphaedit = find_config(LLAMA_3, "alphaedit")
    assert (alphaedit.layers, alphaedit.clamp, alphaedit.v_lr) == ((4, 5, 6, 7, 8), 0.75, 0.1)
    assert (alphaedit.l2, alphaedit.null_threshold, alphaedit.null_relative) == (10.0, 0.02, None)


def test_the_command_line_has_every_method():
    from fastmemit.cli.options import METHOD_NAMES
    from fastmemit.editors import PLANS, PRESERVING

    assert METHOD_NAMES == METHODS == tuple(PLANS)
    assert set(PRESERVING) < set(METHODS)


def test_relatives_share_memits_target_vectors():
    memit = find_config(GPT2_XL, "memit").targets()
    assert find_config(GPT2_XL, "pmet").targets() == memit
    assert find_config(GPT2_XL, "alphaedit").targets() == memit
    assert find_config(GPT2_XL, "encore").targets() == dataclasses.replace(
        memit, stop="most-probable"
    )
    assert find_config(GPT2_XL, "encore", {"stop": "loss"}).targets() == memit


def test_overrides_replace_and_are_checked():
    config = find_config(GPT2_XL, "memit", {"clamp": 2.0, "layers": (3, 4)})
    assert (config.clamp, config.layers, config.weight) == (2.0, (3, 4), 2e4)
    with pytest.raises(BadConfig, match="clmap"):
        find_config(GPT2_XL, "memit", {"clmap": 2.0})
    with pytest.raises(BadLayer, match="9"):
        find_config(find_adapter(tiny_model("llama")), "memit", {"layers": (0, 9)})


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("memit", {"layers": ()}, "at least one"),
        ("memit", {"layers": (4, 3)}, "ascending"),
        ("memit", {"layers": (3, 3)}, "distinct"),
        ("emmet", {"layers": (3, 4)}, "one layer"),
        ("rome", {"keys": "both"}, "both"),
        ("memit", {"steps": 0}, "steps"),
        ("memit", {"steps": 2.5}, "steps"),
        ("memit", {"clamp": 0.0}, "clamp"),
        ("memit", {"weight": -1.0}, "weight"),
        ("memit", {"ridge": float("nan")}, "ridge"),
        ("memit", {"relative_ridge": -1e-3}, "relative_ridge"),
        ("memit", {"shrinkage": "ledoit"}, "none, ledoit-wolf, oas but is 'ledoit'"),
        ("emmet", {"lambda_e": -0.1}, "lambda_e"),
        ("memit", {"v_lr": "fast"}, "v_lr"),
        ("pmet", {"spread": "root"}, "linear, sqrt but is 'root'"),
        ("encore", {"stop": "never"}, "loss, most-probable but is 'never'"),
        ("alphaedit", {"l2": -1.0}, "l2 must be a finite number 0 or above"),
        ("alphaedit", {"null_threshold": 0.0}, "null_threshold must be a finite number above 0"),
        ("alphaedit", {"null_relative": 0}, "null_relative must be a finite number above 0"),
    ],
)
def test_values_out_of_range_are_named(method, values, said):
    with pytest.raises(BadConfig, match=said):
        find_config(GPT2_XL, method, values)


def test_an_unknown_method_lists_the_known():
    with pytest.raises(BadConfig, match="rome, emmet, memit"):
        find_config(GPT2_XL, "memitt")


def test_parse_overrides():
    assert parse_overrides(["clamp=0.75", " steps = 20 ", "layers=4-6,9", "weight=none"]) == {
        "clamp": 0.75, "steps": 20, "layers": (4, 5, 6, 9), "weight": None,
    }  # fmt: skip
    assert parse_overrides(["keys=original"]) == {"keys": "original"}
    assert parse_overrides(["stop=most-probable", "null_relative=0.1", "l2=0"]) == {
        "stop": "most-probable", "null_relative": 0.1, "l2": 0.0,
    }  # fmt: skip
    assert parse_overrides(["null_relative=none"]) == {"null_relative": None}
    assert parse_overrides(["relative_ridge=1e-3", "shrinkage=oas"]) == {
        "relative_ridge": 1e-3, "shrinkage": "oas",
    }  # fmt: skip


def test_targets_do_not_depend_on_how_the_second_moment_is_regularised():
    plain = find_config(GPT2_XL, "memit")
    assert (plain.relative_ridge, plain.shrinkage) == (None, "none")
    other = plain.replaced({"relative_ridge": 1e-2, "shrinkage": "oas", "ridge": 1.0})
    assert other.targets() == plain.targets()


@pytest.mark.parametrize(
    "pair", ["clamp", "=3", "clmap=1", "clamp=wide", "steps=2.5", "layers=4-", "method=rome"]
)
def test_parse_overrides_names_what_it_refuses(pair):
    with pytest.raises(BadConfig, match=pair.partition("=")[2] or pair):
        parse_overrides([pair])


@pytest.mark.parametrize("text", ["", "a", "5-4", "1,,2", "4-8-9"])
def test_parse_layers_refuses(text):
    with pytest.raises(BadConfig, match="layers"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("chosen", "multiplier", "wanted"),
    [
        ({}, 0.5, 0.1),
        ({}, 2.99, 0.1),
        ({}, 3.0, 0.0),
        ({"relative_ridge": 0.0}, 1.0, 0.0),
        ({"relative_ridge": 0.01}, 1.0, 0.01),
        ({"relative_ridge": 0.01}, 10.0, 0.01),
        ({"ridge": 1.0}, 1.0, 0.0),
        ({"shrinkage": "oas"}, 1.0, 0.0),
        ({"method": "rome"}, 1.0, 0.1),
        ({"method": "alphaedit"}, 1.0, 0.0),
    ],
)
def test_few_keys_get_a_ridge_where_nothing_else_is_added(chosen, multiplier, wanted):
    config = EditConfig(**{"method": "memit", "layers": (1,), **chosen})
    assert config.settled(multiplier).relative_ridge == wanted
