"""Target vectors, optimised in batches and stored by content."""

from fastmemit.targets.optimise import Target, TargetSettings, optimise
from fastmemit.targets.store import TargetKey, TargetStore, stored_or_optimised

__all__ = ["Target", "TargetKey", "TargetSettings", "TargetStore", "optimise", "stored_or_optimised"]
