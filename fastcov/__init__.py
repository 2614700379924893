"""Second moments of a model's keys, and the closed-form edits made with them.

The numerics of "Efficient Knowledge Editing via Minimal Precomputation" (arXiv 2506.04226). Importing this package
needs torch alone. A pass over text: `bucket` makes batches, `collect_moments` sums the keys, `save_moment` stores them.
An edit: `regularised` and `factorize` once, then `rome`, `emmet` or `memit`; `null_space` and `alphaedit`.
"""

from fastcov.batching import Prefetcher, Span, between, bucket, take
from fastcov.closed_form import LowRank, NullSpace, alphaedit, emmet, memit, null_space, rome
from fastcov.collecting import collect_moments
from fastcov.distributed import Processes
from fastcov.errors import (
    BadInput,
    BudgetNotMet,
    FailedElsewhere,
    FastcovError,
    KernelUnavailable,
    NonFinite,
    NoNullSpace,
    NotPositiveDefinite,
    ProcessLost,
    StaleCheckpoint,
    StoreDamaged,
    StoreMismatch,
)
from fastcov.hooks import KeyHooks
from fastcov.linalg import CholeskyFactor, factorize, regularised
from fastcov.moments import SecondMoment, budget, ledoit_wolf, oas
from fastcov.ops import rank_k_update
from fastcov.sizing import StoppingRule
from fastcov.store import Checkpoint, load_moment, read_provenance, save_moment

__all__ = [
    "BadInput", "BudgetNotMet", "Checkpoint", "CholeskyFactor", "FailedElsewhere", "FastcovError",
    "KernelUnavailable", "KeyHooks", "LowRank", "NoNullSpace", "NonFinite", "NotPositiveDefinite", "NullSpace",
    "Prefetcher", "ProcessLost", "Processes", "SecondMoment", "Span", "StaleCheckpoint", "StoppingRule",
    "StoreDamaged", "StoreMismatch", "alphaedit", "between", "bucket", "budget", "collect_moments",
    "emmet", "factorize", "ledoit_wolf", "load_moment", "memit", "null_space", "oas", "rank_k_update",
    "read_provenance", "regularised", "rome", "save_moment", "take",
]  # fmt: skip
