"""Finding tasks: what is missing or unknown is said in a sentence, before any work."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

from fastmemit.errors import BadConfig, BadData
from fastmemit.evaluation.downstream import find_tasks
from tiny_tasks import task_folder


def test_without_the_package_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    for missing in ("lm_eval", "accelerate"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, missing=missing: None if name == missing else there(name)
        )
        with pytest.raises(BadConfig, match=r"pip install 'fastmemit\[lm-eval\]'"):
            find_tasks(["hellaswag"])


def test_a_task_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    level = logging.getLogger("lm_eval").level
    found = find_tasks(["tiny_facts", "tiny_facts"], include_path=task_folder(tmp_path))
    assert found.names == ("tiny_facts",) and len(found.loaded) == 1
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger("lm_eval").level == level


def test_data_that_cannot_be_fetched(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = task_folder(tmp_path)
    file = folder / "tiny_facts.yaml"
    file.write_text(file.read_text().replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(BadData) as error:
        find_tasks(["tiny_facts"], include_path=folder)
    said = str(error.value)
    assert "task 'tiny_facts'" in said and "the data set nobody/nothing" in said
    assert "unset HF_HUB_OFFLINE" in said and "\n" not in said and said.endswith(".")


def test_data_files_that_are_missing(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = task_folder(tmp_path)
    (folder / "tiny_facts.jsonl").unlink()
    with pytest.raises(BadData, match=r"task 'tiny_facts' .*tiny_facts.jsonl"):
        find_tasks(["tiny_facts"], include_path=folder)


def test_no_task_and_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(BadConfig, match="No task is named"):
        find_tasks([])
    with pytest.raises(BadConfig, match=r"There is no folder '.*nowhere'"):
        find_tasks(["tiny_facts"], include_path=tmp_path / "nowhere")


@pytest.mark.slow  # the harness reads all its task files
def test_an_unknown_name_gets_those_that_are_near(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(BadConfig, match=r"no task 'hellaswagg'; near it are hellaswag,"):
        find_tasks(["tiny_facts", "hellaswagg"], include_path=task_folder(tmp_path))


@pytest.mark.slow
def test_patterns_and_the_harnesss_own_tasks(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(BadData, match=r"task 'arc_challenge' .*'allenai/ai2_arc'"):
        find_tasks(["tiny_f*", "arc_challeng?"], include_path=task_folder(tmp_path))
