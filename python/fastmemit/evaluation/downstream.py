"""What editing costs elsewhere: perplexity on running text, and lm-evaluation-harness's tasks.

The harness runs on the model in memory, edited or not: nothing is saved or loaded again.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from fastcov.files import StrPath
from fastcov.hooks import evaluation_mode, isolated, random_state_kept
from fastmemit.display import bar
from fastmemit.editor import Editor
from fastmemit.edits import Edit
from fastmemit.errors import BadConfig, BadData, WrongModel
from fastmemit.evaluation.perplexity import PerplexityText, count_tokens, perplexity
from fastmemit.evaluation.runner import stage
from fastmemit.models.running import context_limit
from fastmemit.statistics import versions

_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "evaluate")
_DATASET = re.compile(r"^dataset_path:\s*['\"]?([^\s'\"#]+)", re.MULTILINE)


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-evaluation-harness whose data are here."""

    names: tuple[str, ...]  # what was asked for, patterns replaced by the names that match them
    manager: Any  # the harness's `TaskManager` that knows them
    loaded: tuple[Any, ...]  # the harness's tasks and groups


class TaskScores(TypedDict):
    """What the harness found; ``scores`` has a line for each task and group."""

    scores: dict[str, dict[str, float]]  # task -> metric, such as acc and acc_stderr -> value
    samples: dict[str, int]  # task -> how many of its questions were asked
    num_fewshot: dict[str, int]  # task -> examples in front of each question
    task_versions: dict[str, Any]
    limit: int | None
    lm_eval: str  # the harness's version


class State(TypedDict):
    """What was measured on the weights as they were; None where it was not asked for."""

    perplexity: float | None
    nll: float | None  # nats per predicted token
    tasks: TaskScores | None
    seconds: dict[str, float]  # perplexity, tasks: wall time


class Downstream(TypedDict):
    """Everything that a comparison found (``fastmemit experiment downstream --json``)."""

    before: State  # without any edit
    after: State | None  # None where no edit was given
    text: dict[str, Any] | None  # name, sha256, tokens, windows, context, stride
    edits: list[dict[str, Any]]  # digest, method and number of facts of each
    model: str
    fingerprint: str
    dtype: str
    device: str
    versions: dict[str, str]


def find_tasks(names: Sequence[str], *, include_path: StrPath | None = None, progress: bool = False) -> Tasks:
    """Find tasks, groups or tags of lm-evaluation-harness by name, and fetch their data.

    ``*`` and ``?`` match as in file names. `include_path` is a folder with task files (YAML) of your own, whose names
    go first; with `progress` the harness draws its bars.

    Raises:
        BadConfig: lm-eval is not installed, no task is named, a name is unknown (the message lists what is near), or
            the folder does not exist.
        BadData: A task's data cannot be fetched; the message names the task and its data set.
    """
    if not names:
        raise BadConfig("No task is named; give one such as hellaswag.")
    if include_path is not None and not Path(include_path).is_dir():
        raise BadConfig(f"There is no folder {os.fspath(include_path)!r} with tasks; name one that exists.")
    _check_installed()
    with _quiet(progress):
        from lm_eval.tasks import TaskManager

        # Reading the harness's own 14,000 files is left out if it can be.
        if include_path is None:
            manager = TaskManager()
        else:
            manager = TaskManager(include_path=str(include_path), include_defaults=False)
            if not set(names) <= set(manager.all_subtasks):
                manager = TaskManager(include_path=str(include_path))
        chosen = tuple(dict.fromkeys(match for name in names for match in _matches(manager, name)))
        return Tasks(chosen, manager, tuple(item for name in chosen for item in _load(manager, name)))


def _check_installed() -> None:
    for package, module in (("lm-eval", "lm_eval"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(module) is None:
            raise BadConfig(
                f"Tasks need the package {package}, which is not installed; pip install 'fastmemit[lm-eval]'."
            )


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """No remarks of the harness and its libraries, bars only if wanted, and the global random states as they were."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    # All that draws a bar asks sys.stderr for a terminal, and no setting reaches all of it.
    sink = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with sink, random_state_kept():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _matches(manager: Any, name: str) -> list[str]:
    """The known names that a name or pattern stands for."""
    if name in manager.task_index:
        return [name]
    found = list(manager.match_tasks([name])) if re.search(r"[*?\[]", name) else []
    if found:
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=4)
    fix = f"near it are {', '.join(near)}" if near else "lm-eval ls tasks lists all there are"
    raise BadConfig(f"lm-evaluation-harness has no task {name!r}; {fix}.")


def _load(manager: Any, name: str) -> list[Any]:
    """The group of this name, or its tasks, with their data in memory."""
    try:
        loaded = manager.load([name])
    # Whatever data sets, metrics and the code of a task raise; there is no common type.
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
        path = getattr(manager.task_index[name], "yaml_path", None)
        text = Path(path).read_text(encoding="utf-8", errors="replace") if path and Path(path).is_file() else ""
        dataset = _DATASET.search(text)
        data = f"the data set {dataset[1]}" if dataset else "its data"
        raise BadData(
            f"The task {name!r} cannot be loaded with {data} ({reason.rstrip('.')}); connect to the network once, "
            "unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, or name tasks whose data are on this machine."
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


@isolated()
def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | Tasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: StrPath | None = None,
    batch_size: int | str = 1,
    seed: int = 1234,
    progress: bool = False,
) -> TaskScores:
    """Score the model, as it is in memory now, on tasks of lm-evaluation-harness.

    Neither the model's mode, the tokenizer nor the global random states are different afterwards. The model may be an
    `Editor`, whose tokenizer None takes, or a causal language model of transformers; the tasks names or what
    `find_tasks` found. Of each task `limit` questions are asked (None: all) with `num_fewshot` examples in front (None:
    the task's own number), which `seed` chooses. A forward takes `batch_size` sequences, or ``"auto"``.

    Raises:
        BadConfig: See `find_tasks`; or a number that makes no sense, or no tokenizer.
        BadData: See `find_tasks`.
    """
    _check_installed()
    if limit is not None and limit < 1:
        raise BadConfig(f"The limit must be 1 question or more but is {limit}; give more.")
    if num_fewshot is not None and num_fewshot < 0:
        raise BadConfig(f"num_fewshot must be 0 or more but is {num_fewshot}; give more.")
    if batch_size < 1 if isinstance(batch_size, int) else batch_size != "auto":
        raise BadConfig(f"The batch size must be 1 or more, or auto, but is {batch_size!r}; give such a number.")
    if isinstance(model, Editor):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    if tokenizer is None:
        raise BadConfig("A model without its tokenizer answers no task; give both, or an Editor.")
    if isinstance(tasks, str):
        raise BadConfig(f"Tasks are a list of names, not the text {tasks!r}; give [{tasks!r}].")
    if not isinstance(tasks, Tasks):
        tasks = find_tasks(tasks, include_path=include_path, progress=progress)
    with _quiet(progress), evaluation_mode(model):
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
            **{f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")},
        )
    return TaskScores(
        scores={name: _metrics(scores) for name, scores in found["results"].items()},
        samples={name: int(n["effective"]) for name, n in found["n-samples"].items()},
        num_fewshot={name: int(n) for name, n in found["n-shot"].items() if n is not None},
        task_versions=dict(found["versions"]),
        limit=limit,
        lm_eval=version("lm-eval"),
    )


def _metrics(scores: dict[str, Any]) -> dict[str, float]:
    """Numbers by metric; the harness writes ``acc,none``: metric, then filter."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in scores.items()
        if "," in key and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


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
    """Score the unedited model, apply the edits in order, each on top of the one before, score again, undo them.

    The weights are the same before and after, bit for bit, whatever happens in between. For the text see `read_text`,
    for the tasks `find_tasks`, and `evaluate_tasks` for the settings of these.

    Raises:
        BadConfig: There is neither text nor task, or see `perplexity` and `evaluate_tasks`.
        WrongModel: The model is edited already.
    """
    if text is None and tasks is None:
        raise BadConfig("There is neither a text nor a task to score; give one of them.")
    if editor.edits:
        raise WrongModel("The model is edited already; undo its edits before a comparison.")
    settings: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    shape = None
    if text is not None:
        windows = text.windows(context_limit(editor.model))  # refuses before anything runs
        shape = {
            "name": text.name,
            "sha256": text.sha256,
            "tokens": sum(window.predicted for window in windows),
            "windows": len(windows),
            "context": max(len(window.ids) for window in windows),
            "stride": text.stride,
        }

    def measure(what: str) -> State:
        found = State(perplexity=None, nll=None, tasks=None, seconds={})
        if text is not None:
            total = count_tokens(editor.adapter, text)
            with stage(found["seconds"], "perplexity"), bar(f"{what} perplexity", total, progress) as advance:
                result = perplexity(editor.adapter, text, progress=advance)
            found["perplexity"], found["nll"] = result.perplexity, result.nll
        if tasks is not None:
            with stage(found["seconds"], "tasks"):
                found["tasks"] = evaluate_tasks(editor, None, tasks, progress=progress, **settings)
        found["seconds"] = {name: round(value, 3) for name, value in found["seconds"].items()}
        return found

    before, after = measure("unedited"), None
    if edits:
        try:
            for edit in edits:
                edit.apply()
            after = measure("edited")
        finally:
            for edit in reversed(editor.edits):
                edit.undo()
    return Downstream(
        before=before,
        after=after,
        text=shape,
        edits=[
            {"digest": d.digest(), "method": d.provenance.get("method"), "facts": len(d.requests)}
            for d in (edit.delta for edit in edits)
        ],
        model=editor.name,
        fingerprint=editor.fingerprint,
        dtype=str(editor.model.dtype).removeprefix("torch."),
        device=str(editor.adapter.device),
        versions=versions(),
    )
