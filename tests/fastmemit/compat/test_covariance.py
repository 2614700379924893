"""C for other codebases: of the same keys, and of the unedited model whatever they do to it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastcov
from fastmemit import compat
from fastmemit.compat import drop_in
from fastmemit.errors import BadConfig, BadCorpus, BadLayer, UnknownArchitecture, WrongModel
from fastmemit.statistics import Statistics
from tiny_editors import tiny_corpus, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer

NAME = "model.layers.{}.mlp.down_proj"
ARGS = ("wikipedia", 100000, "float32")


def get_cov(model: Any, tok: Any, layer: int, **more: Any) -> torch.Tensor:
    return compat.get_cov(model, tok, NAME.format(layer), *ARGS, **more)


def unedited(layers: tuple[int, ...] = (0, 1, 2), architecture: str = "llama") -> Any:
    """C of each layer by `fastcov.collect_moments` alone, on a model of its own."""
    model, tok = tiny_model(architecture), tiny_tokenizer()
    ids = (tok(text)["input_ids"] for text in tiny_corpus().documents(0))
    batches = fastcov.bucket(fastcov.take(ids, 256, 256), 4096)
    found = fastcov.collect_moments(model, [NAME.format(i) for i in layers], batches, 256, causal=True)
    return [moment.second_moment for moment in found.values()]


def write(model: Any, layer: int) -> None:
    """What their loop does between two calls."""
    with torch.no_grad():
        model.get_parameter(NAME.format(layer) + ".weight").add_(0.1 * torch.randn(32, 64))


def forwards(model: Any, over: int = 0) -> list[int]:
    """Counts forward passes of more than some number of tokens."""
    count = [0]

    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        count[0] += ids.numel() > over

    model.register_forward_pre_hook(add, with_kwargs=True)
    return count


def test_it_is_the_second_moment_of_the_same_keys(model: Any, tok: Any) -> None:
    expected = unedited()
    for layer in (0, 1, 2):
        C = get_cov(model, tok, layer)
        assert (C.dtype, C.device) == (torch.float32, model.device)
        assert torch.allclose(C, expected[layer], rtol=1e-5, atol=1e-7)
        assert torch.equal(C, C.T)


def test_a_loop_that_writes_between_two_calls_gets_the_unedited_one(model: Any, tok: Any) -> None:
    count, seen = forwards(model), []
    for layer in (0, 1, 2) * 2:  # and for the second batch it stays written
        seen.append((get_cov(model, tok, layer), count[0]))
        write(model, layer)
    assert count[0] == seen[0][1] > 0  # all in one pass, before anything was written
    expected = [get_cov(tiny_model("llama"), tok, layer) for layer in (0, 1, 2)]
    assert all(torch.equal(C, expected[i % 3]) for i, (C, _) in enumerate(seen))


def test_the_order_in_which_layers_are_asked_for_does_not_matter(model: Any, tok: Any) -> None:
    hparams = {"layers": [0, 2]}
    upper = get_cov(model, tok, 2, hparams=hparams)
    write(model, 2)
    write(model, 0)
    lower = get_cov(model, tok, 0, hparams=hparams)
    expected = unedited((0, 2))
    for C, mine in zip(expected, (lower, upper), strict=True):
        assert torch.allclose(mine, C, rtol=1e-5, atol=1e-7)


def test_what_it_returns_is_the_callers_own(model: Any, tok: Any) -> None:
    C = get_cov(model, tok, 1)
    kept = C.clone()
    C.mul_(7)
    assert torch.equal(get_cov(model, tok, 1), kept)
    inverse = get_cov(model, tok, 1, inv=True)
    inverse.zero_()
    assert get_cov(model, tok, 1, inv=True).abs().max() > 0


def test_the_inverse(model: Any, tok: Any) -> None:
    C = get_cov(model, tok, 1).double()
    named = compat.get_inv_cov(model, tok, NAME.format(1), *ARGS)
    assert torch.equal(get_cov(model, tok, 1, inv=True), named)
    assert named.dtype == torch.float32
    assert torch.allclose(named.double() @ C, torch.eye(64).double(), atol=1e-3)
    assert torch.allclose(named.double(), torch.linalg.inv(C), rtol=1e-4, atol=1e-4)


def test_layer_stats_has_what_its_callers_use(model: Any, tok: Any) -> None:
    stats = compat.layer_stats(
        model, tok, NAME.format(1), "data/stats", "wikipedia", to_collect=["mom2"],
        sample_size=100000, precision="float32", force_recompute=False, hparams=None,
    )  # fmt: skip
    assert stats.mom2.count == 256
    assert torch.equal(stats.mom2.moment().float(), get_cov(model, tok, 1))
    assert torch.equal(stats.mom2.mom2 / 256, stats.mom2.moment())
    with pytest.raises(BadConfig, match=r"Only 'mom2' is collected .*\['mean', 'mom2'\]"):
        compat.layer_stats(model, tok, NAME.format(1), "s", "wikipedia", ["mean", "mom2"])


def test_a_layer_that_was_not_collected_in_time_is_refused(model: Any, tok: Any) -> None:
    get_cov(model, tok, 0, hparams={"layers": [0]})
    write(model, 0)
    with pytest.raises(WrongModel, match=r"\[2\] of model were not among those .*configure\(layers"):
        get_cov(model, tok, 2, hparams={"layers": [2]})
    assert torch.equal(get_cov(model, tok, 0), get_cov(tiny_model("llama"), tok, 0))


def test_more_layers_are_collected_as_long_as_the_model_is_unedited(model: Any, tok: Any) -> None:
    expected = [get_cov(tiny_model("llama"), tok, layer) for layer in (0, 1, 2)]
    weight = model.get_parameter(NAME.format(0) + ".weight")
    before = weight.detach().clone()
    get_cov(model, tok, 0, hparams=SimpleNamespace(layers=[0]))
    write(model, 0)
    with torch.no_grad():
        weight.copy_(before)  # put back, as their evaluation does
    assert torch.equal(get_cov(model, tok, 2, hparams={"layers": [1, 2]}), expected[2])
    write(model, 0)
    assert torch.equal(get_cov(model, tok, 1), expected[1])
    assert torch.equal(get_cov(model, tok, 0), expected[0])


def test_kept_statistics_serve_an_edited_model(model: Any, tok: Any, tmp_path: Path) -> None:
    tiny_editor(tmp_path / "cache", layers=(0, 1, 2))  # the same model, at another time
    compat.get_inv_cov(model, tok, NAME.format(0), *ARGS)
    write(model, 0)
    assert torch.equal(get_cov(model, tok, 2), get_cov(tiny_model("llama"), tok, 2))


@pytest.mark.parametrize("asked", [{"corpus": tiny_corpus(seed=1)}, {"corpus": None, "max_length": 16}])
def test_no_other_text_stands_in_for_what_an_edited_model_was_configured_with(
    model: Any, tok: Any, tmp_path: Path, asked: dict[str, Any]
) -> None:
    tiny_editor(tmp_path / "cache", layers=(0, 1, 2))  # of tiny_corpus(), in documents of the model's context
    compat.configure(layers=[0], **asked)
    compat.configure(corpus=asked["corpus"] or tiny_corpus())
    get_cov(model, tok, 0)
    write(model, 0)
    compat.configure(**asked)
    with pytest.raises(WrongModel, match=r"were not among those collected"):
        get_cov(model, tok, 2)


def test_layers_can_be_named_beforehand(model: Any, tok: Any) -> None:
    compat.configure(layers=[0, 2])
    compat.get_inv_cov(model, tok, NAME.format(0), *ARGS)
    write(model, 0)
    get_cov(model, tok, 2)
    with pytest.raises(WrongModel):
        get_cov(model, tok, 1)


def test_without_any_hint_the_layers_above_are_collected_too(tok: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=9)
    get_cov(model, tok, 2)
    write(model, 2)
    for layer in range(3, 8):
        get_cov(model, tok, layer)
    for layer in (1, 8):
        with pytest.raises(WrongModel):
            get_cov(model, tok, layer)


def test_to_recompute_takes_the_model_as_it_is(model: Any, tok: Any) -> None:
    before = get_cov(model, tok, 1)
    write(model, 0)
    assert torch.equal(get_cov(model, tok, 1), before)
    after = get_cov(model, tok, 1, force_recompute=True)
    assert not torch.allclose(after, before, rtol=1e-3)
    assert torch.equal(get_cov(model, tok, 1), after)
    write(model, 0)
    compat.forget(model)
    assert not torch.equal(get_cov(model, tok, 1), after)


def test_a_deep_copy_is_the_same_model_and_a_pickled_one_is_not(model: Any, tok: Any) -> None:
    before = get_cov(model, tok, 1)
    write(model, 0)
    twin = copy.deepcopy(model)
    assert torch.equal(get_cov(twin, tok, 1), before)
    write(twin, 0)
    assert torch.equal(get_cov(twin, tok, 1), before)
    assert torch.equal(get_cov(model, tok, 1), before)
    other = pickle.loads(pickle.dumps(model))
    assert not torch.equal(get_cov(other, tok, 1), before)
    assert set(model.state_dict()) == set(tiny_model("llama").state_dict())


def test_a_model_that_is_gone_is_gone(model: Any, tok: Any) -> None:
    mine = tiny_model("llama")
    get_cov(mine, tok, 1)
    there = weakref.ref(mine)
    del mine
    gc.collect()
    assert there() is None


def test_what_our_own_reading_of_hparams_says_holds(model: Any, tok: Any) -> None:
    compat.configure(multiplier=None)
    theirs = {"layers": [0, 2], "dynamic": True, "dynamic_multiplier": 3}
    read = compat.read_hparams(theirs, "memit")
    for hparams in (theirs, read):
        mine = tiny_model("llama")
        stats = compat.layer_stats(mine, tok, NAME.format(0), "", "wikipedia", ["mom2"], hparams=hparams)
        assert stats.mom2.count == 192
        write(mine, 0)
        get_cov(mine, tok, 2)  # collected with the first


def test_one_layer_need_not_be_a_list_and_words_are_refused(model: Any, tok: Any) -> None:
    get_cov(model, tok, 1, hparams={"layers": 2})
    write(model, 1)
    get_cov(model, tok, 2)
    for layers in (["4"], "4-8", [0.7], [True]):
        with pytest.raises(BadConfig, match="layers of hparams must be whole numbers"):
            get_cov(tiny_model("llama"), tok, 1, hparams={"layers": layers})
        with pytest.raises(BadConfig, match="layers of configure must be whole numbers"):
            compat.configure(layers=layers)  # type: ignore[arg-type]  # wrong kinds are what is refused


def test_a_copy_of_a_copy_does_not_take_itself_for_the_original(model: Any, tok: Any) -> None:
    before = get_cov(model, tok, 1)
    twin = copy.deepcopy(copy.deepcopy(model))
    held = twin.__dict__[drop_in._PLACE]
    assert held._opened_with[0] is None  # an object's number may be had again
    assert torch.equal(get_cov(twin, tok, 1), before)


def test_without_a_corpus_kept_statistics_are_taken_else_it_says_what_to_do(
    model: Any, tok: Any, tmp_path: Path
) -> None:
    compat.configure(corpus=None, multiplier=None)
    with pytest.raises(BadCorpus, match=r"loaded.*; name a text .*configure\(corpus=\"FILE.jsonl\""):
        get_cov(model, tok, 1)
    with pytest.raises(BadCorpus, match=r"data set 'pile' is not known here; .*configure\(corpus="):
        compat.get_cov(model, tok, NAME.format(1), "pile", 1, "float32")
    found = tiny_editor(tmp_path / "cache", layers=(0, 1, 2)).store.covering([1])
    assert torch.equal(get_cov(model, tok, 1), found.second_moment(NAME.format(1)))


def test_kept_statistics_of_fewer_layers_than_would_be_collected(model: Any, tok: Any, tmp_path: Path) -> None:
    found = tiny_editor(tmp_path / "cache", layers=(0, 1)).store.covering([0, 1])
    compat.configure(corpus=None, multiplier=None)
    count = forwards(model, over=24)  # tokens; with fewer a new editor tries its model
    for layer in (0, 1, 0):
        assert torch.equal(get_cov(model, tok, layer), found.second_moment(NAME.format(layer)))
        write(model, layer)
    assert count[0] == 0
    with pytest.raises(WrongModel, match=r"The layers \[2\] of model"):
        get_cov(model, tok, 2)


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("lm_head", BadConfig, "'lm_head' has no layer's number in its name"),
        ("model.layers.9.mlp.down_proj", BadLayer, "Layer 9 is out of range"),
        ("model.layers.1.mlp.c_proj", UnknownArchitecture, "leads to no linear map"),
    ],
)
def test_names_that_lead_nowhere(model: Any, tok: Any, name: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compat.get_cov(model, tok, name, *ARGS)


def test_with_room_for_two_of_three_half_of_the_walks_hits(
    model: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [get_cov(tiny_model("llama"), tok, layer) for layer in (0, 1, 2)]
    held = drop_in.live(model, tok, None)._matrices
    held.capacity = 12 * 64 * 64  # bytes: one in float32, and 8 a number for the next
    read: list[str] = []
    second_moment = Statistics.second_moment

    def noted(self: Statistics, name: str) -> torch.Tensor:
        read.append(name)
        return second_moment(self, name)

    monkeypatch.setattr(Statistics, "second_moment", noted)
    for missed in [0, 1, 2], [1], [0, 2], [1]:
        read.clear()
        assert all(torch.equal(get_cov(model, tok, i), expected[i]) for i in (0, 1, 2))
        assert read == [NAME.format(i) for i in missed]
        assert len(held) == 2
