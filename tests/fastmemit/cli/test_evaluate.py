"""``fastmemit evaluate``: metrics, zsRE and references on the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastmemit.delta import Delta
from tiny_commands import EDIT, Place, refused, run

Capture = pytest.CaptureFixture[str]


def arguments(place: Place, data: Any, *more: Any) -> list[Any]:
    return ["evaluate", *place.model, *EDIT, "--corpus", place.corpus, "--multiplier", "4",
            "--facts", data, "--batch-size", "1", "--num-batches", "2", *more]  # fmt: skip


NUMBER = r"[-+]?[\d.]+"


def rows(out: str) -> dict[str, list[str]]:
    """The table: the values before, after and of the change of each score, without intervals."""
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split() == ["before", "after", "change"])
    found = {}
    for line in lines[at + 1 :]:
        name, *cells = re.sub(r"\[.*?\]", "", line).split()
        if len(cells) != 3 or not all(re.fullmatch(f"{NUMBER}|-", cell) for cell in cells):
            break
        found[name] = cells
    return found


@pytest.fixture
def full(place: Place) -> Path:
    """The records with attribute and generation prompts."""
    found = json.loads(place.records.read_text())
    for record in found:
        record["attribute_prompts"] = ["The piano is in", "The company is in"]
        record["generation_prompts"] = ["I play"]
    path = place.at / "full.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture
def zsre(place: Place) -> Path:
    path = place.at / "zsre.json"
    found = [
        {
            "subject": subject,
            "src": f"Where is {subject}?",
            "rephrase": f"In which city is {subject}?",
            "alt": "",
            "answers": [answer],
            "loc": "nq question: where do they play the violin",
            "loc_ans": "London",
        }
        for subject, answer in (("Eiffel Tower", "Rome"), ("the poet", "Berlin"))
    ]
    path.write_text(json.dumps(found))
    return path


def test_the_metrics_that_are_asked_for(place: Place, full: Path, capsys: Capture) -> None:
    pytest.importorskip("sklearn")
    answers = {r["requested_rewrite"]["target_new"]["str"] for r in json.loads(full.read_text())}
    texts = place.at / "texts.json"
    texts.write_text(json.dumps([{"relation_id": "P1", "target_new": a, "text": "I play it."} for a in answers]))
    result = place.at / "out.json"
    out = run(capsys, *arguments(place, full, "--json", result, "--metrics",
              "magnitude,score,attributes,accuracy,generation", "--references", texts))  # fmt: skip
    shown, found = rows(out), json.loads(result.read_text())
    assert " ".join(shown) == "EM PM NM ES PS NS S EA PA NA AS GE RS"
    for name, (before, after, change) in shown.items():
        values = [found[when][name.lower()] for when in ("before", "after")]
        assert [before, after] == [f"{value:.2f}" for value in values]
        assert change == f"{values[1] - values[0]:+.2f}"
    assert found["settings"]["metrics"][0] == "magnitude"


def test_no_score_is_shown_without_the_exact_matches(place: Place, full: Path, capsys: Capture) -> None:
    out = run(capsys, *arguments(place, full))
    assert list(rows(out)) == ["ES", "PS", "NS", "S", "EA", "PA", "NA"]
    assert len(re.findall(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]", out)) == 7 * 3
    assert "a coin has 50" in out


def test_perplexity_before_and_after(place: Place, full: Path, capsys: Capture) -> None:
    text = place.at / "prose.txt"
    text.write_text("the poet was in the city of Rome and the piano is in Italy " * 20)
    result = place.at / "out.json"
    out = run(capsys, *arguments(place, full, "--json", result, "--text", text,
              "--text-tokens", "60", "--text-batches", "2"))  # fmt: skip
    found = json.loads(result.read_text())
    perplexity = found["perplexity"]
    assert rows(out)["perplexity"] == [
        f"{perplexity['before']:.2f}",
        f"{perplexity['after']:.2f}",
        f"{perplexity['after'] - perplexity['before']:+.2f}",
    ]
    assert perplexity["batches"] == 2 and perplexity["before"] != perplexity["after"]
    assert found["settings"]["text"]["tokens"] == 60
    assert "perplexity" in found["seconds"]
    line = refused(capsys, place, *arguments(place, full, "--text", place.at / "gone.txt"))
    assert "gone.txt does not exist" in line


@pytest.mark.parametrize("prefix", ["", "zsre:"])
def test_zsre(place: Place, zsre: Path, prefix: str, capsys: Capture) -> None:
    result = place.at / "out.json"
    out = run(capsys, *arguments(place, f"{prefix}{zsre}", "--json", result))
    shown, found = rows(out), json.loads(result.read_text())
    names = ("ea", "pa", "na", "a", "ew", "pw", "nw")
    assert list(shown) == [name.upper() for name in names]
    after = [cells[1] for cells in shown.values()]
    assert after == [f"{found['after'][name]:.2f}" for name in names]


def test_what_is_refused(place: Place, full: Path, zsre: Path, capsys: Capture) -> None:
    line = refused(capsys, place, *arguments(place, full, "--metrics", "score,bleu"))
    assert "--metrics: there is no metric 'bleu'; choose from score, magnitude" in line
    line = refused(capsys, place, *arguments(place, full, "--metrics", ","))
    assert "--metrics: name one or more of score" in line
    line = refused(capsys, place, *arguments(place, zsre, "--metrics", "magnitude"))
    assert "zsRE has metrics of its own" in line
    line = refused(capsys, place, *arguments(place, place.records, "--metrics", "generation"))
    assert "has no generation_prompts" in line
    line = refused(capsys, place, *arguments(place, place.records, "--metrics", "attributes"))
    assert "No record has attribute_prompts" in line
    line = refused(capsys, place, *arguments(place, full, "--references", place.at / "gone.json"))
    assert "gone.json does not exist" in line


def test_references_without_generation_or_a_text(place: Place, full: Path, capsys: Capture) -> None:
    pytest.importorskip("sklearn")
    texts = place.at / "texts.jsonl"
    texts.write_text(json.dumps({"relation_id": "P1", "target_new": "Rome", "text": "a city"}))
    line = refused(capsys, place, *arguments(place, full, "--references", texts))
    assert "ask for the metric generation too" in line
    line = refused(capsys, place, *arguments(place, full, "--references", texts, "--metrics", "generation"))
    assert "The references have no text for 1 of the records" in line


def test_a_malformed_zsre_record(place: Place, zsre: Path, capsys: Capture) -> None:
    found = json.loads(zsre.read_text())
    found[1]["src"] = "Where is it?"
    zsre.write_text(json.dumps(found))
    line = refused(capsys, place, *arguments(place, zsre))
    assert "record 1 (item 1), field src" in line and "--skip-malformed" in line
    args = arguments(place, zsre, "--skip-malformed")
    args[args.index("--num-batches") + 1] = "1"
    assert "1 record in 1 batch\n" in run(capsys, *args)


def test_own_facts_are_scored_by_line_against_what_the_model_said(place: Place, capsys: Capture) -> None:
    mine, result = place.at / "mine.jsonl", place.at / "out.json"
    first = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Berlin",
             "paraphrases": ["They say that the capital of {} is"], "neighbours": ["The piano is in"]}  # fmt: skip
    second = {"prompt": "{} is located in the city of", "subject": "Eiffel Tower", "target_new": "Rome"}
    mine.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    common = [*place.model, *EDIT, "--corpus", place.corpus, "--multiplier", "4", "--facts", mine]
    run(capsys, "edit", *common, "--out", place.at / "mine.st")  # which takes the same file
    out = run(capsys, "evaluate", *common, "--json", result)
    assert "2 records in 1 batch\n" in out
    found = json.loads(result.read_text())
    assert [row["case_id"] for row in sorted(found["records"], key=lambda row: row["case_id"])] == [1, 2]
    after = {row["case_id"]: row["after"] for row in found["records"]}
    told = re.search(r"^ +1  The capital of France is Berlin \(before: .+\): (NOT )?said, "
                     r"paraphrases that say it: (\d) of 1, neighbours that keep theirs: (\d) of 1$",
                     out, re.MULTILINE)  # fmt: skip
    assert told is not None
    assert [told[1] is None, int(told[2]), int(told[3])] == [after[1][name] == 1 for name in ("ea", "pa", "na")]
    line = next(line for line in out.splitlines() if line.startswith("     2  Eiffel Tower is located in"))
    assert line.endswith(": said" if after[2]["ea"] == 1 else ": NOT said")


def test_facts_are_edited_and_asked_in_chat(place: Place, zsre: Path, capsys: Capture) -> None:
    line = refused(capsys, place, *arguments(place, place.records, "--chat"))
    assert "The tokenizer has no chat template" in line and "leave --chat out" in line
    assert "leave out --chat" in refused(capsys, place, *arguments(place, zsre, "--chat"))
    folder, saved = place.at / "chatty", place.at / "chat.st"
    shutil.copytree(place.model[1], folder)
    turns = "{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}<s>assistant: "
    (folder / "chat_template.jinja").write_text(turns)
    chatty = dataclasses.replace(place, model=("--model", str(folder), *place.model[2:]))
    run(capsys, "edit", *chatty.model, *EDIT, "--corpus", place.corpus, "--multiplier", "4", "--facts", place.requests,
        "--chat", "--out", saved)  # fmt: skip
    asked = Delta.load(saved).requests[1]
    assert asked["prompt"] == "<s>user: The capital of {} is</s><s>assistant: " and asked["join"] == ""
    out = run(capsys, "apply", *chatty.model, "--edit", saved, "--chat", "--prompt", "Paris is", "--check", "I play")
    assert "1 edit with 2 facts applied" in out and "\nParis is\n  before: " in out
    assert "  <s>user: I play</s><s>assistant: " in out
    out = run(capsys, *arguments(chatty, place.records, "--chat"))
    assert "2 records in 2 batches" in out and list(rows(out))[:3] == ["ES", "PS", "NS"]
