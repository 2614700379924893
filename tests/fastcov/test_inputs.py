"""What is taken where a matrix is: every kind gives the right numbers or one sentence of ours."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fastcov
from fastcov import FastcovError, NonFinite, SecondMoment, closed_form, moments, npz
from fastcov.hooks import matrix, shares_entries, square
from fastcov.linalg import free_memory, place_of_float64, updated

# Halves of small whole numbers: exact in every floating dtype that is taken.
DRAW = torch.Generator().manual_seed(0)
KEYS = torch.randint(-4, 5, (40, 6), generator=DRAW).double() / 2
EDITS = torch.randint(-4, 5, (6, 3), generator=DRAW).double() / 2
RESIDUALS = torch.randint(-4, 5, (4, 3), generator=DRAW).double() / 2
SQUARE = (KEYS.T @ KEYS).round_() / 64
MOMENT = SecondMoment(6, dtype=torch.float64).update(KEYS)
FACTOR = fastcov.factorize(fastcov.regularised(MOMENT, 1.0, 0.25))
NULL = fastcov.null_space(MOMENT, relative=1.0)


def _added(X):
    C = torch.zeros(6, 6, dtype=torch.float64)
    fastcov.rank_k_update(C, X)
    return C.tril()


def _taken_over(lower):
    return SecondMoment.from_lower(lower, 40).merge(MOMENT).sum.double()


def _change(change):
    return change.dense().double()


#: Name -> what is called with one matrix, and the matrix itself, float64.
FUNCTIONS = {
    "rank_k_update": (_added, KEYS),
    "update": (lambda X: SecondMoment(6, dtype=torch.float64).update(X).sum, KEYS),
    "from_lower": (_taken_over, SQUARE),
    "factorize": (lambda A: fastcov.factorize(A).L.double(), SQUARE),
    "factorize in place": (lambda A: fastcov.factorize(A, in_place=True).L.double(), SQUARE),
    "regularised": (lambda C: fastcov.regularised(C, 2.0, 0.5), SQUARE),
    "shrunk": (lambda C: moments.shrunk(C, 0.25), SQUARE),
    "null_space": (lambda C: fastcov.null_space(C, relative=1.0).projector(), SQUARE),
    "solve": (FACTOR.solve, EDITS),
    "half_solve": (FACTOR.half_solve, EDITS),
    "solve_and_gram": (lambda K: FACTOR.solve_and_gram(K)[1], EDITS),
    "updated": (lambda P: updated(FACTOR, P).solve(EDITS), EDITS),
    "memit, keys": (lambda K: _change(closed_form.memit(FACTOR, K, RESIDUALS)), EDITS),
    "memit, residuals": (lambda R: _change(closed_form.memit(FACTOR, EDITS, R)), RESIDUALS),
    "emmet, keys": (lambda K: _change(closed_form.emmet(FACTOR, K, RESIDUALS, 0.1)), EDITS),
    "rome, key": (lambda k: _change(closed_form.rome(FACTOR, k, RESIDUALS[:, :1])), EDITS[:, :1]),
    "rome, residual": (lambda r: _change(closed_form.rome(FACTOR, EDITS[:, :1], r)), RESIDUALS[:, :1]),
    "alphaedit, keys": (lambda K: _change(fastcov.alphaedit(NULL, K, RESIDUALS, 10.0)), EDITS),
    "alphaedit, earlier": (lambda P: _change(fastcov.alphaedit(NULL, EDITS, RESIDUALS, 10.0, P)), EDITS),
}


def _of_inference(x):
    with torch.inference_mode():
        return x.clone()


def _spread(x):
    wide = torch.full((2 * x.shape[0], 3 * x.shape[1]), math.nan, dtype=x.dtype)
    wide[::2, ::3] = x
    return wide[::2, ::3]


def _swapped(x):
    return x.numpy().astype(x.numpy().dtype.newbyteorder("S"))


def _read_only(x):
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


#: Name -> the same numbers in another form.
SAME = {
    "float32": lambda x: x.float(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "transposed strides": lambda x: x.T.contiguous().T,
    "spread strides": _spread,
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "result with a gradient": lambda x: x.clone().requires_grad_(True) * 1,
    "inference": _of_inference,
    "numpy": lambda x: x.numpy().copy(),
    "numpy float32": lambda x: x.float().numpy(),
    "numpy reversed": lambda x: x.numpy()[::-1, ::-1].copy()[::-1, ::-1],
    "numpy Fortran": lambda x: np.asfortranarray(x.numpy()),
    "numpy other byte order": _swapped,
    "numpy read-only": _read_only,
}
#: Name -> what has no numbers, or none of a kind that is taken.
REFUSED = {
    "list": lambda x: x.tolist(),
    "None": lambda x: None,
    "text": lambda x: "matrix",
    "number": lambda x: 1.0,
    "integers": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.cdouble(),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.5, 0, torch.qint8),
    "scalar": lambda x: x[0, 0],
    "numpy integers": lambda x: x.long().numpy(),
    "numpy objects": lambda x: x.numpy().astype(object),
    "numpy complex": lambda x: x.cdouble().numpy(),
    "numpy masked": lambda x: np.ma.masked_array(x.numpy(), x.numpy() > 0),
    "numpy long double": lambda x: x.numpy().astype(np.longdouble),
}


def one_sentence(error):
    text = str(error)
    assert text.endswith(".") and "\n" not in text and len(text) < 500, text
    return True


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_numbers_in_any_form_give_the_same(name, kind):
    function, given = FUNCTIONS[name]
    wanted = function(given.clone())
    try:
        got = function(SAME[kind](given))
    except FastcovError as error:
        # 16 bits are too few to factorise or to sum in; everything else is taken.
        assert kind in ("float16", "bfloat16") and one_sentence(error)
        assert name in ("factorize", "factorize in place", "from_lower")
        return
    except ValueError as error:
        assert name == "from_lower" and "float" in kind and one_sentence(error)
        return
    assert not got.requires_grad
    # Of a result in 16 bits the mean of the diagonal, the product and the sum are each rounded by
    # half an epsilon at most, and the first two add up to the third.
    rtol = max(1e-4, torch.finfo(got.dtype).eps)
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_numbers_are_exact_in_every_dtype(name):
    given = FUNCTIONS[name][1]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(given.to(dtype).double(), given)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_matrix_gets_one_sentence(name, kind):
    function, given = FUNCTIONS[name]
    if (name, kind) == ("alphaedit, earlier", "None"):
        return  # which says that there are none
    with pytest.raises(FastcovError) as refused:
        function(REFUSED[kind](given))
    assert one_sentence(refused.value)


MEANT_AS_MEAN = ("regularised", "shrunk", "null_space")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_moment_is_taken_for_its_mean_or_refused(name):
    function, _ = FUNCTIONS[name]
    if name in MEANT_AS_MEAN:
        want = function(MOMENT.second_moment)
        torch.testing.assert_close(function(MOMENT).tril(), want.tril())
        return
    with pytest.raises(FastcovError) as refused:
        function(MOMENT)
    assert one_sentence(refused.value)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 6), (6, 0), (2, 3, 5), (0, 0), (7, 7)])
def test_odd_shapes_are_empty_sums_or_one_sentence(name, shape):
    function, _ = FUNCTIONS[name]
    try:
        got = function(torch.ones(shape, dtype=torch.float64))
    except (FastcovError, ValueError) as error:
        assert one_sentence(error)
    else:
        assert got.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("rank_k_update", "from_lower")])
def test_a_number_that_is_none_is_not_passed_on_in_silence(name, bad):
    function, given = FUNCTIONS[name]
    spoilt = given.clone()
    spoilt[2, 0] = bad
    try:
        got = function(spoilt)
    except FastcovError as error:
        assert isinstance(error, NonFinite) and one_sentence(error)
    else:  # sums and solves are linear: it shows where it belongs
        assert name in ("regularised", "shrunk", "solve", "half_solve", "solve_and_gram")
        assert not got.isfinite().all()


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-30, 1e30, 1e140, 1e300])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_huge_or_tiny_scale_gives_finite_numbers_or_an_error(name, scale):
    function, given = FUNCTIONS[name]
    try:
        got = function(given * scale)
    except (FastcovError, ValueError) as error:
        assert one_sentence(error)
    else:
        # What is summed or solved with alone may overflow; no edit is made of that.
        assert got.isfinite().all() or name in ("rank_k_update", "solve_and_gram")


def test_expanded_matrices_are_read_as_what_they_hold():
    row = EDITS[:, :1]
    same = row.expand(6, 3)
    got = closed_form.memit(FACTOR, same, RESIDUALS).dense()
    torch.testing.assert_close(got, closed_form.memit(FACTOR, same.clone(), RESIDUALS).dense())
    ones = torch.ones(1, 1, dtype=torch.float64).expand(6, 6)
    assert torch.equal(fastcov.regularised(ones, 2.0, 1.0), 2 * ones + torch.eye(6).double())
    shrunk = moments.shrunk(ones, 0.5)
    assert torch.equal(shrunk, 0.5 * ones + 0.5 * torch.eye(6).double())
    with pytest.raises(FastcovError, match="in_place"):
        moments.shrunk(ones, 0.5, in_place=True)
    four = torch.full((1, 1), 4.0, dtype=torch.float64)
    factor = fastcov.factorize(four.expand(2, 2), in_place=True)  # of rank 1: with a jitter
    assert float(factor.L[0, 0]) == pytest.approx(2.0) and four.item() == 4.0


@pytest.mark.parametrize(
    ("strides", "shared"),
    [
        ((3, 1), False), ((1, 3), False), ((7, 2), False), ((2, 3), False), ((0, 1), True),
        ((1, 0), True), ((1, 1), True), ((2, 1), True), ((4, 6), False), ((2, 5), False),
    ],
)  # fmt: skip
def test_entries_that_share_memory(strides, shared):
    x = torch.zeros(64).as_strided((3, 3), strides)
    places = {i * strides[0] + j * strides[1] for i in range(3) for j in range(3)}
    assert shares_entries(x) is shared is (len(places) < 9)


def test_float64_lives_on_the_cpu_where_the_device_has_none():
    assert place_of_float64(torch.device("mps")).type == "cpu"
    assert place_of_float64(torch.device("cuda:1")) == torch.device("cuda:1")


def test_meta_tensors_hold_no_numbers():
    for name, (function, given) in FUNCTIONS.items():
        if name in ("rank_k_update", "update", "from_lower"):
            continue  # nothing is computed of them, as everywhere in torch
        with pytest.raises(FastcovError, match="meta"):
            function(given.to("meta"))


def test_messages_name_what_was_given():
    with pytest.raises(fastcov.BadInput, match="a SecondMoment; pass its second_moment"):
        matrix(MOMENT, "Edit keys")
    with pytest.raises(fastcov.BadInput, match="numbers, not int64; convert to float64"):
        matrix(torch.ones(2, 2, dtype=torch.int64), "Edit keys")
    with pytest.raises(fastcov.BadInput, match=r"shape \(2, 3\); pass \(d, d\)"):
        square(torch.ones(2, 3), "The matrix")


@pytest.mark.parametrize(
    "function", [fastcov.oas, fastcov.ledoit_wolf, fastcov.StoppingRule().update, SecondMoment(6).merge]
)
def test_what_needs_the_number_of_keys_asks_for_a_moment(function):
    with pytest.raises(fastcov.BadInput, match="takes a SecondMoment, not a Tensor"):
        function(SQUARE)


def test_stores_take_moments_alone(tmp_path):
    with pytest.raises(fastcov.BadInput, match="SecondMoment"):
        fastcov.save_moment(tmp_path / "m", SQUARE.numpy(), {})
    with pytest.raises(fastcov.BadInput, match="SecondMoment"):
        npz.save_npz(tmp_path / "m.npz", SQUARE, sample_size=1)
    assert list(tmp_path.iterdir()) == []


def test_updates_and_solves_ask_for_a_factor_and_a_null_space():
    with pytest.raises(fastcov.BadInput, match="a factor, not with a Tensor"):
        closed_form.memit(SQUARE, EDITS, RESIDUALS)
    with pytest.raises(fastcov.BadInput, match="a NullSpace, not to a Tensor"):
        fastcov.alphaedit(SQUARE, EDITS, RESIDUALS, 10.0)


def test_what_is_free_is_what_the_system_or_the_group_says(monkeypatch):
    """The lesser one of what Linux calls available and of what a container may still take."""
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  3 kB\n",
        "/sys/fs/cgroup/memory.max": "4000\n",
        "/sys/fs/cgroup/memory.current": "1500\n",
    }

    def read(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    cpu = torch.device("cpu")
    assert free_memory(cpu) == 2500
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory(cpu) == 3072
    files.clear()
    assert free_memory(cpu) == float("inf") == free_memory(torch.device("mps"))
