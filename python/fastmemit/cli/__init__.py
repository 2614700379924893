"""The command line: verbs and groups of verbs, and one place where errors become one sentence."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fastmemit import __version__
from fastmemit.cli import doctor, edit, evaluate, experiment, share, stats  # noqa: F401 (they declare the verbs)
from fastmemit.cli.options import VERBS, json_place, meant
from fastmemit.cli.terminal import printable_output, show_traceback

DESCRIPTION = "Edit the facts of a language model: ROME, EMMET, MEMIT and its relatives in seconds."
EPILOG = """examples:
  fastmemit demo
  fastmemit precompute --model gpt2-xl --multiplier 10
  fastmemit edit --model gpt2-xl --prompt "{} is located in the city of" \\
      --subject "Eiffel Tower" --target Rome --out rome.safetensors
  fastmemit apply --model gpt2-xl --edit rome.safetensors --prompt "To see the Eiffel Tower, go to"
  fastmemit evaluate --model gpt2-xl --facts counterfact --batch-size 16 --num-batches 4
  fastmemit experiment sweep --model gpt2-xl --facts counterfact --out DIR
"""
#: Verbs in the order of --help, and the groups behind them.
ORDER = ("demo", "precompute", "edit", "apply", "show", "undo", "compose", "evaluate", "doctor", "completion")
GROUPS = {
    "stats": "What statistics take, and those of other codebases: plan, export, import.",
    "adapter": "Edits as LoRA adapters: export, import.",
    "hub": "Edits and statistics on the hub: push, pull.",
    "experiment": "Score many edits, trace facts: sweep, sequential, locate, report, downstream.",
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one, unless its help says it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        silent = action.default in (None, False, "", argparse.SUPPRESS) or action.default == [] or "default" in said
        return said if silent else f"{said} (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong, as every other error is said, and what may have been meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())  # one line, whatever it quotes
        help_is = f" See {self.prog}" if message.endswith("?") else f"; see {self.prog}"
        self.exit(2, f"fastmemit: error: {message.removesuffix('.')}{help_is} --help.\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # said by the verb that does not know it, which has its own --help
            flag = rest[0].partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(rest)}.{meant(flag, self._option_string_actions)}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(action.choices)
            near = meant(value, known)
            if isinstance(action, argparse._SubParsersAction) and not near:  # it may be a verb of a group
                full = [f"{group} {value}" for group in GROUPS if f"{group} {value}" in VERBS]
                near = f" Did you mean {' or '.join(map(repr, full))}?" if full else ""
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {', '.join(known)}).{near}")


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = _Parser(prog="fastmemit", description=DESCRIPTION, epilog=EPILOG)
    top.add_argument("--version", action="version", version=f"fastmemit {__version__}")
    verbs = {"": top.add_subparsers(metavar="VERB", required=True)}
    for name in sorted(VERBS, key=lambda name: (*ORDER, *GROUPS).index(name.split()[0])):
        verb, (group, _, word) = VERBS[name], name.rpartition(" ")
        if group not in verbs:
            within = verbs[""].add_parser(group, help=GROUPS[group], description=GROUPS[group])
            verbs[group] = within.add_subparsers(metavar="VERB", required=True)
        one = verbs[group].add_parser(word, help=verb.help, description=verb.help, epilog=verb.epilog)
        verb.declare(one)
        one.set_defaults(verb=name)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0; 1 if `--strict` was given and a fact did not take; 2 for an error that the caller can fix, said in one
        sentence on stderr; 130 if the run was interrupted.
    """
    back = printable_output()
    if argv is None:  # the process' own: what it writes at its end is printable too
        _wait_briefly()
        sys.excepthook = show_traceback
        return _run(argv)
    try:
        return _run(argv)
    finally:
        back()


def _wait_briefly() -> None:
    """Let threads that wait for one another give their core away soon, if others want the cores and nobody said how."""
    # GCC's OpenMP, which torch brings, spins for milliseconds at every barrier. Where other processes want the cores,
    # the thread that is waited for does not run meanwhile: an edit beside them took three times its processor time
    # (docs/results/performance.md). Of its own process' threads it knows when they are more than the cores, and spins
    # 1,000 turns then; of others it does not. It is read once, as torch is loaded, which is later than this. On a quiet
    # machine a thread that sleeps wakes late, and an edit took a quarter longer.
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} and _busy():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _busy() -> bool:
    """Whether others run on half the cores at this moment; not known but on Linux."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            others = int(file.read().split()[3].partition("/")[0]) - 1  # without this process
    except (OSError, ValueError, IndexError):
        return False
    return others >= max(1, (os.cpu_count() or 1) // 2)


def _run(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log = argv is None and not (sys.stderr is not None and sys.stderr.isatty())
    if log or getattr(args, "quiet", False):
        # The reader of GGUF files in transformers draws with tqdm itself, which looks here when it
        # is imported. Our own bars are lines in a log (`fastmemit.display`).
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Heavy imports happen here, so that --help answers at once.
    from fastcov import FailedElsewhere, FastcovError
    from fastmemit.errors import FastmemitError, MissedFacts
    from fastmemit.parallel import CURRENT, for_verb

    try:
        with _terminated_like_interrupted(), for_verb(args.verb, divided=("precompute",)), json_place(args):
            VERBS[args.verb].run(args)
            processes = CURRENT.get()
            if isinstance(args.json, Path) and (processes is None or processes.first):
                print(f"written to {args.json}")
    except FailedElsewhere:  # the process that failed says it
        return 2
    except MissedFacts as error:
        return _fail(str(error), code=1)
    except (FastcovError, FastmemitError) as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno is None:  # one of ours, a whole sentence
            return _fail(str(error))
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror}{where}; nothing was left half written, fix it and run again.")
    except KeyboardInterrupt as error:
        ended = isinstance(error, _Terminated)
        what = "terminated" if ended else "interrupted"
        print(f"\nfastmemit: {what}; nothing was left half written.", file=sys.stderr)
        return 143 if ended else 130
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        return _fail(
            "The device ran out of memory; lower --target-batch-tokens, choose --dtype bfloat16, "
            "or choose --device cpu."
        )
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM unwind the run as Ctrl-C does, where the caller has no handler of its own."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def raised(_number: int, _frame: object) -> NoReturn:
        raise _Terminated

    signal.signal(signal.SIGTERM, raised)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# What a message calls the fix in Python, and what it is called here.
_OPTIONS = {
    "force=True (--force)": "--force",
    "--trust-remote-code (trust_remote_code=True)": "--trust-remote-code",
    "allow_fewer=True": "--allow-fewer",
    "allow_conflicts=True": "--allow-conflicts",
    "--dry-run (dry_run=...)": "--dry-run DIR",
    "skip_malformed=True": "--skip-malformed",
    "with field=": "with --field",
    "--chat (chat=True)": "--chat",
    "overwrite=True (--overwrite)": "--overwrite",
    "check=False (--no-check)": "--no-check",
    "model_name= (--model-name)": "--model-name",
}


def _fail(sentence: str, code: int = 2) -> int:
    for python, option in _OPTIONS.items():
        sentence = sentence.replace(python, option)
    print(f"fastmemit: error: {' '.join(sentence.split())}", file=sys.stderr)
    return code
