"""Statistics: ``precompute``, what they take (``stats plan``), and other codebases' files (``stats export|import``)."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmemit.cli import options
from fastmemit.cli.options import make_editor, statistics_found, stored_or_collected, verb, write_json
from fastmemit.cli.terminal import byte_size, show_table
from fastmemit.errors import BadConfig, counted

if TYPE_CHECKING:
    from fastmemit.compat import StatsPlace
    from fastmemit.editor import Editor
    from fastmemit.statistics import Statistics

NULL_SPACE = "null_space_project.pt"


@verb("precompute", "--layers --throughput --quartic --forward --corpus=wikipedia MODEL CORPUS")
def _precompute(args: argparse.Namespace) -> None:
    """Collect the second moments of a model's keys, once; edits find them by themselves.

    Examples:
      fastmemit precompute --model gpt2-xl
      fastmemit precompute --model smollm2 --corpus articles.jsonl --multiplier 10
      fastmemit precompute --model ./my-model --corpus self --layers 4-8

    With several GPUs, each takes its share of the text and the result is the same to rounding:
      torchrun --nproc-per-node 8 -m fastmemit precompute --model gpt2-xl --corpus articles.jsonl
    """
    from fastmemit import parallel
    from fastmemit.data.corpora import is_at_hand, load_corpus
    from fastmemit.methods.config import parse_layers

    processes = parallel.CURRENT.get()
    if processes is not None:
        args.quiet = args.quiet or not processes.first
        if args.device_map is None:
            args.device = parallel.local_device(args.device)
    layers = None if args.layers is None else parse_layers(args.layers)
    corpus = args.corpus
    if is_at_hand(corpus):  # the model takes minutes to load, and is not needed to look
        corpus = load_corpus(corpus, field=args.field)
    editor = make_editor(args)
    begun = time.perf_counter()
    found = options.precompute(editor, corpus, layers, args, quartic=args.quartic, forward=args.forward)
    if processes is not None and not processes.first:
        return
    seconds, speed = time.perf_counter() - begun, found.throughput
    fast = None if speed is None else {"tokens_per_second": speed.tokens_per_second, "share_of_limit": speed.share}
    write_json(args.json, statistics_found(found, seconds=seconds, throughput=fast))
    number = counted(len(found.paths), "layer")
    print(f"{editor.name}: second moments of {number}, {found.describe()}, in {seconds:.1f} s")
    if speed is not None:
        whose = "" if processes is None else f"process 0 of {processes.size}: "
        # The line ends with the share of the limit, which is for those who look for it.
        print(f"  {whose}{speed if args.throughput else str(speed).rpartition(', ')[0]}")
    print(*(f"  {path}" for path in found.paths.values()), sep="\n")


@verb(
    "stats plan",
    "--shape! --layers=4-8 --multipliers --machine --flops --share --processes --batch-tokens --length --batch-size "
    "--facts",
    {
        "--multipliers": {"help": "keys as multiples of their width, beside 44 million"},
        "--batch-size": {"default": None, "help": "facts of the edit (default: 16, or as many as --facts has)"},
    },
)
def _plan(args: argparse.Namespace) -> None:
    """Count the memory, time and bytes that a model's statistics and an edit take, and load nothing.

    Examples:
      fastmemit stats plan --shape llama-3-70b --layers 4-8 --processes 8
      fastmemit stats plan --shape ./my-model --layers 4-8 --multipliers 2,10 --machine h100 --share 0.4
      fastmemit stats plan --shape gpt-j-6b --layers 3-8 --batch-size 10000
      fastmemit stats plan --shape ./my-model --facts facts.jsonl

    Operations and bytes are counted as the code does them. Seconds divide them by a machine's rates;
    the last lines say what was assumed of facts, and which rates were measured. With --facts, those
    are counted in tokens of the model whose folder --shape names.
    """
    import dataclasses

    import fastcov
    from fastmemit.capacity import FULL_KEYS, MACHINES, plan, plan_edit, shape_of, tokens_of
    from fastmemit.cli.edit import named_requests
    from fastmemit.methods.config import parse_layers

    shape, facts, lengths = shape_of(args.shape), args.batch_size or 16, {}
    if args.facts is not None:
        requests = named_requests(args.facts)
        lengths = tokens_of(_tokenizer(args.shape), requests)
        facts = args.batch_size or len(requests)
    machine = MACHINES[args.machine]
    given = {name: value for name in ("flops", "share") if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        if not 0 < value < float("inf"):
            raise BadConfig(f"--{name} must be above 0 but is {value:g}; give what is real.")
    machine = dataclasses.replace(machine, **given)
    layers = parse_layers(args.layers)
    try:
        wanted = [fastcov.budget(float(m), shape.d_k) for m in args.multipliers.split(",")]
    except ValueError as error:
        if isinstance(error, fastcov.FastcovError):
            raise
        raise BadConfig(f"--multipliers {args.multipliers!r} is no list of numbers; write 10, or 2,10.") from error
    plans = [
        plan(shape, machine, layers, keys, processes=args.processes, batch_tokens=args.batch_tokens, length=args.length)
        for keys in dict.fromkeys([*wanted, FULL_KEYS])
    ]
    edit = plan_edit(shape, machine, layers, facts, **lengths)
    write_json(
        args.json,
        {
            "shape": shape,
            "machine": machine,
            "layers": layers,
            "processes": args.processes,
            "plans": [{**dataclasses.asdict(p), "memory": p.memory, "total_seconds": p.total} for p in plans],
            "edit": {"facts": facts, **dataclasses.asdict(edit), "memory": edit.memory},
        },
    )
    print(
        f"{args.shape}: {shape.weights / 1e9:.2f} billion weights, {shape.layers} layers, d {shape.d}, d_k "
        f"{shape.d_k}; statistics of layers {args.layers}, {args.processes} x {args.machine}"
    )
    rows: list[tuple[str, list[str]]] = [
        ("keys of each layer", [f"{p.keys:,}" for p in plans]),
        ("memory of a process", []),
        ("  the whole model", [byte_size(p.weights) for p in plans]),
        ("  the part that runs", [byte_size(p.weights_run) for p in plans]),
        ("  a batch", [byte_size(p.activations) for p in plans]),
        ("  the sums", [byte_size(p.moments) for p in plans]),
        ("  what runs, in all", [byte_size(p.memory) for p in plans]),
        ("seconds", []),
        *((f"  {step}", [_seconds(p.seconds[step]) for p in plans]) for step in plans[0].seconds),
        ("  in all", [_seconds(p.total) for p in plans]),
        ("operations", []),
        ("  forward passes", [f"{p.flops:.2e}" for p in plans]),
        ("  triangles", [f"{p.triangles:.2e}" for p in plans]),
        ("bytes moved", []),
        ("  device memory", [byte_size(p.read) for p in plans]),
        ("  between processes", [byte_size(p.sent) for p in plans]),
        ("  to disk, each layer", [byte_size(p.file) for p in plans]),
        ("then, for each layer", []),
        ("  a factor in float64", [byte_size(p.factor) for p in plans]),
        ("  seconds in float64", [_seconds(p.factor_seconds) for p in plans]),
    ]
    show_table([[name, *cells] for name, cells in rows])
    if plans[-1].memory > machine.memory:
        print(
            f"what runs does not fit into the {byte_size(machine.memory)} of one device: spread the "
            "model (--device auto), or take fewer layers or a smaller batch"
        )
    print(f"\nthen a MEMIT edit of {counted(facts, 'fact')}, beside the model")
    rows = [
        ("memory", []),
        ("  factors of all layers", [byte_size(edit.factors)]),
        ("  making the last one", [byte_size(edit.making)]),
        ("  a batch of texts", [byte_size(edit.reading)]),
        ("  keys", [byte_size(edit.keys)]),
        ("  target vectors", [byte_size(edit.targets)]),
        ("  what solving makes", [byte_size(edit.solve)]),
        ("  copies of weights", [byte_size(edit.copies)]),
        ("  the delta", [byte_size(edit.delta)]),
        ("  at most at once", [byte_size(edit.memory)]),
        ("seconds", []),
        *((f"  {step}", [_seconds(seconds)]) for step, seconds in edit.seconds.items()),
    ]
    show_table([[name, *cells] for name, cells in rows])
    known = "tokens are these facts', the rest is assumed" if args.facts is not None else "all of it assumed"
    print(
        "a fact: {rows} texts of {tokens} tokens, {moving} from the subject's last on, {steps} steps;".format_map(
            edit.counted_with
        ),
        known,
    )
    print(f"rates: {machine.source}")
    if given:
        print("rates given on the command line replace those")


def _tokenizer(folder: str) -> Any:
    """That of the model whose folder is the plan's shape."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise BadConfig(
            f"--facts are counted in a model's tokens, and {folder!r} is no folder of one; name it as --shape."
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BadConfig(
            f"The folder {folder!r} has no tokenizer that can be loaded ({error!s:.120}); leave out --facts."
        ) from error


def _seconds(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def _place(args: argparse.Namespace, editor: Editor) -> StatsPlace:
    from fastmemit.compat import StatsPlace

    return StatsPlace(
        args.stats_dir,
        args.layout,
        # Theirs go by the path of a local folder as it is written.
        args.model_name or (args.model if Path(args.model).is_dir() else editor.name),
        dataset=args.dataset,
        precision=args.precision,
        sample_size=args.sample_size,
    )


@verb(
    "stats export",
    "--layout! --layers --overwrite --null-space --no-null-space --threshold --relative-threshold PLACE MODEL CORPUS",
)
def _export(args: argparse.Namespace) -> None:
    r"""Write second moments where ROME, MEMIT, EasyEdit, AlphaEdit or the paper's code look for theirs.

    Examples:
      fastmemit stats export --model gpt2-xl --layout memit --stats-dir memit/data/stats
      fastmemit stats export --model gpt2-xl --layout rome --layers 17 --corpus wikipedia \
          --multiplier 10
      fastmemit stats export --model meta-llama/Meta-Llama-3-8B --model-name Llama3-8B \
          --layout easyedit --stats-dir EasyEdit/data/stats --relative-threshold 0.01

    Without --corpus the newest stored statistics are written. The other codebase takes the files as its
    own where its settings say the same mom2_dataset, mom2_n_samples and mom2_dtype. EasyEdit's
    AlphaEdit reads projectors too, which are written for the layers of our AlphaEdit's settings or of
    --layers; AlphaEdit's own code makes them from C at each start, so with --layout alphaedit none are.
    """
    from fastmemit.compat.npz_files import check_new, export_null_space, export_statistics, layers_by_name
    from fastmemit.display import bar
    from fastmemit.methods.config import parse_layers

    layers = None if args.layers is None else parse_layers(args.layers)
    null_space = _null_space(args)
    if null_space is not None and not args.overwrite:
        check_new(null_space)
    editor = make_editor(args)
    place = _place(args, editor)
    found = _statistics(editor, args, layers)
    layer_of = layers_by_name(editor.adapter)
    modules = sorted(found.paths, key=lambda name: layer_of[name])
    with bar("layers written", len(modules), not args.quiet) as written:
        paths = export_statistics(found, place, modules, overwrite=args.overwrite, progress=written)
    ranks: dict[str, int] = {}
    if null_space is not None:
        ours = [editor.adapter.projection_name(layer) for layer in editor.config("alphaedit").layers]
        modules = ours if layers is None and set(ours) <= set(modules) else modules
        with bar("layers decomposed", len(modules), not args.quiet) as decomposed:
            ranks = export_null_space(
                found,
                null_space,
                modules,
                **({} if args.threshold is None else {"threshold": args.threshold}),
                relative=args.relative_threshold,
                overwrite=args.overwrite,
                progress=decomposed,
            )
    write_json(args.json, statistics_found(found, exported=paths, null_space=null_space, null_space_ranks=ranks))
    print(f"{editor.name}: second moments of {counted(len(paths), 'layer')}, {found.describe()}")
    print(*(f"  {path}" for path in paths.values()), sep="\n")
    print(
        f"taken where mom2_dataset is {place.dataset}, mom2_n_samples {place.sample_size} and "
        f"mom2_dtype {place.precision}"
    )
    if null_space is None:
        return
    print(f"projectors onto the null spaces in {null_space}")
    print(f"taken where P_loc is that file and layers are {[layer_of[name] for name in modules]}")
    for name, rank in ranks.items():
        print(f"  {name}: {rank} of {editor.adapter.d_k(layer_of[name])} directions")


def _null_space(args: argparse.Namespace) -> Path | None:
    """Where the projectors of EasyEdit's AlphaEdit go, if they are to be written."""
    given = [args.threshold, args.relative_threshold]
    if None not in given:
        raise BadConfig("Give either --threshold or --relative-threshold.")
    for value in given:
        if value is not None and not 0 < value < float("inf"):
            raise BadConfig(f"A threshold must be a finite number above 0 but is {value:g}.")
    wanted = args.null_space is not None or args.layout == "easyedit"
    if args.no_null_space or not wanted:
        if args.null_space is not None or given != [None, None]:
            raise BadConfig(
                "The projectors are not written, so --null-space and thresholds make no sense; "
                "pass --null-space FILE without --no-null-space."
            )
        return None
    if args.null_space is not None:
        if args.null_space.is_dir():
            raise BadConfig(f"{str(args.null_space)!r} is a folder; name a file (--null-space).")
        return Path(args.null_space)
    folder: Path = args.stats_dir
    inside = folder.absolute().parts[-2:] == ("data", "stats")
    return (folder.absolute().parent.parent if inside else folder) / NULL_SPACE


def _statistics(editor: Editor, args: argparse.Namespace, layers: tuple[int, ...] | None) -> Statistics:
    """The statistics to write: newly collected where a corpus is named, else stored ones."""
    from fastcov import FastcovError
    from fastmemit.methods import METHODS

    if args.corpus is not None or args.multiplier == "auto":
        configs = [editor.config(method) for method in METHODS]
        every = sorted({layer for config in configs if config.needs_statistics for layer in config.layers})
        return stored_or_collected(editor, layers or every, args)
    found = editor.store.find(layers, args.multiplier, context=args.max_length)
    if found is not None:
        return found
    many = "" if args.multiplier is None else f" for the multiplier {args.multiplier:g}"
    many += "" if args.max_length is None else f" for documents of {args.max_length} tokens"
    which = "" if layers is None else f" of the layers {list(layers)}"
    raise FastcovError(
        f"No second moments{which} of {editor.name} are stored{many}; name a --corpus "
        "to collect them from, or other --layers."
    )


@verb("stats import", "--layout --file --layers --no-check PLACE MODEL")
def _import(args: argparse.Namespace) -> None:
    r"""Take over second moments that ROME, MEMIT, EasyEdit, AlphaEdit or the paper's code collected.

    Examples:
      fastmemit stats import --model gpt2-xl --layout memit --stats-dir memit/data/stats
      fastmemit stats import --model EleutherAI/gpt-j-6B --layout rome --layers 3-8
      fastmemit stats import --model gpt2-xl \
          --file transformer.h.17.mlp.c_proj_float32_mom2_100000.npz

    Edits use what was imported or precomputed last. Import with the --dtype that you edit with: the
    same weights in another dtype are another model.
    """
    from fastmemit.compat import files_of, import_statistics
    from fastmemit.methods.config import parse_layers

    if bool(args.file) == (args.layout is not None):
        raise BadConfig("Name the files either by --layout and --stats-dir or by --file.")
    layers = None if args.layers is None else parse_layers(args.layers)
    if args.file and layers is not None:
        raise BadConfig("The names of files say which layers they are of; leave --layers out.")
    editor = make_editor(args)
    files = args.file or files_of(editor, _place(args, editor), layers)
    found = import_statistics(editor, files, check=not args.no_check)
    dtype = str(editor.model.dtype).removeprefix("torch.")
    write_json(args.json, statistics_found(found, imported=list(files), dtype=dtype))
    number = counted(len(found.paths), "layer")
    print(f"{editor.name} in {dtype}: second moments of {number} taken over, {found.describe()}")
    print(*(f"  {path}" for path in found.paths.values()), sep="\n")
