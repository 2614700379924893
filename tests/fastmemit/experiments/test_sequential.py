"""Batch on batch: each on the edited weights, all facts scored, every bit given back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastcov.errors import NonFinite
from fastmemit.data import Record
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig, BadData, BadRequest, WrongModel
from fastmemit.evaluation import score_records
from fastmemit.evaluation.scores import RecordScore, summarise
from fastmemit.experiments.results import Step
from fastmemit.experiments.sequential import Plan, run_sequential
from fastmemit.methods import PreservedKeys, ReadCache
from fastmemit.request import EditRequest
from tiny_editors import FACTS, record, tiny_editor

SUBJECTS = ("Eiffel Tower", "Italy", "the poet", "the piano", "France")
RECORDS = [record(10 + n, EditRequest("{} is in", name, "Rome", "Paris")) for n, name in enumerate(SUBJECTS)]
BATCHES = [RECORDS[:2], RECORDS[2:4], RECORDS[4:]]
SETTINGS: dict[str, Any] = {"layers": (0, 1), "steps": 3, "clamp": 4.0, "weight": 3.0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


@pytest.fixture
def editor(shared: Editor) -> Iterator[Editor]:
    before = {name: tensor.clone() for name, tensor in shared.model.state_dict().items()}
    yield shared
    assert shared.edits == ()
    now = shared.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def table(scores: list[RecordScore]) -> dict[str, Any]:
    found = summarise(scores)
    return {name: found[name] for name in ("es", "ps", "ns", "s", "ea", "pa", "na")}


PLAN = Plan(BATCHES, "memit", SETTINGS)


def run(editor: Editor, preserve: bool = True, plan: Plan = PLAN, **more: Any) -> list[Step]:
    return list(run_sequential(editor, plan, preserve, **more))


@pytest.mark.parametrize("preserve", [True, False])
def test_a_run_is_edits_on_top_of_each_other_written_out(editor: Editor, preserve: bool) -> None:
    costs: list[int] = []

    def perplexity() -> float:
        costs.append(len(editor.edits))
        return 30.0 + len(costs)

    counted: list[int] = []
    found = run(editor, preserve, perplexity=perplexity, progress=counted.append)
    assert [step["edits"] for step in found] == [1, 2, 3] == costs
    assert [step["perplexity"] for step in found] == [31.0, 32.0, 33.0]
    assert sum(counted) == 5 + 2 + 4 + 5
    unedited = score_records(editor.adapter, editor.tokenizer, RECORDS)
    preserved = PreservedKeys() if preserve else None
    edits = []
    for number, step in enumerate(found, 1):
        requests = [item.request for item in BATCHES[number - 1]]
        edits.append(editor.edit(requests, "memit", preserved=preserved, **SETTINGS))
        so_far = [item for batch in BATCHES[:number] for item in batch]
        now = score_records(editor.adapter, editor.tokenizer, so_far)
        assert step["facts"] == len(so_far) and step["failed"] == 0
        assert step["preserved"] == (len(so_far) if preserve else 0)
        assert step["scores"] == table(now)
        assert step["before"] == table(unedited[: len(so_far)])
        assert step["by_batch"][0] == table(now[:2]) and len(step["by_batch"]) == number
        assert [(row["case_id"], row["batch"], row["before"]["ns"], row["after"]["ea"]) for row in step["records"]] == [
            (item.case_id, RECORDS.index(item) // 2, old.ns, new.shares()["ea"])
            for item, old, new in zip(so_far, unedited, now, strict=False)
        ]
    for edit in reversed(edits):
        edit.undo()


@pytest.mark.parametrize("method", ["encore", "alphaedit"])
def test_methods_of_earlier_keys_go_without_them_where_that_is_asked_for(editor: Editor, method: str) -> None:
    own = {"null_relative": 0.5} if method == "alphaedit" else {}
    settings = {"layers": (0, 1), "steps": 2, **own}
    name, seen = editor.adapter.weight_name(0), []

    def look() -> float:
        weight = editor.model.get_parameter(name).detach()
        seen.append((weight.clone(), editor.edits[-1].delta.provenance["preserved"]))
        return 1.0

    for preserve in (True, False):
        steps = run(editor, preserve, Plan(BATCHES[:2], method, settings), perplexity=look)
        assert [step["preserved"] for step in steps] == ([2, 4] if preserve else [0, 0])
    (first, _), (with_keys, named), (same, _), (without, none) = seen
    assert torch.equal(first, same) and not torch.equal(with_keys, without)
    assert len(named) == 1 and none == []


def test_preserved_keys_make_another_model_from_the_second_batch_on(editor: Editor) -> None:
    seen: dict[bool, list[torch.Tensor]] = {}
    for preserve in (True, False):
        weights = seen[preserve] = []

        def look(weights: list[torch.Tensor] = weights) -> float:
            weights.append(editor.adapter.weight(0).clone())
            return 1.0

        run(editor, preserve, perplexity=look)
    equal = [torch.equal(one, other) for one, other in zip(seen[True], seen[False], strict=True)]
    assert equal == [True, False, False]


def test_scores_are_taken_after_every_kth_batch_and_the_last(editor: Editor) -> None:
    assert [step["edits"] for step in run(editor, plan=replace(PLAN, score_every=2))] == [2, 3]
    assert [step["edits"] for step in run(editor, plan=replace(PLAN, score_every=7))] == [3]


def test_targets_are_those_of_the_edited_model(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[tuple[int, str]] = []
    real = editor.workspace.targets

    def spy(*args: Any, **kwargs: Any) -> Any:
        states.append((len(editor.edits), editor._stack.state()))
        return real(*args, **kwargs)

    monkeypatch.setattr(editor.workspace, "targets", spy)
    run(editor)
    assert [edits for edits, _ in states] == [0, 0, 1, 1, 2, 2]
    assert len({state for _, state in states}) == len(set(states)) == 3
    assert states[0][1] == editor.fingerprint  # of the model alone


def test_unedited_targets_are_made_once_before_anything_is_written(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[int] = []
    real = editor.workspace.targets

    def spy(*args: Any, **kwargs: Any) -> Any:
        states.append(len(editor.edits))
        return real(*args, **kwargs)

    monkeypatch.setattr(editor.workspace, "targets", spy)
    seen: list[torch.Tensor] = []

    def look() -> float:
        seen.append(editor.adapter.weight(0).detach().clone())
        assert editor.edits[-1].delta.provenance["targets"] == "given"
        return 1.0

    run(editor, False, replace(PLAN, targets="unedited"), perplexity=look)
    assert states == [0, 0, 0]
    goals = {}
    for batch in BATCHES:
        requests = [item.request for item in batch]
        goals |= zip(requests, editor.targets(requests, editor.config("memit", **SETTINGS)), strict=True)
    edits = []
    for batch, wanted in zip(BATCHES, seen, strict=True):
        edits.append(editor.edit([item.request for item in batch], "memit", targets=goals, **SETTINGS))
        assert torch.equal(editor.adapter.weight(0), wanted)
    with pytest.raises(BadRequest, match="No target vector is given for 'The capital of France is'; make one"):
        editor.plan(FACTS[1], "memit", targets=goals, **SETTINGS)
    with pytest.raises(BadConfig, match="ultraedit has no target vectors, so none can be given for it"):
        editor.plan(FACTS[1], "ultraedit", layers=(0, 1), targets=goals)
    for edit in reversed(edits):
        edit.undo()


def test_a_method_without_target_vectors_runs_in_sequence(editor: Editor) -> None:
    settings = {"layers": (0, 1), "eta": 1e-3, "tokens": "all"}
    written = iter((7.5, 6.5, 5.5))
    found = list(run_sequential(editor, Plan(BATCHES, "ultraedit", settings), False, entropy=lambda: next(written)))
    assert [step["entropy"] for step in found] == [7.5, 6.5, 5.5]
    assert [step["facts"] for step in found] == [2, 4, 5] and found[-1]["failed"] == 0
    with pytest.raises(BadConfig, match="ultraedit has no target vectors; leave out targets='unedited'"):
        run(editor, False, Plan(BATCHES, "ultraedit", settings, targets="unedited"))


def test_the_unedited_scores_and_readings_are_taken_from_outside(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmemit.experiments import sequential

    plain = run(editor)
    scores = score_records(editor.adapter, editor.tokenizer, RECORDS)
    monkeypatch.delattr(sequential, "score_records")
    reads = ReadCache()
    unedited = {score.case_id: score.shares() for score in scores}
    for _ in range(2):
        assert run(editor, unedited=unedited, reads=reads) == plain
    assert len(reads) == 1


@pytest.mark.parametrize("when", ["edit", "score", "close"])
def test_whatever_ends_it_the_weights_come_back(editor: Editor, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = run_sequential(editor, PLAN, True)
    next(steps)
    assert len(editor.edits) == 1
    if when == "close":
        steps.close()
        return

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    from fastmemit.experiments import sequential

    if when == "edit":
        monkeypatch.setattr(editor, "edit", interrupted)
    else:
        monkeypatch.setattr(sequential, "scored_or_failed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(steps)


def test_a_broken_model_counts_as_failures_and_the_run_goes_on(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = editor.edit

    def breaks(requests: Any, *args: Any, **kwargs: Any) -> Any:
        if editor.edits:
            raise NonFinite("1 of 2 edit keys hold NaN")
        return real(requests, *args, **kwargs)

    monkeypatch.setattr(editor, "edit", breaks)
    found = run(editor)
    assert [step["failed"] for step in found] == [0, 1, 2]
    assert [step["preserved"] for step in found] == [2, 2, 2]
    assert "A batch was not written: 1 of 2 edit keys hold NaN" in caplog.text
    # Before anything was written it is no model's fault.
    monkeypatch.setattr(editor, "edit", lambda *_, **__: breaks_at_once())
    with pytest.raises(NonFinite):
        run(editor)


def breaks_at_once() -> None:
    raise NonFinite("a key holds NaN")


def test_nan_scores_and_perplexities_do_not_end_it(editor: Editor) -> None:
    from fastmemit.evaluation.perplexity import PerplexityText, perplexity

    text = PerplexityText("text", "0" * 64, tuple(range(20, 40)))
    before = editor.adapter.weight(0).clone()
    steps = run_sequential(
        editor, replace(PLAN, batches=BATCHES[:1]), False,
        perplexity=lambda: perplexity(editor.adapter, text).perplexity,
    )  # fmt: skip
    hook = editor.model.lm_head.register_forward_hook(lambda *args: args[2] * float("nan") if editor.edits else None)
    (step,) = list(steps)
    hook.remove()
    assert set(step["scores"].values()) == {0.0}, "nothing is said exactly, either"
    assert step["before"]["ns"] is not None and step["perplexity"] == float("inf")
    assert torch.equal(before, editor.adapter.weight(0))


def test_what_makes_no_sense_is_refused_before_anything_is_written(editor: Editor) -> None:
    def refused(error: type[Exception], match: str, batches: Any, **more: Any) -> None:
        with pytest.raises(error, match=match):
            next(run_sequential(editor, replace(PLAN, batches=batches, **more), True))

    refused(BadConfig, "after every 0 batches", BATCHES, score_every=0)
    refused(BadData, "at least one record each", [])
    refused(BadData, "at least one record each", [RECORDS[:1], []])
    twice = [Record(1, FACTS[0]), Record(2, FACTS[0])]
    refused(BadRequest, "Requests 0 and 1", [RECORDS[:1], twice])
    edit = editor.edit(FACTS[:1], "memit", **SETTINGS)
    refused(WrongModel, "edited already; undo its edits before a sequence", BATCHES)
    edit.undo()
