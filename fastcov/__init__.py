"""Second moments of a model's keys, and the closed-form edits made with them.

The numerics of "Efficient Knowledge Editing via Minimal Precomputation" (arXiv 2506.04226). Importing this package
needs torch alone. `fastcov.ops` has the operator and its kernels, `fastcov.closed_form` the formulas, `fastcov.store`
the file format.
"""

from fastcov import closed_form
from fastcov.ahead import Ahead
from fastcov.alphaedit import alphaedit
from fastcov.batches import bucket, take
from fastcov.budget import budget, minimum_keys
from fastcov.checkpoint import Checkpoint
from fastcov.closed_form import LowRank
from fastcov.collect import collect
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
from fastcov.keys import KeyHooks, flatten_keys, key_rows
from fastcov.linalg import CholeskyFactor, RefinedFactor, factorize, regularised
from fastcov.moments import SecondMoment
from fastcov.null_space import NullSpace, null_space
from fastcov.ops import rank_k_update
from fastcov.processes import Processes
from fastcov.shrinkage import ledoit_wolf, oas, shrunk
from fastcov.spans import Span, between
from fastcov.stopping import StoppingRule, checkpoints
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
    "collect",
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
