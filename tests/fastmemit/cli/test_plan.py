"""`fastmemit stats plan` prints what `fastmemit.capacity` counts."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from fastmemit.cli import main
from tiny_commands import Place, refused, run
from tiny_editors import FACTS
from tiny_tokenizers import tiny_tokenizer


def columns(out: str) -> dict[str, list[str]]:
    rows = (line for line in out.splitlines()[1:] if not line.startswith(("rates", "what runs d", "a fact: ")))
    return {name: cells for name, *cells in (re.split(" {2,}", line.strip()) for line in rows)}


def test_seventy_billion_over_eight(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "stats", "plan", "--shape", "llama-3-70b", "--layers", "4-8", "--processes", "8")
    assert out.startswith("llama-3-70b: 70.55 billion weights, 80 layers, d 8192, d_k 28672;")
    cells = columns(out)
    assert cells["keys of each layer"] == ["286,720", "44,000,000"]
    assert cells["the whole model"] == ["141.10 GB"] * 2
    assert cells["the sums"] == ["16.44 GB"] * 2
    assert cells["to disk, each layer"] == ["1.64 GB"] * 2
    assert cells["a factor in float64"] == ["6.58 GB"] * 2
    assert "rates: published: " in out and "assumed: " in out and "does not fit" not in out


def test_an_edit_of_ten_thousand_facts(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/guide/scale.md has the same numbers."""
    page = (Path(__file__).parents[3] / "docs" / "guide" / "scale.md").read_text(encoding="utf-8")
    for place, facts in enumerate(("16", "10000")):
        cells = columns(run(capsys, "stats", "plan", "--shape", "gpt-j-6b", "--layers", "3-8", "--batch-size", facts))
        for name in (
            "factors of all layers",
            "keys",
            "target vectors",
            "what solving makes",
            "the delta",
            "at most at once",
        ):
            line = next(line for line in page.splitlines() if line.startswith(f"| {name} | "))
            assert cells[name] == [line.split(" | ")[1 + place].removesuffix(" |")]


def test_the_plan_of_an_edit_is_written_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    place = tmp_path / "plan.json"
    run(capsys, "stats", "plan", "--shape", "gpt-j-6b", "--layers", "3-8", "--batch-size", "16", "--json", place)
    edit = json.loads(place.read_text())["edit"]
    assert edit["facts"] == 16 and edit["factors"] == 6 * 8 * 16384**2  # six layers, float64
    held = sum(edit[name] for name in ("factors", "keys", "targets", "copies", "delta"))
    assert edit["memory"] == held + max(edit[name] for name in ("reading", "making", "solve"))


def test_facts_are_counted_in_tokens_of_the_model(capsys: pytest.CaptureFixture[str], place: Place) -> None:
    model, out = place.model[1], place.at / "plan.json"
    said = run(capsys, "stats", "plan", "--shape", model, "--layers", "0", "--facts", place.requests, "--json", out)
    edit, tokenizer = json.loads(out.read_text())["edit"], tiny_tokenizer()
    # All but the answer's last token; the mean of two facts, rounded up, and 10 more for contexts.
    lengths = [len(tokenizer(fact.text + fact.target)["input_ids"]) - 1 for fact in FACTS[:2]]
    tokens = 10 + math.ceil(sum(lengths) / 2)
    assert edit["facts"] == 2 and edit["counted_with"]["tokens"] == tokens
    assert "a MEMIT edit of 2 facts" in said and f"6 texts of {tokens} tokens" in said and "these facts'" in said
    assert "all of it assumed" in run(capsys, "stats", "plan", "--shape", model, "--layers", "0")
    more = ("--shape", "gpt2-xl", "--facts", place.requests)
    assert "'gpt2-xl' is no folder of one; name it as --shape" in refused(capsys, place, "stats", "plan", *more)
    (place.at / "bare").mkdir()
    shutil.copy(Path(model) / "config.json", place.at / "bare")
    more = ("--shape", place.at / "bare", "--layers", "0", "--facts", place.requests)
    assert "has no tokenizer that can be loaded" in refused(capsys, place, "stats", "plan", *more)


def test_several_multipliers_and_given_rates(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "stats", "plan", "--shape", "gpt-j-6b", "--layers", "3-8", "--multipliers", "2,10",
              "--flops", "1e12", "--share", "1")  # fmt: skip
    assert columns(out)["keys of each layer"][-1] == "44,000,000"
    assert "32,768" in out and "163,840" in out
    assert out.endswith("rates given on the command line replace those\n")


def test_all_layers_of_a_large_model_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "stats", "plan", "--shape", "llama-3-70b", "--layers", "0-79")
    assert "what runs does not fit into the 80.00 GB of one device" in out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shape", "gpt-5", "There is no shape 'gpt-5'"),
        ("--layers", "20-40", "not among the 28 of this model"),
        ("--multipliers", "ten", "'ten' is no list of numbers; write 10, or 2,10."),
        ("--multipliers", "0", "multiplier"),
        ("--share", "0", "--share must be above 0 but is 0"),
        ("--flops", "inf", "--flops must be above 0 but is inf"),
        ("--processes", "0", "must be a whole number above 0"),
    ],
)
def test_what_makes_no_sense(
    capsys: pytest.CaptureFixture[str], place: Place, option: str, value: str, message: str
) -> None:
    given = {"--shape": "gpt-j-6b", "--layers": "3-8", option: value}
    assert message in refused(capsys, place, "stats", "plan", *(x for pair in given.items() for x in pair))


def test_it_loads_no_model() -> None:
    with pytest.raises(SystemExit):
        main(["stats", "plan", "--model", "gpt2-xl"])
