"""A folder with what the command line needs: a tiny model, a corpus, requests and records."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastmemit.cli import main
from tiny_editors import FACTS, record, texts
from tiny_models import tiny_model, tiny_tokenizer

#: Two layers of MEMIT with few steps.
EDIT = ("--method", "memit", "--set", "layers=0-1", "--set", "steps=8", "--set", "clamp=4")


@dataclass(frozen=True)
class Place:
    """Paths of the inputs; outputs go to `at`."""

    at: Path
    model: tuple[str, ...]  # --model, folder, --cache, folder, --quiet
    corpus: Path
    requests: Path
    records: Path

    def edit(self, capsys: pytest.CaptureFixture[str], name: str, *more: str) -> Path:
        """An edit file made with the requests."""
        run(capsys, "edit", *self.model, *EDIT, *more, "--corpus", self.corpus, "--multiplier", "4",
            "--facts", self.requests, "--out", self.at / name)  # fmt: skip
        return self.at / name

    def other_model(self) -> tuple[str, ...]:
        """Options for a model of the same shape with other weights."""
        return ("--model", save_model(self.at / "other-model", 1), *self.model[2:])


def save_model(folder: Path, seed: int = 0) -> str:
    """A tiny llama and its tokenizer as a folder that ``from_pretrained`` loads."""
    tiny_model("llama", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def make_place(at: Path, model: str) -> Place:
    """A place with a cache of its own."""
    corpus, requests, records = at / "corpus.jsonl", at / "facts.jsonl", at / "records.json"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)))
    facts = [{k: v for k, v in dataclasses.asdict(fact).items()} for fact in FACTS]
    requests.write_text("".join(json.dumps(fact) + "\n" for fact in facts[:2]))
    more = dataclasses.replace(FACTS[1], subject="Italy", target_true="Rome")
    found = [record(number, fact) for number, fact in enumerate((*FACTS, more))]
    records.write_text(json.dumps([_counterfact(item) for item in found]))
    options = ("--model", model, "--cache", str(at / "cache"), "--quiet")
    return Place(at, options, corpus, requests, records)


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """Run a command that must succeed and say nothing on stderr; what it printed."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def refused(capsys: pytest.CaptureFixture[str], place: Place, *argv: Any) -> str:
    """Run a command that must be refused; its one line. Files are the same before and after."""
    before = files(place)
    capsys.readouterr()
    try:
        code = main([str(word) for word in argv])
    except SystemExit as left:
        code = left.code  # type: ignore[assignment]  # an exit has a number
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("fastmemit: error: ") and err.endswith("\n") and err.count("\n") == 1
    assert "Traceback" not in err and ".;" not in err and ".." not in err.replace("...", "")
    assert files(place) == before
    return err.removeprefix("fastmemit: error: ").rstrip("\n")


def files(place: Place) -> dict[Path, bytes]:
    """Every file but kept statistics and targets, which later commands use; no temporary ones."""
    found = {}
    for root in (place.at, Path(place.model[1])):
        for path in root.rglob("*"):
            assert not path.name.endswith(".tmp")
            if path.is_file() and place.at / "cache" not in path.parents:
                found[path] = path.read_bytes()
    return found


def edit_args(place: Place, requests: Any, *more: Any) -> list[Any]:
    """A complete edit command for some requests."""
    return ["edit", *place.model, *EDIT, *more, "--corpus", place.corpus, "--multiplier", "4",
            "--facts", requests, "--out", place.at / "edit.st"]  # fmt: skip


def _counterfact(item: Any) -> dict[str, Any]:
    fact = item.request
    return {
        "case_id": item.case_id,
        "requested_rewrite": {
            "prompt": fact.prompt,
            "subject": fact.subject,
            "target_new": {"str": fact.target_new},
            "target_true": {"str": fact.target_true},
            "relation_id": "P1",
        },
        "paraphrase_prompts": list(item.paraphrases),
        "neighborhood_prompts": list(item.neighbourhood),
    }
