"""Implementations of the rank-k update; `fastcov.ops` chooses between them."""
