"""From requests to a delta and what it was made with, and from there into the weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from fastcov.mode import isolated
from fastmemit.applied import Edit, EditStack
from fastmemit.delta import Delta
from fastmemit.editors import PLANS, PRESERVING, EditConfig, PreservedKeys, ReadCache
from fastmemit.editors.base import EditKeys
from fastmemit.errors import MissedFacts
from fastmemit.factors import resolved
from fastmemit.outcomes import compare, verdict
from fastmemit.request import EditRequest, check_batch
from fastmemit.sources import Sources
from fastmemit.statistics import versions

log = logging.getLogger(__name__)


@isolated()
def plan_edit(
    sources: Sources,
    stack: EditStack,
    requests: Sequence[EditRequest],
    config: EditConfig,
    preserved: PreservedKeys | None = None,
    reads: ReadCache | None = None,
) -> tuple[Delta, EditKeys]:
    """Compute an edit; the weights are the same before and after.

    Args:
        sources: What it draws on.
        stack: The edits that are in the weights.
        requests: The facts, written together.
        config: The settings.
        preserved: Keys of earlier edits that this one shall preserve too; None stands for none, but for those of all
            edits in the weights where they belong to the method.
        reads: Where to keep what the unedited model shows.

    Returns:
        The delta, and the keys that it was written with.

    Raises:
        BadRequest: A request that cannot be carried out, or two that contradict each other.
        WrongModel: The preserved keys are of another editor's edits.
        fastcov.StoreMissing: No statistics of the edited layers were precomputed.
    """
    batch = check_batch(requests)
    if preserved is None and config.method in PRESERVING:
        preserved = sources.preserved
        unknown = len(stack.edits) - len(preserved.edits)
        if unknown:
            log.warning(
                "%d of the %d edits in the weights come from files, which hold no keys: %s does not preserve theirs",
                unknown,
                len(stack.edits),
                config.method,
            )
    earlier = () if preserved is None else preserved.edits
    for edit in earlier:
        stack.check(edit)
    work = sources.workspace(config, preserved, reads)
    used = sources.statistics_for(config.layers)
    factors = work.plan(PLANS[config.method], batch)
    provenance = {
        **sources.identity(),
        "method": config.method,
        "settings": resolved(work.adapter, used, config).as_dict(),
        "requests": [dataclasses.asdict(request) for request in batch],
        "statistics": dict(used.provenance),
        "contexts": list(sources.contexts(config.method)),
        "on_top_of": stack.digests(),
        "seed": sources.seed,
        "versions": versions(),
    }
    if preserved is not None:
        provenance["preserved"] = [edit.delta.digest() for edit in earlier]
    return Delta(factors, provenance), work.keys


@isolated()
def apply_edit(
    sources: Sources,
    stack: EditStack,
    requests: Sequence[EditRequest],
    config: EditConfig,
    preserved: PreservedKeys | None = None,
    reads: ReadCache | None = None,
    *,
    verify: bool = False,
    strict: bool = False,
) -> Edit:
    """Compute an edit and apply it; its keys join the preserved ones.

    Args and errors are those of `plan_edit`; on any of them the weights are as they were. `verify` asks the facts
    before and after (`Edit.outcomes`); `strict` does, too, and takes the edit back where the model does not say one of
    them.

    Raises:
        MissedFacts: That was so.
    """
    batch = check_batch(requests)
    delta, keys = plan_edit(sources, stack, batch, config, preserved, reads)
    before = sources.ask(batch) if verify or strict else []
    edit = Edit(delta, stack).apply()
    if before:
        try:
            edit.outcomes = compare(batch, before, sources.ask(batch))
            if strict and not all(outcome.said for outcome in edit.outcomes):
                said = verdict(edit.outcomes).replace("\n", "; ")
                raise MissedFacts(f"{said}; the model is left unedited.")
        except BaseException:
            edit.undo()
            raise
    if preserved is not None:
        preserved.add(edit, keys)
    # In the computer's memory: most edits are never followed by one that asks for their keys.
    kept = {layer: [k.cpu() for k in blocks] for layer, blocks in keys.items()}
    sources.preserved.add(edit, kept)
    return edit
