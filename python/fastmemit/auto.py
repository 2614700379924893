"""``multiplier="auto"``: keys are collected until an edit's solution is near its limit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastcov.sizing import LIMIT, StoppingRule, checkpoints
from fastmemit.data.corpora import Corpus
from fastmemit.statistics import Statistics

if TYPE_CHECKING:
    from fastmemit.sources import Sources

log = logging.getLogger(__name__)

AUTO = "auto"


def precompute_auto(
    sources: Sources,
    corpus: Corpus,
    layers: Sequence[int],
    limit: float = LIMIT,
    allow_fewer: bool = False,
    max_length: int | None = None,
) -> Statistics:
    """Collect until the stopping rule of every layer says that it is enough.

    The sum is stored at every look, so an interrupted pass goes on at the last one, and the looks are the same the next
    time. See `fastcov.sizing` for what is looked at.

    Args:
        sources: Of the unedited model.
        corpus: Where the text comes from.
        layers: Whose keys.
        limit: The multiplier at which it is enough in any case.
        allow_fewer: Take a corpus that ends early for what it has.
        max_length: Cut documents at so many tokens.

    Raises:
        BudgetNotMet: The corpus ended before, and `allow_fewer` is not set.
    """
    rules: dict[str, StoppingRule] = {}
    before: Statistics | None = None
    d_k = sources.widest(layers)
    for keys in checkpoints(d_k, limit):
        after = sources.precompute(corpus, list(layers), keys / d_k, allow_fewer, max_length, after=before, aside=True)
        if not rules:
            rules = {name: StoppingRule(limit=limit) for name in after.paths}
        enough = [rule.update(after.moment(name)) for name, rule in rules.items()]
        before = after
        if all(enough) or after.exhausted:
            break
    assert before is not None
    for name, rule in rules.items():
        if not rule.settled:
            log.warning(
                "with %d keys an edit of %s still disturbs about %.2f times more than it must; a "
                "multiplier above %g, or more and shorter documents, would settle it",
                before.keys,
                name,
                rule.looks[-1].excess,
                limit,
            )
    return sources.keep(before)
