"""The command line: one file per verb, and one place where errors become one sentence."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from fastmemit import __version__
from fastmemit.cli import (
    apply,
    compose,
    demo,
    downstream,
    edit,
    evaluate,
    export_adapter,
    export_stats,
    import_adapter,
    import_stats,
    locate,
    plan,
    precompute,
    pull,
    push,
    report,
    sequential,
    sweep,
)
from fastmemit.cli.terminal import printable_output, show_traceback

DESCRIPTION = "Edit the facts of a language model: ROME, EMMET, MEMIT and its relatives in seconds."
EPILOG = """examples:
  fastmemit demo
  fastmemit precompute --model gpt2-xl --multiplier 10
  fastmemit edit --model gpt2-xl --prompt "{} is located in the city of" \\
      --subject "Eiffel Tower" --target Rome --save rome.safetensors
  fastmemit apply --model gpt2-xl --edit rome.safetensors --prompt "To see the Eiffel Tower, go to"
  fastmemit evaluate --model gpt2-xl --data counterfact --method memit --batch-size 16 --batches 4
  fastmemit sweep --model gpt2-xl --data counterfact --out DIR
  fastmemit report DIR
"""
VERBS = {
    "plan": plan,
    "precompute": precompute,
    "edit": edit,
    "apply": apply,
    "compose": compose,
    "export-adapter": export_adapter,
    "import-adapter": import_adapter,
    "push": push,
    "pull": pull,
    "evaluate": evaluate,
    "locate": locate,
    "sweep": sweep,
    "sequential": sequential,
    "report": report,
    "downstream": downstream,
    "export-stats": export_stats,
    "import-stats": import_stats,
    "demo": demo,
}


class _Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())  # one line, whatever it quotes
        self.exit(2, f"fastmemit: error: {message}; see {self.prog} --help.\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = _Parser(
        prog="fastmemit", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"fastmemit {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0; 1 if `--strict` was given and a fact did not take; 2 for an error that the caller can mend, said in one
        sentence on stderr; 130 if the run was interrupted.
    """
    back = printable_output()
    if argv is None:  # the process' own: what it writes at its end is printable too
        sys.excepthook = show_traceback
        return _run(argv)
    try:
        return _run(argv)
    finally:
        back()


def _run(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if getattr(args, "quiet", False):
        # The reader of GGUF files in transformers draws with tqdm itself, which looks here when it
        # is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Heavy imports happen here, so that --help answers at once.
    from fastcov import FailedElsewhere, FastcovError
    from fastmemit.errors import FastmemitError, MissedFacts
    from fastmemit.parallel import for_verb

    try:
        with _terminated_like_interrupted(), for_verb(args.verb, divided=("precompute",)):
            VERBS[args.verb].run(args)
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
        return _fail(f"{error.strerror}{where}; nothing was left half written, mend it and run again.")
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


# What a message calls the mend in Python, and what it is called here.
_OPTIONS = {
    "force=True (--force)": "--force",
    "--trust-remote-code (trust_remote_code=True)": "--trust-remote-code",
    "allow_fewer=True": "--allow-fewer",
    "allow_conflicts=True": "--allow-conflicts",
    "--dry-run (dry_run=...)": "--dry-run DIR",
    "skip_malformed=True": "--skip-malformed",
    "with field=": "with --field",
    "overwrite=True (--overwrite)": "--overwrite",
    "check=False (--no-check)": "--no-check",
    "model_name= (--model-name)": "--model-name",
}


def _fail(sentence: str, code: int = 2) -> int:
    for python, option in _OPTIONS.items():
        sentence = sentence.replace(python, option)
    print(f"fastmemit: error: {' '.join(sentence.split())}", file=sys.stderr)
    return code
