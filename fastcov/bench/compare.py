"""A run beside a recorded one, row by row."""

from __future__ import annotations

import textwrap
from dataclasses import asdict

from fastcov.bench.schema import Row, Run

# (device, suite, case) and, within it, the contender: where they agree, rows are compared.
_Case = tuple[str, str, str]
_WIDTH = 118


def comparison(now: Run, then: Run) -> list[str]:
    """Lines to print: what differs between the machines, ratios, and rows without a partner.

    Args:
        now: This run.
        then: The recorded one.

    Returns:
        For each row that both have, ``seconds then / seconds now``: above 1 is faster now.
    """
    lines = [f"Compared with the run of {then.date}: {then.command}"]
    lines += [f"warning: {text}" for text in differences(now, then)]
    ours, theirs = _timed(now), _timed(then)
    # Only of suites that ran now: a run of one suite says nothing of the others.
    suites = {row.suite for row in now.rows}
    alone: list[str] = []
    for case in dict.fromkeys([*ours, *(case for case in theirs if case[1] in suites)]):
        mine, other = ours.get(case, {}), theirs.get(case, {})
        both = [name for name in mine if name in other]
        if both:
            lines += ["", _title(case), f"{'contender':24}{'then ms':>12}{'now ms':>12}{'then/now':>10}"]
        for name in both:
            before, after = other[name], mine[name]
            lines.append(f"{name:24}{1000 * before:12,.3f}{1000 * after:12,.3f}{before / after:10.2f}")
        alone += _alone("in the recorded run", case, [name for name in mine if name not in other])
        alone += _alone("in this run", case, [name for name in other if name not in mine])
    if not any(name in theirs.get(case, {}) for case, rows in ours.items() for name in rows):
        lines.append("No row of this run has a partner in the recorded one.")
    if alone:
        lines += ["", "Rows without a partner:", *alone]
    return lines


def differences(now: Run, then: Run) -> list[str]:
    """What makes the two runs hard to compare: hardware, versions, threads."""
    found = []
    old, new = asdict(then.machine), asdict(now.machine)
    for name in new:
        if old[name] != new[name]:
            found.append(f"the {name} was {old[name]!r} and is {new[name]!r}")
    for name in sorted({*now.versions, *then.versions}):
        before, after = then.versions.get(name, "absent"), now.versions.get(name, "absent")
        if before != after:
            found.append(f"{name} was {before!r} and is {after!r}")
    if now.threads != then.threads:
        found.append(f"the threads were {then.threads} and are {now.threads}")
    return found


def _timed(run: Run) -> dict[_Case, dict[str, float]]:
    found: dict[_Case, dict[str, float]] = {}
    for row in run.rows:
        if row.p50 is not None:
            found.setdefault(_key(row), {})[row.contender] = row.p50
    return found


def _key(row: Row) -> _Case:
    return (row.device, row.suite, row.case)


def _title(case: _Case) -> str:
    device, suite, name = case
    return f"{suite}: {name}, on {device}"


def _alone(where: str, case: _Case, names: list[str]) -> list[str]:
    if not names:
        return []
    text = f"none {where} for {_title(case)}: {', '.join(names)}"
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
