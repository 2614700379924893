"""lm-evaluation-harness on the model in memory, edited or not: nothing is saved or loaded again."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, TypedDict

from fastcov.mode import evaluation_mode, isolated
from fastmemit.downstream.tasks import Tasks, apart, check_installed, find_tasks
from fastmemit.editor import Editor
from fastmemit.errors import BadConfig


class TaskScores(TypedDict):
    """What the harness found; ``scores`` has a line for each task and group."""

    scores: dict[str, dict[str, float]]  # task -> metric, such as acc and acc_stderr -> value
    samples: dict[str, int]  # task -> how many of its questions were asked
    num_fewshot: dict[str, int]  # task -> examples in front of each question
    task_versions: dict[str, Any]
    limit: int | None
    lm_eval: str  # the harness's version


@isolated()
def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | Tasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    batch_size: int | str = 1,
    seed: int = 1234,
    progress: bool = False,
) -> TaskScores:
    """Score the model, as it is in memory now, on tasks of lm-evaluation-harness.

    Neither the model's mode, the tokenizer nor the global random states are different afterwards.

    Args:
        model: An `Editor`, or a causal language model of transformers.
        tokenizer: Its tokenizer; None takes the editor's.
        tasks: Names, see `find_tasks`, or what `find_tasks` found.
        limit: Ask so many questions of each task; None asks all.
        num_fewshot: Examples in front of each question; None takes each task's own number.
        include_path: See `find_tasks`.
        batch_size: Sequences a forward takes, or ``"auto"``.
        seed: Of the choice of examples.
        progress: Let the harness draw its bars.

    Raises:
        BadConfig: See `find_tasks`; or a number that makes no sense, or no tokenizer.
        BadData: See `find_tasks`.
    """
    check_installed()
    _check(limit, num_fewshot, batch_size)
    if isinstance(model, Editor):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    if tokenizer is None:
        raise BadConfig("A model without its tokenizer answers no task; give both, or an Editor.")
    if isinstance(tasks, str):
        raise BadConfig(f"Tasks are a list of names, not the text {tasks!r}; give [{tasks!r}].")
    if not isinstance(tasks, Tasks):
        tasks = find_tasks(tasks, include_path=include_path, progress=progress)
    with apart(progress), evaluation_mode(model):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # The harness gives a tokenizer without padding one, and turns its side.
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = simple_evaluate(
            model=lm,
            tasks=list(tasks.loaded),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=tasks.manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return TaskScores(
        scores={name: _metrics(scores) for name, scores in found["results"].items()},
        samples={name: int(n["effective"]) for name, n in found["n-samples"].items()},
        num_fewshot={name: int(n) for name, n in found["n-shot"].items() if n is not None},
        task_versions=dict(found["versions"]),
        limit=limit,
        lm_eval=version("lm-eval"),
    )


def _check(limit: int | None, num_fewshot: int | None, batch_size: int | str) -> None:
    if limit is not None and limit < 1:
        raise BadConfig(f"The limit must be 1 question or more but is {limit}; give more.")
    if num_fewshot is not None and num_fewshot < 0:
        raise BadConfig(f"num_fewshot must be 0 or more but is {num_fewshot}; give more.")
    good = batch_size >= 1 if isinstance(batch_size, int) else batch_size == "auto"
    if not good:
        raise BadConfig(f"The batch size must be 1 or more, or auto, but is {batch_size!r}; give such a number.")


def _metrics(scores: dict[str, Any]) -> dict[str, float]:
    """Numbers by metric; the harness writes ``acc,none``: metric, then filter."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in scores.items()
        if "," in key and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
