"""The command line: settings, suites, the table, the file, the comparison."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from fastcov.bench import collect, factor, rank_k
from fastcov.bench.compare import comparison
from fastcov.bench.machine import new_run, program
from fastcov.bench.schema import BadInput, Row, Run, save
from fastcov.bench.settings import Settings, parse
from fastcov.bench.table import LEGEND, heading, table
from fastcov.errors import printable

SUITES: dict[str, Callable[[Settings], Iterator[list[Row]]]] = {
    "rank_k": rank_k.run,
    "factor": factor.run,
    "collect": collect.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Args:
        arguments: Without the program; by default the process's.

    Returns:
        The exit code: 0, 1 where a row failed its check, 2 where the input makes no sense.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        settings = parse(given)
        run = measured(settings, given)
    except BadInput as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; cases that were finished are printed above.", file=sys.stderr)
        return 130
    failed = [row for row in run.rows if row.status == "failed"]
    if failed:
        print(f"\n{len(failed)} of {len(run.rows)} rows FAILED their check and were not timed.")
    return 1 if failed else 0


def measured(settings: Settings, arguments: Sequence[str]) -> Run:
    """Run the suites, printing each case as it is done, and writing the file after each."""
    torch.set_num_threads(settings.threads)
    run = new_run(arguments, settings.device, program())
    print(heading(run), flush=True)
    for suite in settings.suites:
        for rows in SUITES[suite](settings):
            run.rows.extend(rows)
            print(f"\n{table(rows)}", flush=True)
            if settings.json is not None:
                save(run, settings.json)
    print(f"\n{LEGEND}")
    if settings.quick:
        print("These are the sizes of a trial (--quick); they measure nothing.")
    if settings.json is not None:
        print(f"Written to {settings.json}.")
    if settings.compare is not None:
        for line in ("", *comparison(run, settings.compare)):
            print(printable(line))
    return run
