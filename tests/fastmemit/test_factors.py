"""Factors of A: what it is made of, and that each kind is made once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastcov
from fastcov.errors import BadInput
from fastcov.linalg import FactorCache
from fastmemit.errors import BadConfig
from fastmemit.methods import MemitConfig, find_config
from fastmemit.methods.base import Draft, averaged_keys
from fastmemit.statistics import Statistics, StatisticsStore
from reference import closed_form as literal
from reference import shrinkage as literal_shrinkage
from tiny_editors import FACTS, tiny_corpus, tiny_editor


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    editor = tiny_editor(tmp_path_factory.mktemp("factors"), layers=None)
    editor.precompute(tiny_corpus(), multiplier=4, layers=(0, 1), quartic=True)
    return editor


def fresh(editor, capacity=None):
    """A store that holds no factor, with the statistics of the editor's."""
    store = StatisticsStore(editor.adapter, editor.tokenizer, editor._stack, Path("nowhere"))
    store._held.capacity = capacity
    store.use(editor.store.covering((0, 1)))
    return store


def setting(editor, **values):
    return find_config(editor.adapter, "memit", {"layers": (0, 1), **values})


def factor(editor, store=None, layer=1, **values):
    config = setting(editor, **values)
    return (store or fresh(editor)).factor(config, layer)


def stored(editor, layer=1):
    used = editor.store.covering((0, 1))
    return used.moment(editor.adapter.projection_name(layer))


@pytest.mark.parametrize("shrinkage", ["none", "oas", "ledoit-wolf"])
@pytest.mark.parametrize("relative_ridge", [0.0, 1e-2])
def test_a_factor_is_that_of_the_literal_matrix(editor, shrinkage, relative_ridge):
    moment = stored(editor)
    C = moment.second_moment.double().numpy()
    intensity = {"none": lambda _: 0.0, "oas": fastcov.oas, "ledoit-wolf": fastcov.ledoit_wolf}
    ridge = 0.01 + relative_ridge * 20 * float(np.mean(np.diag(C)))
    C = literal_shrinkage.shrunk(C, intensity[shrinkage](moment))
    wanted = np.linalg.cholesky(literal.regularised(C, 20.0, ridge))
    got = factor(editor, weight=20.0, ridge=0.01, relative_ridge=relative_ridge,
                 shrinkage=shrinkage)  # fmt: skip
    assert got.jitter == 0
    torch.testing.assert_close(got.L, torch.from_numpy(wanted), rtol=1e-7, atol=1e-9)


def test_the_default_is_of_the_sum_in_float64_bit_for_bit(editor):
    moment = stored(editor)
    A = moment.lower.double() * (20.0 / moment.count)
    A.diagonal().add_(0.01)
    wanted = fastcov.factorize(A)
    assert torch.equal(factor(editor, weight=20.0, ridge=0.01).L, wanted.L)


def test_the_stored_triangle_is_enough(editor, monkeypatch):
    """No mean and no mirrored copy of it is made on the way to A."""
    for name in ("second_moment", "sum"):
        monkeypatch.delattr(fastcov.SecondMoment, name)
    factor(editor)


@pytest.fixture
def made(monkeypatch):
    """A list that each factorisation of A lengthens."""
    found = []
    real = fastcov.factorize
    monkeypatch.setattr(fastcov, "factorize", lambda A, **kw: found.append(1) or real(A, **kw))
    return found


@pytest.mark.parametrize(("room", "batches"), [(None, [3, 0, 0]), (3, [3, 0, 0]), (2, [3, 1, 2]), (1, [3, 3, 3])])
def test_layers_are_factorised_once_whatever_the_number_of_batches(tmp_path, made, room, batches):
    """Three layers are walked through again and again; with room for two half of what is asked for is held."""
    editor = tiny_editor(tmp_path, layers=(0, 1, 2))
    editor.store._held.capacity = None if room is None else room * 64 * 64 * 8
    for fact, wanted in zip(FACTS, batches, strict=True):
        made.clear()
        editor.edit([fact], "memit", layers=(0, 1, 2), steps=1, verify=False)
        assert len(made) == wanted


def test_room_is_what_the_device_has_free(editor, made, monkeypatch):
    size, kinds = 64 * 64 * 8, [{"weight": float(n)} for n in range(1, 6)]
    # A factor takes two of its size while it is made; a quarter of what is free or held stays free.
    free = 4 * size
    monkeypatch.setattr("fastcov.linalg.free_memory", lambda place: free - size * len(store._held))
    store = fresh(editor)
    for kind in kinds:
        factor(editor, store, **kind)
    assert [key[1][0] for key in store._held] == [4.0, 5.0]  # what other settings need goes first, the oldest before
    free = 0
    factor(editor, store)
    assert len(store._held) == 1


def test_a_factor_for_which_a_device_has_no_room_is_made_on_the_cpu(editor, monkeypatch, caplog):
    """The device meta holds no numbers, so what is solved with was made elsewhere."""
    size, free = 64 * 64 * 8, {"meta": 2 * 64 * 64 * 8 - 1, "cpu": 1e9}
    monkeypatch.setattr("fastcov.linalg.free_memory", lambda place: free[place.type])
    store = fresh(editor)
    monkeypatch.setattr(store, "_place", lambda layer: torch.device("meta"))
    found = factor(editor, store)
    assert found.device.type == "cpu" and torch.equal(found.L, factor(editor).L)
    assert "meta has 0.00 GB free, and a factor of width 64 takes 0.00 GB while it is made" in caplog.text
    assert factor(editor, store) is found  # held there
    space = store.null_space(find_config(editor.adapter, "alphaedit", {"layers": (1,), "null_relative": 0.5}), 1)
    assert space.device.type == "cpu"
    for capacity, room in ((None, 2 * size), (1, 0)):  # room for one; or whoever set a limit has chosen the device
        free["meta"] = room
        cache = FactorCache()
        cache.capacity = capacity
        assert cache.make_room((1,), "kind", torch.device("meta"), 64, 2) == torch.device("meta")


def test_each_kind_is_made_once_and_held_until_there_is_no_room(editor, made):
    kinds = [{}, {"weight": 3.0}, {"ridge": 0.1}, {"relative_ridge": 0.1}, {"shrinkage": "oas"}]
    store = fresh(editor)
    first = [factor(editor, store, **kind) for kind in kinds]
    again = [factor(editor, store, **kind) for kind in kinds]
    assert len(made) == len(kinds) and all(a is b for a, b in zip(first, again, strict=True))
    small = fresh(editor, capacity=first[0].nbytes)
    assert factor(editor, small) is factor(editor, small)
    factor(editor, small, ridge=0.1)
    factor(editor, small)
    assert len(made) == len(kinds) + 3
    store.use(dataclasses.replace(editor.store.current))
    factor(editor, store)
    assert len(made) == len(kinds) + 4


def test_fourth_powers_are_summed_only_where_they_are_asked_for(tmp_path):
    editor = tiny_editor(tmp_path)
    assert stored(editor).quartic is None and "quartic" not in editor.statistics.provenance
    assert factor(editor, shrinkage="oas").jitter == 0
    with pytest.raises(BadInput, match=r"quartic=True \(precompute --quartic\)"):
        factor(editor, shrinkage="ledoit-wolf")
    settings = MemitConfig(layers=(0, 1), shrinkage="ledoit-wolf")
    editor.precompute(tiny_corpus(), multiplier=4, method=settings)  # settings that need it switch it on
    assert stored(editor).quartic is not None
    assert factor(editor, shrinkage="ledoit-wolf").jitter == 0
    used = editor.statistics
    editor.precompute(tiny_corpus(), multiplier=4, layers=(0, 1))
    assert stored(editor).quartic is None  # each stored under what it is
    assert editor.precompute(tiny_corpus(), multiplier=4, layers=(0, 1), quartic=True).paths == used.paths
    editor.precompute(tiny_corpus(), multiplier=3, layers=(0, 1))  # the newest, which the next process finds
    later = tiny_editor(tmp_path, layers=None).store
    assert later.find((0, 1)).provenance["multiplier"] == 3
    assert later.needed(settings).paths == used.paths


def space(editor, store, layer=1, **values):
    config = find_config(editor.adapter, "alphaedit", {"layers": (0, 1), **values})
    return store.null_space(config, layer)


@pytest.mark.parametrize("kind", [{"null_relative": 0.5}, {"null_threshold": 0.3}])
def test_a_null_space_is_that_of_the_literal_projector(editor, kind):
    C = stored(editor).second_moment.double().numpy()
    limit = kind.get("null_threshold") or 0.5 * C.diagonal().mean()
    found = space(editor, fresh(editor), **kind)
    wanted = literal.null_projector(C, limit)
    assert 0 < found.rank < 64 and found.threshold == pytest.approx(limit)
    torch.testing.assert_close(found.projector(), torch.from_numpy(wanted))


def test_a_null_space_is_made_once_for_each_layer_and_threshold(editor, monkeypatch):
    made = []
    real = fastcov.null_space
    monkeypatch.setattr(fastcov, "null_space", lambda C, **kw: made.append(kw) or real(C, **kw))
    store = fresh(editor)
    kinds = [{}, {"layer": 0}, {"null_threshold": 0.3}, {"null_relative": 0.5}]
    first = [space(editor, store, **kind) for kind in kinds]
    again = [space(editor, store, **kind) for kind in kinds]
    # What a null space does not depend on makes none.
    again += [space(editor, store, l2=1.0, clamp=3.0)]
    assert len(made) == len(kinds)
    assert all(a is b for a, b in zip([*first, first[0]], again, strict=True))
    store.use(dataclasses.replace(editor.store.current))
    space(editor, store)
    assert len(made) == len(kinds) + 1


def test_factors_and_null_spaces_share_the_room(editor):
    one = space(editor, fresh(editor), null_relative=0.5)
    assert one.nbytes == 8 * (one.basis.numel() + 64)
    small = fresh(editor, capacity=one.nbytes)
    kept = space(editor, small, null_relative=0.5)
    factor(editor, small)
    assert space(editor, small, null_relative=0.5) is not kept


@pytest.mark.parametrize(("multiplier", "ridge"), [(1, 0.1), (4, 0.0)])
def test_few_keys_get_a_ridge(tmp_path, multiplier, ridge):
    editor = tiny_editor(tmp_path)
    editor.precompute(tiny_corpus(), multiplier=multiplier, layers=(0, 1))
    assert torch.equal(factor(editor).L, factor(editor, relative_ridge=ridge).L)
    assert not torch.equal(factor(editor).L, factor(editor, relative_ridge=0.1 - ridge).L)
    edit = editor.plan(FACTS[:2], "memit", layers=(0, 1), steps=2)
    assert edit.delta.provenance["settings"]["relative_ridge"] == ridge


@pytest.mark.parametrize(("layers", "ridge"), [((0,), 0.0), ((1,), 0.1), ((0, 1), 0.1)])
def test_layers_of_unlike_widths_come_to_one_ridge(layers, ridge):
    """A corpus of 300 keys ended before four widths of 128, but not before four of 64."""
    adapter = SimpleNamespace(d_k={0: 64, 1: 128}.__getitem__)
    used = Statistics({}, {"multiplier": 4.0, "budget": 512, "keys": 300})
    config = MemitConfig(layers=layers)
    assert used.resolved(adapter, config).relative_ridge == ridge


def test_the_identity_in_the_place_of_c_asks_for_no_statistics(tmp_path):
    editor = tiny_editor(tmp_path, layers=None)
    got = editor.store.factor(
        setting(editor, covariance="identity", weight=20.0, ridge=0.01, relative_ridge=1e-2), layer=1
    )
    wanted = literal.regularised(np.eye(64), 20.0, 0.01 + 1e-2 * 20)
    torch.testing.assert_close(got.L @ got.L.T, torch.from_numpy(wanted), rtol=1e-12, atol=0)
    config = find_config(editor.adapter, "rome", {"layers": (1,), "covariance": "identity", "steps": 3})
    edit = editor.edit(FACTS[:1], config)
    # Delta = r k^T / (k^T k): the change reads nothing but the key's own direction.
    (name,) = edit.delta.factors
    right = edit.delta.factors[name][1][:, 0].double()
    edit.undo()
    key = averaged_keys(Draft(editor.workspace, config).context_outputs(1, list(FACTS[:1])).keys)[:, 0]
    assert float(torch.cosine_similarity(right, key, dim=0).abs()) > 1 - 1e-6
    assert edit.delta.provenance["statistics"] == {} and editor.statistics is None
    with pytest.raises(BadConfig, match=r"shrinkage='oas' would change nothing, for the identity shrinks to itself"):
        find_config(editor.adapter, "memit", {"covariance": "identity", "shrinkage": "oas"})
