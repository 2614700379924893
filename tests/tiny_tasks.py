"""A task of lm-evaluation-harness with its data in a folder: nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

_TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
#: The gold answers are those that `tiny_editors.FACTS` write.
QUESTIONS = (
    ("The Eiffel Tower is located in the city of", ("Paris", "Rome", "Berlin", "London"), 1),
    ("The capital of France is", ("Paris", "Rome", "Berlin", "London"), 2),
    ("The mother tongue of the poet is", ("French", "English", "Italy", "football"), 1),
    ("I play the", ("violin", "piano", "city", "language"), 0),
    ("The headquarters of the company are in", ("Berlin", "west", "Lyon", "Rome"), 0),
    ("They play football in", ("London", "French", "poet", "tower"), 0),
)


def task_folder(at: Path, name: str = "tiny_facts") -> Path:
    """A folder with one task, which `QUESTIONS` are the data of."""
    folder = at / f"tasks-{name}"
    folder.mkdir()
    data = folder / f"{name}.jsonl"
    rows = [{"question": q, "choices": list(c), "answer": a} for q, c, a in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(_TASK.format(name=name, data=json.dumps(str(data))))
    return folder
