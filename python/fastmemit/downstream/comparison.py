"""The same text and tasks before and after edits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypedDict

from fastmemit.downstream.harness import TaskScores, evaluate_tasks
from fastmemit.downstream.tasks import Tasks
from fastmemit.editor import Edit, Editor
from fastmemit.errors import BadConfig, WrongModel
from fastmemit.evaluation.perplexity import PerplexityText, count_tokens, perplexity
from fastmemit.models.context import context_limit
from fastmemit.progress import bar
from fastmemit.statistics import versions


class State(TypedDict):
    """What was measured on the weights as they were; None where it was not asked for."""

    perplexity: float | None
    nll: float | None  # nats per predicted token
    tasks: TaskScores | None
    seconds: dict[str, float]  # perplexity, tasks: wall time


class Downstream(TypedDict):
    """Everything that a comparison found (``fastmemit downstream --json``)."""

    before: State  # without any edit
    after: State | None  # None where no edit was given
    text: dict[str, Any] | None  # name, sha256, tokens, windows, context, stride
    edits: list[dict[str, Any]]  # digest, method and number of facts of each
    model: str
    fingerprint: str
    dtype: str
    device: str
    versions: dict[str, str]


def compare(
    editor: Editor,
    edits: Sequence[Edit] = (),
    *,
    text: PerplexityText | None = None,
    tasks: Tasks | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    progress: bool = False,
) -> Downstream:
    """Score the unedited model, apply the edits, score again, undo them.

    The weights are the same before and after, bit for bit, whatever happens in between.

    Args:
        editor: The editor of an unedited model.
        edits: Applied in this order, each on top of the one before.
        text: Running text for a perplexity, see `read_text`.
        tasks: Tasks of lm-evaluation-harness, see `find_tasks`.
        limit: See `evaluate_tasks`.
        num_fewshot: See `evaluate_tasks`.
        batch_size: See `evaluate_tasks`.
        progress: Show progress bars.

    Raises:
        BadConfig: There is neither text nor task, or see `perplexity` and `evaluate_tasks`.
        WrongModel: The model is edited already.
    """
    if text is None and tasks is None:
        raise BadConfig("There is neither a text nor a task to score; give one of them.")
    if editor.edits:
        raise WrongModel("The model is edited already; undo its edits before a comparison.")
    shape = None if text is None else _text(editor, text)  # refuses before anything runs
    settings = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    before = _state(editor, text, tasks, settings, "unedited", progress)
    after = None
    if edits:
        try:
            for edit in edits:
                edit.apply()
            after = _state(editor, text, tasks, settings, "edited", progress)
        finally:
            for edit in reversed(editor.edits):
                edit.undo()
    return Downstream(
        before=before,
        after=after,
        text=shape,
        edits=[_edit(edit) for edit in edits],
        model=editor.name,
        fingerprint=editor.fingerprint,
        dtype=str(editor.model.dtype).removeprefix("torch."),
        device=str(editor.adapter.device),
        versions=versions(),
    )


def _state(
    editor: Editor,
    text: PerplexityText | None,
    tasks: Tasks | None,
    settings: dict[str, Any],
    what: str,
    progress: bool,
) -> State:
    found = State(perplexity=None, nll=None, tasks=None, seconds={})
    if text is not None:
        begun = time.perf_counter()
        total = count_tokens(editor.adapter, text)
        with bar(f"{what} perplexity", total, progress) as advance:
            result = perplexity(editor.adapter, text, progress=advance)
        found["perplexity"], found["nll"] = result.perplexity, result.nll
        found["seconds"]["perplexity"] = round(time.perf_counter() - begun, 3)
    if tasks is not None:
        begun = time.perf_counter()
        found["tasks"] = evaluate_tasks(editor, None, tasks, progress=progress, **settings)
        found["seconds"]["tasks"] = round(time.perf_counter() - begun, 3)
    return found


def _text(editor: Editor, text: PerplexityText) -> dict[str, Any]:
    windows = text.windows(context_limit(editor.model))
    return {
        "name": text.name,
        "sha256": text.sha256,
        "tokens": sum(window.predicted for window in windows),
        "windows": len(windows),
        "context": max(len(window.ids) for window in windows),
        "stride": text.stride,
    }


def _edit(edit: Edit) -> dict[str, Any]:
    return {
        "digest": edit.delta.digest(),
        "method": edit.delta.provenance.get("method"),
        "facts": len(edit.delta.requests),
    }
