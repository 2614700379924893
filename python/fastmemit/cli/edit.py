"""``fastmemit edit``: write facts into a model and keep the change as a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastmemit.cli.options import (
    add_corpus,
    add_method,
    add_model,
    check_free,
    check_writable,
    chosen_settings,
    ensure_statistics,
    make_editor,
)
from fastmemit.errors import BadConfig, MissedFacts
from fastmemit.request import EditRequest, check_batch

if TYPE_CHECKING:
    from fastmemit import Edit, Editor

HELP = "Write facts into a model; keep the edit as a small file, or the whole edited model."
EPILOG = """examples:
  fastmemit edit --model smollm2 --requests facts.jsonl --save edit.safetensors
  fastmemit edit --model gpt2-xl --prompt "{} is located in the city of" \\
      --subject "Eiffel Tower" --target Rome --save rome.safetensors
  fastmemit edit --model gpt2-xl --method rome --set clamp=3 --requests one.jsonl --save-model out/

A line of a requests file:
  {"prompt": "{} is located in the city of", "subject": "Eiffel Tower", "target_new": "Rome"}
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    facts = verb.add_argument_group("facts")
    facts.add_argument("--requests", type=Path, metavar="FILE", help="JSONL or JSON of requests")
    facts.add_argument("--prompt", help="one fact instead: its prompt with {} for the subject")
    facts.add_argument("--subject", help="its subject")
    facts.add_argument("--target", help="its new answer")
    facts.add_argument("--join", metavar="TEXT", help="what stands between prompt and answer (default: by rule)")
    verb.add_argument(
        "--strict",
        action="store_true",
        help="if the edited model does not say every fact, save nothing and exit with 1",
    )
    verb.add_argument("--save", type=Path, metavar="FILE", help="write the edit here")
    verb.add_argument("--save-model", type=Path, metavar="DIR", help="write the edited model here")
    add_model(verb)
    add_method(verb)
    add_corpus(verb, default=None)


def run(args: argparse.Namespace) -> None:
    """Edit, show what changed, save."""
    from fastmemit.outcomes import compare, verdict

    requests = _requests(args)
    overrides = chosen_settings(args)
    if args.save is None and args.save_model is None:
        raise BadConfig("The edit would be gone with this command; pass --save FILE or --save-model DIR.")
    check_writable(args.save)
    check_free(args.save_model)
    editor = make_editor(args)
    config = editor.config(args.method, **overrides)
    ensure_statistics(editor, config.layers, args)
    before = editor.ask(requests)
    edit = editor.edit(requests, args.method, verify=False, **overrides)
    if not args.strict:
        # Before anything is asked or shown, which may fail, and the edit would be gone.
        _save(args, editor, edit)
    outcomes = compare(requests, before, editor.ask(requests))
    layers = ", ".join(map(str, config.layers))
    print(f"layers {layers} of {editor.name} edited by {args.method}: {verdict(outcomes)}")
    print("probability of the new answer, before -> after, and what was said before:")
    for outcome in outcomes:
        print(f"  {outcome.described()}")
    if args.strict:
        if not all(outcome.said for outcome in outcomes):
            raise MissedFacts("Not every fact is what the model says, so nothing was saved.")
        _save(args, editor, edit)
    if args.save is not None:
        print(f"edit saved to {args.save}")
    if args.save_model is not None:
        print(f"edited model saved to {args.save_model}")


def _save(args: argparse.Namespace, editor: Editor, edit: Edit) -> None:
    if args.save is not None:
        edit.save(args.save)
    if args.save_model is not None:
        editor.save_model(args.save_model)


def _requests(args: argparse.Namespace) -> list[EditRequest]:
    from fastmemit.data import load_requests

    single = (args.prompt, args.subject, args.target)
    complete = None not in single
    given = any(single) or args.join is not None
    if (args.requests is None and not complete) or (args.requests is not None and given):
        raise BadConfig(
            "Name the facts either by --requests FILE or by --prompt, --subject and --target, to which --join belongs."
        )
    if args.requests is not None:
        return check_batch(load_requests(args.requests))
    fact = {"prompt": args.prompt, "subject": args.subject, "target_new": args.target}
    return [EditRequest.from_dict({**fact, "join": args.join})]
