"""The arithmetic of plans, by hand, and beside runs that were recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmemit.capacity import FULL_KEYS, MACHINES, SHAPES, Machine, Shape, plan, plan_edit
from fastmemit.errors import BadConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Two blocks, d 4, d_k 8, two heads of width 2 on one of keys and values, 10 tokens.
SMALL = Shape(2, 4, 8, 2, 1, 2, 10, gated=True, tied=False)
ROUND = Machine(
    flops=1000.0,
    share=0.5,
    float64=100.0,
    memory=1e9,
    bandwidth=10.0,
    link=16.0,
    disk=2.0,
    tokenise=4.0,
    dtype_bytes=2,
    source="made up",
)


def test_a_plan_by_hand() -> None:
    made = plan(SMALL, ROUND, [0, 1], 100, processes=2, batch_tokens=30, length=9)
    # 2 operations for each of 256 weights; 4 x 2 x 2 for each of 5 tokens on average, in 2 blocks
    assert made.flops == 100 * (2 * 256 + 16 * 5 * 2)
    assert made.triangles == 100 * 2 * 8 * 9
    # 4 batches, 2 for each process; half of 1000 operations a second
    assert made.seconds["model"] == (2 / 4) * (67200 + 14400) / 500
    assert made.seconds["text"] == 25
    triangle = 36 * 4
    assert made.read == 2 * (256 * 2 + 2 * 2 * triangle)
    assert made.seconds["memory"] == made.read / 10
    # a ring of two sends half of it twice; a sixteenth more than the triangle goes
    assert made.sent == 2 * triangle * 17 / 16
    assert made.seconds["adding up"] == made.sent / 16
    assert made.seconds["writing"] == 2 * triangle / 2
    assert made.total == made.read / 10 + made.sent / 16 + triangle
    assert (made.weights, made.weights_run) == (368 * 2, (256 + 40) * 2)
    assert made.activations == 30 * (3 * 8 + 3 * 4) * 2
    assert (made.moments, made.factor, made.file) == (2 * 64 * 4, 64 * 8, triangle)
    assert made.memory == 592 + 2160 + 512
    assert made.factor_seconds == 512 / 3 / 100


def test_one_process_sends_nothing_and_a_short_run_has_a_small_batch() -> None:
    made = plan(SMALL, ROUND, [0], 10)
    assert made.sent == 0 and made.activations == 10 * (3 * 8 + 3 * 4) * 2
    more = plan(SMALL, ROUND, [0], 10, processes=5)  # a single batch cannot be divided
    assert more.seconds["model"] == made.seconds["model"]


def test_a_model_of_seventy_billion() -> None:
    shape = SHAPES["llama-3-70b"]
    # 80 x (2 x 8192^2 + 2 x 8192 x 1024 + 3 x 8192 x 28672) + 2 x 128256 x 8192
    assert shape.weights == 80 * 855_638_016 + 2 * 1_050_673_152 == 70_552_387_584
    made = plan(shape, MACHINES["h100"], range(4, 9), 286_720)
    assert made.moments / 5 == 28672**2 * 4 == 3_288_334_336
    assert made.file == 28672 * 28673 // 2 * 4 == 1_644_224_512
    assert made.factor == 6_576_668_672


def test_the_recorded_collect_took_what_is_counted() -> None:
    """Operations as torch counted them while SmolLM2 ran, and the rates that the plan takes."""
    recorded = json.loads((RESULTS / "collect-2core-zen3.json").read_text())
    row = next(r for r in recorded["rows"] if r["contender"] == "fastcov.collect_moments")
    counted = row["gflops"] * row["p50"] * 1e9
    machine = MACHINES["2-core"]
    # The recorded text: articles of about 1,650 tokens as the model saw them.
    made = plan(SHAPES["smollm2"], machine, range(4, 9), row["n"], length=1650, batch_tokens=4096)
    assert made.flops + made.triangles == pytest.approx(counted, rel=0.05)
    assert made.seconds["model"] == pytest.approx(row["p50"], rel=0.08)
    assert machine.share == pytest.approx(row["share"], abs=0.005)
    assert machine.flops / 1e9 == pytest.approx((row["peak_before"] + row["peak_after"]) / 2, rel=0.01)
    factor = json.loads((RESULTS / "factor-2core-zen3.json").read_text())["rows"]
    rate = max(r["gflops"] for r in factor if r["contender"] == "fastcov factorize")
    assert machine.float64 / 1e9 == pytest.approx(rate, rel=0.01)
    rates = json.loads((RESULTS / "scale-2core-zen3.json").read_text())["rates"]
    assert machine.tokenise == pytest.approx(rates["tokens_per_second"], rel=0.05)
    assert machine.disk == pytest.approx(rates["write_bytes_per_second"], rel=0.05)
    assert machine.link == pytest.approx(rates["add_up_bytes_per_second"], rel=0.05)


@pytest.mark.parametrize("layers", [[], [-1], [2]])
def test_layers_that_the_model_does_not_have(layers: list[int]) -> None:
    with pytest.raises(BadConfig, match="are not among the 2 of this model; name some from 0 to 1"):
        plan(SMALL, ROUND, layers, 10)


@pytest.mark.parametrize("name", ["processes", "batch_tokens", "length"])
def test_numbers_below_one(name: str) -> None:
    with pytest.raises(BadConfig, match="at least 1, but one is 0"):
        plan(SMALL, ROUND, [0], FULL_KEYS, **{name: 0})


def test_the_page_says_what_is_counted() -> None:
    """docs/guide/scale.md: its tables are this module's numbers."""
    page = (Path(__file__).parents[2] / "docs" / "guide" / "scale.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:-1]]
        for line in page.splitlines()
        if line.startswith("| ") and (cells := line[1:].split("|"))
    }
    shape, machine, layers = SHAPES["llama-3-70b"], MACHINES["h100"], range(4, 9)
    plans = [plan(shape, machine, layers, keys, processes=n) for n in (1, 8) for keys in (286_720, 44_000_000)]
    assert rows["keys of each layer"] == [f"{p.keys:,}" for p in plans]
    for name, step in {
        "the model at work, seconds": "model",
        "reading and tokenising, beside it": "text",
        "adding up": "adding up",
        "writing five files": "writing",
    }.items():
        said = [float(cell.replace(",", "")) for cell in rows[name]]
        assert said == pytest.approx([p.seconds[step] for p in plans], rel=0.01, abs=1e-3)
    said = [float(cell.replace(",", "")) for cell in rows["in all, seconds"]]
    assert said == pytest.approx([p.total for p in plans], rel=0.01)
    for name, counted in (
        ("forward passes, operations", [p.flops for p in plans[:2]]),
        ("triangles, operations", [p.triangles for p in plans[:2]]),
    ):
        assert [float(cell) for cell in rows[name][:2]] == pytest.approx(counted, rel=0.01)
    made = plans[0]
    for start, counted in {
        "the whole model in": made.weights,
        "the part that runs": made.weights_run,
        "a batch of 16,384": made.activations,
        "the sums of five": made.moments,
        "what runs, in all": made.memory,
        "a file, the triangle": made.file,
        "then, for an edit": made.factor,
    }.items():
        (cells,) = [cells for name, cells in rows.items() if name.startswith(start)]
        assert float(cells[0].split(" GB")[0]) == pytest.approx(counted / 1e9, rel=0.01)


def test_an_edit_by_hand() -> None:
    made = plan_edit(SMALL, ROUND, [0], 3, rows=2, steps=4, tokens=5, moving=2)
    # attention 2 x 4 x 2 x 2 + 2 x 4 x 2; gate and way up, 2 x 32; then all of the block above
    below, above = SMALL.run(0), SMALL.block
    assert (below, above) == (48 + 64, 48 + 96)
    target = 2 * 2 * (5 * below + 3 * 4 * (2 * above + 2 * 10 * 4))
    assert made.seconds["targets"] == 3 * target / 500
    assert made.seconds["reading keys"] == 3 * 2 * 5 * 2 * below / 500
    assert made.seconds["factors"] == 512 / 3 / 100
    # two triangles and a gram by half of one; a factor of 3 and what it is multiplied with
    assert made.seconds["solving"] == 2 * (2 * 3 * 64 + 9 * 8 + 9 + 4 * 9) / 100
    assert (made.factors, made.making) == (512, 426)
    assert made.keys == 3 * 8 * 8 and made.targets == 3 * 4 * 24
    assert made.solve == (2 * 3 * 8 + 9 + 3 * 4) * 8
    assert made.copies == 4 * 8 * 2 and made.delta == 3 * 12 * 4
    assert made.reading == 30 * (3 * 8 + 3 * 4) * 2
    assert made.memory == 512 + 192 + 288 + 64 + 144 + max(2160, 426, 552)


def test_an_edit_of_more_facts_than_a_side() -> None:
    made = plan_edit(SMALL, ROUND, [0, 1], 100)
    assert made.delta == 2 * 4 * 12 * 4  # four columns, not a hundred
    assert made.solve == (2 * 100 * 8 + 3 * 64 + 400) * 8
    assert made.keys == 100 * 8 * 8
    assert made.reading == 8192 * 36 * 2  # of 12,000 tokens
    for wrong in ({"facts": 0}, {"facts": 1, "steps": 0}):
        with pytest.raises(BadConfig, match="at least 1, but one is 0"):
            plan_edit(SMALL, ROUND, [0], **wrong)
    with pytest.raises(BadConfig, match="are not among the 2 of this model; name some from 0 to 1"):
        plan_edit(SMALL, ROUND, [2], 1)
