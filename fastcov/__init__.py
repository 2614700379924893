"""Second moments of a model's keys, and the closed-form edits made with them.

The numerics of "Efficient Knowledge Editing via Minimal Precomputation" (arXiv 2506.04226). Importing this package
needs torch alone. `fastcov.ops` has the operator and its kernels, `fastcov.closed_form` the formulas, `fastcov.store`
the file format.
"""

from fastcov import closed_form
from fastcov.batching import Ahead, Span, between, bucket, take
from fastcov.checkpoint import Checkpoint
from fastcov.closed_form import LowRank, NullSpace, alphaedit, null_space
from fastcov.collecting import collect_moments
from fastcov.distributed import Processes
from fastcov.errors import (
    BadBudget,
    BadInput,
    BudgetNotMet,
    EmptyCorpus,
    FailedElsewhere,
    FastcovError,
    HookNeverRan,
    KernelUnavailable,
    NonFiniteKeys,
    NonFiniteMatrix,
    NoNullSpace,
    NotPositiveDefinite,
    ProcessLost,
    QuarticUnknown,
    ResidualTooLarge,
    StaleCheckpoint,
    StoreDamaged,
    StoreMismatch,
    StoreMissing,
    UnknownModule,
    WrongWidth,
)
from fastcov.hooks import KeyHooks, flatten_keys, key_rows
from fastcov.linalg import CholeskyFactor, RefinedFactor, factorize, ledoit_wolf, oas, regularised, shrunk
from fastcov.moments import SecondMoment
from fastcov.ops import rank_k_update
from fastcov.sizing import StoppingRule, budget, checkpoints, minimum_keys
from fastcov.store import load_moment, read_provenance, save_moment
from fastcov.throughput import Throughput

__all__ = [
    "Ahead",
    "BadBudget",
    "BadInput",
    "BudgetNotMet",
    "Checkpoint",
    "CholeskyFactor",
    "EmptyCorpus",
    "FailedElsewhere",
    "FastcovError",
    "HookNeverRan",
    "KernelUnavailable",
    "KeyHooks",
    "LowRank",
    "NoNullSpace",
    "NonFiniteKeys",
    "NonFiniteMatrix",
    "NotPositiveDefinite",
    "NullSpace",
    "ProcessLost",
    "Processes",
    "QuarticUnknown",
    "RefinedFactor",
    "ResidualTooLarge",
    "SecondMoment",
    "Span",
    "StaleCheckpoint",
    "StoppingRule",
    "StoreDamaged",
    "StoreMismatch",
    "StoreMissing",
    "Throughput",
    "UnknownModule",
    "WrongWidth",
    "alphaedit",
    "between",
    "bucket",
    "budget",
    "checkpoints",
    "closed_form",
    "collect_moments",
    "factorize",
    "flatten_keys",
    "key_rows",
    "ledoit_wolf",
    "load_moment",
    "minimum_keys",
    "null_space",
    "oas",
    "rank_k_update",
    "read_provenance",
    "regularised",
    "save_moment",
    "shrunk",
    "take",
]
