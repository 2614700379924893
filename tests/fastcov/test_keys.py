from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcov import BadInput, FastcovError, KeyHooks
from fastcov.hooks import key_rows
from reference.tiny import Tiny, paths

IDS = {"input_ids": torch.tensor([[1, 2, 3]]), "position_ids": torch.arange(3)[None]}


def hooks_on(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_rows_are_made_without_a_copy():
    x = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    ((rows, kept),) = key_rows(x, mask)
    assert rows.shape == (6, 4) and rows.data_ptr() == x.data_ptr()
    assert kept.dtype == torch.bool and kept.tolist() == [1, 1, 0, 0, 1, 0]
    assert [rows.shape for rows, _ in key_rows(x[0, 0])] == [(1, 4)]


def test_a_transposed_batch_is_viewed_and_rows_stay_with_their_mask():
    base = torch.randn(5, 3, 4)
    x = base.transpose(0, 1)  # (3, 5, 4)
    mask = torch.rand(3, 5) < 0.5
    ((rows, kept),) = key_rows(x, mask)
    assert rows.data_ptr() == base.data_ptr()
    assert sorted(rows[kept].tolist()) == sorted(x[mask].tolist())


def test_the_mask_of_a_batch_whose_keys_are_flat_already():
    mask = torch.tensor([[1, 0], [1, 1]])
    ((_, kept),) = key_rows(torch.zeros(4, 3), mask)
    assert kept.tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("view", "pieces"),
    [
        (lambda x: x, 1),
        (lambda x: x[0, 0, 0], 1),
        (lambda x: x.permute(2, 0, 1, 3), 1),
        (lambda x: x[..., 1:3], 1),
        (lambda x: x[:, :, 1:], 6),  # 2 x 3 sequences, each a matrix
        (lambda x: x[:, 1:], 2),
        (lambda x: x[:1, :, 1:], 3),
        (lambda x: x[:, :, ::2].transpose(0, 2), 1),
        (lambda x: x[:0], 1),
        (lambda x: x[:1, :1, :1].expand(2, 3, 4, 5), 1),
    ],
)
def test_rows_are_views_in_as_few_pieces_as_the_strides_allow(view, pieces):
    x = view(torch.randn(2, 3, 4, 5))
    mask = torch.rand(x.shape[:-1]) < 0.5
    got = list(key_rows(x, mask))
    assert len(got) == pieces
    for rows, kept in got:
        assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert rows.dim() == 2 and kept.dtype == torch.bool and kept.shape == rows.shape[:1]
    every = torch.cat([rows for rows, _ in got])
    assert sorted(every.tolist()) == sorted(x.reshape(-1, x.shape[-1]).tolist())
    some = torch.cat([rows[kept] for rows, kept in got])
    assert sorted(some.tolist()) == sorted(x[mask].tolist())
    assert [kept for _, kept in key_rows(x)] == [None] * pieces


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(2, 4), torch.ones(2, 3, 4)])
def test_rows_need_a_mask_that_fits(mask):
    with pytest.raises(BadInput, match=r"\(2, 3, 4\)"):
        next(key_rows(torch.zeros(2, 3, 4), mask))
    with pytest.raises(BadInput, match="scalar"):
        next(key_rows(torch.tensor(1.0)))


def test_hooks_read_inputs_and_nothing_runs_after_the_last():
    model = Tiny()
    got = {}
    with KeyHooks(model, paths(0, 1), got.__setitem__) as hooks:
        assert hooks_on(model) == 2
        hooks.run(IDS)
        hooks.run({**IDS, "attention_mask": torch.ones(1, 3)})
    assert hooks_on(model) == 0
    assert list(got) == paths(0, 1)
    assert got[paths(1)[0]].shape == (1, 3, 8)
    assert model.layers[0].down_proj.calls == 2
    assert model.layers[1].up.calls == 2
    assert model.layers[1].down_proj.calls == 0  # not even its own product
    assert model.layers[2].up.calls == 0 and model.head.calls == 0


def test_the_order_of_the_names_does_not_matter():
    model, seen = Tiny(), []
    with KeyHooks(model, paths(1, 0), lambda name, x: seen.append(name)) as hooks:
        hooks.run(IDS)
    assert seen == paths(0, 1) and model.layers[1].down_proj.calls == 0


def test_a_forward_of_somebody_else_is_left_alone():
    model, seen = Tiny(), []
    with KeyHooks(model, paths(0), lambda *key: seen.append(key)) as hooks:
        assert model(**IDS).shape == (1, 3, 50)
        assert seen == []
        hooks.run(IDS)
    assert len(seen) == 1


def test_keys_by_keyword_and_after_other_hooks():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(2, 2)

        def forward(self, x):
            return self.down(input=x)

    model, got = Keyword(), []
    with KeyHooks(model, ["down"], lambda name, x: got.append(x)) as hooks:
        hooks.run({"x": torch.tensor([[1.0, 2.0]])})
    assert got[0].tolist() == [[1.0, 2.0]] and not got[0].requires_grad


def test_a_module_that_never_runs_is_named():
    model = Tiny()
    with KeyHooks(model, [*paths(0), "unused"], lambda *key: None) as hooks, pytest.raises(BadInput, match="'unused'"):
        hooks.run(IDS)
    assert model.head.calls == 1 and hooks_on(model) == 0


def test_a_module_that_runs_twice_is_refused():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(layer, nn.Tanh(), layer), nn.Linear(2, 2))

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net(x)

    with (
        KeyHooks(Wrapped(), ["net.0.0", "net.1"], lambda *key: None) as hooks,
        pytest.raises(FastcovError, match="twice"),
    ):
        hooks.run({"x": torch.zeros(1, 2)})


def test_hooks_are_removed_when_the_reader_or_the_model_fails():
    model = Tiny()

    def fail(*key):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"), KeyHooks(model, paths(1), fail) as hooks:
        hooks.run(IDS)
    assert hooks_on(model) == 0
    with pytest.raises(IndexError), KeyHooks(model, paths(1), print) as hooks:
        hooks.run({**IDS, "input_ids": torch.tensor([[99, 1, 1]])})
    assert hooks_on(model) == 0


def test_unknown_paths_get_near_matches():
    with pytest.raises(BadInput, match=r"'layers\.1\.down_porj'.*'layers\.1\.down_proj'"):
        KeyHooks(Tiny(), ["layers.1.down_porj"], print)
    with pytest.raises(BadInput, match="named_modules"):
        KeyHooks(Tiny(), ["zzzzzz"], print)


def test_no_path_or_one_module_twice_is_refused():
    for bad in ([], "layers.0.up"):
        with pytest.raises(ValueError, match="list of at least one"):
            KeyHooks(Tiny(), bad, print)
    model = Tiny()
    model.alias = model.layers[0].down_proj
    for bad in (paths(0, 0), [*paths(0), "alias"]):
        with pytest.raises(ValueError, match="same module"):
            KeyHooks(model, bad, print)


def test_hooks_that_are_off_do_not_run():
    hooks = KeyHooks(Tiny(), paths(0), print)
    with pytest.raises(FastcovError, match="with statement"):
        hooks.run(IDS)
    with hooks, pytest.raises(FastcovError, match="already"):
        hooks.__enter__()
