"""Several deltas as one, in their order and on record, and one of them taken out again.

Deltas add: ``W + L1 R1^T + L2 R2^T = W + [L1 L2] [R1 R2]^T``, so a composition holds the factors of
its parts side by side.  Applied, it equals its parts applied one after the other up to rounding,
because it is rounded to the weight's dtype once and they n times: the two differ in an entry by at most about ``u
(|W_1| + ... + |W_n| + |W'|)``, W_i being what the weight is after part i, W' after the composition, and u the unit
roundoff of the weight's dtype (2^-24 in float32, 2^-8 in bfloat16), and by the rounding of the products in float32, ``2
B 2^-24 |L| |R|^T``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcov.hooks import isolated
from fastmemit.delta import Delta
from fastmemit.errors import BadConfig, ConflictingEdits, DamagedFile, WrongModel
from fastmemit.sharing.compression import compressed
from fastmemit.sharing.facts import check_facts, facts_of, listed_texts
from fastmemit.statistics import versions

METHOD = "composition"
#: Fewer digits of a digest than this name nothing for sure.
_DIGITS = 8


@isolated()
def compose(
    deltas: Sequence[Delta], *, allow_conflicts: bool = False, compress: bool = False, rank: int | None = None
) -> Delta:
    """One delta that makes the changes of several.

    A part that is a composition itself is taken apart, so that each edit can be removed alone. What a delta changes was
    computed on one state of the weights: the model's own, or with other
    edits on it (``on_top_of``).  Their sum does not depend on their order, but it is what was
    meant only where each later edit was computed on top of the earlier ones, or they share no weight; the more facts
    computed apart are added, the more they disturb each other.

    Args:
        deltas: At least one, of one model, in the order in which they count as applied.
        allow_conflicts: Add edits of which two write the same fact.
        compress: Bring ranks above a weight's smaller side down to it (`compressed`); parts can then no longer be
            removed.
        rank: Compress to at most this rank, with loss; implies `compress`.

    Returns:
        The composition, with method ``"composition"``, the facts of all parts, and under ``parts`` each part's digest,
        ranks and provenance.

    Raises:
        BadConfig: There is no delta, or a rank below 1.
        WrongModel: They are of different models, or have a weight in different shapes.
        ConflictingEdits: Two write the same fact, or two are the same edit.
        DamagedFile: One says that it is a composition and does not hold what it says.
        BadData: The facts on record of one are no facts.
    """
    given = list(deltas)
    flat = [part for delta in given for part in parts(delta)]
    if not flat:
        raise BadConfig("There is no edit to compose; give at least one.")
    _check_models(flat)
    digests = [part.digest() for part in flat]
    for place, digest in enumerate(digests):
        if digest in digests[:place]:
            raise ConflictingEdits(
                f"Edits {digests.index(digest) + 1} and {place + 1} are the same edit "
                f"({digest:.12}), whose change would be made twice; give it once."
            )
    if not allow_conflicts:
        check_facts(flat)
    whole = _joined(flat, digests)
    return compressed(whole, rank=rank) if compress or rank is not None else whole


@isolated()
def parts(delta: Delta) -> tuple[Delta, ...]:
    """The deltas that a composition is made of, oldest first; the delta itself if it is none.

    Raises:
        DamagedFile: It says that it is a composition and does not hold what it says.
    """
    if delta.provenance.get("method") != METHOD or "compression" in delta.provenance:
        return (delta,)
    found: list[Delta] = []
    start = dict.fromkeys(delta.factors, 0)
    for about in _records(delta):
        factors = {}
        for name, rank in about["ranks"].items():
            if name not in start:
                raise _not_as_said(f"its part {len(found) + 1} changes {name!r:.80} and it does not")
            columns = slice(start[name], start[name] + rank)
            factors[name] = _columns(delta.factors[name], columns)
            start[name] += rank
        part = Delta(factors, about["provenance"])
        if part.digest() != about["digest"]:
            raise _not_as_said(f"part {len(found) + 1} has other numbers than its digest says")
        found.append(part)
    if any(start[name] != left.shape[1] for name, (left, _) in delta.factors.items()):
        raise _not_as_said("its parts do not add up to it")
    return tuple(found)


@isolated()
def remove(delta: Delta, digest: str) -> Delta:
    """A composition without one of its parts, with the very numbers of the others.

    Args:
        delta: The composition.
        digest: The part's `Delta.digest`, or the first 8 digits or more of it.

    Returns:
        The composition of the rest; where one part is left, that part as it was.

    Raises:
        BadConfig: No part, or no single one, has this digest; or it is the only part.
        DamagedFile: The composition does not hold what it says.
    """
    if "compression" in delta.provenance:
        raise BadConfig(
            "The composition was compressed, which mixes its parts; compose the edits that shall "
            "stay from their own files."
        )
    flat = parts(delta)
    digests = [part.digest() for part in flat]
    hits = [i for i, d in enumerate(digests) if len(digest) >= _DIGITS and d.startswith(digest)]
    if len(hits) != 1:
        many = "several parts have" if hits else "no part has"
        raise BadConfig(
            f"The digest {digest!r:.80} names no part of the composition, because {many} it; its "
            f"parts are {', '.join(d[:12] for d in digests)}."
        )
    rest = [part for i, part in enumerate(flat) if i != hits[0]]
    if not rest:
        raise BadConfig(f"The edit {digest:.12} is all that there is, so nothing would be left.")
    return rest[0] if len(rest) == 1 else _joined(rest, [part.digest() for part in rest])


def _joined(flat: Sequence[Delta], digests: Sequence[str]) -> Delta:
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in dict.fromkeys(name for part in flat for name in part.factors):
        own = [part.factors[name] for part in flat if name in part.factors]
        factors[name] = (torch.cat([left for left, _ in own], dim=1), torch.cat([right for _, right in own], dim=1))
    below = [d for part in flat for d in listed_texts(part, "on_top_of") if d not in digests]
    facts = [dataclasses.asdict(fact) for part in flat for fact in facts_of(part)]
    provenance: dict[str, Any] = {
        key: flat[0].provenance[key] for key in ("model", "model_name", "tokenizer") if key in flat[0].provenance
    }
    provenance.update(
        method=METHOD,
        requests=facts,
        on_top_of=list(dict.fromkeys(below)),
        parts=[
            {
                "digest": digest,
                "ranks": {name: left.shape[1] for name, (left, _) in part.factors.items()},
                "provenance": dict(part.provenance),
            }
            for part, digest in zip(flat, digests, strict=True)
        ],
        versions=versions(),
    )
    return Delta(factors, provenance)


def _check_models(flat: Sequence[Delta]) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    for place, part in enumerate(flat):
        if part.model != flat[0].model:
            raise WrongModel(
                f"Edit 1 is of the model {flat[0].model!s:.16} "
                f"({flat[0].provenance.get('model_name')}) and edit {place + 1} of "
                f"{part.model!s:.16} ({part.provenance.get('model_name')}); compose edits of one "
                "model only."
            )
        for name, (left, right) in part.factors.items():
            shape = (left.shape[0], right.shape[0])
            if shapes.setdefault(name, shape) != shape:
                raise WrongModel(
                    f"Edit {place + 1} has {name} of shape {shape} and an earlier one of "
                    f"{shapes[name]}; compose edits of one model only."
                )


def _records(delta: Delta) -> list[Mapping[str, Any]]:
    """What a composition says of its parts, if it can be read at all."""
    listed = delta.provenance.get("parts")
    if not isinstance(listed, list) or not listed:
        raise _not_as_said("its parts are not listed")
    for about in listed:
        sound = (
            isinstance(about, dict)
            and isinstance(about.get("digest"), str)
            and isinstance(about.get("provenance"), dict)
            and isinstance(about.get("ranks"), dict)
            and all(type(rank) is int and rank >= 0 for rank in about["ranks"].values())
        )
        if not sound:
            raise _not_as_said("what it says of a part cannot be read")
    return listed


def _columns(pair: tuple[Tensor, Tensor], columns: slice) -> tuple[Tensor, Tensor]:
    left, right = pair
    return left[:, columns].contiguous(), right[:, columns].contiguous()


def _not_as_said(what: str) -> DamagedFile:
    return DamagedFile(f"The edit is no composition as it says, for {what}; compose it again.")
