"""What holds for any moments, any provenance, any multiplier and any delta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastcov
from fastcov import BadInput, SecondMoment, budget, load_moment, read_provenance, save_moment
from fastmemit.delta import Delta
from fastmemit.edits import Edit, EditStack
from fastmemit.errors import NonFiniteEdit

# Each example writes over the same file; derandomised, so that a run is like the one before it.
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(allow_nan=False, allow_infinity=False), unicode
)
values = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(unicode, inner, max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip
provenances = st.dictionaries(unicode, values, max_size=4)


def keys(seed: int, n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def merged(parts: Sequence[Tensor], order: Sequence[int], dtype: torch.dtype) -> SecondMoment:
    total = SecondMoment(parts[0].shape[1], dtype=dtype, quartic=True)
    for index in order:
        total.merge(SecondMoment(total.d, dtype=dtype, quartic=True).update(parts[index]))
    return total


@QUICK
@given(st.data())
def test_merging_is_commutative_and_associative_up_to_rounding(data: st.DataObject) -> None:
    d, dtype = (data.draw(st.integers(1, 9)), data.draw(st.sampled_from([torch.float32, torch.float64])))
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=2, max_size=5))  # fmt: skip
    parts = [keys(i, n, d) for i, n in enumerate(sizes)]
    together = SecondMoment(d, dtype=dtype, quartic=True).update(torch.cat(parts))
    one = merged(parts, range(len(parts)), dtype)
    other = merged(parts, data.draw(st.permutations(range(len(parts)))), dtype)
    half = len(parts) // 2
    grouped = merged(parts[:half], range(half), dtype) if half else SecondMoment(d, dtype=dtype, quartic=True)
    grouped.merge(merged(parts[half:], range(len(parts) - half), dtype))
    exact = torch.cat(parts).double().T @ torch.cat(parts).double()
    for moment in (together, one, other, grouped):
        assert moment.count == sum(sizes)
        size = float(exact.abs().max()) if moment.count else 0.0
        torch.testing.assert_close(moment.sum.double(), exact, rtol=0, atol=size * 1e-6 * (1 + moment.count / 4))
        quartic = torch.cat(parts).double().square().sum(1).square().sum()
        torch.testing.assert_close(moment.quartic, quartic, rtol=1e-5, atol=1e-12)


@QUICK
@given(provenance=provenances, seed=st.integers(0, 9), d=st.integers(1, 6), n=st.integers(0, 9))
def test_any_json_comes_back_with_any_moment(tmp_path: Path, provenance, seed, d, n) -> None:
    path = tmp_path / "m.safetensors"
    saved = SecondMoment(d, quartic=True).update(keys(seed, n, d))
    save_moment(path, saved, provenance)
    loaded, found = load_moment(path, expect=provenance)
    assert found == provenance == read_provenance(path)
    assert list(map(type, found.values())) == [type(provenance[name]) for name in found]
    assert torch.equal(loaded.sum, saved.sum) and loaded.count == n
    assert torch.equal(loaded.quartic, saved.quartic)
    first = path.read_bytes()
    save_moment(path, loaded, dict(reversed(found.items())))
    assert path.read_bytes() == first


@pytest.mark.parametrize("levels", [fastcov.files.MAX_DEPTH - 1, fastcov.files.MAX_DEPTH])
def test_nothing_is_written_that_would_not_be_read(tmp_path: Path, levels: int) -> None:
    value: object = 0
    for _ in range(levels):
        value = [value]
    path, about = tmp_path / "m.safetensors", {"deep": value}
    if levels < fastcov.files.MAX_DEPTH:  # the object around it is one more
        save_moment(path, SecondMoment(2), about)
        assert read_provenance(path) == about
        Delta({}, about).save(path)
        assert Delta.load(path).provenance == about
        return
    for save in (lambda: save_moment(path, SecondMoment(2), about), lambda: Delta({}, about).save(path)):
        with pytest.raises(ValueError, match="100 deep"):
            save()
        assert not path.exists()


@QUICK
@given(multiplier=st.floats(1e-6, 1e6), d_k=st.integers(1, 20_000))
def test_the_budget_is_the_nearest_whole_number(multiplier: float, d_k: int) -> None:
    exact = Fraction(multiplier) * d_k
    try:
        found = budget(multiplier, d_k)
    except BadInput:
        assert exact <= Fraction(1, 2) * (1 + Fraction(1, 10**12))
        return
    # The product is rounded to a float first, then to a whole number.
    assert abs(found - exact) <= Fraction(1, 2) + Fraction(math.ulp(float(exact)))
    assert found >= 1 and isinstance(found, int)
    assert budget(multiplier, d_k) <= budget(multiplier * 2, d_k)


class Weights(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        draw = torch.Generator().manual_seed(seed)
        for number, shape in enumerate(shapes):
            value = torch.randn(shape, generator=draw).to(dtype)
            self.register_parameter(f"w{number}", nn.Parameter(value))


@QUICK
@given(st.data())
def test_a_delta_goes_into_a_file_into_weights_and_out_again(tmp_path: Path, data: st.DataObject) -> None:
    sides = st.integers(1, 5)
    shapes = data.draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    rank, seed = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 99))  # fmt: skip
    scale = data.draw(st.sampled_from([1.0, 1e-8, 1e6, float("inf"), float("nan")]))
    model = Weights(shapes, dtype, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    factors = {}
    for i, (a, b) in enumerate(shapes):
        left, right = (torch.randn(side, rank, generator=draw) for side in (a, b))
        factors[f"w{i}"] = (left * scale, right)
    made = Delta(factors, data.draw(provenances))
    path = tmp_path / "e.safetensors"
    if not all(t.isfinite().all() for pair in factors.values() for t in pair):
        with pytest.raises(NonFiniteEdit, match="holds NaN or infinity in its factors of w"):
            made.save(path)
        with pytest.raises(NonFiniteEdit):
            Edit(made, EditStack(model)).apply()
        return
    made.save(path)
    loaded = Delta.load(path)
    assert loaded.provenance == made.provenance and loaded.digest() == made.digest()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    results = []
    stack = EditStack(model)
    sums = [w.float() + a @ b.T for w, (a, b) in zip(before.values(), factors.values(), strict=True)]
    if not all(s.to(dtype).isfinite().all() for s in sums):  # too large for the weights' dtype
        for delta in (made, loaded):
            with pytest.raises(NonFiniteEdit):
                Edit(delta, stack).apply()
            assert all(torch.equal(w, before[name]) for name, w in model.named_parameters())
        return
    for delta in (made, loaded):
        edit = Edit(delta, stack).apply()
        results.append([weight.detach().clone() for weight in model.parameters()])
        edit.undo()
        assert all(torch.equal(w, before[name]) for name, w in model.named_parameters())
    for one, two, weight, (left, right) in zip(*results, before.values(), factors.values(), strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))
        if math.isfinite(scale) and dtype == torch.float32:
            expected = weight.double() + left.double() @ right.double().T
            torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5 * max(1, scale))
