from __future__ import annotations

import itertools

import pytest

from fastmemit.errors import BadConfig
from fastmemit.experiments.sweep import (
    TABLE_1,
    Forecast,
    Grid,
    Place,
    Rates,
    parse_batches,
    parse_methods,
    parse_multipliers,
    parse_seeds,
    parse_shard,
)
from fastmemit.methods import CONFIGS, EditConfig, MemitConfig


def test_the_default_is_table_1() -> None:
    places = Grid().places()
    assert TABLE_1 == {1: 1000, 16: 10, 64: 5, 256: 5, 1024: 3}
    # Five batch sizes of EMMET and MEMIT, one of ROME, at six multipliers.
    assert len(places) == 6 * (5 + 5 + 1)
    assert {p.multiplier for p in places} == {1.0, 2.0, 3.0, 4.0, 10.0, None}
    assert {p.batch_size for p in places if p.method == "rome"} == {1}
    assert len({place.key for place in places}) == len(places)


def test_cells_that_share_statistics_follow_one_another() -> None:
    grid = Grid(batches={1: 2, 4: 1}, seeds=(0, 3), bos=(True, False), variants=({}, {"clamp": 2.0}))
    shared = [(place.seed, place.bos, place.multiplier) for place in grid.places()]
    changes = sum(one != other for one, other in itertools.pairwise(shared))
    assert changes == len(set(shared)) - 1


@pytest.mark.parametrize(
    ("place", "key"),
    [
        (Place("memit", 16, 10, 2.0), "memit/b16x10/x2"),
        (Place("emmet", 1, 1000, None), "emmet/b1x1000/full"),
        (
            Place("memit", 4, 2, 0.02, (("relative_ridge", 0.001), ("shrinkage", "oas"))),
            "memit/b4x2/x0.02+relative_ridge=0.001+shrinkage=oas",
        ),
        (Place("emmet", 4, 2, 1.0, (("layers", (3,)),), bos=False, seed=2), "emmet/b4x2/x1+layers=[3]-bos/seed2"),
    ],
)
def test_a_cell_is_called_by_all_that_tells_it_from_others(place: Place, key: str) -> None:
    assert place.key == key
    assert place.as_dict()["settings"] == dict(place.settings)


def test_the_way_to_a_multiplier_has_all_smaller_ones_of_the_plan() -> None:
    grid = Grid(multipliers=(1.0, 10.0, None), snapshots=(0.5, 2.0, 10.0))
    assert grid.way(1.0) == [0.5, 1.0]
    assert grid.way(10.0) == [0.5, 1.0, 2.0, 10.0]
    assert grid.way(None) == [0.5, 1.0, 2.0, 10.0, None]


def test_lists_are_read_as_they_are_written() -> None:
    assert parse_multipliers("10, full,0.5,1e1 ".replace(",1e1 ", "")) == (0.5, 10.0, None)
    assert parse_methods("memit, rome") == ("memit", "rome")
    assert parse_batches(None, None) == TABLE_1
    assert parse_batches("16,1", None) == {16: 10, 1: 1000}
    assert parse_batches("4,64", "2,3") == {4: 2, 64: 3}
    assert parse_batches("1,4", "2") == {1: 2, 4: 2}
    assert parse_seeds("3,0") == (3, 0)
    assert parse_shard("2/4") == (2, 4) and parse_shard(None) == (1, 1)


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (parse_multipliers, "1,two", "'two'"),
        (parse_multipliers, "0", "'0'"),
        (parse_multipliers, "inf", "'inf'"),
        (parse_multipliers, "nan", "'nan'"),
        (parse_multipliers, "2,2.0", "twice"),
        (parse_multipliers, "1,,2", "empty part"),
        (parse_multipliers, "", "empty part"),
        (parse_methods, "memit,mend", "'mend'"),
        (parse_methods, "rome,rome", "twice"),
        (parse_seeds, "-1", "'-1'"),
        (parse_seeds, "0,0", "twice"),
        (parse_shard, "0/4", "'0/4'"),
        (parse_shard, "5/4", "'5/4'"),
        (parse_shard, "2", "'2'"),
    ],
)
def test_a_bad_list_is_refused(parse, text: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        parse(text)


@pytest.mark.parametrize(
    ("sizes", "counts", "said"),
    [
        ("16", "1,2", "2 numbers of batches for 1 batch sizes"),
        ("16", "0", "'0'"),
        ("a", "1", "'a'"),
        ("1,1", "2,3", "twice"),
        ("7", None, "no batches of 7; say how many of each size with --num-batches"),
        ("4,4", "2", "twice"),
    ],
)
def test_bad_batches_are_refused(sizes: str | None, counts: str | None, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        parse_batches(sizes, counts)


def test_settings_of_ones_own_stand_for_a_method() -> None:
    def usual(method: str | EditConfig) -> EditConfig:
        if isinstance(method, EditConfig):
            return method
        return CONFIGS[method](layers=(5,) if method == "emmet" else (3, 4), clamp=0.75)

    own = MemitConfig(layers=(3, 4), clamp=1.0, weight=5.0)
    grid = Grid(
        methods=(own, "emmet"),
        batches={16: 2},
        multipliers=(1.0,),
        variants=({}, {"relative_ridge": 0.1}),
        settings={"emmet": {"lambda_e": 0.3}},
    ).of_model(usual)
    # What the model's own settings have too is no part of a name.
    assert [place.key for place in grid.places()] == [
        "memit/b16x2/x1+clamp=1+weight=5",
        "emmet/b16x2/x1+lambda_e=0.3",
        "memit/b16x2/x1+clamp=1+weight=5+relative_ridge=0.1",
        "emmet/b16x2/x1+lambda_e=0.3+relative_ridge=0.1",
    ]
    first = grid.places()[0]
    assert usual("memit").replaced(dict(first.settings)) == own


def test_a_forecast_adds_up_what_cells_share() -> None:
    grid = Grid(methods=("memit", "rome"), batches={1: 10, 4: 5}, multipliers=(2.0, None), seeds=(0, 1))
    places = grid.places()
    targets = {place.key: place.method for place in places}  # ROME's settings are not MEMIT's
    rates = Rates(key=0.5, target=10.0, alone=3.0, together=1.0)
    found = Forecast(grid, places, targets, rates, full=100.0, width=8)
    assert found.seconds() == {
        "statistics": 2 * 100 * 0.5,  # one pass for each seed, no further than the corpus
        "target vectors": (20 + 10) * 10.0,
        "editing and scoring": 20 * 1.0 + 4 * (2 * 10 * 3.0 + 20 * 1.0) * 1.2,
    }
    assert found.describe() == (
        "12 cells, 160 records to edit and score: about 13 min here (statistics 2 min, target vectors 5 min, editing "
        "and scoring 7 min; measured with a few records just now)"
    )
    assert found.flags_for(3600) == ""
    # A quarter of the time for the corpus, half as many batches.
    assert found.flags_for(430) == "--batch-sizes 1,4 --num-batches 5,2"
    assert found.flags_for(120) == "--batch-sizes 1 --num-batches 1 --full-keys 60"
    assert found.flags_for(1e-3) == ""
