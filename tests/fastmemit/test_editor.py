"""The editor as a whole: what it plans, what it records, and that failures change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastmemit import Edit, Editor, MemitConfig, RomeConfig
from fastmemit.errors import BadConfig, BadLayer, BadRequest, DamagedFile, WrongModel
from fastmemit.evaluation import evaluate
from fastmemit.methods import ReadCache
from fastmemit.request import EditRequest
from fastmemit.statistics import versions
from fastmemit.text import continue_texts
from tiny_editors import FACTS, QUICK, optimised, record, tiny_corpus, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer

ONE = {**QUICK, "layers": (1,)}
METHODS = [("memit", QUICK), ("emmet", ONE), ("rome", ONE)]


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("editor"), name="tiny")


@pytest.fixture(autouse=True)
def _unchanged(editor: Editor) -> Any:
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    yield
    for edit in reversed(editor.edits):
        edit.undo()
    now = editor.model.state_dict()
    assert [name for name, t in before.items() if not torch.equal(t, now[name])] == []


def bits(editor: Editor) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in editor.model.state_dict().values()]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_a_plan_changes_nothing_and_is_the_edit(editor: Editor, method: str, settings: dict[str, Any]) -> None:
    before = bits(editor)
    delta = editor.plan(FACTS, method, **settings).delta
    assert same(bits(editor), before) and editor.edits == ()
    edit = editor.edit(FACTS, method, **settings)
    assert isinstance(edit, Edit)
    assert edit.delta.digest() == delta.digest()
    former = {"former": [outcome.before.says for outcome in edit.outcomes]}  # what only an edit that was asked knows
    assert dict(edit.delta.provenance) == {**delta.provenance, **former}
    rank = {pair[0].shape[1] for pair in delta.factors.values()}
    assert rank == {3}


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_the_same_edit_again_in_a_fresh_editor_has_the_same_bits(
    editor: Editor, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    # Nothing is shared with the first: its own statistics, contexts, targets and factors.
    fresh = tiny_editor(tmp_path)
    ours, theirs = (e.plan(FACTS, method, **settings).delta.digest() for e in (editor, fresh))
    assert ours == theirs
    # And from what is kept on the disk.
    kept = tiny_editor(tmp_path, layers=None)
    assert kept.plan(FACTS, method, **settings).delta.digest() == ours
    other = tiny_editor(tmp_path, layers=None, seed=5)  # other contexts
    assert other.plan(FACTS, method, **settings).delta.digest() != ours


def test_the_provenance_says_what_the_edit_is(editor: Editor) -> None:
    first = editor.edit(FACTS[:1], "rome", layers=(1,), steps=2)
    provenance = first.delta.provenance
    assert provenance["model"] == editor.fingerprint and provenance["model_name"] == "tiny"
    assert provenance["method"] == "rome" and provenance["settings"]["steps"] == 2
    assert provenance["requests"] == [
        {
            "prompt": "{} is located in the city of",
            "subject": "Eiffel Tower",
            "target_new": "Rome",
            "target_true": "Paris",
            "join": None,
        }
    ]
    assert provenance["statistics"]["multiplier"] == 4.0 and provenance["seed"] == 0
    assert len(provenance["contexts"]) == 21 and provenance["versions"] == versions()
    assert provenance["on_top_of"] == []


def test_an_edit_on_top_of_another_sees_it_and_says_so(editor: Editor) -> None:
    alone = editor.plan(FACTS[1:2], "memit", **QUICK).delta
    below = editor.edit(FACTS[:1], "memit", **{**QUICK, "clamp": 4.0})
    above = editor.plan(FACTS[1:2], "memit", **QUICK).delta
    assert above.provenance["on_top_of"] == [below.delta.digest()]
    assert above.digest() != alone.digest()
    below.undo()
    assert editor.plan(FACTS[1:2], "memit", **QUICK).delta.digest() == alone.digest()


@pytest.mark.parametrize(
    ("requests", "method", "settings", "error"),
    [
        ([], "memit", QUICK, BadRequest),
        ([FACTS[0], FACTS[0]], "memit", QUICK, BadRequest),
        (FACTS, "ft", {}, BadConfig),
        (FACTS, "memit", {"layers": (0, 9)}, BadLayer),
        (FACTS, "memit", {"speed": 3}, BadConfig),
        ([EditRequest("{}", "x", "y")], "memit", QUICK, None),
    ],
)
def test_bad_edits_change_nothing(
    editor: Editor, requests: Any, method: str, settings: dict[str, Any], error: Any
) -> None:
    before = bits(editor)
    if error is None:  # an odd request, but one that can be carried out
        editor.edit(requests, method, **settings).undo()
    else:
        with pytest.raises(error):
            editor.edit(requests, method, **settings)
    assert same(bits(editor), before) and editor.edits == ()


def test_a_weight_that_cannot_be_written_is_told_before_statistics_are_asked_for(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    weight = editor.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(WrongModel, match=r"layers\.1\.mlp\.down_proj.* float8"):
        editor.plan(FACTS[:1], "memit", **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_an_error_in_the_middle_changes_nothing(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, Any]
) -> None:
    from fastmemit.methods.base import Draft

    before = bits(editor)
    real = Draft.write
    wrote: list[int] = []

    def fails_after_writing(self: Draft[Any], layer: int, *written: Any) -> None:
        real(self, layer, *written)
        wrote.append(layer)
        assert not same(bits(editor), before)
        raise KeyboardInterrupt

    monkeypatch.setattr(Draft, "write", fails_after_writing)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(FACTS, method, **settings)
    assert wrote and same(bits(editor), before) and editor.edits == ()


def test_targets_are_made_once(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    made = optimised(monkeypatch)
    settings = {"layers": (1,), "steps": 4}
    editor.plan(FACTS[:2], "emmet", **settings)
    editor.plan(FACTS, "emmet", lambda_e=0.5, **settings)  # another solve, the same targets
    editor.plan(FACTS, "memit", **settings)  # MEMIT's are the same as EMMET's
    assert made == [2, 1]


def test_a_factor_is_made_once_per_layer_and_forgotten_with_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastcov

    editor = tiny_editor(tmp_path)
    made: list[int] = []
    real = fastcov.factorize

    def spy(matrix: torch.Tensor, **kwargs: Any) -> Any:
        made.append(1)
        return real(matrix, **kwargs)

    monkeypatch.setattr(fastcov, "factorize", spy)
    first = editor.plan(FACTS[:1], "memit", **QUICK).delta
    editor.plan(FACTS[1:2], "memit", **QUICK)
    assert len(made) == 2
    editor.plan(FACTS[:1], "memit", **QUICK, ridge=0.1)
    assert len(made) == 4
    editor.precompute(tiny_corpus(seed=1), multiplier=4, layers=(0, 1))
    assert editor.plan(FACTS[:1], "memit", **QUICK).delta.digest() != first.digest()
    assert len(made) == 6


def test_generate_follows_the_weights_as_they_are(editor: Editor) -> None:
    prompt = ["The capital of France is"]
    before = editor.generate(prompt, 5)
    assert before == continue_texts(editor.model, editor.tokenizer, prompt, 5)
    edit = editor.edit(FACTS[1:2], "memit", **{**QUICK, "steps": 20, "clamp": 4.0})
    assert editor.generate(prompt, 5) != before
    edit.undo()
    assert editor.generate(prompt, 5) == before


def test_files_that_are_no_edits(editor: Editor, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no edit")
    with pytest.raises(DamagedFile):
        editor.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="There is no edit file"):
        editor.load(tmp_path / "gone")


def test_the_cache_is_the_environments_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMEMIT_CACHE", str(tmp_path / "there"))
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    editor.precompute(tiny_corpus(), multiplier=1, layers=[0])
    assert [p.name for p in (tmp_path / "there" / "statistics").iterdir()] == [editor.fingerprint[:16]]


def test_the_default_layers_are_those_of_all_methods(editor: Editor, tmp_path: Path) -> None:
    fresh = tiny_editor(tmp_path, layers=None)
    found = fresh.precompute(tiny_corpus(), multiplier=1)
    wanted = {layer for m in ("rome", "emmet", "memit") for layer in fresh.config(m).layers}
    assert list(found.paths) == [fresh.adapter.projection_name(layer) for layer in sorted(wanted)]


def test_settings_of_ones_own_take_the_place_of_a_methods_name(editor: Editor, tmp_path: Path) -> None:
    own = MemitConfig(layers=(0, 1), clamp=0.75, steps=2)
    usual: dict[str, Any] = {"layers": (0, 1), "clamp": 0.75, "steps": 2}
    assert editor.config(own) == editor.config("memit", **usual)
    named = editor.plan(FACTS[:2], "memit", **usual).delta
    released = MemitConfig(**usual, scale="published", v_lr=0.5)
    assert editor.plan(FACTS[:2], released).delta.digest() != named.digest()
    assert editor.plan(FACTS[:2], own).delta.digest() == named.digest()
    assert editor.plan(FACTS[:2], own).delta.provenance["settings"] == named.provenance["settings"]
    with editor.edit(FACTS[:2], own, steps=3) as edit:
        settings = edit.delta.provenance["settings"]
        assert edit.delta.provenance["method"] == "memit" and settings["steps"] == 3
        assert settings.keys() == MemitConfig.settings().keys() | {"method", "preset"}
    rome = RomeConfig(layers=1, steps=2, keys="original")
    assert editor.plan(FACTS[:1], rome).delta.provenance["settings"]["keys"] == "original"
    assert editor.config(released) == released and editor.config(own, clamp=2).clamp == 2
    vectors = [editor.targets(FACTS[:1], config)[0].vector for config in (own, editor.config(own))]
    assert torch.equal(*vectors)
    result = evaluate(editor, [[record(0, FACTS[0])]], own)
    assert result["settings"]["method"] == "memit" and result["settings"]["clamp"] == 0.75
    fresh = tiny_editor(tmp_path, layers=None)
    found = fresh.precompute(tiny_corpus(), multiplier=1, method=MemitConfig(layers=(2,)))
    assert list(found.paths) == [fresh.adapter.projection_name(2)]
    with pytest.raises(BadConfig, match=r"layers \(\[1\]\) and a method; leave out one"):
        fresh.precompute(tiny_corpus(), multiplier=1, layers=[1], method="memit")


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("memit", {"lambda_e": 0.7, "l2": 3, "keys": "original"}, "lambda_e is a setting of emmet"),
        ("rome", {"spread": "sqrt"}, "spread is a setting of memit, pmet, encore, rlsedit and alphaedit"),
        ("alphaedit", {"weight": 5}, "weight is a setting of rome, emmet, memit, pmet, encore and rlsedit"),
    ],
)
def test_settings_that_do_nothing_are_refused(editor: Editor, method: str, values: dict[str, Any], said: str) -> None:
    for refuse in (
        lambda: editor.config(method, **values),
        lambda: editor.plan(FACTS[:1], method, **values),
        lambda: editor.edit(FACTS[:1], method, **values),
        lambda: evaluate(editor, [[record(0, FACTS[0])]], method, values),
    ):
        with pytest.raises(BadConfig, match=f"^{said}; {method} has layers, clamp"):
            refuse()
    assert editor.edits == ()


def test_the_path_of_a_model_file_is_not_its_name(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    editor = Editor(
        tiny_model("llama"), tiny_tokenizer("byte_bpe"), cache_dir=tmp_path,
        name=str(tmp_path / "model.gguf"),
    )  # fmt: skip
    assert editor.name == "model.gguf"


def test_editors_of_two_projections_of_a_model_share_no_vector_and_no_reading(tmp_path: Path) -> None:
    model, tokenizer, reads = tiny_model("llama"), tiny_tokenizer("byte_bpe"), ReadCache()
    mlp, attention = (
        Editor(model, tokenizer, module=f"model.layers.{{}}.{name}", cache_dir=tmp_path)
        for name in ("mlp.down_proj", "self_attn.o_proj")
    )
    for editor in (mlp, attention):
        editor.precompute(tiny_corpus(), multiplier=4, layers=[1])
        for method in ("rome", "memit"):
            facts = FACTS[:1] if method == "rome" else FACTS[:2]
            alone = Editor(model, tokenizer, module=editor.adapter.template, cache_dir=tmp_path / method)
            alone.store.use(editor.statistics)
            wanted = alone.plan(facts, method, **ONE).delta.factors
            for name, pair in editor.plan(facts, method, reads=reads, **ONE).delta.factors.items():
                assert all(torch.equal(got, want) for got, want in zip(pair, wanted[name], strict=True))
