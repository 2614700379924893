"""``fastmemit locate``: which layers carry facts, and so which to edit."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmemit.cli.options import above_zero, add_model, check_writable, make_editor

if TYPE_CHECKING:
    from fastmemit.editor import Editor
    from fastmemit.tracing import TraceSettings
    from fastmemit.tracing_report import Effect

HELP = "Trace facts through the layers (ROME's causal tracing) and propose layers to edit."
EPILOG = """examples:
  fastmemit locate --model gpt2-xl --facts counterfact --limit 200 --figure layers.svg
  fastmemit locate --model smollm2 --facts counterfact.json --positions all --json layers.json
"""
_KINDS = ("mlp", "attention", "hidden")


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "--facts",
        required=True,
        help="a CounterFact file (full or flat), counterfact (from the hub), hub:NAME[@SPLIT] or builtin",
    )
    verb.add_argument("--skip-malformed", action="store_true", help="go on without bad records")
    verb.add_argument("--limit", type=above_zero, default=200, metavar="N", help="trace at most N facts")
    verb.add_argument(
        "--unknown-too", action="store_true", help="also facts of which the model does not predict the answer"
    )
    verb.add_argument("--samples", type=above_zero, default=10, help="noise samples per fact")
    verb.add_argument(
        "--noise", type=float, default=3.0, help="standard deviation of the noise, in those of the subjects' embeddings"
    )
    verb.add_argument(
        "--window",
        type=above_zero,
        metavar="N",
        help="layers of MLP or attention restored together (default: 10 of 48, at most 10)",
    )
    verb.add_argument(
        "--positions",
        choices=("last-subject", "all"),
        default="last-subject",
        help="tokens to restore: the subject's last, or all from the subject on",
    )
    verb.add_argument(
        "--kinds", default=",".join(_KINDS), help="what to restore, from mlp, attention and hidden (default: all three)"
    )
    verb.add_argument("--json", type=Path, metavar="FILE", help="write everything found here")
    verb.add_argument("--figure", type=Path, metavar="FILE", help="draw it (.svg or .png)")
    add_model(verb)


def run(args: argparse.Namespace) -> None:
    """Trace, print the table and the proposal, write the files."""
    import torch

    from fastcov.bench.machine import machine
    from fastcov.store import atomic_file
    from fastmemit.data import load_records
    from fastmemit.progress import bar
    from fastmemit.statistics import versions
    from fastmemit.tracing import TraceSettings, choose_facts, count_states, trace
    from fastmemit.tracing_report import check_figure, draw, located, propose

    check_writable(args.json, args.figure)
    check_figure(args.figure)
    settings = TraceSettings(
        samples=args.samples,
        noise=args.noise,
        window=args.window,
        limit=args.limit,
        only_known=not args.unknown_too,
        positions=args.positions,
        kinds=tuple(args.kinds.split(",")),
        seed=args.seed,
    )
    records = load_records(args.facts, skip_malformed=args.skip_malformed)
    editor = make_editor(args)
    adapter = editor.adapter
    begun = time.perf_counter()
    requests = [record.request for record in records]
    chosen = choose_facts(adapter, editor.tokenizer, requests, settings)
    total = count_states(adapter, chosen.facts, settings)
    with bar("restored states", total, not args.quiet) as advance:
        found = trace(adapter, chosen.facts, settings, progress=advance)
    seconds = time.perf_counter() - begun
    mlp = found.effects.get("mlp")
    proposal = None if mlp is None else propose(mlp["last subject"], args.seed)
    described = {
        **dataclasses.asdict(settings),
        "model": editor.name,
        "fingerprint": editor.fingerprint,
        "dtype": str(editor.model.dtype).removeprefix("torch."),
        "device": str(adapter.device),
        "facts": _facts_name(args.facts),
    }
    hardware = {**dataclasses.asdict(machine(adapter.device)), "threads": torch.get_num_threads()}
    result = located(
        found,
        chosen.looked_at,
        proposal,
        seed=args.seed,
        settings=described,
        seconds=seconds,
        versions=versions(),
        hardware=hardware,
        command=_command(args, editor, settings),
    )
    if args.json is not None:  # before it is shown, which may fail
        with atomic_file(args.json) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    print("\n".join(_report(result, editor)))
    if args.json is not None:
        print(f"written to {args.json}")
    if args.figure is not None:
        draw(result, args.figure)
        print(f"drawn in {args.figure}")


def _report(result: dict[str, Any], editor: Editor) -> list[str]:
    """What a person reads."""
    traced, looked_at = result["facts"], result["looked_at"]
    clean, corrupted = 100 * result["clean"]["mean"][0], 100 * result["corrupted"]["mean"][0]
    lines = [
        f"{editor.name}: {traced} facts traced of {looked_at} looked at"
        + ("" if result["settings"]["only_known"] is False else f", {looked_at - traced} unknown")
        + f", {result['settings']['samples']} noise samples each, {result['seconds']:.1f} s",
        f"probability of the answer: clean {clean:.2f} %, subject hidden {corrupted:.2f} %",
        "indirect effect at the subject's last token, points of probability [95 % interval]",
        *_table(result),
    ]
    for kind, groups in result["effects"].items():
        if len(groups) > 1:
            lines += [f"{kind}: effect by position, points of probability", *_groups(groups)]
    return lines + _proposed(result, editor)


def _table(result: dict[str, Any]) -> list[str]:
    heads = []
    for kind in result["effects"]:
        window = result["windows"][kind]
        heads.append(f"{kind} ({window} layer{'s' if window > 1 else ''})")
    lines = ["layer" + "".join(f"{head:>26}" for head in heads)]
    columns = [groups["last subject"] for groups in result["effects"].values()]
    for layer in range(len(columns[0]["mean"])):
        cells = "".join(f"{_cell(effect, layer):>26}" for effect in columns)
        lines.append(f"{layer:5d}{cells}")
    return lines


def _cell(effect: Effect, layer: int) -> str:
    mean, low, high = effect["mean"], effect["low"], effect["high"]
    if low is None or high is None:
        return f"{100 * mean[layer]:.2f}"
    return f"{100 * mean[layer]:.2f} [{100 * low[layer]:6.2f}, {100 * high[layer]:6.2f}]"


def _groups(groups: dict[str, Effect]) -> list[str]:
    """The largest effect of each position."""
    lines = []
    for name, effect in groups.items():
        layer = max(range(len(effect["mean"])), key=lambda index: effect["mean"][index])
        top = 100 * effect["mean"][layer]
        lines.append(f"  {name:<15} at most {top:6.2f}, at layer {layer} ({effect['facts']} facts)")
    return lines


def _proposed(result: dict[str, Any], editor: Editor) -> list[str]:
    if "mlp" not in result["effects"]:
        return ["no layers proposed: the MLP was not traced (--kinds)"]
    proposal = result["proposal"]
    if proposal is None:
        return [
            "no layers proposed: no effect of the MLP stands out from zero; trace more facts "
            "(--limit), or facts that the model knows better"
        ]
    peak, layers = proposal["peak"], proposal["layers"]
    now = {name: editor.config(name) for name in ("memit", "emmet", "rome")}
    of = now["memit"].preset
    return [
        f"the MLP's effect is largest at layer {peak} (95 % interval of its place: "
        f"{proposal['low']} to {proposal['high']})",
        f"proposed: --method memit --set layers={_span(layers)}",
        f"          --method rome or emmet --set layers={peak}",
        f"now used ({'preset ' + of if of != 'default' else 'by depth, no preset'}): "
        + ", ".join(f"{name} {_span(config.layers)}" for name, config in now.items()),
    ]


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"


def _facts_name(source: str) -> dict[str, str]:
    """The facts' name without its folder, and the digest of a file."""
    path = Path(source)
    if not path.is_file():
        return {"name": source}
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _command(args: argparse.Namespace, editor: Editor, settings: TraceSettings) -> list[str]:
    """The command line that gives this result, with names instead of folders."""
    words = ["fastmemit", "locate", "--model", editor.name]
    words += ["--facts", _facts_name(args.facts)["name"], "--limit", str(settings.limit)]
    words += ["--samples", str(settings.samples), "--noise", f"{settings.noise:g}"]
    if settings.window is not None:
        words += ["--window", str(settings.window)]
    words += ["--positions", settings.positions, "--kinds", ",".join(settings.kinds)]
    words += ["--seed", str(settings.seed)]
    for name in ("module", "device", "dtype"):
        if getattr(args, name) is not None:
            words += [f"--{name}", getattr(args, name)]
    flags = ("unknown_too", "skip_malformed", "trust_remote_code")
    return words + [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag)]
