"""Settings: presets by architecture and size, defaults by shape, overrides by name."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fastcov.moments import SHRINKAGES
from fastmemit.cli.options import describe
from fastmemit.errors import BadConfig, BadLayer
from fastmemit.methods import (
    CONFIGS,
    METHODS,
    AlphaEditConfig,
    EditConfig,
    EmmetConfig,
    EncoreConfig,
    MemitConfig,
    PmetConfig,
    RlsEditConfig,
    RomeConfig,
    TargetConfig,
    UltraEditConfig,
    find_config,
    parse_overrides,
)
from fastmemit.methods.config import RELATIVES, load_presets, parse_layers
from fastmemit.models import find_adapter
from tiny_models import tiny_model


def shaped(model_type, n_layers, d, d_k):
    """A stand-in with the shape of a large model."""
    return SimpleNamespace(
        adds_plainly=lambda layer: True,
        moves_freely=lambda layer: True,
        model=SimpleNamespace(config=SimpleNamespace(model_type=model_type)),
        n_layers=n_layers,
        layers=list(range(n_layers)),
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
            known = {method, "memit"} if CONFIGS[method] in RELATIVES else {method}
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
    shared = {"layers": (4, 5, 6, 7, 8), "clamp": 4, "weight_decay": 0.001, "preset": "llama-2-7b"}
    shared |= {"scale": "published", "v_lr": 0.5, "steps": 25}
    of_a = {"weight": 15000.0, "ridge": 0.01}
    expected = {
        "memit": MemitConfig(**shared, **of_a),
        "pmet": PmetConfig(**shared, **of_a, spread="sqrt"),
        "encore": EncoreConfig(**shared, weight=15000.0, ridge=10.0, stop="most-probable"),
        "alphaedit": AlphaEditConfig(**shared),
    }
    for method, wanted in expected.items():
        assert find_config(LLAMA_2, method) == wanted
        assert find_config(shaped("new", 32, 64, 256), method).layers == (4, 5, 6, 7, 8)
    # As released for Llama-3-8B.
    alphaedit = find_config(LLAMA_3, "alphaedit")
    assert (alphaedit.layers, alphaedit.clamp, alphaedit.v_lr) == ((4, 5, 6, 7, 8), 0.75, 0.1)
    assert (alphaedit.l2, alphaedit.null_threshold, alphaedit.null_relative) == (10.0, 0.02, None)


def test_the_command_line_has_every_method():
    from fastmemit.cli.options import METHOD_NAMES
    from fastmemit.methods import PRESERVING, REGISTRY

    assert METHOD_NAMES == METHODS and set(METHODS) == set(REGISTRY)
    assert set(PRESERVING) < set(METHODS)


def test_relatives_share_memits_target_vectors():
    memit = find_config(GPT2_XL, "memit").targets()
    assert find_config(GPT2_XL, "pmet").targets() == memit
    assert find_config(GPT2_XL, "alphaedit").targets() == memit
    assert find_config(GPT2_XL, "encore").targets() == dataclasses.replace(memit, stop="most-probable")
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
        ("encore", {"stop": "never"}, "loss, nll, most-probable but is 'never'"),
        ("alphaedit", {"l2": -1.0}, "l2 must be a finite number 0 or above"),
        ("alphaedit", {"null_threshold": 0.0}, "null_threshold must be a finite number above 0"),
        ("alphaedit", {"null_relative": 0}, "null_relative must be a finite number above 0"),
    ],
)
def test_values_out_of_range_are_named(method, values, said):
    with pytest.raises(BadConfig, match=said):
        find_config(GPT2_XL, method, values)


def test_an_unknown_method_lists_the_known():
    with pytest.raises(BadConfig, match=r"did you mean 'memit'.* from rome, emmet, memit"):
        find_config(GPT2_XL, "memitt")
    for wrong in ("x", 3, None, MemitConfig):
        with pytest.raises(BadConfig, match="choose from rome"):
            find_config(GPT2_XL, wrong)


def test_parse_overrides():
    pairs = ["clamp=0.75", " steps = 20 ", "layers=4-6,9", "weight=none"]
    assert parse_overrides(pairs, "memit") == {
        "clamp": 0.75, "steps": 20, "layers": (4, 5, 6, 9), "weight": None,
    }  # fmt: skip
    assert parse_overrides(["keys=original"], "rome") == {"keys": "original"}
    assert parse_overrides(["stop=most-probable", "null_relative=0.1", "l2=0"], "alphaedit") == {
        "stop": "most-probable", "null_relative": 0.1, "l2": 0.0,
    }  # fmt: skip
    assert parse_overrides(["null_relative=none"], "alphaedit") == {"null_relative": None}
    assert parse_overrides(["relative_ridge=1e-3", "shrinkage=oas"], "emmet") == {
        "relative_ridge": 1e-3, "shrinkage": "oas",
    }  # fmt: skip


def test_targets_do_not_depend_on_how_the_second_moment_is_regularised():
    plain = find_config(GPT2_XL, "memit")
    assert (plain.relative_ridge, plain.shrinkage) == (None, "none")
    other = plain.replaced({"relative_ridge": 1e-2, "shrinkage": "oas", "ridge": 1.0})
    assert other.targets() == plain.targets()


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("clamp", "'clamp' is not name=value"),
        ("=3", "'=3' is not name=value"),
        ("clmap=1", "no setting 'clmap'; did you mean 'clamp'"),
        ("clamp=wide", "'wide' of clamp is not a number;"),
        ("weight=much", "'much' of weight is not a number or 'none'"),
        ("steps=2.5", "'2.5' of steps is not a whole number or 'none'"),
        ("layers=4-", "'4-'"),
        ("method=rome", "no setting 'method'"),
        ("preset=mine", "no setting 'preset'"),
        ("l2=3", "l2 is a setting of alphaedit; memit has layers"),
    ],
)
def test_parse_overrides_names_what_it_refuses(pair, said):
    with pytest.raises(BadConfig, match=said):
        parse_overrides([pair], "memit")


def test_settings_for_several_methods_must_be_those_of_each():
    assert parse_overrides(["ridge=1"], ("memit", "rome")) == {"ridge": 1.0}
    with pytest.raises(BadConfig, match=r"^lambda_e is a setting of emmet; memit has"):
        parse_overrides(["lambda_e=1"], ("emmet", "memit"))


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
        ({"covariance": "identity"}, 1.0, 0.0),
        ({"method": "rome"}, 1.0, 0.1),
    ],
)
def test_few_keys_get_a_ridge_where_nothing_else_is_added(chosen, multiplier, wanted):
    method = {"method": "memit", **chosen}["method"]
    config = CONFIGS[method](layers=(1,), **{k: v for k, v in chosen.items() if k != "method"})
    assert config.resolved(multiplier).relative_ridge == wanted


def test_alphaedit_has_no_a_and_gets_no_ridge():
    config = AlphaEditConfig(layers=(1, 2))
    assert config.resolved(0.5) == config and "relative_ridge" not in config.as_dict()


# -- one class a method ----------------------------------------------------------------------------

TARGETS = {
    "layers", "clamp", "steps", "v_lr", "weight_decay", "kl_factor", "early_stop", "stop", "scale",
    "optimiser", "rho",
}  # fmt: skip
OF_A = {"weight", "ridge", "relative_ridge", "shrinkage", "covariance"}
OWN = {
    RomeConfig: OF_A | {"keys"},
    EmmetConfig: OF_A | {"lambda_e", "site", "iterations"},
    MemitConfig: OF_A | {"spread", "site", "iterations"},
    PmetConfig: OF_A | {"spread", "site", "iterations"},
    EncoreConfig: OF_A | {"spread", "site", "iterations"},
    RlsEditConfig: OF_A | {"spread", "site", "iterations"},
    AlphaEditConfig: {"spread", "site", "iterations", "l2", "null_threshold", "null_relative"},
    UltraEditConfig: {"eta", "tokens"},
}
VALUES = {
    "lambda_e": 0.7, "spread": "sqrt", "l2": 3, "null_threshold": 0.5, "null_relative": 0.9,
    "weight": 5, "ridge": 0.7, "relative_ridge": 0.3, "shrinkage": "oas", "keys": "original",
    "site": "projection", "covariance": "identity", "eta": 1e-3, "tokens": "all", "iterations": 2,
}  # fmt: skip


def test_each_class_has_the_settings_of_its_method():
    assert [cls.method for cls in OWN] == list(METHODS) == list(CONFIGS)
    for cls, own in OWN.items():
        shared = TARGETS if issubclass(cls, TargetConfig) else {"layers"}
        assert set(cls.settings()) == shared | own
        made = cls(layers=(3,))
        assert set(made.as_dict()) == shared | own | {"method", "preset"}
        assert made.as_dict()["method"] == cls.method
        measured = made
        if issubclass(cls, TargetConfig):
            measured = dataclasses.replace(made, scale="median", v_lr=0.2, steps=25)
        assert find_config(shaped("new", 32, 64, 256), made) == measured
    with pytest.raises(TypeError, match="use MemitConfig"):
        EditConfig(layers=(3,))
    assert VALUES.keys() == set.union(*OWN.values())
    assert tuple(SHRINKAGES) == ("none", "ledoit-wolf", "oas")


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("cls", OWN)
def test_a_setting_of_another_method_names_its_owner(cls, name):
    many = shaped("new", 32, 64, 256)
    if name in OWN[cls]:
        assert getattr(find_config(many, cls.method, {name: VALUES[name]}), name) == VALUES[name]
        return
    owners = [other.method for other, own in OWN.items() if name in own]
    listed = owners[0] if len(owners) == 1 else f"{', '.join(owners[:-1])} and {owners[-1]}"
    said = f"^{name} is a setting of {listed}; {cls.method} has layers, .*{min(OWN[cls])}"
    with pytest.raises(BadConfig, match=said):
        find_config(many, cls.method, {"layers": 3, name: VALUES[name]})
    with pytest.raises(BadConfig, match=said):
        find_config(many, cls(layers=(3,)), {name: VALUES[name]})
    with pytest.raises(TypeError, match=name):
        cls(layers=(3,), **{name: VALUES[name]})


@pytest.mark.parametrize(
    ("method", "name", "meant"),
    [
        ("memit", "clmap", "clamp"),
        ("rome", "key", "keys"),
        ("emmet", "lambda", "lambda_e"),
        ("alphaedit", "null_treshold", "null_threshold"),
        ("memit", "null_treshold", "null_threshold"),
        ("memit", "v_learning_rate", None),
    ],
)
def test_a_mistyped_setting_is_told_which_was_meant(method, name, meant):
    with pytest.raises(BadConfig, match=f"^There is no setting '{name}'; ") as caught:
        find_config(GPT2_XL, method, {name: 1.0})
    assert (f"did you mean '{meant}'?" in str(caught.value)) == (meant is not None)


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("memit", {"stop": "most-probable", "early_stop": 0.1}, "early_stop=0.1 would change nothi"),
        ("encore", {"early_stop": 0.1}, "early_stop=0.1 would change nothing"),
        ("memit", {"layers": (3,), "spread": "sqrt"}, r"spread='sqrt' would .* one layer takes all .* at 'linear'"),
        ("alphaedit", {"layers": 3, "spread": "sqrt"}, "spread='sqrt' would change nothing"),
        ("memit", {"rho": 0.1}, r"rho=0.1 would .* optimiser='adam' has v_lr; leave rho at 0.3"),
        (
            "memit",
            {"optimiser": "rotate", "v_lr": 0.1},
            r"v_lr=0.1 would .* optimiser='rotate' has rho; leave v_lr at No",
        ),
        (
            "alphaedit",
            {"null_relative": 0.5, "null_threshold": 1.0},
            r"null_threshold=1.0 would .* null_relative is used inst",
        ),
    ],
)
def test_what_nothing_would_read_is_refused(method, values, said):
    name = said.split()[0].partition("=")[0]
    with pytest.raises(BadConfig, match=said):
        find_config(GPT2_XL, method, values)
    with pytest.raises(BadConfig, match=said):
        CONFIGS[method](**{"layers": (3, 4), **values})
    # The default is nobody's wish.
    default = CONFIGS[method].settings()[name]
    assert getattr(find_config(GPT2_XL, method, {**values, name: default}), name) == default


def test_what_a_preset_has_gives_way_where_a_change_puts_it_out_of_use():
    config = AlphaEditConfig(layers=(3, 4), null_threshold=0.5, spread="sqrt")
    changed = config.replaced({"null_relative": 0.1, "layers": (3,)})
    assert changed == AlphaEditConfig(layers=(3,), null_relative=0.1)
    assert MemitConfig(layers=(3,), early_stop=0.2).replaced({"stop": "most-probable"}) == (
        MemitConfig(layers=(3,), stop="most-probable")
    )


def test_one_layer_may_be_a_number_and_a_range_is_layers():
    assert RomeConfig(layers=5).layers == (5,)
    assert MemitConfig(layers=range(4, 7)).layers == (4, 5, 6)
    for wrong in ("4-8", 4.0, None, [True], ["4"], {}):
        with pytest.raises(BadConfig, match="layers must be whole numbers"):
            MemitConfig(layers=wrong)


def test_settings_of_ones_own_are_not_mixed_with_the_presets():
    own = MemitConfig(layers=(3, 4, 5), clamp=0.75)
    tuned = dataclasses.replace(own, scale="published", v_lr=0.5, steps=25)
    assert find_config(LLAMA_2, own) == find_config(LLAMA_2, tuned) == tuned
    assert find_config(LLAMA_2, own).weight is None
    assert find_config(LLAMA_2, own, {"weight": 3}) == dataclasses.replace(tuned, weight=3)
    with pytest.raises(BadLayer, match="9"):
        find_config(find_adapter(tiny_model("llama")), MemitConfig(layers=(0, 9)))


def test_a_preset_with_a_setting_of_another_method_is_refused(monkeypatch):
    wrong = {**load_presets()[0], "methods": {"memit": {"l2": 3}}}
    monkeypatch.setattr("fastmemit.methods.config.load_presets", lambda: [wrong])
    match = wrong["match"]
    adapter = shaped(match["model_type"], match["n_layers"], match["d"], match["d_k"])
    with pytest.raises(BadConfig, match=f"preset '{wrong['name']}': l2 is a setting of alphaedit"):
        find_config(adapter, "memit")


def test_presets_have_only_settings_of_their_methods():
    for preset in load_presets():
        for method, values in preset["methods"].items():
            assert values.keys() <= CONFIGS[method].settings().keys()


def test_settings_are_described_with_their_defaults():
    lines = describe("emmet").splitlines()
    assert "  lambda_e (0.1)           How far the equality constraint is relaxed, in batches" in ("\n".join(lines))
    assert "  layers (by depth)        The edited layers, ascending" in describe("memit")
    for cls in OWN:
        text = describe(cls.method)
        for name, default in cls.settings().items():
            shown = "by depth" if name == "layers" else "none" if default is None else default
            (line,) = [x for x in text.splitlines() if x.startswith(f"  {name} (")]
            assert line.startswith(f"  {name} ({shown}) ") and len(line.split()) > 4
    assert all(f"\n{method}:\n" in describe() for method in METHODS)


@pytest.mark.parametrize(
    ("layers", "memit", "single"),
    [
        ([0, 2, 4, 6, 8, 10, 12, 14], (2, 4, 6, 8, 10), 4),
        ([1, 5], (5,), 5),
        ([0, 1], (0, 1), 1),  # nothing above an eighth of the depth
        ([15], (15,), 15),
    ],
)
def test_defaults_are_among_the_layers_that_can_be_edited(layers, memit, single):
    adapter = shaped("new", 16, 64, 256)
    adapter.layers = layers
    assert find_config(adapter, "memit").layers == memit
    assert find_config(adapter, "emmet").layers == find_config(adapter, "rome").layers == (single,)


def test_no_default_without_a_layer_and_no_preset_for_blocks_that_differ():
    adapter = shaped("new", 16, 64, 256)
    adapter.layers = []
    with pytest.raises(BadLayer, match="No block of SimpleNamespace"):
        find_config(adapter, "memit")
    adapter = shaped("gpt2", 48, 1600, 6400)
    adapter.layers = list(range(0, 48, 2))
    config = find_config(adapter, "memit")
    assert config.layers == (6, 8, 10, 12, 14) and config.preset == "default"


def test_a_model_without_a_preset_has_settings_relative_to_its_own_size():
    config = find_config(shaped("new", 32, 64, 256), "memit")
    assert (config.scale, config.v_lr, config.clamp) == ("median", 0.2, 1.0)
    assert find_config(shaped("new", 32, 64, 256), "emmet").site == "block"
    assert find_config(GPT2_XL, "emmet").scale == "published"
    assert find_config(GPT2_XL, "emmet").v_lr == 0.5


def test_settings_of_ones_own_are_measured_as_the_model_wants_it():
    new = shaped("new", 32, 64, 256)
    assert find_config(new, MemitConfig(layers=(4, 5))) == find_config(new, "memit", {"layers": (4, 5)})
    expected = {
        (None, None): ("median", 0.2),
        ("published", None): ("published", 0.5),
        ("median", None): ("median", 0.2),
        (None, 0.3): ("median", 0.3),
        ("published", 0.3): ("published", 0.3),
    }
    for (scale, v_lr), wanted in expected.items():
        found = find_config(new, PmetConfig(layers=(4, 5), scale=scale, v_lr=v_lr))
        assert (found.scale, found.v_lr) == wanted
        assert find_config(new, found) == found
    # A preset is of the methods that it names, and of MEMIT's relatives.
    assert find_config(LLAMA_2, PmetConfig(layers=(4, 5))).scale == "published"
    assert find_config(LLAMA_2, RomeConfig(layers=5)).scale == find_config(LLAMA_2, "rome").scale
    assert parse_overrides(["scale=none", "v_lr=none"], "memit") == {"scale": None, "v_lr": None}


def test_each_optimiser_has_its_own_steps():
    for method in (method for method in METHODS if issubclass(CONFIGS[method], TargetConfig)):
        for adapter in (LLAMA_3, GPT2_XL, shaped("new", 32, 64, 256)):
            turned = find_config(adapter, method, {"optimiser": "rotate"})
            assert (turned.optimiser, turned.steps, turned.v_lr, turned.rho) == ("rotate", 14, None, 0.3)
            assert find_config(adapter, turned) == turned
            assert find_config(adapter, find_config(adapter, method), {"optimiser": "rotate"}) == turned
            back = find_config(adapter, turned, {"optimiser": "adam"})
            assert (back.steps, back.v_lr) == (25, 0.2 if back.scale == "median" else 0.5)
    settings = find_config(GPT2_XL, "memit", {"optimiser": "rotate", "rho": 0.4, "steps": 7}).targets()
    assert (settings.optimiser, settings.rho, settings.steps) == ("rotate", 0.4, 7)
    assert parse_overrides(["optimiser=rotate", "rho=0.15", "steps=12"], "memit") == (
        {"optimiser": "rotate", "rho": 0.15, "steps": 12}
    )


def test_where_a_norm_lies_behind_the_projection_the_target_lies_before_it():
    adapter = find_adapter(tiny_model("gemma3", num_hidden_layers=8))
    assert find_config(adapter, "rome").targets().site == "projection"
    emmet, memit = find_config(adapter, "emmet"), find_config(adapter, "memit")
    assert (emmet.layers, emmet.site, emmet.targets().site, emmet.weight) == ((2,), "projection", "projection", None)
    assert (memit.layers, memit.site, memit.targets().site) == ((1, 2), "projection", "projection")
    assert memit.weight == adapter.d_k(2) / 4
    assert find_config(adapter, "alphaedit").site == "projection"
    # Other layers than the defaults were not measured so, or were worse.
    asked = find_config(adapter, "memit", {"layers": [1, 2]})
    assert (asked.site, asked.weight, find_config(adapter, "emmet", {"layers": 3}).site) == (
        "block",
        None,
        "projection",
    )
    plain = find_adapter(tiny_model("llama", num_hidden_layers=8))
    memit = find_config(plain, "memit")
    assert (memit.layers, memit.site, memit.weight) == ((1, 2, 3, 4, 5), "block", None)


def test_a_scale_behind_the_projection_hinders_nothing_and_leaves_the_defaults_of_several_layers():
    model = tiny_model("llama", num_hidden_layers=8)
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _module, _args, out: 0.5 * out)
    adapter = find_adapter(model)
    assert not adapter.adds_plainly(2) and adapter.moves_freely(2)
    memit = find_config(adapter, "memit")
    assert (memit.layers, memit.site, memit.weight) == ((1, 2, 3, 4, 5), "block", None)
    assert find_config(adapter, "emmet").site == "projection"


def test_a_layer_that_can_hardly_move_its_block_is_no_default():
    model = tiny_model("gemma3", num_hidden_layers=8)
    adapter = find_adapter(model)
    assert find_config(adapter, "emmet").layers == (2,)
    assert find_config(adapter, "memit").layers == (1, 2)
    with torch.no_grad():  # gains of 0.01 where those of the other layers are 1
        model.model.layers[2].post_feedforward_layernorm.weight.fill_(-0.99)
    adapter = find_adapter(model)
    assert adapter.reach(2) < 0.05 * adapter.reach(3)
    assert find_config(adapter, "emmet").layers == (3,)
    assert find_config(adapter, "memit").layers == (1, 3)
