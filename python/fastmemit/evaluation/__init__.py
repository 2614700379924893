"""CounterFact, zsRE, running text and lm-evaluation-harness's tasks on a model before and after editing it."""

from fastmemit.answers import Answer, judge_answers
from fastmemit.evaluation.generation import References, generate_records, load_references
from fastmemit.evaluation.runner import Result, evaluate, measure_answers
from fastmemit.evaluation.scores import judge_zsre, score_records

__all__ = [
    "Answer", "References", "Result", "evaluate", "generate_records", "judge_answers", "judge_zsre", "load_references",
    "measure_answers", "score_records",
]  # fmt: skip
