from __future__ import annotations

import pytest
import torch

import fastcov
from fastcov.bench import collect
from fastcov.bench.models import SHAPES, build
from fastcov.bench.schema import BadInput
from fastcov.bench.settings import parse
from fastcov.bench.timing import Effort, measure

CPU = torch.device("cpu")


@pytest.fixture
def settings():
    return parse(["collect", "--quick", "--multiplier", "2", "--threads", "1"])


def test_both_agree_and_the_limit_is_counted(settings):
    (made,) = collect.cases(settings)
    case, contenders = made
    ours, released = measure(case, contenders, Effort(0.01, 3, 3))
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
    lengths = [len(text) for text in fastcov.take(build("tiny", CPU, torch.float32, 2.0)[2], 256, 999)]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attended = 3 * 2 * 2 * shape.d * pairs
    assert sum(lengths) == 256 and attended > 0
    assert case.flops() == pytest.approx(256 * per_token + updates + attended, rel=1e-12)


def test_rows_have_tokens_per_second(settings):
    ((ours, released),) = collect.run(settings)
    assert ours.tokens_per_second == pytest.approx(256 / ours.p50)
    assert released.ratio == 1.0


def test_ours_is_held_against_the_released_sums(settings, monkeypatch):
    right = fastcov.collect_moments

    def wrong(*args, **options):
        moments = right(*args, **options)
        next(iter(moments.values())).lower.mul_(1 + 1e-4)
        return moments

    monkeypatch.setattr(fastcov, "collect_moments", wrong)
    ((ours, released),) = collect.run(settings)
    assert (ours.status, released.status, ours.p50) == ("failed", "ok", None)
    assert ours.error == pytest.approx(1e-4, rel=0.01)


def test_the_released_sums_are_held_against_float64(settings, monkeypatch):
    right = collect.released.covariances

    def wrong(*args):
        return {path: total * (1 + 1e-4) for path, total in right(*args).items()}

    monkeypatch.setattr(collect.released, "covariances", wrong)
    ((_, released),) = collect.run(settings)
    assert released.status == "failed"


def given_model():
    return build("tiny", CPU, torch.float32, 3.0)


def test_a_real_model_is_loaded_by_its_provider(monkeypatch, tmp_path):
    (tmp_path / "own_model.py").write_text(
        "from fastcov.bench.models import build\nimport torch\n"
        "def load():\n    return build('tiny', torch.device('cpu'), torch.float32, 3.0)\n"
        "def wrong():\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["collect", "--quick", "--threads", "1", "--multiplier", "1"]
    ((ours, released),) = collect.run(parse([*arguments, "--load", "own_model:load"]))
    assert ours.case == "own_model:load, float32, 128 keys a layer, d_k 128"
    assert (ours.status, released.status) == ("ok", "ok")
    with pytest.raises(BadInput, match="--load own_model:wrong must return"):
        list(collect.run(parse([*arguments, "--load", "own_model:wrong"])))
    few = [*arguments[:-1], "9", "--load", "own_model:load"]
    with pytest.raises(BadInput, match=r"have \d+ tokens and 1152 are wanted"):
        list(collect.run(parse(few)))
