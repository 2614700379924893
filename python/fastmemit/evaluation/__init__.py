"""CounterFact and zsRE on a model before and after editing it."""

from fastmemit.answers import Answer, answer_nlls, judge_answers
from fastmemit.evaluation.counterfact import score_records
from fastmemit.evaluation.generation import generate_records
from fastmemit.evaluation.references import References, load_references
from fastmemit.evaluation.runner import evaluate
from fastmemit.evaluation.schema import Result
from fastmemit.evaluation.zsre import judge_zsre

__all__ = [
    "Answer",
    "References",
    "Result",
    "answer_nlls",
    "evaluate",
    "generate_records",
    "judge_answers",
    "judge_zsre",
    "load_references",
    "score_records",
]
