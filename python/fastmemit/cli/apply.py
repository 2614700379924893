"""``fastmemit apply``: put saved edits into a model and look at what it says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastmemit.cli.options import above_zero, add_model, check_free, make_editor
from fastmemit.errors import BadData
from fastmemit.request import EditRequest

if TYPE_CHECKING:
    from fastmemit import Edit

HELP = "Apply saved edits to the model that they were made for."
EPILOG = """examples:
  fastmemit apply --model smollm2 --edit edit.safetensors --prompt "The Eiffel Tower is in"
  fastmemit apply --model gpt2-xl --edit a.safetensors --edit b.safetensors --save-model out/
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "--edit",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="a saved edit; several are applied in their order",
    )
    verb.add_argument("--prompt", action="append", default=[], help="continue this text before and after")
    verb.add_argument("--tokens", type=above_zero, default=20, help="how far (default 20)")
    verb.add_argument("--force", action="store_true", help="though made for another model")
    verb.add_argument("--save-model", type=Path, metavar="DIR", help="write the edited model here")
    add_model(verb)


def run(args: argparse.Namespace) -> None:
    """Apply all edits or none, ask for their facts, and show the prompts before and after."""
    from fastmemit.outcomes import compare, verdict

    check_free(args.save_model)
    editor = make_editor(args)
    edits = [editor.load(path, force=args.force) for path in args.edit]
    facts = _facts(edits)
    replies = editor.ask(facts)
    before = editor.generate(args.prompt, args.tokens) if args.prompt else []
    for edit in edits:
        edit.apply()
    if args.save_model is not None:  # before anything that may fail
        editor.save_model(args.save_model)
    after = editor.generate(args.prompt, args.tokens) if args.prompt else []
    count = sum(len(edit.delta.requests) for edit in edits)
    print(f"{len(edits)} edits with {count} facts applied to {editor.name}")
    if facts:
        print(verdict(compare(facts, replies, editor.ask(facts))))
    for prompt, old, new in zip(args.prompt, before, after, strict=True):
        print(f"\n{prompt}\n  before: {_line(old)}\n  after:  {_line(new)}")
    if args.save_model is not None:
        print(f"edited model saved to {args.save_model}")


def _facts(edits: Sequence[Edit]) -> list[EditRequest]:
    """The facts of edits, of two answers to the same prompt the later one."""
    from fastmemit.sharing.composition import facts_of

    last: dict[tuple[str, str], EditRequest] = {}
    for edit in edits:
        try:
            found = facts_of(edit.delta)
        except BadData as error:  # the change is good all the same
            print(f"facts that cannot be asked for: {error}")
            continue
        last.update({(fact.prompt, fact.subject): fact for fact in found})
    return list(last.values())


def _line(text: str) -> str:
    return " ".join(text.split())
