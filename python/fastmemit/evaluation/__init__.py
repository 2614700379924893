"""CounterFact on a model before and after editing it."""

from fastmemit.evaluation.counterfact import score_records
from fastmemit.evaluation.nll import answer_nlls
from fastmemit.evaluation.runner import evaluate
from fastmemit.evaluation.schema import Result

__all__ = ["Result", "answer_nlls", "evaluate", "score_records"]
