"""Edits from facts to files and back: ``edit``, ``apply``, ``show``, ``undo`` and ``compose``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from fastmemit.errors import BadConfig, BadData, BadUndo, MissedFacts, ModelNotFound, WrongModel, counted
from fastmemit.request import EditRequest, check_batch

if TYPE_CHECKING:
    from fastmemit import Edit, Editor
    from fastmemit.delta import Delta
    from fastmemit.evaluation.changes import Change, Observer
    from fastmemit.methods import PreservedText


@verb(
    "edit",
    "--facts --prompt --subject --target --join --chat --strict --check --check-file --preserve --preserve-weight "
    "--html --out --save-model MODEL METHOD CORPUS",
    {"--prompt": {"action": "store", "default": None, "help": "one fact instead: its prompt, {} for the subject"}},
)
def _edit(args: argparse.Namespace) -> None:
    r"""Write facts into a model; keep the edit as a small file, or the whole edited model.

    Examples:
      fastmemit edit --model smollm2 --facts facts.jsonl --out edit.safetensors
      fastmemit edit --model gpt2-xl --prompt "{} is located in the city of" \
          --subject "Eiffel Tower" --target Rome --out rome.safetensors
      fastmemit edit --model gpt2-xl --method rome --set clamp=3 --facts one.jsonl --save-model out/
      fastmemit edit --model smollm2 --facts mine.jsonl --check-file mine.jsonl \
          --check "The Louvre is in" --html page.html --out edit.safetensors

    A line of a file of facts:
      {"prompt": "{} is located in the city of", "subject": "Eiffel Tower", "target_new": "Rome"}
    """
    from fastmemit.answers import compare, verdict
    from fastmemit.text import chat_request

    requests = _requests(args)
    overrides = chosen_settings(args)
    if args.out is None and args.save_model is None:
        raise BadConfig("The edit would be gone with this command; pass --out FILE or --save-model DIR.")
    text = _preserved(args)
    check_writable(args.out, args.html)
    check_free(args.save_model)
    editor = make_editor(args)
    if args.chat:
        requests = [chat_request(editor.tokenizer, request) for request in requests]
    config = editor.config(args.method, **overrides)
    ensure_statistics(editor, config, args)
    before = editor.ask(requests)
    observer = _observer(args, editor, requests)
    edit = editor.edit(requests, args.method, verify=False, preserve=text, **overrides)
    edit.remember(before)
    if not args.strict:
        # Before anything is asked or shown, which may fail, and the edit would be gone.
        _save(args, editor, edit)
    outcomes = compare(requests, before, editor.ask(requests))
    changes = observer.changes()
    saved = not args.strict or all(outcome.said for outcome in outcomes)
    write_json(
        args.json,
        {
            "model": editor.name,
            "method": args.method,
            "layers": config.layers,
            "facts": outcomes,
            "changes": changes,
            "preserved_text": edit.delta.provenance.get("preserved_text"),
            "out": args.out if saved else None,
            "save_model": args.save_model if saved else None,
        },
    )
    layers = ", ".join(map(str, config.layers))
    print(f"layers {layers} of {editor.name} edited by {args.method}: {verdict(outcomes)}")
    if text is not None:
        about = edit.delta.provenance["preserved_text"]
        print(f"preserved beside C: {about['tokens']} tokens of {about['name']}, {about['weight']:.3g} of a fact each")
    print("probability of the new answer, before -> after, and what was said before:")
    for outcome in outcomes:
        print(f"  {outcome.described()}")
    _show_changes(args, editor, args.method, changes)
    if args.strict:
        if not saved:
            raise MissedFacts("Not every fact is what the model says, so nothing was saved.")
        _save(args, editor, edit)
    if args.out is not None:
        print(f"edit saved to {args.out}")
    if args.save_model is not None:
        print(f"edited model saved to {args.save_model}")


def _preserved(args: argparse.Namespace) -> PreservedText | None:
    from fastmemit.methods import PreservedText

    if args.preserve is not None:
        return PreservedText.from_text(args.preserve, args.preserve_weight)
    if args.preserve_weight is not None:
        raise BadConfig("--preserve-weight weighs the text of --preserve FILE; give one.")
    return None


def _save(args: argparse.Namespace, editor: Editor, edit: Edit) -> None:
    if args.out is not None:
        edit.save(args.out)
    if args.save_model is not None:
        editor.save_pretrained(args.save_model)


def _requests(args: argparse.Namespace) -> list[EditRequest]:
    single = (args.prompt, args.subject, args.target)
    complete = None not in single
    given = any(single) or args.join is not None
    if (args.facts is None and not complete) or (args.facts is not None and given):
        lacking = [name for name, value in zip(("--prompt", "--subject", "--target"), single, strict=True) if not value]
        what = "--facts and one fact beside it are two" if args.facts is not None else f"Without {', '.join(lacking)}"
        raise BadConfig(
            f"{what}: name the facts either by --facts FILE or by --prompt, --subject and --target, to which --join "
            "belongs."
        )
    if args.facts is None:
        fact = {"prompt": args.prompt, "subject": args.subject, "target_new": args.target}
        return [EditRequest.from_dict({**fact, "join": args.join})]
    return check_batch(named_requests(args.facts))


def named_requests(facts: str) -> list[EditRequest]:
    """The requests that ``--facts`` names."""
    from fastmemit.data import load_records, load_requests, load_zsre
    from fastmemit.data.reading import NAMES
    from fastmemit.data.records import is_zsre

    if is_zsre(facts):
        return [record.request for record in load_zsre(facts)]
    if facts in NAMES or facts.startswith("hub:"):
        return [request for record in load_records(facts) for request in record.requests]
    return load_requests(facts)


def _observer(args: argparse.Namespace, editor: Editor, facts: Sequence[EditRequest]) -> Observer:
    """An observer of the prompts that are to be checked, and, where a page is asked for, of the facts too."""
    from fastmemit.data import Record
    from fastmemit.evaluation.changes import Observer, Watched, read_prompts, watched_facts
    from fastmemit.text import chat_text

    watched = [] if args.html is None else watched_facts(editor.tokenizer, [Record(0, fact) for fact in facts])
    checked = [] if args.check_file is None else read_prompts(editor.tokenizer, args.check_file)
    checked += [Watched("prompt", prompt) for prompt in args.check]
    if args.chat:
        checked = [replace(each, prompt=chat_text(editor.tokenizer, each.prompt)) for each in checked]
    return Observer(editor, [*watched, *checked])


def _show_changes(args: argparse.Namespace, editor: Editor, method: str, changes: Sequence[Change]) -> None:
    """Print what has changed at the prompts that were to be checked, and write the page."""
    from fastcov.files import atomic_file, printable
    from fastmemit.evaluation.changes import page

    if args.html is not None:
        with atomic_file(args.html) as file:
            file.write(page(editor.name, method, changes).encode())
    checked = [change for change in changes if change.watched.kind != "fact"]
    if checked:
        print("probability of the former answer, before -> after, and what is said now:")
    for change in checked:
        old = change.old_probability
        shares = f"{'-':>7}    {'-':>7}" if old is None else f"{old[0]:7.2%} -> {old[1]:7.2%}"
        now = "as before" if change.same else f"now: {' '.join(change.after.split())}"
        print(f"  {shares}  {printable(f'{change.watched.prompt} {change.old} ({now})')}")
    if args.html is not None:
        print(f"page written to {args.html}")


@verb("apply", "--edit! --prompt --max-new-tokens --chat --check --check-file --html --force --save-model MODEL")
def _apply(args: argparse.Namespace) -> None:
    """Apply saved edits to the model that they were made for.

    Examples:
      fastmemit apply --model smollm2 --edit edit.safetensors --prompt "The Eiffel Tower is in"
      fastmemit apply --model gpt2-xl --edit a.safetensors --edit b.safetensors --save-model out/
      fastmemit apply --model smollm2 --edit edit.safetensors --check-file mine.jsonl --html page.html
    """
    from fastmemit.answers import compare, verdict

    check_writable(args.html)
    check_free(args.save_model)
    editor = make_editor(args)
    edits = [editor.load(path, force=args.force) for path in args.edit]
    facts = _facts([edit.delta for edit in edits])
    replies = editor.ask(facts)
    before = editor.generate(args.prompt, args.max_new_tokens, chat=args.chat)
    observer = _observer(args, editor, facts)
    for edit in edits:
        edit.apply()
    if args.save_model is not None:  # before anything that may fail
        editor.save_pretrained(args.save_model)
    after = editor.generate(args.prompt, args.max_new_tokens, chat=args.chat)
    outcomes, changes = compare(facts, replies, editor.ask(facts)), observer.changes()
    said = [
        {"prompt": prompt, "before": old, "after": new}
        for prompt, old, new in zip(args.prompt, before, after, strict=True)
    ]
    found = {"model": editor.name, "edits": args.edit, "facts": outcomes, "prompts": said, "changes": changes}
    write_json(args.json, {**found, "save_model": args.save_model})
    count = sum(len(edit.delta.requests) for edit in edits)
    print(f"{counted(len(edits), 'edit')} with {counted(count, 'fact')} applied to {editor.name}")
    if facts:
        print(verdict(outcomes))
    _show_changes(args, editor, ", ".join(str(e.delta.provenance.get("method", "unknown")) for e in edits), changes)
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
    """Say what is in a saved edit, an adapter, statistics or a model's folder.

    Examples:
      fastmemit show edit.safetensors
      fastmemit show a.safetensors adapter/ ./my-model
      fastmemit show ~/.cache/fastmemit/statistics/0c5e1b6a9d2f4837/memit-0a1b2c3d4e5f
    """
    from fastcov.files import printable

    shown = [(path, *_shown(path)) for path in args.paths]
    write_json(args.json, [{"path": path, "is": kind, **_gathered(about)} for path, kind, about in shown])
    for path, kind, about in shown:
        print(f"{path}: {kind}")
        for name, value in about:
            print(f"  {name:<10} {printable(' '.join(str(value).split()))}")


def _gathered(about: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Lines of `_show` by name; those of one name that may stand there often, as a list."""
    names = {"part", "fact"} | {"module", "edit"} & {name for name, _ in about}
    lists = {f"{name}s": [value for key, value in about if key == name] for name in sorted(names)}
    return {**dict(line for line in about if f"{line[0]}s" not in lists), **lists}


def _shown(path: Path) -> tuple[str, list[tuple[str, object]]]:
    """What a path holds, told by what is in it and not by its name."""
    from fastmemit.sharing.adapter import CONFIG

    if not path.is_dir():
        return _statistics_shown(path) if path.is_file() and _is_moment(path) else _edit_shown(path)
    if (path / CONFIG).is_file():
        return _adapter_shown(path)
    if not (path / "config.json").is_file() and any(map(_is_moment, path.glob("*.safetensors"))):
        return _statistics_shown(path)
    return _model_shown(path)


def _is_moment(path: Path) -> bool:
    """Whether a file's header is that of a moment; whether all of it is sound is seen when it is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            return {"d", "count"} <= set(file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _edit_shown(path: Path) -> tuple[str, list[tuple[str, object]]]:
    from fastmemit.delta import Delta
    from fastmemit.sharing import parts

    delta = Delta.load(path)
    found, about = parts(delta), delta.provenance
    layers = {int(number[1]) for number in (re.search(r"\.(\d+)\.", name) for name in delta.factors) if number}
    revision = f", revision {about['model_revision']!s:.12}" if about.get("model_revision") else ""
    model = f"{about.get('model_name', 'unknown')!s:.200} ({delta.model or 'of no fingerprint'!s:.16}{revision})"
    return f"an edit, {byte_size(path.stat().st_size)}", [
        ("model", model),
        ("method", f"{about.get('method', 'unknown')!s:.20}"),
        ("layers", ", ".join(map(str, sorted(layers))) or "none"),
        ("weights", len(delta.factors)),
        ("rank", max((left.shape[1] for left, _ in delta.factors.values()), default=0)),
        ("digest", delta.digest()),
        *(
            ("part", f"{part.digest():.12} with {counted(len(part.requests), 'fact')}")
            for part in found
            if len(found) > 1
        ),
        *(("fact", fact) for entry in delta.entries for fact in _facts_shown(entry)),
    ]


def _facts_shown(entry: Mapping[str, Any]) -> list[str]:
    """The facts of one of `Delta.entries`, each with the former answer where it is on record."""
    from fastmemit.delta import fact_text

    return [
        " -> ".join(fact_text(fact)) + (f" (before: {fact['former']})" if "former" in fact else "")
        for fact in entry["facts"]
    ]


def _adapter_shown(path: Path) -> tuple[str, list[tuple[str, object]]]:
    from fastmemit.delta import Delta
    from fastmemit.sharing.adapter import read_about

    config, ranks, ours = read_about(path)
    provenance = ours.get("provenance")
    edit = Delta({}, provenance if isinstance(provenance, dict) else {})
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return f"an adapter ({config.get('peft_type')!s:.20}), {byte_size(size)}", [
        ("base", f"{config.get('base_model_name_or_path') or 'unknown'!s:.200}"),
        ("rank", " to ".join(map(str, dict.fromkeys((min(ranks.values()), max(ranks.values())))))),
        ("alpha", f"{config.get('lora_alpha')!s:.20}"),
        *(("module", f"{module:.120}") for module in ranks),
        *([("method", edit.entries[0]["method"]), ("digest", f"{ours.get('digest')!s:.64}")] if ours else []),
        *(("fact", fact) for entry in edit.entries if ours for fact in _facts_shown(entry)),
    ]


def _statistics_shown(path: Path) -> tuple[str, list[tuple[str, object]]]:
    import fastcov

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    read = {file: fastcov.load_moment(file) for file in files}
    moments = [moment for moment, _ in read.values()]
    about = next(iter(read.values()))[1]
    corpus = about.get("corpus")
    name = corpus.get("name", "unknown") if isinstance(corpus, dict) else "unknown"
    counts = sorted({moment.count for moment in moments})
    return f"statistics, {byte_size(sum(file.stat().st_size for file in files))}", [
        ("model", f"{about.get('model_name', 'unknown')!s:.200} ({about.get('model', 'no fingerprint')!s:.16})"),
        ("corpus", f"{name!s:.200}"),
        ("multiplier", about.get("multiplier", "unknown")),
        ("keys", f"{' to '.join(f'{n:,}' for n in dict.fromkeys((counts[0], counts[-1])))} of width {moments[0].d:,}"),
        *(("module", f"{said.get('module', file.stem)!s:.120}") for file, (_, said) in read.items()),
    ]


def _model_shown(path: Path) -> tuple[str, list[tuple[str, object]]]:
    from fastmemit.delta import read_record
    from fastmemit.models import find_adapter, load_skeleton

    adapter = find_adapter(load_skeleton(str(path)))
    record = read_record(path)
    base = [("base", f"{record['base']['name']:.200} ({record['base']['fingerprint']:.16})")] if record else []
    edits = [
        line
        for entry in record.get("edits", ())
        for line in (
            ("edit", f"{entry['digest']:.12} by {entry['method']:.20}, {counted(len(entry['facts']), 'fact')}"),
            *(("fact", fact) for fact in _facts_shown(entry)),
        )
    ]
    layers = adapter.layers
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return f"a model, {byte_size(size)}", [
        ("class", type(adapter.model).__name__),
        ("weights", f"{sum(weight.numel() for weight in adapter.model.parameters()):,}"),
        ("layers", f"{layers[0]} to {layers[-1]} can be edited, by weights such as {adapter.weight_name(layers[0])}"),
        ("keys", f"of width {adapter.d_k(layers[0]):,}"),
        *base,
        *edits,
    ]


@verb("undo", "--edit! --save-model! --base MODEL")
def _undo(args: argparse.Namespace) -> None:
    """Take saved edits out of an edited model's folder, and write the unedited model.

    Examples:
      fastmemit undo --model edited/ --edit edit.safetensors --save-model unedited/
      fastmemit undo --model edited/ --edit edit.safetensors --base gpt2-xl --save-model unedited/

    The weights are those of the base model, bit for bit, where that can be loaded and the edited
    ones are its own with these edits. Else they come back but for the rounding of the sum.
    """
    from fastmemit.answers import compare
    from fastmemit.delta import RECORD, Delta, model_record
    from fastmemit.models import fingerprint, save_model
    from fastmemit.sharing.hub import model_card

    check_free(args.save_model)
    deltas = [Delta.load(path) for path in args.edit]
    editor = make_editor(args)
    if editor.fingerprint == deltas[0].model:
        raise BadUndo(f"{editor.name} is the model that {args.edit[0]} was made for, without it; there is no undo.")
    record = editor.record
    entries = record.get("edits", [])
    for path, delta in zip(args.edit, deltas, strict=True):
        if record and not delta.digests & {entry["digest"] for entry in entries}:
            raise BadUndo(
                f"{editor.name} was saved with {counted(len(entries), 'edit')} and {path} is none of them; fastmemit "
                "show lists which they are."
            )
    if record:  # in the order in which they were applied, whichever they are named in
        place = {entry["digest"]: number for number, entry in enumerate(entries)}
        deltas.sort(key=lambda delta: min(place[digest] for digest in delta.digests if digest in place))
    unedited = deltas[0].model
    out = frozenset().union(*(delta.digests for delta in deltas))
    left = [entry for entry in entries if entry["digest"] not in out]
    facts = _facts(deltas)
    before = editor.ask(facts)
    base, why = (None, "other edits stay in them") if left else _base_of(args, editor, deltas)
    if base is None:
        for delta in reversed(deltas):
            negative = {name: (-first, second) for name, (first, second) in delta.factors.items()}
            Delta(negative, delta.provenance).add_to(editor.model)
        beside = {}
        if left:
            name, model = record["base"]["name"], record["base"]["fingerprint"]
            card = model_card(name, left, Path(args.model))
            beside = {RECORD: model_record(name, model, left), "README.md": card.encode()}
        save_model(editor.model, editor.tokenizer, args.save_model, beside)
    else:
        base.save_pretrained(args.save_model)
    now = (base or editor).ask(facts)
    exact = base is not None or fingerprint(editor.model) == unedited
    found = {"model": editor.name, "edits": args.edit, "facts": compare(facts, before, now), "bit_for_bit": exact}
    write_json(args.json, {**found, "save_model": args.save_model})
    print(f"{counted(len(deltas), 'edit')} taken out of {editor.name}")
    said, says = (sum(reply.said for reply in replies) for replies in (before, now))
    print(f"of {counted(len(facts), 'fact')} the model said {said} and says {says} now")
    if base is not None:
        print(f"the weights are bit for bit those of {base.name}")
    elif exact:
        print("the weights are bit for bit the unedited model's")
    else:
        print(f"the edits were subtracted, because {why}: the weights are what they were but for the rounding of a sum")
    print(f"unedited model saved to {args.save_model}")


def _base_of(args: argparse.Namespace, edited: Editor, deltas: Sequence[Delta]) -> tuple[Editor | None, str]:
    """The model that is the edited one without these edits, or why there is none to be had."""
    import torch

    from fastmemit.edits import Edit, EditStack

    recorded = edited.record.get("base", {}).get("name") or deltas[0].provenance.get("model_name")
    name = args.base or recorded
    if not isinstance(name, str):
        return None, "the edit does not name its base model (pass --base)"
    try:
        base = make_editor(argparse.Namespace(**{**vars(args), "model": name}))
    except ModelNotFound:
        if args.base is not None:
            raise
        return None, f"the base model {name!r:.200} is not here (pass --base)"
    if base.fingerprint != deltas[0].model:
        if args.base is not None:
            raise WrongModel(
                f"The base model {name!r} is {base.fingerprint:.16} and the edit was made for {deltas[0].model!s:.16}; "
                "name the model that it was made for, with the same --dtype."
            )
        return None, f"{name!r:.200} is another model now, or in another dtype"
    made = [Edit(delta, EditStack.of(base.model)).apply() for delta in deltas]
    found = base.model.state_dict()
    other = [name for name, weight in edited.model.state_dict().items() if not torch.equal(weight, found[name])]
    for edit in reversed(made):
        edit.undo()
    if other:
        return None, f"{other[0]} is not what the base model and these edits give"
    return base, ""


@verb("compose", "--edit! --out! --remove --allow-conflicts --compress --rank")
def _compose(args: argparse.Namespace) -> None:
    """Put several saved edits of one model into one file, or take one out of it.

    Examples:
      fastmemit compose --edit a.safetensors --edit b.safetensors --out both.safetensors
      fastmemit compose --edit both.safetensors --remove 3f7c1a9be2d4 --out a.safetensors
      fastmemit compose --edit a.safetensors --edit b.safetensors --rank 64 --out small.safetensors
    """
    from fastcov.files import printable
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
    listed: list[dict[str, Any]] = [
        {"digest": part.digest(), "facts": len(part.requests), "method": str(part.provenance.get("method", "unknown"))}
        for part in found
    ]
    compression = whole.provenance.get("compression") or {}
    about = {"out": args.out, "weights": list(whole.factors), "parts": listed, "compression": compression}
    write_json(args.json, about)
    for each in listed:
        print(f"  {each['digest']:.12}  {counted(each['facts'], 'fact')} by {printable(each['method']):.20}")
    for name, done in compression.items():
        print(f"  {printable(name)}: rank {done['from']} -> {done['to']}, relative error {done['relative_error']:.1e}")
    print(f"{counted(len(found), 'edit')} on {counted(len(whole.factors), 'weight')} saved to {args.out}")
