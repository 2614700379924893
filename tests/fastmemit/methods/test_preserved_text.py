"""Text among what is preserved: the literal formula over its tokens' keys, its weight, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcov
from fastcov import closed_form
from fastcov.linalg import updated
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, BadCorpus
from fastmemit.methods import PreservedKeys, PreservedText
from reference import closed_form as literal
from tiny_editors import FACTS, texts

A: dict[str, Any] = {"steps": 2, "weight": 5.0, "ridge": 0.01}
SETTINGS: dict[str, dict[str, Any]] = {
    "memit": {**A, "layers": (0,)},
    "emmet": {**A, "layers": (1,), "lambda_e": 0.1},
    "rome": {**A, "layers": (1,)},
    "alphaedit": {"steps": 2, "layers": (0,), "null_relative": 0.5, "l2": 2.0},
}
FEW = ["The mother tongue of Italy is", "The piano is in"]
MANY = texts(8, seed=3)  # more tokens than twice the width


def literal_keys(editor: Editor, layer: int, rows: list[list[int]]) -> Any:
    """The keys (n, d_k) of rows of tokens, each run alone."""
    found: list[torch.Tensor] = []
    hook = editor.adapter.projection(layer).register_forward_pre_hook(lambda _, args: found.append(args[0][0].double()))
    with torch.no_grad():
        for row in rows:
            editor.model(input_ids=torch.tensor([row]))
    hook.remove()
    return torch.cat(found).numpy()


def given_to(editor: Editor, method: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[Any, Any, Any]:
    """K and R that a closed form was given, and the change that was made."""
    given: list[Any] = []
    real = getattr(closed_form, method)

    def spy(factor: Any, K: Any, R: Any, *args: Any, **kwargs: Any) -> Any:
        given.append((K.reshape(64, -1).numpy(), R.reshape(32, -1).numpy()))
        return real(factor, K, R, *args, **kwargs)

    monkeypatch.setattr(closed_form, method, spy)
    monkeypatch.setattr("fastcov.alphaedit", closed_form.alphaedit)
    facts = FACTS[:1] if method == "rome" else FACTS
    delta = editor.plan(facts, method, **SETTINGS[method], **more).delta
    ((left, right),) = delta.factors.values()
    (K, R) = given[0]
    return K, R, ((left @ right.T).double().numpy(), delta.provenance)


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("kind", ["few", "many"])
def test_the_change_equals_the_formula_with_the_keys_of_every_token(
    editor: Editor, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = FEW if kind == "few" else MANY
    rows = [editor.tokenizer(each)["input_ids"] for each in text]
    assert (sum(map(len, rows)) > 128) is (kind == "many")
    (layer,) = SETTINGS[method]["layers"]
    P = 0.7**0.5 * literal_keys(editor, layer, rows).T
    K, R, (change, provenance) = given_to(
        editor, method, monkeypatch, preserve=PreservedText.from_text(text, weight=0.7)
    )
    C = editor.store.covering([layer]).second_moment(editor.adapter.projection_name(layer)).double().numpy()
    if method == "alphaedit":
        projector = literal.null_projector(C, 0.5 * C.diagonal().mean())
        wanted = literal.alphaedit(projector, K, R, 2.0, P)
        plain = literal.alphaedit(projector, K, R, 2.0)
    else:
        base = literal.regularised(C, A["weight"], A["ridge"])
        arguments = (K[:, 0], R[:, 0]) if method == "rome" else (K, R, *((0.1,) if method == "emmet" else ()))
        wanted, plain = (getattr(literal, method)(a, *arguments) for a in (literal.preserving(base, [P]), base))
    assert abs(change - wanted).max() <= 1e-4 * abs(wanted).max() < abs(wanted - plain).max()
    assert (abs(change @ P) ** 2).sum() < (abs(plain @ P) ** 2).sum()  # which is what it is for
    about = provenance["preserved_text"]
    assert (about["texts"], about["tokens"], about["weight"]) == (len(text), sum(map(len, rows)), 0.7)
    assert about["name"] == "the preserved text" and len(about["fingerprint"]) == 64


def test_a_weight_of_two_is_the_text_twice(editor: Editor) -> None:
    once = editor.plan(FACTS, "memit", preserve=PreservedText.from_text(FEW, weight=2), **SETTINGS["memit"]).delta
    text = PreservedText.from_text([*FEW, *FEW], weight=1)
    twice = editor.plan(FACTS, "memit", preserve=text, **SETTINGS["memit"]).delta
    for name, (left, right) in once.factors.items():
        torch.testing.assert_close(twice.factors[name][0] @ twice.factors[name][1].T, left @ right.T)


@pytest.mark.parametrize(
    ("method", "w", "text", "weight"),
    [("memit", 12.0, FEW, 1.0), ("memit", 5.0, FEW, 5 / 10), ("rome", None, FEW, 1.0), ("emmet", None, MANY, 64 / 311),
     ("alphaedit", 64.0, FEW, 1.0), ("alphaedit", 64.0, MANY, 64 / 311)],
)  # fmt: skip
def test_a_text_counts_no_more_than_c_does(
    editor: Editor, method: str, w: float | None, text: list[str], weight: float
) -> None:
    """A token counts 1, and n tokens w at most: 10 and 311 here, and d_k is 64."""
    settings = {**SETTINGS[method], **({} if method == "alphaedit" else {"weight": w})}
    config = editor.config(method, **settings)
    _, about = PreservedText.from_text(text).columns(editor.adapter, editor.tokenizer, config)
    assert about["weight"] == weight
    columns, said = PreservedText.from_text(text, weight).columns(editor.adapter, editor.tokenizer, config)
    assert said == about
    for name, found in PreservedText.from_text(text).columns(editor.adapter, editor.tokenizer, config)[0].items():
        assert torch.equal(found, columns[name])


def test_at_most_twice_as_much_is_left_of_a_fact_with_a_text_like_c() -> None:
    """By hand: C = diag(1, 1/4), w = 4 and k = (2, 0) give k A^-1 k = 1, so half of what is missing is left.

    Eight tokens with the mean C make A = (4 + 8 weight) C: of 4/8 each two thirds are left, of 1 each three quarters.
    """
    C, k = torch.diag(torch.tensor([1.0, 0.25])).double(), torch.tensor([[2.0], [0.0]]).double()
    eight = (8 * C).sqrt()  # P P^T is the sum over eight keys
    base = fastcov.factorize(fastcov.regularised(C, 4.0, 0.0))
    for factor, left in ((base, 1 / 2), (updated(base, eight * 0.5**0.5), 2 / 3), (updated(base, eight), 3 / 4)):
        change = closed_form.memit(factor, k, torch.ones(1, 1).double())
        assert 1 - float(change.left @ change.right.T @ k) == pytest.approx(left)


def test_text_joins_the_keys_of_earlier_edits(editor: Editor) -> None:
    """In the object of one's own as in the editor's, and a later edit without the text does not have it."""
    settings, preserved = SETTINGS["memit"], PreservedKeys()
    editor.edit(FACTS[:1], "memit", preserved=preserved, **settings)
    text = PreservedText.from_text(FEW, weight=1)
    with_both = editor.plan(FACTS[1:], "memit", preserved=preserved, preserve=text, **settings).delta
    name = editor.adapter.weight_name(0)
    (key,) = preserved.blocks(name)
    C = editor.store.covering([0]).second_moment(editor.adapter.projection_name(0)).double().numpy()
    P = literal_keys(editor, 0, [editor.tokenizer(each)["input_ids"] for each in FEW]).T
    base = literal.preserving(literal.regularised(C, A["weight"], A["ridge"]), [key.numpy(), P])
    # All changes are R K^T (A + K K^T)^-1 of the same K and R, those of the edit with the earlier key alone too.
    alone = editor.plan(FACTS[1:], "memit", preserved=preserved, **settings).delta
    less = literal.preserving(literal.regularised(C, A["weight"], A["ridge"]), [key.numpy()])
    left, right = (side.double().numpy() for side in alone.factors[name])
    K = less @ right  # X = A^-1 K
    R = left @ (K.T @ right + torch.eye(2).double().numpy())
    wanted = literal.memit(base, K, R)
    left, right = (side.double().numpy() for side in with_both.factors[name])
    assert abs(left @ right.T - wanted).max() <= 1e-3 * abs(wanted).max()


def test_a_long_text_runs_in_pieces_of_the_context(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(editor.adapter), "max_context", property(lambda _: 7))
    (ids,) = [editor.tokenizer(MANY[0])["input_ids"]]
    config = editor.config("rome", **SETTINGS["rome"])
    columns, about = PreservedText.from_text(MANY[:1], weight=1).columns(editor.adapter, editor.tokenizer, config)
    assert about["tokens"] == len(ids) > 14
    found = columns[editor.adapter.weight_name(1)]
    wanted = literal_keys(editor, 1, [ids[start : start + 7] for start in range(0, len(ids), 7)]).T
    assert abs((found @ found.T).numpy() - wanted @ wanted.T).max() <= 1e-5 * abs(wanted @ wanted.T).max()


def test_a_file_has_a_text_a_line_and_json_its_field(editor: Editor, tmp_path: Path) -> None:
    lines, values = tmp_path / "neighbours.txt", tmp_path / "neighbours.jsonl"
    lines.write_text("\n".join(["", FEW[0], "  ", FEW[1], ""]))
    values.write_text("".join(json.dumps({"text": text}) + "\n" for text in FEW))
    wanted = editor.plan(FACTS, "memit", preserve=FEW, **SETTINGS["memit"]).delta
    for path in (lines, values):
        found = editor.plan(FACTS, "memit", preserve=path, **SETTINGS["memit"]).delta
        assert found.provenance["preserved_text"]["name"] == path.name
        assert found.provenance["preserved_text"]["tokens"] == wanted.provenance["preserved_text"]["tokens"]
        for name, (left, right) in wanted.factors.items():
            torch.testing.assert_close(found.factors[name][0] @ found.factors[name][1].T, left @ right.T)


def test_what_is_refused(editor: Editor, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    for weight in (0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(BadConfig, match="The weight of preserved text must be a finite number above 0 but is"):
            PreservedText.from_text(FEW, weight)
    with pytest.raises(BadConfig, match="ultraedit preserves no keys, so those of a text neither"):
        editor.edit(FACTS, "ultraedit", preserve=FEW)
    (tmp_path / "white.txt").write_text(" \n\n")
    for path, said in (("gone.txt", "does not exist"), ("white.txt", "holds no text")):
        with pytest.raises(BadCorpus, match=said):
            editor.edit(FACTS, "memit", preserve=tmp_path / path, **SETTINGS["memit"])
    with pytest.raises(BadCorpus, match="holds no text"):
        editor.plan(FACTS, "memit", preserve=[" "], **SETTINGS["memit"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in editor.model.state_dict().items())
