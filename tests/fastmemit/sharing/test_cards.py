"""Cards: read by the hub's own reader, with every fact in its place."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import fastcov
from fastmemit.delta import Delta
from fastmemit.errors import BadConfig
from fastmemit.files import common_provenance, provenance_of
from fastmemit.request import EditRequest
from fastmemit.sharing import compose
from fastmemit.sharing.hub import edit_card, statistics_card
from fastmemit.statistics import Statistics
from tiny_editors import FACTS, QUICK, tiny_editor


def delta(facts: Any = FACTS, seed: int = 0, **about: Any) -> Delta:
    torch.manual_seed(seed)
    provenance = {
        "model": "f" * 64,
        "model_name": "gpt2-xl",
        "method": "memit",
        "requests": [dataclasses.asdict(fact) for fact in facts],
        **about,
    }
    return Delta({"h.1.weight": (torch.randn(4, 3), torch.randn(6, 3))}, provenance)


def rows(card: str) -> list[list[str]]:
    """The cells of all tables, as a renderer shows them."""
    markdown_it = pytest.importorskip("markdown_it")
    body = card.split("---\n", 2)[2]
    parsed = markdown_it.MarkdownIt("commonmark").enable("table").parse(body)
    found: list[list[str]] = []
    for before, token in itertools.pairwise(parsed):
        if token.type == "tr_open":
            found.append([])
        elif before.type in ("td_open", "th_open"):
            found[-1].append("".join(child.content for child in token.children))
    return found


def test_the_header_is_what_the_hub_reads() -> None:
    card = edit_card(delta(), "me/edit", license="apache-2.0")
    data = ModelCard(card).data
    assert data.library_name == "fastmemit" and data.base_model == "gpt2-xl"
    assert data.license == "apache-2.0" and "memit" in data.tags
    other = ModelCard(edit_card(delta(model_name="../my models"), "me/edit")).data
    assert other.base_model is None and other.license is None
    for local in ("smollm2", "gemma-3-270m-q4_k_m.gguf"):  # which look like a name on the hub
        assert ModelCard(edit_card(delta(model_name=local), "me/edit")).data.base_model is None
    named = ModelCard(edit_card(delta(), "me/edit", base_model="openai-community/gpt2-xl")).data
    assert named.base_model == "openai-community/gpt2-xl"


def test_a_real_edit_shows_facts_weights_settings_and_versions(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path, name="me/tiny")
    made = editor.plan(FACTS, **QUICK).delta
    card = edit_card(made, "me/edit")
    found = rows(card)
    assert ["The capital of France is", "Berlin", "Paris"] in found
    assert ["model.layers.1.mlp.down_proj.weight", "32 x 64", "3"] in found
    shown = {row[0]: row[1] for row in found if len(row) == 2}
    assert shown["setting layers"] == "0, 1" and shown["setting steps"] == "3"
    assert shown["model fingerprint"] == editor.fingerprint
    assert shown["corpus"] == "tiny0" and shown["multiplier"] == "4"
    assert shown["digest"] == made.digest() and "torch" in shown["versions"]
    assert 'Editor.from_pretrained("me/tiny")' in card and 'pull_edit("me/edit"' in card


@pytest.mark.parametrize("method", ["rome", "emmet", "memit", "pmet", "encore", "alphaedit"])
def test_every_method_is_a_tag_and_a_setting_that_is_not_set_is_said_so(method: str) -> None:
    settings = {"layers": (0, 1), "relative_ridge": None, "ridge": 10.0}
    card = edit_card(delta(method=method, settings=settings), "me/edit")
    assert method in ModelCard(card).data.tags
    shown = {row[0]: row[1] for row in rows(card) if len(row) == 2}
    assert shown["setting relative_ridge"] == "not set" and shown["setting ridge"] == "10"
    read = delta(method=method, settings={**settings, "layers": [0, 1]})  # as from a file
    assert edit_card(read, "me/edit") == card


def test_facts_with_markdown_stay_facts() -> None:
    nasty = "A|B\n<img src=x onerror=alert(1)> [x](y)"
    card = edit_card(delta([EditRequest("{} is `in`", nasty, "C | D")]), "me/edit")
    assert [" ".join(nasty.split()) + " is `in`", "C | D", ""] in rows(card)
    assert "<img" not in card
    strange = edit_card(delta(method="<b>m|e</b>", settings={"x": "```\n# y"}), "me/edit")
    assert "<b>" not in strange and strange.count("```") == 2


def test_many_facts_are_counted() -> None:
    facts = [EditRequest("{} is", f"Town {n}", "big") for n in range(130)]
    card = edit_card(delta(facts), "me/edit")
    assert "130 facts" in card and "And 30 more" in card
    assert "Town 99 is" in card and "Town 100 is" not in card


def test_a_composition_lists_its_parts() -> None:
    first, second = delta(FACTS[:1], 1), delta(FACTS[1:], 2)
    found = rows(edit_card(compose([first, second]), "me/edit"))
    assert ["1", first.digest()[:16], "memit", "1"] in found
    assert ["2", second.digest()[:16], "memit", "2"] in found


@pytest.mark.parametrize("name", ["my licence", "mit\nbase_model: x", "", "a" * 80])
def test_a_licence_is_a_short_name(name: str) -> None:
    with pytest.raises(BadConfig, match="licence"):
        edit_card(delta(), "me/edit", license=name)


def test_a_base_model_is_a_name_on_the_hub() -> None:
    with pytest.raises(BadConfig, match="no name of a model on the hub"):
        edit_card(delta(), "me/edit", base_model="/home/me/model")


def test_statistics_say_what_they_are_of(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path, name="me/tiny")
    card = statistics_card(editor.store.covering([0, 1]), "me/moments", license="mit")
    assert ModelCard(card).data.base_model == "me/tiny"
    found = rows(card)
    assert ["model.layers.0.mlp.down_proj", "64", "256", "float32"] in found
    shown = {row[0]: row[1] for row in found if len(row) == 2}
    assert shown["corpus"] == "tiny0" and shown["model fingerprint"] == editor.fingerprint
    assert shown["multiplier (keys per width)"] == "4"
    assert re.search(r"transformers \d", shown["versions"])
    assert shown["first positions"] == "counted" and shown["seed"] == "0"


def test_statistics_say_what_nobody_knows_and_what_was_left_out(tmp_path: Path) -> None:
    found = tiny_editor(tmp_path).store.covering([0])
    module, path = next(iter(found.paths.items()))
    moment, stored = fastcov.load_moment(path)
    about = {k: v for k, v in stored.items() if k != "context"}
    fastcov.save_moment(path, moment, {**about, "seed": None, "bos": False})
    other = Statistics({module: path}, common_provenance([provenance_of(path)]))
    shown = {row[0]: row[1] for row in rows(statistics_card(other, "me/m")) if len(row) == 2}
    assert shown["seed"] == shown["documents cut at"] == "unknown"
    assert shown["first positions"] == "left out"
