"""One pass over a corpus for every multiplier of a sweep: sums are stored on the way."""

from __future__ import annotations

from collections.abc import Sequence

from fastmemit.data import Corpus
from fastmemit.editor import Editor
from fastmemit.statistics import Statistics

#: Tokens that MEMIT's authors ran (100,000 Wikipedia articles), the full precompute of the paper.
FULL_KEYS = 44_000_000


def precompute_multipliers(
    editor: Editor,
    corpus: Corpus,
    multipliers: Sequence[float | None],
    layers: Sequence[int],
    *,
    full_keys: int = FULL_KEYS,
    max_length: int | None = None,
    bos: bool = True,
    seed: int | None = None,
) -> dict[float | None, Statistics]:
    """Statistics of several multipliers, each with the keys of the smaller ones and some more.

    A budget's keys are the first of the next one's. So the corpus is run once, up to the largest budget, and the sum is
    stored at each of them. What is stored already is not run again: a pass that was interrupted goes on at the last
    budget it met.

    Args:
        editor: Of the unedited model.
        corpus: Where the text comes from.
        multipliers: In ascending order; None, which comes last, is the full precompute: `full_keys` keys, or as many as
            the corpus has.
        layers: Whose keys.
        full_keys: Of the full precompute.
        max_length: Cut documents at so many tokens.
        bos: Whether the first position of a document is a key.
        seed: Of the order of the corpus; None takes the editor's.

    Raises:
        BudgetNotMet: The corpus is too short for one of the numbers.
    """
    width = max(editor.adapter.d_k(layer) for layer in layers)
    found: dict[float | None, Statistics] = {}
    before: Statistics | None = None
    for multiplier in multipliers:
        before = editor.sources.precompute(
            corpus,
            list(layers),
            full_keys / width if multiplier is None else multiplier,
            allow_fewer=multiplier is None,
            max_length=max_length,
            bos=bos,
            after=before,
            seed=seed,
            aside=True,
        )
        found[multiplier] = before
    return found
