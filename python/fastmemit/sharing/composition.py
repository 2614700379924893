"""Several deltas as one, in their order and on record, and one of them taken out again.

Deltas add: ``W + L1 R1^T + L2 R2^T = W + [L1 L2] [R1 R2]^T``, so a composition holds the factors of its parts side by
side. Applied, it equals its parts applied one after the other up to rounding, because it is rounded to the weight's
dtype once and they n times: the two differ in an entry by at most about ``u (|W_1| + ... + |W_n| + |W'|)``, W_i being
what the weight is after part i, W' after the composition, and u the unit roundoff of the weight's dtype (2^-24 in
float32, 2^-8 in bfloat16), and by the rounding of the products in float32, ``2 B 2^-24 |L| |R|^T``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcov.hooks import isolated
from fastmemit.delta import Delta
from fastmemit.errors import BadConfig, BadData, BadRequest, DamagedFile, WrongModel
from fastmemit.request import EditRequest
from fastmemit.statistics import versions

METHOD = "composition"
#: Below this part of the largest, a singular value is less than the rounding of float32 factors.
ROUNDING = 2.0**-24
_DIGITS = 8  # fewer digits of a digest than this name nothing for sure


@isolated()
def compose(deltas: Sequence[Delta], *, allow_conflicts: bool = False) -> Delta:
    """One delta that makes the changes of several.

    A part that is a composition itself is taken apart, so that each edit can be removed alone. What a delta changes was
    computed on one state of the weights: the model's own, or with other edits on it (``on_top_of``). Their sum does not
    depend on their order, but it is what was meant only where each later edit was computed on top of the earlier ones,
    or they share no weight; the more facts computed apart are added, the more they disturb each other.

    Args:
        deltas: At least one, of one model, in the order in which they count as applied.
        allow_conflicts: Add edits of which two write the same fact.

    Returns:
        The composition, with method ``"composition"``, the facts of all parts, and under ``parts`` each part's digest,
        ranks and provenance.

    Raises:
        BadConfig: There is no delta.
        BadRequest: Two write the same fact, or two are the same edit.
    """
    flat = [part for delta in deltas for part in parts(delta)]
    if not flat:
        raise BadConfig("There is no edit to compose; give at least one.")
    _check_models(flat)
    digests = [part.digest() for part in flat]
    for place, digest in enumerate(digests):
        if digest in digests[:place]:
            raise BadRequest(
                f"Edits {digests.index(digest) + 1} and {place + 1} are the same edit ({digest:.12}), whose change "
                "would be made twice; give it once."
            )
    if not allow_conflicts:
        check_facts(flat)
    return _joined(flat, digests)


@isolated()
def parts(delta: Delta) -> tuple[Delta, ...]:
    """The deltas that a composition is made of, oldest first; the delta itself if it is none."""
    if delta.provenance.get("method") != METHOD or "compression" in delta.provenance:
        return (delta,)
    listed = delta.provenance.get("parts")
    if not isinstance(listed, list) or not listed:
        raise DamagedFile(_not_as_said("its parts are not listed"))
    found: list[Delta] = []
    start = dict.fromkeys(delta.factors, 0)
    for about in listed:
        sound = (
            isinstance(about, dict)
            and isinstance(about.get("digest"), str)
            and isinstance(about.get("provenance"), dict)
            and isinstance(about.get("ranks"), dict)
            and all(type(rank) is int and rank >= 0 for rank in about["ranks"].values())
        )
        if not sound:
            raise DamagedFile(_not_as_said("what it says of a part cannot be read"))
        factors = {}
        for name, rank in about["ranks"].items():
            if name not in start:
                raise DamagedFile(_not_as_said(f"its part {len(found) + 1} changes {name!r:.80} and it does not"))
            columns = slice(start[name], start[name] + rank)
            left, right = delta.factors[name]
            factors[name] = left[:, columns].contiguous(), right[:, columns].contiguous()
            start[name] += rank
        part = Delta(factors, about["provenance"])
        if part.digest() != about["digest"]:
            raise DamagedFile(_not_as_said(f"part {len(found) + 1} has other numbers than its digest says"))
        found.append(part)
    if any(start[name] != left.shape[1] for name, (left, _) in delta.factors.items()):
        raise DamagedFile(_not_as_said("its parts do not add up to it"))
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
    first = flat[0].provenance
    provenance: dict[str, Any] = {key: first[key] for key in ("model", "model_name", "tokenizer") if key in first}
    provenance.update(
        method=METHOD,
        requests=[dataclasses.asdict(fact) for part in flat for fact in facts_of(part)],
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
                f"Edit 1 is of the model {flat[0].model!s:.16} ({flat[0].provenance.get('model_name')}) and edit "
                f"{place + 1} of {part.model!s:.16} ({part.provenance.get('model_name')}); compose edits of one model "
                "only."
            )
        for name, (left, right) in part.factors.items():
            shape = (left.shape[0], right.shape[0])
            if shapes.setdefault(name, shape) != shape:
                raise WrongModel(
                    f"Edit {place + 1} has {name} of shape {shape} and an earlier one of "
                    f"{shapes[name]}; compose edits of one model only."
                )


def _not_as_said(what: str) -> str:
    return f"The edit is no composition as it says, for {what}; compose it again."


def facts_of(delta: Delta) -> list[EditRequest]:
    """The requests on record, none where there are none; a `BadData` where they cannot be read."""
    found = delta.provenance.get("requests", [])
    if not isinstance(found, list):
        raise BadData(f"The edit's requests are no list but {found!r:.80}; make the edit again.")
    facts = []
    for index, item in enumerate(found):
        try:
            facts.append(EditRequest.from_dict(item))
        except BadRequest as error:
            raise BadData(f"Request {index} of the edit cannot be read: {error}") from error
    return facts


def listed_texts(delta: Delta, field: str) -> list[str]:
    """The texts in a list of the provenance; what is no text or no list is left out."""
    found = delta.provenance.get(field)
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


def check_facts(deltas: Sequence[Delta]) -> None:
    """Refuse edits of which two write the same fact.

    The same subject in the same prompt with two answers is a contradiction. With the same answer the change would be
    made twice, except where the later edit was computed on top of the earlier.

    Raises:
        BadRequest: Two edits do so; the message names the fact, both edits and both answers.
    """
    seen: dict[tuple[str, str], tuple[int, EditRequest]] = {}
    for place, delta in enumerate(deltas):
        for fact in facts_of(delta):
            first, other = seen.setdefault((fact.prompt.rstrip(), fact.subject.strip().lower()), (place, fact))
            if first == place:
                continue
            if other.target.strip() != fact.target.strip():
                raise BadRequest(
                    f"Edit {first + 1} makes {fact.text!r:.80} go on with {other.target!r:.40} and edit {place + 1} "
                    f"with {fact.target!r:.40}; leave one of them out, or pass allow_conflicts=True to add both."
                )
            if deltas[first].digest() not in listed_texts(delta, "on_top_of"):
                raise BadRequest(
                    f"Edits {first + 1} and {place + 1} both write {fact.text + fact.target!r:.80} and would together "
                    "change twice what is needed; leave one of them out, or pass allow_conflicts=True to add both."
                )


@isolated()
def compressed(delta: Delta, *, rank: int | None = None, tolerance: float = ROUNDING) -> Delta:
    """The same change with as few columns as it needs.

    ``left = Q_l R_l`` and ``right = Q_r R_r``; the singular values of ``R_l R_r^T``, at most as many as the weight's
    smaller side, are those of the change (Golub and Van Loan, section 5.4). All in float64, rounded to float32 at the
    end.

    Args:
        delta: A delta whose factors have more columns than they need.
        rank: Keep at most so many columns of each weight, with loss: the best change of that rank.
        tolerance: Drop singular values up to this part of the largest.

    Returns:
        The delta; weights that need all of their columns keep the very same factors. What was done is in its provenance
        under ``compression``: for each weight that changed, ``from`` and ``to`` columns and ``relative_error``, the
        Frobenius norm of what was dropped over that of the change.

    Raises:
        BadConfig: The rank is below 1, or the tolerance not from 0 to below 1.
    """
    if rank is not None and rank < 1:
        raise BadConfig(f"The rank must be 1 or more but is {rank}.")
    if not 0 <= tolerance < 1:
        raise BadConfig(f"The tolerance must be from 0 to below 1 but is {tolerance}.")
    factors, done = dict(delta.factors), {}
    for name, (left, right) in delta.factors.items():
        if found := _reduced(left, right, rank, tolerance):
            factors[name] = found[:2]
            done[name] = {"from": left.shape[1], "to": found[0].shape[1], "relative_error": found[2]}
    return Delta(factors, {**delta.provenance, "compression": done}) if done else delta


def _reduced(left: Tensor, right: Tensor, rank: int | None, tolerance: float) -> tuple[Tensor, Tensor, float] | None:
    """Both factors, (rows, B) and (columns, B), with fewer columns and the relative error, or None if all stay."""
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        return None  # it has no singular values; whatever it does to a weight stays visible
    q_left, r_left = torch.linalg.qr(left.double())  # (rows, p), (p, B)
    q_right, r_right = torch.linalg.qr(right.double())  # (columns, q), (q, B)
    u, values, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    needed = int((values > tolerance * values.max()).sum()) if values.numel() else 0
    new = max(1, needed if rank is None else min(needed, rank))
    if new >= left.shape[1]:
        return None
    root = values[:new].sqrt()
    whole, dropped = float(torch.linalg.vector_norm(values)), float(torch.linalg.vector_norm(values[new:]))
    new_left = (q_left @ (u[:, :new] * root)).float()
    new_right = (q_right @ (vt[:new].T * root)).float()
    return new_left.contiguous(), new_right.contiguous(), dropped / whole if whole > 0 else 0.0
