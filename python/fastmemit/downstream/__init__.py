"""What editing costs elsewhere: perplexity on running text, and lm-evaluation-harness's tasks."""

from fastmemit.downstream.comparison import Downstream, compare
from fastmemit.downstream.harness import TaskScores, evaluate_tasks
from fastmemit.downstream.tasks import Tasks, find_tasks

__all__ = ["Downstream", "TaskScores", "Tasks", "compare", "evaluate_tasks", "find_tasks"]
