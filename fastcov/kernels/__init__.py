"""Implementations of the rank-k update, between which `fastcov.ops` chooses."""
