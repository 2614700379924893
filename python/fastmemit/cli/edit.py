"""Edits from facts to files and back: ``edit``, ``apply``, ``show``, ``undo`` and ``compose``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastmemit.cli.options import (
    check_free,
    check_writable,
    chosen_settings,
    ensure_statistics,
    make_editor,
    verb,
    write_json,
)
from fastmemit.cli.terminal import byte_size
from fastmemit.errors import BadConfig, BadData, BadUndo, MissedFacts
from fastmemit.request import EditRequest, check_batch

if TYPE_CHECKING:
    from fastmemit import Edit, Editor
    from fastmemit.delta import Delta


@verb(
    "edit",
    "--facts --prompt --subject --target --join --strict --out --save-model MODEL METHOD CORPUS",
    {"--prompt": {"action": "store", "default": None, "help": "one fact instead: its prompt, {} for the subject"}},
)
def _edit(args: argparse.Namespace) -> None:
    r"""Write facts into a model; keep the edit as a small file, or the whole edited model.

    Examples:
      fastmemit edit --model smollm2 --facts facts.jsonl --out edit.safetensors
      fastmemit edit --model gpt2-xl --prompt "{} is located in the city of" \
          --subject "Eiffel Tower" --target Rome --out rome.safetensors
      fastmemit edit --model gpt2-xl --method rome --set clamp=3 --facts one.jsonl --save-model out/

    A line of a file of facts:
      {"prompt": "{} is located in the city of", "subject": "Eiffel Tower", "target_new": "Rome"}
    """
    from fastmemit.answers import compare, verdict

    requests = _requests(args)
    overrides = chosen_settings(args)
    if args.out is None and args.save_model is None:
        raise BadConfig("The edit would be gone with this command; pass --out FILE or --save-model DIR.")
    check_writable(args.out)
    check_free(args.save_model)
    editor = make_editor(args)
    config = editor.config(args.method, **overrides)
    ensure_statistics(editor, config, args)
    before = editor.ask(requests)
    edit = editor.edit(requests, args.method, verify=False, **overrides)
    if not args.strict:
        # Before anything is asked or shown, which may fail, and the edit would be gone.
        _save(args, editor, edit)
    outcomes = compare(requests, before, editor.ask(requests))
    saved = not args.strict or all(outcome.said for outcome in outcomes)
    write_json(
        args.json,
        {
            "model": editor.name,
            "method": args.method,
            "layers": config.layers,
            "facts": outcomes,
            "out": args.out if saved else None,
            "save_model": args.save_model if saved else None,
        },
    )
    layers = ", ".join(map(str, config.layers))
    print(f"layers {layers} of {editor.name} edited by {args.method}: {verdict(outcomes)}")
    print("probability of the new answer, before -> after, and what was said before:")
    for outcome in outcomes:
        print(f"  {outcome.described()}")
    if args.strict:
        if not saved:
            raise MissedFacts("Not every fact is what the model says, so nothing was saved.")
        _save(args, editor, edit)
    if args.out is not None:
        print(f"edit saved to {args.out}")
    if args.save_model is not None:
        print(f"edited model saved to {args.save_model}")


def _save(args: argparse.Namespace, editor: Editor, edit: Edit) -> None:
    if args.out is not None:
        edit.save(args.out)
    if args.save_model is not None:
        editor.save_pretrained(args.save_model)


def _requests(args: argparse.Namespace) -> list[EditRequest]:
    from fastmemit.data import load_records, load_requests

    single = (args.prompt, args.subject, args.target)
    complete = None not in single
    given = any(single) or args.join is not None
    if (args.facts is None and not complete) or (args.facts is not None and given):
        raise BadConfig(
            "Name the facts either by --facts FILE or by --prompt, --subject and --target, to which --join belongs."
        )
    if args.facts is None:
        fact = {"prompt": args.prompt, "subject": args.subject, "target_new": args.target}
        return [EditRequest.from_dict({**fact, "join": args.join})]
    if args.facts in ("builtin", "counterfact") or args.facts.startswith("hub:"):
        return check_batch([record.request for record in load_records(args.facts)])
    return check_batch(load_requests(args.facts))


@verb("apply", "--edit! --prompt --max-new-tokens --force --save-model MODEL")
def _apply(args: argparse.Namespace) -> None:
    """Apply saved edits to the model that they were made for.

    Examples:
      fastmemit apply --model smollm2 --edit edit.safetensors --prompt "The Eiffel Tower is in"
      fastmemit apply --model gpt2-xl --edit a.safetensors --edit b.safetensors --save-model out/
    """
    from fastmemit.answers import compare, verdict

    check_free(args.save_model)
    editor = make_editor(args)
    edits = [editor.load(path, force=args.force) for path in args.edit]
    facts = _facts([edit.delta for edit in edits])
    replies = editor.ask(facts)
    before = editor.generate(args.prompt, args.max_new_tokens) if args.prompt else []
    for edit in edits:
        edit.apply()
    if args.save_model is not None:  # before anything that may fail
        editor.save_pretrained(args.save_model)
    after = editor.generate(args.prompt, args.max_new_tokens) if args.prompt else []
    outcomes = compare(facts, replies, editor.ask(facts))
    said = [
        {"prompt": prompt, "before": old, "after": new}
        for prompt, old, new in zip(args.prompt, before, after, strict=True)
    ]
    found = {"model": editor.name, "edits": args.edit, "facts": outcomes, "prompts": said}
    write_json(args.json, {**found, "save_model": args.save_model})
    count = sum(len(edit.delta.requests) for edit in edits)
    print(f"{len(edits)} edits with {count} facts applied to {editor.name}")
    if facts:
        print(verdict(outcomes))
    for prompt, old, new in zip(args.prompt, before, after, strict=True):
        print(f"\n{prompt}\n  before: {' '.join(old.split())}\n  after:  {' '.join(new.split())}")
    if args.save_model is not None:
        print(f"edited model saved to {args.save_model}")


def _facts(deltas: Sequence[Delta]) -> list[EditRequest]:
    """The facts of edits, of two answers to the same prompt the later one."""
    from fastmemit.sharing.composition import facts_of

    last: dict[tuple[str, str], EditRequest] = {}
    for delta in deltas:
        try:
            found = facts_of(delta)
        except BadData as error:  # the change is good all the same
            print(f"facts that cannot be asked for: {error}")
            continue
        last.update({(fact.prompt, fact.subject): fact for fact in found})
    return list(last.values())


@verb("show", "paths")
def _show(args: argparse.Namespace) -> None:
    """Say what is in a saved edit: facts, model, method, layers, rank, digest; or in a model's folder.

    Examples:
      fastmemit show edit.safetensors
      fastmemit show a.safetensors b.safetensors ./my-model
    """
    from fastcov.errors import printable

    shown = [(path, *(_model_shown(path) if path.is_dir() else _edit_shown(path))) for path in args.paths]
    write_json(args.json, [{"path": path, "is": kind, **_gathered(about)} for path, kind, about in shown])
    for path, kind, about in shown:
        print(f"{path}: {kind}")
        for name, value in about:
            print(f"  {name:<10} {printable(' '.join(str(value).split()))}")


def _gathered(about: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Lines of `_show` by name; those of one name that may stand there often, facts and parts, as a list."""
    lists = {f"{name}s": [value for key, value in about if key == name] for name in ("part", "fact")}
    return {**dict(line for line in about if f"{line[0]}s" not in lists), **lists}


def _edit_shown(path: Path) -> tuple[str, list[tuple[str, object]]]:
    from fastmemit.delta import Delta
    from fastmemit.sharing import parts
    from fastmemit.sharing.composition import facts_of

    delta = Delta.load(path)
    found = parts(delta)
    about = delta.provenance
    layers = {int(number[1]) for number in (re.search(r"\.(\d+)\.", name) for name in delta.factors) if number}
    shown: list[tuple[str, object]] = [
        ("model", f"{about.get('model_name', 'unknown')!s:.80} ({delta.model or 'of no fingerprint'!s:.16})"),
        ("method", f"{about.get('method', 'unknown')!s:.20}"),
        ("layers", ", ".join(map(str, sorted(layers))) or "none"),
        ("weights", len(delta.factors)),
        ("rank", max((left.shape[1] for left, _ in delta.factors.values()), default=0)),
        ("digest", delta.digest()),
        *(("part", f"{part.digest():.12} with {len(part.requests)} facts") for part in found if len(found) > 1),
    ]
    try:
        facts = [f"{fact.text} -> {fact.target.strip()}" for fact in facts_of(delta)]
    except BadData as error:
        facts = [str(error)]
    return f"an edit, {byte_size(path.stat().st_size)}", [*shown, *(("fact", fact) for fact in facts)]


def _model_shown(path: Path) -> tuple[str, list[tuple[str, object]]]:
    from fastmemit.models import find_adapter, load_skeleton

    adapter = find_adapter(load_skeleton(str(path)))
    layers = adapter.layers
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return f"a model, {byte_size(size)}", [
        ("class", type(adapter.model).__name__),
        ("weights", f"{sum(weight.numel() for weight in adapter.model.parameters()):,}"),
        ("layers", f"{layers[0]} to {layers[-1]} can be edited"),
        ("edited", adapter.weight_name(layers[0])),
        ("keys", f"of width {adapter.d_k(layers[0]):,}"),
    ]


@verb("undo", "--edit! --save-model! MODEL")
def _undo(args: argparse.Namespace) -> None:
    """Take saved edits out of an edited model's folder, and write the unedited model.

    Examples:
      fastmemit undo --model edited/ --edit edit.safetensors --save-model unedited/

    The weights come back but for the rounding of the sum. For the bits themselves keep the unedited
    model and the edit's file: apply puts them together when they are needed.
    """
    from fastmemit.answers import compare
    from fastmemit.delta import Delta
    from fastmemit.edits import Edit, EditStack
    from fastmemit.models import fingerprint

    check_free(args.save_model)
    deltas = [Delta.load(path) for path in args.edit]
    editor = make_editor(args)
    unedited = deltas[0].model
    if editor.fingerprint == unedited:
        raise BadUndo(f"{editor.name} is the model that {args.edit[0]} was made for, without it; there is no undo.")
    facts = _facts(deltas)
    before = editor.ask(facts)
    for delta in reversed(deltas):
        negative = Delta({name: (-left, right) for name, (left, right) in delta.factors.items()}, delta.provenance)
        Edit(negative, EditStack.of(editor.model)).apply()
    editor.save_pretrained(args.save_model)
    now = editor.ask(facts)
    exact = fingerprint(editor.model) == unedited
    found = {"model": editor.name, "edits": args.edit, "facts": compare(facts, before, now), "bit_for_bit": exact}
    write_json(args.json, {**found, "save_model": args.save_model})
    print(f"{len(deltas)} edits taken out of {editor.name}")
    said, says = (sum(reply.said for reply in replies) for replies in (before, now))
    print(f"of {len(facts)} facts the model said {said} and says {says} now")
    if exact:
        print("the weights are bit for bit the unedited model's")
    else:
        print("the weights are the unedited model's but for rounding: their last bits are not in an edited model")
    print(f"unedited model saved to {args.save_model}")


@verb("compose", "--edit! --out! --remove --allow-conflicts --compress --rank")
def _compose(args: argparse.Namespace) -> None:
    """Put several saved edits of one model into one file, or take one out of it.

    Examples:
      fastmemit compose --edit a.safetensors --edit b.safetensors --out both.safetensors
      fastmemit compose --edit both.safetensors --remove 3f7c1a9be2d4 --out a.safetensors
      fastmemit compose --edit a.safetensors --edit b.safetensors --rank 64 --out small.safetensors
    """
    from fastcov.errors import printable
    from fastmemit.delta import Delta
    from fastmemit.sharing import compose, compressed, parts, remove

    check_writable(args.out)
    if args.remove and len(args.edit) > 1:
        raise BadConfig("--remove takes a part out of one composition; pass one --edit with it.")
    deltas = [Delta.load(path) for path in args.edit]
    if args.remove:
        whole = deltas[0]
        for digest in args.remove:
            whole = remove(whole, digest)
    else:
        whole = compose(deltas, allow_conflicts=args.allow_conflicts)
    found = parts(whole)
    if args.compress or args.rank is not None:
        whole = compressed(whole, rank=args.rank)
    whole.save(args.out)
    listed = [(part.digest(), len(part.requests), str(part.provenance.get("method", "unknown"))) for part in found]
    compression = whole.provenance.get("compression") or {}
    parts_found = [{"digest": digest, "facts": facts, "method": method} for digest, facts, method in listed]
    weights = list(whole.factors)
    write_json(args.json, {"out": args.out, "weights": weights, "parts": parts_found, "compression": compression})
    for digest, facts, method in listed:
        print(f"  {digest:.12}  {facts} facts by {printable(method):.20}")
    for name, done in compression.items():
        print(f"  {printable(name)}: rank {done['from']} -> {done['to']}, relative error {done['relative_error']:.1e}")
    print(f"{len(found)} edits on {len(whole.factors)} weights saved to {args.out}")
