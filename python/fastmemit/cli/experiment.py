"""Experiments: ``experiment sweep|sequential|report|locate|downstream``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastmemit.cli.options import check_writable, chosen_settings, make_editor, read_text, verb, write_json
from fastmemit.cli.terminal import SCORES, show_scores, show_table
from fastmemit.errors import BadConfig, BadData, counted

if TYPE_CHECKING:
    from fastmemit.data import Corpus, Record
    from fastmemit.editor import Editor
    from fastmemit.evaluation.downstream import State
    from fastmemit.experiments.results import Inputs
    from fastmemit.tracing_report import Effect

EARLIER_KEYS = {"both": (True, False), "yes": (True,), "no": (False,)}
BOS = {"with": (True,), "without": (False,), "both": (True, False)}


def _data(args: argparse.Namespace) -> tuple[list[Record], Corpus]:
    """The records and the corpus of an experiment, whose folder for results is one."""
    from fastmemit.data import load_corpus, load_records
    from fastmemit.data.records import listed_records

    if args.out.exists() and not args.out.is_dir():
        raise BadConfig(f"{str(args.out)!r} is a file; name a folder for the results.")
    if args.corpus == "self":
        raise BadConfig("The corpus is read many times; give a file, builtin or wikipedia.")
    records = load_records(args.facts, skip_malformed=args.skip_malformed)
    if args.cases is not None:
        records = listed_records(records, args.cases)
    if any(record.probes for record in records):
        raise BadConfig(f"{args.facts} asks what follows from its edits, which experiments do not; take evaluate.")
    return records, load_corpus(args.corpus, field=args.field)


def _inputs(args: argparse.Namespace, editor: Editor, corpus: Corpus) -> Inputs:
    from fastmemit.capacity import FULL_KEYS
    from fastmemit.experiments.results import Inputs, file_identity

    return Inputs(
        corpus,
        args.out,
        file_identity(args.facts),
        cases=None if args.cases is None else file_identity(args.cases),
        full_keys=args.full_keys or FULL_KEYS,
        max_length=args.max_length,
        text=read_text(args, editor),
        perplexity_batches=getattr(args, "text_batches", 1),
    )


@verb(
    "experiment sweep",
    "--methods --multipliers=1,2,3,4,10,full --snapshots --batch-sizes --num-batches --vary "
    "--only-varied --seeds --bos --shard --text-batches INPUTS MODEL",
    {"--num-batches": {"type": str, "default": None, "help": "how many of each size, or of all (default: Table 1's)"}},
)
def _sweep(args: argparse.Namespace) -> None:
    r"""Score edits for every multiplier, method and batch size; a sweep that was killed is resumed.

    Examples:
      fastmemit experiment sweep --model smollm2 --methods emmet,memit --multipliers 1,2,3,4,10,full \
          --batch-sizes 1,16,64 --num-batches 64,4,1 --facts counterfact.json --corpus text.jsonl \
          --out DIR
      fastmemit experiment sweep --model gpt2-xl --facts counterfact --out DIR --shard 1/2

    Before it starts it says what it will take here, and if that is more than an hour, which flags
    bring it below. A sweep that was killed is resumed by the same command. When all shards are
    done, the command without --shard puts their results into one file. The grid may change between
    two runs into the same folder.
    """
    from fastmemit.experiments import sweep

    methods = sweep.parse_methods(args.methods)
    grid = sweep.Grid(
        methods=methods,
        batches=sweep.parse_batches(args.batch_sizes, args.num_batches),
        multipliers=sweep.parse_multipliers(args.multipliers),
        variants=_variants(args.vary, args.only_varied, methods),
        bos=BOS[args.bos],
        seeds=sweep.parse_seeds(args.seeds),
        snapshots=sweep.parse_multipliers(args.snapshots) if args.snapshots else (),
    )
    shard = sweep.parse_shard(args.shard)
    records, corpus = _data(args)
    editor = make_editor(args)
    for method in methods:  # refused here, not after hours
        for variant in grid.variants:
            editor.config(method, **variant)
    inputs = _inputs(args, editor, corpus)
    expected = None if args.quiet else sweep.forecast(editor, grid, records, inputs, shard=shard)
    if expected is not None:
        print(expected.describe(), file=sys.stderr)
        if flags := expected.flags_for():
            print(f"for less than an hour: {flags}", file=sys.stderr, flush=True)
    cells = sweep.run_sweep(editor, grid, records, inputs, shard=shard, progress=not args.quiet)
    costs = {cell["key"]: cell["perplexity"] and cell["perplexity"]["after"] for cell in cells}
    rows = {cell["key"]: {**sweep.table_of(cell["records"]), "perplexity": costs[cell["key"]]} for cell in cells}
    write_json(args.json, rows)
    show_scores(rows, (*SCORES, "perplexity"))
    number, of = shard
    if of == 1:
        print(f"{counted(len(cells), 'cell')} in {args.out}; fastmemit experiment report {args.out} draws them")
    else:
        print(f"shard {number} of {of} is done: {len(cells)} of {len(grid.places())} cells so far")


def _variants(vary: list[str], only: bool, methods: Sequence[str]) -> tuple[dict[str, Any], ...]:
    from fastmemit.methods import parse_overrides

    try:
        # A part without "=" belongs to the setting before it: layers=4,5.
        varied = [parse_overrides(re.split(r",(?=[^,=]*=)", text), methods) for text in vary]
    except BadConfig as error:
        if len(methods) == 1:
            raise
        raise BadConfig(
            f"{error} A setting that not all of {', '.join(methods)} have is varied with --methods "
            "for those that have it, into the same --out."
        ) from error
    if only and not varied:
        raise BadConfig("--only-varied leaves no cell; give --vary, such as relative_ridge=1e-3.")
    found: list[dict[str, Any]] = [] if only else [{}]
    for settings in varied:
        if settings in found:
            raise BadConfig(f"The settings {settings} are there twice; give each --vary once.")
        found.append(settings)
    return tuple(found)


@verb(
    "experiment sequential",
    "--batch-size --num-batches=10 --score-every --multipliers=10 --earlier-keys --targets --generations INPUTS "
    "MODEL METHOD",
)
def _sequential(args: argparse.Namespace) -> None:
    r"""Write batches on top of each other and score all facts so far; finished sequences are not run again.

    Examples:
      fastmemit experiment sequential --model smollm2 --method memit --facts counterfact.json \
          --batch-size 16 --num-batches 10 --score-every 2 --multipliers 1,2,10,full \
          --earlier-keys both --corpus text.jsonl --text text.txt --out DIR

    DIR gets sequential.jsonl, a line a step, and of all that is in it sequential.md, .svg, .pdf and
    .png. A sequence that was killed begins again at its first batch; those that were finished stay.
    """
    from fastcov.files import atomic_file
    from fastmemit.data import batches
    from fastmemit.experiments.frame import measure_steps
    from fastmemit.experiments.plots import check_matplotlib, sequence_picture
    from fastmemit.experiments.results import method_title
    from fastmemit.experiments.sequential import Plan, run_sequences
    from fastmemit.experiments.sweep import parse_multipliers
    from fastmemit.experiments.tables import markdown, step_tables

    check_matplotlib()
    multipliers = parse_multipliers(args.multipliers)
    overrides = chosen_settings(args)
    records, corpus = _data(args)
    chosen = batches(records, args.batch_size, args.num_batches, seed=None if args.cases else args.seed)
    editor = make_editor(args)
    editor.config(args.method, **overrides)  # refused before the text is read
    plan = Plan(
        chosen,
        args.method,
        overrides,
        multipliers,
        EARLIER_KEYS[args.earlier_keys],
        args.score_every,
        args.targets,
        args.generations,
    )
    lines = run_sequences(editor, plan, _inputs(args, editor, corpus), progress=not args.quiet)
    title = f"{editor.name}: {method_title(args.method)}, batches of {args.batch_size} in sequence"
    steps = measure_steps(lines)
    files = {"md": markdown(step_tables(steps)).encode(), **sequence_picture(steps, title).files}
    for ending, content in files.items():
        with atomic_file(args.out / f"sequential.{ending}") as file:
            file.write(content)
    last = [line for line in lines if line["edits"] == len(chosen)]
    facts = sum(map(len, chosen))
    in_batches = f"{counted(facts, 'fact')} in {counted(len(chosen), 'batch', 'batches')}"
    print(f"{editor.name}, {args.method}, {in_batches}, all of them kept")
    rows = {line["key"].rpartition("/")[0]: {**line["scores"], "perplexity": line["perplexity"]} for line in last}
    rows = {"unedited": last[0]["before"], **rows}
    write_json(args.json, rows)
    show_scores(rows, (*SCORES, "perplexity"))
    print(f"{len(rows) - 1} sequences in {args.out}: sequential.jsonl, .md (with intervals), .svg, .pdf, .png")


@verb("experiment report", "folders --out")
def _report(args: argparse.Namespace) -> None:
    """Write the tables and figures of a sweep or of sequences, and one page with all of it.

    Examples:
      fastmemit experiment report results/smollm2
      fastmemit experiment report results/smollm2 results/smollm2-below-the-minimum --out report
    """
    from fastcov.files import printable
    from fastmemit.experiments.frame import summary
    from fastmemit.experiments.report import write_report

    report = write_report(args.folders, args.out)
    cells = [{**row, "settings": json.loads(row["settings"])} for row in report.cells.to_dict("records")]
    write_json(args.json, {**vars(report), "cells": cells})
    print(printable(report.model))
    show_table(summary(report.cells))
    for path in report.files:
        print(f"written to {path}")


@verb(
    "experiment locate",
    "--facts! --skip-malformed --limit=200 --unknown-too --samples --noise --window --positions --kinds --figure MODEL",
)
def _locate(args: argparse.Namespace) -> None:
    r"""Trace facts through the layers (ROME's causal tracing) and propose layers to edit.

    Examples:
      fastmemit experiment locate --model gpt2-xl --facts counterfact --limit 200 --figure layers.svg
      fastmemit experiment locate --model smollm2 --facts counterfact.json --positions all \
          --json layers.json
    """
    import torch

    from fastcov.machine import this_machine
    from fastmemit.data import load_records
    from fastmemit.display import bar
    from fastmemit.experiments.results import file_identity
    from fastmemit.statistics import versions
    from fastmemit.tracing import TraceSettings, choose_facts, count_states, trace
    from fastmemit.tracing_report import check_figure, draw, located, propose

    check_writable(args.figure)
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
        "facts": file_identity(args.facts),
    }
    hardware = {**dataclasses.asdict(this_machine(adapter.device)), "threads": torch.get_num_threads()}
    result = located(
        found,
        chosen.looked_at,
        proposal,
        seed=args.seed,
        settings=described,
        seconds=seconds,
        versions=versions(),
        hardware=hardware,
        command=_command(args, editor.name),
    )
    write_json(args.json, result)
    _show_effects(result, editor)
    if args.figure is not None:
        draw(result, args.figure)
        print(f"drawn in {args.figure}")


def _show_effects(result: dict[str, Any], editor: Editor) -> None:
    """What a person reads."""
    traced, looked_at, effects = result["facts"], result["looked_at"], result["effects"]
    clean, corrupted = 100 * result["clean"]["mean"][0], 100 * result["corrupted"]["mean"][0]
    print(
        f"{editor.name}: {counted(traced, 'fact')} traced of {looked_at} looked at"
        + ("" if result["settings"]["only_known"] is False else f", {looked_at - traced} unknown")
        + f", {result['settings']['samples']} noise samples each, {result['seconds']:.1f} s"
    )
    print(f"probability of the answer: clean {clean:.2f} %, subject hidden {corrupted:.2f} %")
    print("indirect effect at the subject's last token, points of probability [95 % interval]")
    windows = {kind: result["windows"][kind] for kind in effects}
    heads = [f"{kind} ({window} layer{'s' if window > 1 else ''})" for kind, window in windows.items()]
    columns = [groups["last subject"] for groups in effects.values()]
    layers = range(len(columns[0]["mean"]))
    show_table([["layer", *heads], *([str(at), *(_effect(column, at) for column in columns)] for at in layers)])
    for kind, groups in effects.items():
        if len(groups) > 1:
            print(f"{kind}: effect by position, points of probability")
            for name, effect in groups.items():
                layer = max(range(len(effect["mean"])), key=lambda index: effect["mean"][index])
                top = 100 * effect["mean"][layer]
                print(f"  {name:<15} at most {top:6.2f}, at layer {layer} ({counted(effect['facts'], 'fact')})")
    print("\n".join(_proposed(result, editor)))


def _effect(effect: Effect, layer: int) -> str:
    mean, low, high = effect["mean"], effect["low"], effect["high"]
    if low is None or high is None:
        return f"{100 * mean[layer]:.2f}"
    return f"{100 * mean[layer]:.2f} [{100 * low[layer]:6.2f}, {100 * high[layer]:6.2f}]"


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


def _command(args: argparse.Namespace, name: str) -> list[str]:
    """The command line that gives this result, with names instead of folders."""
    from fastmemit.experiments.results import file_identity

    words = ["fastmemit", "experiment", "locate", "--model", name, "--facts", file_identity(args.facts)["name"]]
    for flag in ("limit", "samples", "noise", "window", "positions", "kinds", "seed", "module", "device", "dtype"):
        value = getattr(args, flag)
        if value is not None:
            words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    switches = ("unknown_too", "skip_malformed", "trust_remote_code")
    return words + [f"--{switch.replace('_', '-')}" for switch in switches if getattr(args, switch)]


@verb(
    "experiment downstream",
    "--edit --force --text --text-tokens --context --stride --tasks --include-path --limit --num-fewshot "
    "--task-batch-size MODEL",
    {"--edit": {"default": []}},
)
def _downstream(args: argparse.Namespace) -> None:
    r"""Perplexity on a text and lm-evaluation-harness's tasks, before and after saved edits.

    Examples:
      fastmemit experiment downstream --model smollm2 --edit edit.safetensors --text wiki.txt \
          --text-tokens 20000
      fastmemit experiment downstream --model gpt2-xl --edit edit.safetensors --text wiki.txt \
          --tasks hellaswag,arc_easy --limit 200 --json downstream.json
      fastmemit experiment downstream --model smollm2 --tasks my_task --include-path my_tasks/
    """
    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    if args.text is None and not names:
        raise BadConfig("There is nothing to score; give --text FILE, --tasks NAMES, or both.")

    from fastmemit.data.reading import check_file
    from fastmemit.evaluation.downstream import compare, find_tasks

    if args.text is not None:
        check_file(args.text, BadData)
    bars = not args.quiet and sys.stderr.isatty()
    tasks = find_tasks(names, include_path=args.include_path, progress=bars) if names else None
    editor = make_editor(args)
    edits = [editor.load(path, force=args.force) for path in args.edit]
    text = read_text(args, editor, context=args.context, stride=args.stride)
    found = compare(
        editor,
        edits,
        text=text,
        tasks=tasks,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        batch_size=args.task_batch_size,
        progress=bars,
    )
    write_json(args.json, found)
    facts = sum(edit["facts"] for edit in found["edits"])
    print(f"{editor.name}, {counted(len(edits), 'edit')} with {counted(facts, 'fact')}")
    if found["text"] is not None:
        shape = found["text"]
        print(
            f"{shape['name']}: {shape['tokens']} tokens predicted in {shape['windows']} windows of {shape['context']}"
        )
    columns = {"before": dict(_lines(found["before"]))}
    if found["after"] is not None:
        columns["after"] = dict(_lines(found["after"]))
    show_table([["", *columns], *([name, *(c[name] for c in columns.values())] for name in columns["before"])])


def _lines(state: State) -> Iterator[tuple[str, str]]:
    """Each number with its name; standard errors behind ±."""
    if state["perplexity"] is not None:
        yield "perplexity", f"{state['perplexity']:.4f}"
    if state["tasks"] is None:
        return
    for task, scores in state["tasks"]["scores"].items():
        for metric, value in scores.items():
            if "_stderr" in metric:
                continue
            name, *rest = metric.split(",")
            error = scores.get(",".join([f"{name}_stderr", *rest]))
            yield f"{task} {metric}", f"{value:.4f}" + (f" ± {error:.4f}" if error else "")
