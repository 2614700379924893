"""Numbers that break sums: NaN, infinity, overflow, underflow, dead coordinates, equal keys."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastcov
from fastcov import NonFinite, NotPositiveDefinite, SecondMoment, closed_form, factorize
from fastcov.linalg import JITTERS
from fastmemit import Editor
from fastmemit.errors import BadData, FastmemitError, WrongModel
from fastmemit.evaluation import score_records
from tiny_editors import FACTS, QUICK, record, tiny_corpus, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer

ONE: dict[str, Any] = {**QUICK, "layers": (1,)}
METHODS = [("memit", QUICK), ("emmet", ONE), ("rome", ONE)]
DOWN, UP = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.mlp.up_proj.weight"


# -- NaN and infinity in weights ------------------------------------------------------------------


def spoil(model: Any, name: str, value: float) -> dict[str, Tensor]:
    """Put one bad number into a weight; all bits as they are then."""
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[5] = value
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(torch.int32)  # NaN is equal to itself then


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(bits(t), before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("weight", "module"),
    [(UP.format(0), "model.layers.0.mlp.down_proj"), (DOWN.format(0), "model.layers.1.mlp.down_proj")],
)
def test_collecting_names_the_module(tmp_path: Path, weight: str, module: str, value: float):
    model = tiny_model("llama")
    before = spoil(model, weight, value)
    editor = Editor(model, tiny_tokenizer(), cache_dir=tmp_path)
    with pytest.raises(NonFinite, match=f"keys of '{module}' hold NaN or infinity in batch 0"):
        editor.precompute(tiny_corpus(), multiplier=4, layers=(0, 1))
    assert unchanged(model, before)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("weight", [UP.format(2), DOWN.format(1), "lm_head.weight"])
def test_a_model_that_gives_nan_writes_no_contexts_and_no_text(tmp_path: Path, weight: str) -> None:
    model = tiny_model("llama")
    before = spoil(model, weight, float("nan"))
    editor = Editor(model, tiny_tokenizer(), cache_dir=tmp_path)
    editor.precompute(tiny_corpus(), multiplier=4, layers=(0, 1))  # the keys are sound
    calls: list[Callable[[], object]] = [
        lambda: editor.contexts("memit"),
        lambda: editor.contexts("rome"),
        lambda: editor.generate(["The capital"], 3),
        *(lambda m=m, s=s: editor.edit(FACTS, m, **s) for m, s in METHODS),
    ]
    for call in calls:
        with pytest.raises(FastmemitError, match="logits of LlamaForCausalLM are NaN or infinite"):
            call()
    with pytest.raises(BadData, match="target_new at the rewrite prompt of case 0 is NaN"):
        score_records(editor.adapter, editor.tokenizer, [record(0, FACTS[0])])
    assert unchanged(model, before) and editor.edits == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_break_after_the_contexts_stop_the_targets(tmp_path: Path, value: float) -> None:
    editor = tiny_editor(tmp_path)
    for method, _ in METHODS:
        editor.contexts(method)
    before = spoil(editor.model, UP.format(2), value)
    for method, overrides in METHODS:
        with pytest.raises(WrongModel, match=r"layers\.2\.mlp\.up_proj\.weight was changed by"):
            editor.edit(FACTS, method, **overrides)
        assert unchanged(editor.model, before) and editor.edits == ()
    sound = editor.workspace.contexts  # the broken model could write none
    editor = tiny_editor(tmp_path, model=editor.model)
    editor.workspace.contexts = sound
    for method, overrides in METHODS:
        with pytest.raises(FastmemitError, match=r"target loss of '.*' is nan at step 1; load"):
            editor.edit(FACTS, method, **overrides)
        assert unchanged(editor.model, before) and editor.edits == ()


# -- coordinates that are never on ----------------------------------------------------------------


def test_dead_coordinates_in_a_model_are_edited_around(tmp_path: Path, caplog) -> None:
    model = tiny_model("llama")
    dead = [3, 17, 40]
    with torch.no_grad():
        for layer in (0, 1):
            model.get_parameter(UP.format(layer))[dead] = 0.0
    editor = tiny_editor(tmp_path, model=model)
    moment = editor.store.covering((0, 1)).moment("model.layers.1.mlp.down_proj")
    assert moment.sum[dead].abs().max() == 0
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        edit = editor.edit(FACTS, "memit", **QUICK)
    assert "needed a jitter of 1e-10" in caplog.text and "its rank is about 61" in caplog.text
    for left, right in edit.delta.factors.values():
        assert left.isfinite().all() and right.isfinite().all()
        assert (left @ right.T)[:, dead].abs().max() == 0  # what never was a key is not written to
    edit.undo()
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dead", [1, 10, 31])
def test_a_matrix_with_zero_rows_has_its_jitter_on_record(dtype: torch.dtype, dead: int) -> None:
    keys = torch.randn(400, 32, dtype=dtype)
    keys[:, :dead] = 0
    moment = SecondMoment(32, dtype=dtype).update(keys)
    factor = factorize(fastcov.regularised(moment, 100.0, 0.0, dtype))
    assert factor.jitter == JITTERS[1] if dtype == torch.float64 else 0 < factor.jitter <= 1e-6
    assert factor.rank == 32 - dead
    change = closed_form.memit(factor, keys[:4].T, torch.randn(8, 4, dtype=dtype)).dense()
    assert change.isfinite().all() and change[:, :dead].abs().max() == 0


def test_keys_that_are_all_zero_and_one_key_alone() -> None:
    nothing = SecondMoment(8, quartic=True).update(torch.zeros(5, 8))
    assert nothing.count == 5 and float(nothing.quartic) == 0
    with pytest.raises(NotPositiveDefinite, match=r"diagonal of mean 0.*keys that are not all zero"):
        factorize(nothing.second_moment)
    one = factorize(SecondMoment(8, quartic=True).update(torch.ones(1, 8)).second_moment.double())
    assert one.jitter > 0 and one.rank == 1
    assert one.solve(torch.ones(8, dtype=torch.float64)).isfinite().all()


# -- equal keys in a batch, and more keys than width ----------------------------------------------


def sound(d: int = 16, n: int = 200) -> Tensor:
    keys = torch.randn(n, d, dtype=torch.float64)
    return keys.T @ keys / n * 10.0


def test_equal_keys_are_refused_by_emmet_without_lambda_and_met_half_way_by_memit() -> None:
    A, K, R = sound(), torch.randn(16, 1, dtype=torch.float64), torch.randn(6, 2).double()
    K = K.expand(16, 2).contiguous()
    with pytest.raises(NotPositiveDefinite, match=r"2 edit keys .* not independent with lambda_e=0"):
        closed_form.emmet(factorize(A), K, R)
    expected = R @ K.T @ torch.linalg.inv(A + K @ K.T)
    torch.testing.assert_close(closed_form.memit(factorize(A), K, R).dense(), expected)
    X = torch.linalg.solve(A, K)
    expected = R @ torch.linalg.inv(K.T @ X + 0.1 * torch.eye(2).double()) @ X.T
    torch.testing.assert_close(closed_form.emmet(factorize(A), K, R, 0.1).dense(), expected)


def test_a_batch_that_is_wider_than_its_keys() -> None:
    A, K, R = sound(4), torch.randn(4, 9).double(), torch.randn(3, 9).double()
    expected = R @ K.T @ torch.linalg.inv(A + K @ K.T)
    torch.testing.assert_close(closed_form.memit(factorize(A), K, R).dense(), expected)
    with pytest.raises(NotPositiveDefinite, match="9 edit keys of width 4 are not independent"):
        closed_form.emmet(factorize(A), K, R)
    assert closed_form.emmet(factorize(A), K, R, 0.1).dense().isfinite().all()


def test_facts_with_one_key_in_an_editor(tmp_path: Path) -> None:
    """What stands behind the subject is no part of the key: two prompts, one key."""
    editor = tiny_editor(tmp_path)
    batch = [type(FACTS[0])("{} is " + word, "Paris", "Rome") for word in ("in", "located in")]
    before = {name: bits(tensor) for name, tensor in editor.model.state_dict().items()}
    with pytest.raises(NotPositiveDefinite, match="remove duplicate requests"):
        editor.edit(batch, "emmet", **ONE, lambda_e=0.0)
    assert unchanged(editor.model, before)
    for method, overrides in (("memit", QUICK), ("emmet", {**ONE, "lambda_e": 0.1})):
        editor.edit(batch, method, **overrides).undo()
        assert unchanged(editor.model, before)


# -- large and small keys -------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [257.0, 1000.0, 20_000.0])
def test_squares_that_half_precision_cannot_hold(dtype: torch.dtype, scale: float) -> None:
    keys = (torch.randn(300, 24).clamp(-3, 3) * scale).to(dtype)
    keys[0] = 65_504.0
    expected = keys.double().T @ keys.double()
    moment = SecondMoment(24, quartic=True).update(keys)
    assert relative(moment.sum, expected) < 1e-5
    quartic = keys.double().square().sum(1).square().sum()
    assert abs(float(moment.quartic) / float(quartic) - 1) < 1e-5


class Gives(nn.Module):
    """A model whose one projection takes whatever it is given."""

    def __init__(self, d: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.down = nn.Linear(d, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x)


def collected(keys: Tensor, dtype: torch.dtype = torch.float32) -> SecondMoment:
    model = Gives(keys.shape[-1], keys.dtype)
    return fastcov.collect_moments(model, ["down"], [{"x": keys[None]}], len(keys), dtype=dtype)["down"]


def test_half_precision_that_has_overflown_already() -> None:
    keys = (torch.ones(4, 8) * 70_000).half()
    with pytest.raises(NonFinite, match="4 of 4 keys of 'down' hold NaN or infinity in batch 0"):
        collected(keys)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(exponent=st.integers(-44, 38), spread=st.integers(0, 3), seed=st.integers(0, 99))
def test_keys_of_any_scale_are_summed_right_or_refused(exponent: int, spread: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    unit = torch.randn(50, 6, generator=draw).clamp(-2, 2)
    keys = unit * 10.0 ** (exponent - torch.arange(6).remainder(spread + 1).float())
    exact = keys.double().T @ keys.double()
    wide = collected(keys, torch.float64)
    assert relative(wide.sum, exact) < 1e-6  # the squares of float32 fit into float64
    try:
        narrow = collected(keys)
    except NonFinite as error:
        assert "overflow torch.float32" in str(error) and "dtype=torch.float64" in str(error)
        assert exact.diagonal().max() > 1e38
        return
    assert exact.diagonal().max() < 3.41e38
    # Below the normal numbers float32 has fewer digits, and none below its smallest one.
    torch.testing.assert_close(narrow.sum.double(), exact, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e6, 1e17])
def test_an_edit_does_not_depend_on_the_unit_of_the_keys(scale: float) -> None:
    """With keys, weight and residual in one unit, the change is in its inverse."""
    keys, R = torch.randn(200, 12), torch.randn(5, 3).double()
    K = keys[:3].T.double()
    plain = closed_form.memit(factorize(fastcov.regularised(collected(keys), 100.0, 0.0)), K, R).dense()
    moment = collected(keys * scale, torch.float64)
    factor = factorize(fastcov.regularised(moment, 100.0, 0.0))
    assert factor.jitter == 0
    change = closed_form.memit(factor, (keys[:3] * scale).T, R).dense() * scale
    torch.testing.assert_close(change, plain, rtol=1e-4, atol=1e-6)
