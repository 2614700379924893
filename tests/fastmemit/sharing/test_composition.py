"""Several edits as one: the sum, the order on record, a part out again, and contradictions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastmemit.delta import Delta
from fastmemit.errors import BadConfig, BadRequest, DamagedFile, WrongModel
from fastmemit.request import EditRequest
from fastmemit.sharing import compose, compressed, parts, remove
from tiny_editors import FACTS, QUICK, tiny_editor

SHAPES = {"a.weight": (6, 9), "b.weight": (8, 5)}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def made(seed: int, rank: int = 2, names: tuple[str, ...] = ("a.weight",), **about: Any) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in names:
        rows, columns = SHAPES[name]
        left = torch.randn(rows, rank, generator=generator)
        factors[name] = (left, torch.randn(columns, rank, generator=generator))
    return Delta(factors, {"model": "f" * 64, "method": "memit", "requests": [], **about})


def fact(subject: str, target: str, prompt: str = "{} is in") -> dict[str, Any]:
    return dataclasses.asdict(EditRequest(prompt, subject, target))


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Linear(9, 6, bias=False, dtype=dtype)
        self.b = nn.Linear(5, 8, bias=False, dtype=dtype)


@pytest.mark.parametrize("dtype", UNIT)
def test_it_is_one_after_the_other_within_the_stated_bound(dtype: torch.dtype) -> None:
    deltas = [made(1, 3), made(2, 40, ("b.weight", "a.weight")), made(3, 1)]
    one_by_one, at_once = Two(dtype), Two(dtype)
    at_once.load_state_dict(one_by_one.state_dict())
    bound = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for delta in deltas:
        delta.add_to(one_by_one)
        for name in delta.factors:
            bound[name] += UNIT[dtype] * one_by_one.get_parameter(name).detach().double().abs()
    whole = compose(deltas)
    whole.add_to(at_once)
    differs = False
    for name, (left, right) in whole.factors.items():
        weight = at_once.get_parameter(name).detach().double()
        bound[name] += UNIT[dtype] * weight.abs()
        products = 2 * left.shape[1] * 2.0**-24 * left.double().abs() @ right.double().abs().T
        gap = (one_by_one.get_parameter(name).detach().double() - weight).abs()
        assert bool((gap <= 1.01 * (bound[name] + products)).all())
        differs = differs or bool(gap.any())
    assert differs  # rounding is there to be bounded


def test_the_order_and_the_parts_are_on_record(tmp_path: Path) -> None:
    first = made(1, 2, requests=[fact("Rome", "Spain")], model_name="tiny")
    second = made(2, 3, ("b.weight", "a.weight"), requests=[fact("Oslo", "Peru")], on_top_of=["x"])
    whole = compose([first, second])
    assert whole.model == "f" * 64 and whole.provenance["model_name"] == "tiny"
    assert [r["subject"] for r in whole.provenance["requests"]] == ["Rome", "Oslo"]
    assert whole.provenance["on_top_of"] == ["x"]
    about = whole.provenance["parts"]
    assert [part["digest"] for part in about] == [first.digest(), second.digest()]
    assert about[1]["ranks"] == {"b.weight": 3, "a.weight": 3}
    assert about[0]["provenance"] == first.provenance
    assert {n: left.shape[1] for n, (left, _) in whole.factors.items()} == {"a.weight": 5, "b.weight": 3}
    whole.save(tmp_path / "whole.safetensors")
    again = parts(Delta.load(tmp_path / "whole.safetensors"))
    assert [part.digest() for part in again] == [first.digest(), second.digest()]
    assert [part.provenance for part in again] == [first.provenance, second.provenance]


def test_an_edit_on_top_of_another_part_needs_nothing_below() -> None:
    first = made(1)
    second = made(2, on_top_of=[first.digest()])
    assert compose([first, second]).provenance["on_top_of"] == []
    assert compose([second]).provenance["on_top_of"] == [first.digest()]


@pytest.mark.parametrize("out", [0, 1, 2])
def test_a_part_comes_out_and_leaves_the_others_bit_for_bit(out: int) -> None:
    deltas = [made(1, 3), made(2, 1, ("b.weight", "a.weight")), made(3, 2, ("b.weight",))]
    whole = compose([compose(deltas[:2]), deltas[2]])  # compositions of compositions are flat
    assert len(parts(whole)) == 3
    rest = remove(whole, deltas[out].digest()[:12])
    expected = compose([delta for place, delta in enumerate(deltas) if place != out])
    assert rest.digest() == expected.digest()
    assert rest.provenance == expected.provenance
    last = remove(rest, parts(rest)[0].digest())
    assert last.digest() == parts(rest)[1].digest()
    assert last.provenance == parts(rest)[1].provenance


def test_a_digest_that_names_no_part_is_refused() -> None:
    deltas = [made(1), made(2)]
    whole = compose(deltas)
    with pytest.raises(BadConfig, match=f"no part has it; its parts are {deltas[0].digest():.12}"):
        remove(whole, "0" * 64)
    with pytest.raises(BadConfig, match="no part has it"):
        remove(whole, deltas[0].digest()[:7])
    with pytest.raises(BadConfig, match="all that there is"):
        remove(deltas[0], deltas[0].digest())
    small = compressed(compose(deltas), rank=1)
    with pytest.raises(BadConfig, match="was compressed"):
        remove(small, deltas[0].digest())
    assert parts(small) == (small,)
    assert [p.digest() for p in parts(compose([small, made(3)]))] == [small.digest(), made(3).digest()]


def test_contradictions_are_named_and_can_be_allowed() -> None:
    first = made(1, requests=[fact("Eiffel Tower", "Rome")])
    second = made(2, requests=[fact(" eiffel tower", " Oslo")])
    with pytest.raises(BadRequest, match=r"Edit 1 .* ' Rome' and edit 2 with ' Oslo'"):
        compose([first, second])
    assert len(compose([first, second], allow_conflicts=True).provenance["requests"]) == 2
    other = made(3, requests=[fact("Eiffel Tower", "Oslo", "{} was built in")])
    compose([first, other])
    with pytest.raises(BadRequest, match="edit 3 with"):
        compose([compose([first, other]), second])
    composed = compose([first, second], allow_conflicts=True)
    with pytest.raises(BadRequest):
        compose([composed, made(4)])


def test_the_same_answer_twice_is_refused_unless_the_second_knew_the_first() -> None:
    first = made(1, requests=[fact("Eiffel Tower", "Rome")])
    with pytest.raises(BadRequest, match="twice what is needed"):
        compose([first, made(2, requests=[fact("Eiffel Tower", " Rome ")])])
    compose([first, made(2, requests=[fact("Eiffel Tower", "Rome")], on_top_of=[first.digest()])])
    with pytest.raises(BadRequest, match="Edits 1 and 3 are the same edit"):
        compose([first, made(2), first], allow_conflicts=True)


def test_edits_of_different_models_are_refused() -> None:
    with pytest.raises(WrongModel, match="edit 2 of eeee"):
        compose([made(1), made(2, model="e" * 64)])
    wide = Delta({"a.weight": (torch.ones(6, 1), torch.ones(8, 1))}, {"model": "f" * 64})
    with pytest.raises(WrongModel, match=r"Edit 2 has a.weight of shape \(6, 8\)"):
        compose([made(1), wide])
    with pytest.raises(BadConfig, match="no edit to compose"):
        compose([])


def altered(whole: Delta, harm: Any) -> Delta:
    provenance = json.loads(json.dumps(whole.provenance))
    harm(provenance)
    return Delta(whole.factors, provenance)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: p.pop("parts"), "parts are not listed"),
        (lambda p: p.update(parts=[3]), "cannot be read"),
        (lambda p: p["parts"][0].update(digest="0" * 64), "part 1 has other numbers"),
        (lambda p: p["parts"][0]["ranks"].update({"a.weight": -1}), "cannot be read"),
        (lambda p: p["parts"][0]["ranks"].update({"c.weight": 1}), "changes 'c.weight'"),
        (lambda p: p["parts"].pop(), "do not add up"),
    ],
)
def test_a_composition_that_does_not_hold_what_it_says(harm: Any, message: str) -> None:
    whole = compose([made(1), made(2, 3)])
    with pytest.raises(DamagedFile, match=message):
        parts(altered(whole, harm))


def test_real_edits_one_on_the_other(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path)
    first = editor.edit(FACTS[:1], **QUICK)
    second = editor.edit(FACTS[1:], **QUICK)
    both = {name: p.detach().clone() for name, p in editor.model.named_parameters()}
    second.undo()
    first.undo()
    compose([first.delta, second.delta]).save(tmp_path / "both.safetensors")
    whole = editor.load(tmp_path / "both.safetensors").apply()
    for name, weight in editor.model.named_parameters():
        torch.testing.assert_close(weight, both[name], rtol=1e-6, atol=1e-6)
    whole.undo()
    remove(whole.delta, second.delta.digest()).save(tmp_path / "one.safetensors")
    assert Delta.load(tmp_path / "one.safetensors").digest() == first.delta.digest()
    assert compressed(first.delta) is first.delta
