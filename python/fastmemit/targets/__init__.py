"""Target vectors, optimised in batches."""

from fastmemit.targets.optimise import Target, TargetSettings, optimise

__all__ = ["Target", "TargetSettings", "optimise"]
