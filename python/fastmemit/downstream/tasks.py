"""Tasks of lm-evaluation-harness by name: found and their data fetched before any work is done."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcov.mode import random_state_kept
from fastmemit.errors import BadConfig, BadData

_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "evaluate")
_DATASET = re.compile(r"^dataset_path:\s*['\"]?([^\s'\"#]+)", re.MULTILINE)


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data are here.

    Attributes:
        names: What was asked for, patterns replaced by the names that match them.
        manager: The harness's `TaskManager` that knows them.
        loaded: The harness's tasks and groups.
    """

    names: tuple[str, ...]
    manager: Any
    loaded: tuple[Any, ...]


def find_tasks(
    names: Sequence[str], *, include_path: str | os.PathLike[str] | None = None, progress: bool = False
) -> Tasks:
    """Find tasks, groups or tags of lm-evaluation-harness, and fetch their data.

    Args:
        names: Names such as ``"hellaswag"``; ``*`` and ``?`` match as in file names.
        include_path: A folder with task files (YAML) of your own, whose names go first.
        progress: Let the harness draw its bars.

    Raises:
        BadConfig: lm-eval is not installed, no task is named, a name is unknown (the message lists what is near), or
            the folder does not exist.
        BadData: A task's data cannot be fetched; the message names the task and its data set.
    """
    if not names:
        raise BadConfig("No task is named; give one such as hellaswag.")
    if include_path is not None and not Path(include_path).is_dir():
        raise BadConfig(f"There is no folder {os.fspath(include_path)!r} with tasks; name one that exists.")
    check_installed()
    with apart(progress):
        manager = _manager(names, include_path)
        known = [match for name in names for match in _matches(manager, name)]
        chosen = tuple(dict.fromkeys(known))
        loaded = tuple(item for name in chosen for item in _load(manager, name))
    return Tasks(chosen, manager, loaded)


def _manager(names: Sequence[str], include_path: str | os.PathLike[str] | None) -> Any:
    """What knows the tasks; reading the harness's own 14,000 files is left out if it can be."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    if set(names) <= set(own.all_subtasks):
        return own
    return TaskManager(include_path=str(include_path))


def check_installed() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        BadConfig: lm-eval, or accelerate, which its models need, is not installed.
    """
    for package, module in (("lm-eval", "lm_eval"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(module) is None:
            raise BadConfig(
                f"Tasks need the package {package}, which is not installed; pip install 'fastmemit[lm-eval]'."
            )


@contextlib.contextmanager
def apart(progress: bool) -> Iterator[None]:
    """The harness kept apart from its caller.

    Its remarks and its libraries' are not shown, their bars only if wanted, and the global random states, which it
    sets, are as they were.
    """
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
    mend = f"near it are {', '.join(near)}" if near else "lm-eval ls tasks lists all there are"
    raise BadConfig(f"lm-evaluation-harness has no task {name!r}; {mend}.")


def _load(manager: Any, name: str) -> list[Any]:
    """The group of this name, or its tasks, with their data in memory."""
    try:
        loaded = manager.load([name])
    # Whatever data sets, metrics and the code of a task raise; there is no common type.
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
        dataset = _dataset_of(manager, name)
        data = f"the data set {dataset}" if dataset else "its data"
        raise BadData(
            f"The task {name!r} cannot be loaded with {data} ({reason.rstrip('.')}); connect to "
            "the network once, unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, or name tasks whose "
            "data are on this machine."
        ) from error
    if name in loaded["groups"]:
        return [loaded["groups"][name]]
    return list(loaded["tasks"].values())


def _dataset_of(manager: Any, name: str) -> str | None:
    """The data set that a task's file names, where it names one itself."""
    path = getattr(manager.task_index[name], "yaml_path", None)
    if path is None or not Path(path).is_file():
        return None
    found = _DATASET.search(Path(path).read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else None
