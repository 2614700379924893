"""The noise that hides a subject from the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastcov.mode import isolated
from fastmemit.errors import BadRequest
from fastmemit.models import ModelAdapter
from fastmemit.tracing.facts import TracedFact


@isolated()
def subject_embeddings(adapter: ModelAdapter, facts: Sequence[TracedFact]) -> tuple[float, int]:
    """Standard deviation over all coordinates of the subjects' token embeddings, and their width.

    ROME's noise level (its section 2.1 and appendix B) is 3 of these.  Read where the noise is
    added, at the embeddings' output: some models scale it (Gemma 3).

    Raises:
        BadRequest: All coordinates are alike, so that there is nothing to measure noise by.
    """
    tokens = [token for fact in facts for token in fact.ids[fact.first : fact.last + 1]]
    embed = _input_embeddings(adapter)
    values = embed(torch.tensor([tokens], device=adapter.device)).float()
    std = float(values.std())
    if not std > 0:
        raise BadRequest(
            f"The embeddings of the {len(tokens)} subject tokens have a standard deviation of "
            f"{std}, which noise cannot be measured by; give other facts or another model."
        )
    return std, values.shape[-1]


@isolated()
def subject_noise(fact: TracedFact, samples: int, width: int, std: float, seed: int) -> Tensor:
    """Gaussian noise for the subject's tokens, (samples, subject tokens, width), float32.

    It depends on the seed and the fact's own tokens alone: a fact gets the same noise wherever it stands in a file or a
    batch, and at whichever position something is restored.
    """
    name = f"{seed} {fact.first} {fact.last} {fact.ids}"
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return std * torch.randn(samples, fact.last - fact.first + 1, width, generator=generator)


@contextmanager
def added_to_embeddings(adapter: ModelAdapter, noise: Tensor) -> Iterator[None]:
    """Add `noise` (rows, tokens, width) to what the input embeddings give inside the block."""
    embed = _input_embeddings(adapter)
    handle = embed.register_forward_hook(lambda _module, _args, out: out + noise.to(out))
    try:
        yield
    finally:
        handle.remove()


def _input_embeddings(adapter: ModelAdapter) -> Any:
    model: Any = adapter.model
    return model.get_input_embeddings()
