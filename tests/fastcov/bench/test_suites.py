from __future__ import annotations

import pytest
import torch
from torch import nn

import fastcov
from benchmarks.recorded import load
from benchmarks.shapes import SHAPES, build
from fastcov import ops
from fastcov.bench import suites
from fastcov.bench.__main__ import main, parse
from fastcov.bench.measure import Effort, measure
from fastcov.errors import BadInput
from fastcov.kernels import plain

CPU = torch.device("cpu")


ARGUMENTS = ["rank_k", "--quick", "--sizes", "40", "--rows", "64", "--threads", "1"]


@pytest.fixture
def kernel(monkeypatch):
    """Registers a kernel for the time of a test."""
    monkeypatch.setattr(ops, "KERNELS", dict(ops.KERNELS))
    monkeypatch.setattr(ops, "_chosen", {})

    def register(name, update, missing=None, refuses=None):
        ops.KERNELS[name] = ops.Kernel(
            name, update, lambda C=None, X=None: missing or (X is not None and refuses) or None
        )

    return register


def rows_of(dtype="float32", **names):
    settings = parse([*ARGUMENTS, "--dtype", dtype])
    case, contenders = suites.rank_k_case(settings, settings.dtypes[0], 40)
    return {row.contender: row for row in measure(case, contenders, Effort(0.01, 3, 3))}


def doubled(C, X, mask, alpha):
    plain.reference(C, X, mask, 2 * alpha)


def test_a_wrong_kernel_fails_is_not_timed_and_the_exit_code_is_1(kernel, capsys, tmp_path):
    runs = []

    def wrong(C, X, mask, alpha):
        runs.append(1)
        doubled(C, X, mask, alpha)

    kernel("wrong", wrong)
    file = tmp_path / "run.json"
    assert main([*ARGUMENTS, "--dtype", "float32", "--json", str(file)]) == 1
    assert len(runs) == 1  # the check, and no round
    printed = capsys.readouterr().out
    assert "fastcov wrong" in printed and "FAILED: relative error" in printed
    assert "1 of " in printed and "rows FAILED their check and were not timed" in printed
    (row,) = [row for row in load(file).rows if row.kernel == "wrong"]
    assert (row.status, row.p50) == ("failed", None)
    assert row.error is not None and row.error > 1e-2
    assert all(row.p50 for row in load(file).rows if row.kernel == "reference")


def test_a_kernel_that_forgets_the_sum_or_writes_above_the_diagonal_fails(kernel):
    def forgets(C, X, mask, alpha):
        C.copy_(torch.where(torch.ones_like(C).tril() > 0, (X.mT @ X), C))

    kernel("forgets", forgets)
    kernel("full", lambda C, X, mask, alpha: C.addmm_(X.mT, X))
    rows = rows_of()
    assert rows["fastcov forgets"].reason.startswith("relative error")
    assert rows["fastcov full"].reason == "it changed something above the diagonal"


def test_kernels_that_cannot_run_say_why(kernel):
    kernel("absent", doubled, missing="there is no such machine")
    kernel("choosy", doubled, refuses="it wants square keys")
    rows = rows_of()
    assert (rows["fastcov absent"].status, rows["fastcov absent"].reason) == ("cannot", "there is no such machine")
    assert rows["fastcov choosy"].reason == "it wants square keys"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_row_that_runs_is_right_and_timed(dtype):
    rows = rows_of(dtype)
    timed = [row for row in rows.values() if row.p50 is not None]
    assert {"fastcov reference", "torch.addmm", "torch block rows 768"} <= set(rows)
    assert not [row for row in rows.values() if row.status == "failed"]
    for row in timed:
        assert row.error is not None and row.error < (1e-13 if dtype == "float64" else 1e-6)
        assert row.gflops == pytest.approx(64 * 40 * 41 / row.p50 / 1e9)
        assert row.ratio == pytest.approx(rows["torch.addmm"].p50 / row.p50)
    fastest = min(row.p50 for row in timed if row.kind == "library")
    assert rows["fastcov reference"].ratio_library == pytest.approx(fastest / rows["fastcov reference"].p50)


def test_only_named_kernels_run_and_slow_ones_only_where_named(kernel):
    kernel("portable", doubled)
    names = lambda *more: {  # noqa: E731
        c.kernel for c in suites.rank_k_case(parse([*ARGUMENTS, *more]), torch.float32, 40)[1] if c.kernel is not None
    }
    assert "portable" not in names()
    assert names("--kernels", "reference,portable") == {"reference", "portable"}


def test_a_library_beyond_the_gate_is_marked_and_timed(monkeypatch):
    def rounded(C, X):
        C.addmm_(X.mT, X).mul_(1 + 1e-4)

    def other(C, X):
        C.zero_()

    monkeypatch.setattr(suites, "torch_routes", lambda *a: {"rounded": rounded, "other": other})
    rows = rows_of()
    assert rows["rounded"].inexact and rows["rounded"].p50 is not None
    assert rows["other"].status == "failed"


@pytest.fixture
def factoring():
    return parse(["factor", "--quick", "--sizes", "48", "--threads", "1"])


@pytest.fixture
def given():
    return suites.problem(48, CPU, count=2, size=4)


MAKERS = {
    "factorising": 48**3 / 3,
    "solving": 2 * 48 * 48 * 4,
    "editing": 48**3 / 3 + 2 * (2 * 48 * 48 * 4 + 2 * 48 * 4 * (4 + 12)),
}


@pytest.mark.parametrize("make", MAKERS)
def test_both_sides_are_right_and_the_operations_are_counted(factoring, given, make):
    case, contenders = list(suites.factor_cases(factoring, *given))[list(MAKERS).index(make)]
    rows = measure(case, contenders, Effort(0.01, 3, 3))
    assert {row.status for row in rows} == {"ok"}
    assert rows[0].kind == "ours" and rows[-1].ratio == 1.0
    assert case.flops() == pytest.approx(MAKERS[make])
    assert all(row.error < 1e-11 for row in rows)


def test_the_matrix_is_symmetric_positive_and_conditioned_like_a_moment(given):
    assert torch.equal(given[0], given[0].mT)
    assert torch.equal(given[0], given[0].float().double())
    eigenvalues = torch.linalg.eigvalsh(given[0])
    assert 1e3 < eigenvalues[-1] / eigenvalues[0] < 1e6


def test_a_wrong_update_fails(factoring, given, monkeypatch):
    right = suites.closed_form.memit

    def wrong(factor_, K, R):
        return right(factor_, K, R * (1 + 1e-6))

    monkeypatch.setattr(suites.closed_form, "memit", wrong)
    case, contenders = list(suites.factor_cases(factoring, *given))[2]
    ours, theirs = measure(case, contenders, Effort(0.01, 3, 3))
    assert [ours.status, theirs.status] == ["failed", "ok"]
    assert ours.error == pytest.approx(1e-6, rel=1e-3)


def test_a_wrong_factor_fails(factoring, given, monkeypatch):
    right = suites.factorize

    def wrong(A, **options):
        found = right(A, **options)
        found.lower.mul_(1 + 1e-9)
        return found

    monkeypatch.setattr(suites, "factorize", wrong)
    case, contenders = next(suites.factor_cases(factoring, *given))
    assert [row.status for row in measure(case, contenders, Effort(0.01, 3, 3))] == ["failed", "ok"]


def test_factorising_never_sees_its_own_result(factoring, given):
    """In place, so that each call must get the matrix anew."""
    _, (ours, _) = next(suites.factor_cases(factoring, *given))
    for _ in range(2):
        ours.prepare()
        L = ours.run().tril()
        assert (L @ L.mT - given[0]).norm() / given[0].norm() < 1e-12


def test_memory_is_counted_in_matrices_and_not_for_small_ones(factoring, given, monkeypatch):
    case, contenders = next(suites.factor_cases(factoring, *given))
    row = measure(case, contenders, Effort(0.01, 3, 3))[0]
    monkeypatch.setattr(suites.m, "peak_beyond", lambda run, device: 3 * 48 * 48 * 8)
    assert suites.with_memory(row, contenders[0], case).memory is None
    monkeypatch.setattr(suites, "_SMALL", 0)
    assert suites.with_memory(row, contenders[0], case).memory == 3.0


@pytest.fixture
def settings():
    return parse(["collect", "--quick", "--multiplier", "2", "--threads", "1", "--load", "benchmarks.shapes:tiny"])


def test_both_agree_and_the_limit_is_counted(settings):
    case, contenders = suites.collect_case(settings, *settings.load())
    ours, _, released = measure(case, contenders, Effort(0.01, 3, 3))
    assert [ours.status, released.status] == ["ok", "ok"]
    assert (case.n, case.d) == (256, 128)
    shape = SHAPES["tiny"]
    # Two whole layers and the third up to its key: projections of attention (queries and output
    # whole, keys and values half), gate and up; down in the first two.
    attention = 2 * (shape.d * shape.d * 2 + 2 * shape.d * shape.d // 2)
    wide = 2 * shape.d * shape.d_k
    per_token = 3 * (attention + 2 * wide) + 2 * wide
    updates = 2 * 256 * 128 * 129
    # Scores and their use, in three layers, for every token with itself and those before it.
    lengths = [len(text) for text in fastcov.take(build("tiny", CPU)[2], 256, 999)]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attended = 3 * 2 * 2 * shape.d * pairs
    assert sum(lengths) == 256 and attended > 0
    assert case.flops() == pytest.approx(256 * per_token + updates + attended, rel=1e-12)


def test_rows_have_tokens_per_second(settings):
    ((ours, _, released),) = suites.collect(settings)
    assert ours.tokens_per_second == pytest.approx(256 / ours.p50)
    assert released.ratio == 1.0


def test_forward_passes_in_bfloat16_are_tried_where_they_are_faster(settings, monkeypatch):
    monkeypatch.setattr(suites, "why_no_bfloat", lambda: None)
    _, (_, narrow, _) = suites.collect_case(settings, *settings.load())
    assert narrow.cannot is None
    assert 1e-5 < narrow.check().error < 2e-2
    monkeypatch.setattr(suites, "why_no_bfloat", lambda: "they are slow")
    _, (_, narrow, _) = suites.collect_case(settings, *settings.load())
    assert narrow.cannot == "they are slow"


def test_ours_is_held_against_the_released_sums(settings, monkeypatch):
    right = fastcov.collect_moments

    def wrong(*args, **options):
        moments = right(*args, **options)
        next(iter(moments.values())).lower.mul_(1 + 1e-4)
        return moments

    monkeypatch.setattr(fastcov, "collect_moments", wrong)
    ((ours, _, released),) = suites.collect(settings)
    assert (ours.status, released.status, ours.p50) == ("failed", "ok", None)
    assert ours.error == pytest.approx(1e-4, rel=0.01)


def test_the_released_sums_are_held_against_float64(settings, monkeypatch):
    right = suites.released_covariance

    def wrong(model, path, documents, sums):
        return right(model, path, documents, sums) * (1 + 1e-4 * (sums == torch.float32))

    monkeypatch.setattr(suites, "released_covariance", wrong)
    ((*_, released),) = suites.collect(settings)
    assert released.status == "failed"


def test_a_real_model_is_loaded_by_its_provider(monkeypatch, tmp_path):
    (tmp_path / "own_model.py").write_text(
        "from benchmarks.shapes import build\nimport torch\n"
        "def load():\n    return build('tiny', torch.device('cpu'), 3.0)\n"
        "def wrong():\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["collect", "--quick", "--threads", "1", "--multiplier", "1"]
    ((ours, _, released),) = suites.collect(parse([*arguments, "--load", "own_model:load"]))
    assert ours.case == "own_model:load, float32, 128 keys a layer, d_k 128"
    assert (ours.status, released.status) == ("ok", "ok")
    with pytest.raises(BadInput, match="--load own_model:wrong must return"):
        list(suites.collect(parse([*arguments, "--load", "own_model:wrong"])))
    few = [*arguments[:-1], "9", "--load", "own_model:load"]
    with pytest.raises(BadInput, match=r"have \d+ tokens and 1152 are wanted"):
        list(suites.collect(parse(few)))


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.first = nn.Linear(3, 3, bias=False)
        self.last = nn.Linear(3, 2, bias=False)
        self.above = 0

    def forward(self, input_ids, attention_mask):
        assert input_ids.shape[0] == 1  # one document at a time
        x = self.last(self.first(self.embed(input_ids)))
        self.above += 1
        return x


def test_each_layer_has_a_pass_of_its_own_that_stops_there():
    model = TwoLayers()
    documents = [[0, 1, 2], [3], [4, 4]]
    sums = {path: suites.released_covariance(model, path, documents) for path in ("first", "last")}
    keys = model.embed.weight[torch.tensor([0, 1, 2, 3, 4, 4])].detach().double()
    inner = keys @ model.first.weight.detach().double().T
    torch.testing.assert_close(sums["first"].double(), keys.T @ keys, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums["last"].double(), inner.T @ inner, rtol=1e-5, atol=1e-6)
    assert sums["first"].dtype == torch.float32
    assert model.above == 0
    assert not model.first._forward_hooks and not model.last._forward_hooks


def test_a_hook_does_not_outlive_an_error():
    model = TwoLayers()
    with pytest.raises(IndexError):
        suites.released_covariance(model, "first", [[99]])
    assert not model.first._forward_hooks


def test_the_update_of_one_key_by_hand():
    A, K, R = torch.eye(2).double() * 3, torch.tensor([[1.0], [0.0]]).double(), torch.ones(1, 1)
    ((update,),) = [suites.released_memit(A, [(K, R.double())])]
    assert update.tolist() == [[0.25, 0.0]]  # r k^T / (3 + 1)
