from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from fastcov import BadInput, BudgetNotMet, NonFinite, bucket, collect_moments, take
from reference import closed_form as literal
from reference.tiny import Tiny, keys_of, paths

GENERATOR = torch.Generator().manual_seed(5)
DOCUMENTS = [
    torch.randint(1, 50, (int(n),), generator=GENERATOR).tolist()
    for n in torch.randint(1, 30, (25,), generator=GENERATOR)
]
TOTAL = sum(map(len, DOCUMENTS))


def moments(model, batches, budget=None, modules=None, **more):
    modules = modules or paths(0, 2)
    return collect_moments(model, modules, batches, budget, dtype=torch.float64, **more)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 37, 128, 10_000])
@pytest.mark.parametrize("window", [3, 1000])
def test_the_cut_of_the_batches_does_not_matter(tokens, window):
    model = Tiny()
    got = moments(model, bucket(DOCUMENTS, tokens, max_padding=0.3, window=window))
    assert list(got) == paths(0, 2)
    for layer in (0, 2):
        moment = got[paths(layer)[0]]
        assert moment.count == TOTAL
        wanted = literal.second_moment(keys_of(model, DOCUMENTS, layer).numpy())
        close(moment.second_moment, torch.from_numpy(wanted))


@pytest.mark.parametrize("budget", [1, 8, 100, TOTAL])
@pytest.mark.parametrize("tokens", [16, 400])
def test_the_budget_is_met_exactly_and_is_a_prefix(budget, tokens):
    model = Tiny()
    first = list(take(DOCUMENTS, budget, 64))
    by_take = moments(model, bucket(first, tokens), budget)
    # Batches in the order of the corpus, cut by collect itself.
    by_mask = moments(model, bucket(DOCUMENTS, tokens, max_padding=0.9, window=1), budget)
    for layer in (0, 2):
        wanted = literal.second_moment(keys_of(model, first, layer).numpy())
        for got in (by_take, by_mask):
            assert got[paths(layer)[0]].count == budget
            close(got[paths(layer)[0]].second_moment, torch.from_numpy(wanted))


def test_the_cut_inside_a_padded_batch_is_row_by_row():
    model = Tiny()
    (batch,) = bucket([[1, 2, 3], [4, 5], [6, 7]], 100, max_padding=0.9)
    got = moments(model, [batch], 4)[paths(0)[0]]
    wanted = literal.second_moment(keys_of(model, [[1, 2, 3], [4]], 0).numpy())
    close(got.second_moment, torch.from_numpy(wanted))


def test_left_padding_and_no_mask_at_all():
    model = Tiny()
    left = {
        "input_ids": torch.tensor([[0, 1, 2], [3, 4, 5]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 1], [0, 1, 2]]),
    }
    wanted = literal.second_moment(keys_of(model, [[1, 2], [3, 4, 5]], 0).numpy())
    close(moments(model, [left])[paths(0)[0]].second_moment, torch.from_numpy(wanted))
    bare = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "position_ids": torch.arange(2)[None]}
    wanted = literal.second_moment(keys_of(model, [[1, 2], [3]], 0).numpy())
    got = moments(model, [bare], 3)[paths(0)[0]]
    assert got.count == 3
    close(got.second_moment, torch.from_numpy(wanted))


def test_each_module_has_its_own_budget_and_no_batch_is_read_too_many():
    model, read = Tiny(), []

    def source():
        for batch in bucket(DOCUMENTS, 32, window=1):
            read.append(int(batch["attention_mask"].sum()))
            yield batch

    steps = []
    first, second = paths(0, 2)
    got = moments(model, source(), {first: 11, second: 40}, progress=steps.append)
    assert (got[first].count, got[second].count) == (11, 40)
    assert sum(read[:-1]) < 40 <= sum(read)
    assert sum(steps) == 40 and len(steps) == len(read)
    wanted = literal.second_moment(keys_of(model, DOCUMENTS, 0).numpy()[:11])
    close(got[first].second_moment, torch.from_numpy(wanted))


def test_the_model_is_left_as_it_was():
    model = Tiny()
    model.train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    moments(model, bucket(DOCUMENTS, 64), modules=paths(0, 1))
    assert modes == [module.training for module in model.modules()]
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(seen[1:] == (False, False, False) for seen in model.seen)  # cache, grad, training
    assert model.layers[1].down_proj.calls == 0 and model.head.calls == 0


def test_the_cache_is_off_by_configuration_where_it_is_no_argument():
    class Config:
        use_cache = True

    class Plain(nn.Module):
        config = Config()

        def __init__(self):
            super().__init__()
            self.down = nn.Linear(2, 2)

        def forward(self, input_ids):  # no position_ids either
            assert not self.config.use_cache
            return self.down(input_ids[..., None].float().expand(-1, -1, 2))

    model = Plain()
    batch = {"input_ids": torch.ones(1, 2), "position_ids": torch.zeros(1, 2)}
    got = collect_moments(model, ["down"], [batch], None)["down"]
    assert got.sum.tolist() == [[2.0, 2.0], [2.0, 2.0]] and model.config.use_cache


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.ones(1, 2, dtype=torch.int64),
    "position_ids": torch.arange(2)[None], "attention_mask": torch.zeros(1, 2)}]])  # fmt: skip
def test_an_empty_corpus(batches):
    for budget in (None, 5):
        with pytest.raises(BudgetNotMet, match="no key at all") as bad:
            moments(Tiny(), batches, budget, allow_fewer=True)
        assert (bad.value.found, bad.value.wanted) == (0, budget or 1)


def test_a_short_corpus_says_how_many_there_were(caplog):
    batches = list(bucket(DOCUMENTS, 64))
    with pytest.raises(BudgetNotMet, match=rf"{TOTAL} keys.*{TOTAL + 1} were.*allow_fewer") as bad:
        moments(Tiny(), batches, TOTAL + 1)
    assert (bad.value.found, bad.value.wanted) == (TOTAL, TOTAL + 1)
    with caplog.at_level(logging.WARNING):
        got = moments(Tiny(), batches, TOTAL + 1, allow_fewer=True)
    assert got[paths(0)[0]].count == TOTAL and f"only {TOTAL}" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_keys_are_named(value):
    model = Tiny()
    with torch.no_grad():
        model.embed.weight[49] = value
    good, bad = [1, 2, 3], [1, 49, 49, 2]
    with pytest.raises(NonFinite, match=r"2 of 4 keys of 'layers\.0\.down_proj'.* batch 1"):
        if value == float("inf"):  # tanh would make it finite: put it in after
            model.layers[0].up.register_forward_hook(
                lambda module, args, out: out.masked_fill(~args[0].isfinite()[..., :1], value)
            )
            torch_tanh = torch.tanh
            torch.tanh = lambda x: x
            try:
                moments(model, bucket([good, bad], 4, window=1))
            finally:
                torch.tanh = torch_tanh
        else:
            moments(model, bucket([good, bad], 4, window=1))
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_non_finite_keys_that_are_masked_do_no_harm():
    model = Tiny()
    with torch.no_grad():
        model.embed.weight[0] = float("nan")  # the id of padding
    batches = bucket([[1, 2, 3], [4]], 100, max_padding=0.9)
    assert moments(model, batches)[paths(0)[0]].second_moment.isfinite().all()


def test_squares_that_overflow_are_named():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(2, 2)

        def forward(self, x):
            return self.down(x)

    with pytest.raises(NonFinite, match="overflow"):
        collect_moments(Large(), ["down"], [{"x": torch.full((1, 2), 1e30)}], None)
    got = collect_moments(Large(), ["down"], [{"x": torch.full((1, 2), 1e30)}], None, dtype=torch.float64)
    assert got["down"].second_moment.isfinite().all()
    with pytest.raises(BadInput, match=r"'down'.*batch 0.*2"):
        collect_moments(Large(), ["down"], [{"x": torch.ones(1, 3)}], None)
    with pytest.raises(ValueError, match="floating point"):
        collect_moments(Large(), ["down"], [{"x": torch.ones(1, 2).long()}], None)


def test_a_width_that_changes_is_named():
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Identity()

        def forward(self, x):
            return self.down(x)

    with pytest.raises(BadInput, match=r"'down'.*batch 1.*must be 2"):
        collect_moments(Any(), ["down"], [{"x": torch.ones(1, 2)}, {"x": torch.ones(1, 3)}], None)


@pytest.mark.parametrize("budget", [0, -5, 2.5, True, {}, {"layers.0.down_proj": 5}])
def test_bad_budgets_are_refused_before_the_model_runs(budget):
    model = Tiny()
    with pytest.raises(BadInput):
        moments(model, bucket(DOCUMENTS, 64), budget)
    assert model.seen == []


def test_bad_modules_are_named():
    with pytest.raises(BadInput, match="nowhere"):
        moments(Tiny(), [], 5, ["nowhere"])
    with pytest.raises(BadInput, match="unused"):
        moments(Tiny(), bucket(DOCUMENTS, 64), None, ["unused"])
    with pytest.raises(ValueError, match="list"):
        moments(Tiny(), bucket(DOCUMENTS, 64), None, "layers.0.down_proj")


def test_sums_of_bfloat16_keys_are_float32():
    model = Tiny(dtype=torch.bfloat16)
    got = collect_moments(model, paths(0), bucket(DOCUMENTS, 64), None)[paths(0)[0]]
    assert got.dtype == torch.float32
    wanted = literal.second_moment(keys_of(model, DOCUMENTS, 0).double().numpy())
    torch.testing.assert_close(got.second_moment.double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)


def test_a_forward_in_bfloat16_multiplies_so_and_is_summed_as_ever():
    model = Tiny(dtype=torch.float32)

    def bfloat(projection, x):  # as autocast multiplies, by hand
        return nn.functional.linear(x.bfloat16(), projection.weight.bfloat16(), projection.bias.bfloat16())

    def literal_keys(layer):
        rows = []
        for document in DOCUMENTS:
            x = model.embed(torch.tensor(document)) + model.positions(torch.arange(len(document)))
            for block in model.layers[: layer + 1]:
                key = torch.tanh(bfloat(block.up, x))
                x = x + bfloat(block.down_proj, key)
            rows.append(key)
        return torch.cat(rows)

    plain = moments(model, bucket(DOCUMENTS, 128))
    with torch.autocast("cpu", torch.bfloat16):  # the caller's own, which has no part in either
        narrow = moments(model, bucket(DOCUMENTS, 128), forward=torch.bfloat16)
        again = moments(model, bucket(DOCUMENTS, 128))
    for layer in (0, 2):
        name = paths(layer)[0]
        keys = literal_keys(layer)
        assert keys.dtype == torch.bfloat16
        wanted = torch.from_numpy(literal.second_moment(keys.detach().double().numpy()))
        got = narrow[name].second_moment
        assert (got - wanted).norm() < 1e-4 * wanted.norm()  # another shape of batch may round a key otherwise
        assert 3e-4 * wanted.norm() < (got - plain[name].second_moment).norm() < 3e-2 * wanted.norm()
        assert torch.equal(again[name].sum, plain[name].sum)
    assert not torch.is_autocast_enabled("cpu")
