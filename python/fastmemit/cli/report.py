"""``fastmemit report``: the tables and figures of sweeps."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Write the tables and figures of a sweep, and one page with all of it."
EPILOG = """examples:
  fastmemit report results/smollm2
  fastmemit report results/smollm2 results/smollm2-below-the-minimum --out report
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="a folder that a sweep wrote; several of the same model make one report",
    )
    verb.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: report in the first DIR)")


def run(args: argparse.Namespace) -> None:
    """Write the report, print a short table and what was written."""
    from fastcov.printable import printable
    from fastmemit.experiments.report import write_report
    from fastmemit.experiments.tables import summary

    report = write_report(args.folders, args.out)
    print(printable(report.model))
    print(summary(report.groups))
    for path in report.files:
        print(f"written to {path}")
