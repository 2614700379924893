"""Recorded runs of `python -m fastcov.bench`: reading them, and putting one beside another, row by row.

python benchmarks/recorded.py now.json benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastcov.bench.report import FORMAT, VERSION, Row, Run  # noqa: E402
from fastcov.errors import BadInput  # noqa: E402
from fastcov.files import parse_json, printable  # noqa: E402
from fastcov.machine import Machine  # noqa: E402

# (device, suite, case) and, within it, the contender: where they agree, rows are compared.
_Case = tuple[str, str, str]
_WIDTH = 118


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ratios of two runs, row by row.")
    parser.add_argument("now", type=Path, help="a file that --json wrote")
    parser.add_argument("then", type=Path, help="the run to compare it with")
    given = parser.parse_args(arguments)
    try:
        lines = comparison(load(given.now), load(given.then))
    except BadInput as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    print("\n".join(map(printable, lines)))
    return 0


def load(path: Path) -> Run:
    """Read a run.

    Raises:
        BadInput: There is no such file, or it is not one of `fastcov.bench`.
    """
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is not a file; name one that --json wrote.")
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); name a file that --json wrote.") from error
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error}); name a file that --json wrote.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"{path} is not a run of fastcov.bench; name a file that --json wrote.")
    if (version := content.get("version")) != VERSION:
        raise BadInput(
            f"{path} has version {version!r:.40} of the format and this program reads {VERSION}; record the run again."
        )
    try:
        known = {one.name for one in fields(Row)}  # a later program may have written more
        return Run(
            machine=Machine(**{**content["machine"], "isa": tuple(content["machine"]["isa"])}),
            versions={str(k): str(v) for k, v in content["versions"].items()},
            threads=int(content["threads"]),
            command=str(content["command"]),
            date=str(content["date"]),
            rows=[Row(**{name: value for name, value in row.items() if name in known}) for row in content["rows"]],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({type(error).__name__}: {error}); record the run again.") from error


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
    suites = {row.suite for row in now.rows}  # a run of one suite says nothing of the others
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
    return [*lines, "", "Rows without a partner:", *alone] if alone else lines


def differences(now: Run, then: Run) -> list[str]:
    """What makes the two runs hard to compare: hardware, versions, threads."""
    old, new = asdict(then.machine), asdict(now.machine)
    found = [f"the {name} was {old[name]!r} and is {new[name]!r}" for name in new if old[name] != new[name]]
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
            found.setdefault((row.device, row.suite, row.case), {})[row.contender] = row.p50
    return found


def _title(case: _Case) -> str:
    device, suite, name = case
    return f"{suite}: {name}, on {device}"


def _alone(where: str, case: _Case, names: list[str]) -> list[str]:
    text = f"none {where} for {_title(case)}: {', '.join(names)}"
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ") if names else []


if __name__ == "__main__":
    raise SystemExit(main())
