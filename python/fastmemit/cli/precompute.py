"""``fastmemit precompute``: the second moments that every later edit of a model uses."""

from __future__ import annotations

import argparse
import time

from fastmemit.cli.options import DEFAULT_MULTIPLIER, add_corpus, add_model, make_editor

HELP = "Collect the second moments of a model's keys, once; edits find them by themselves."
EPILOG = """examples:
  fastmemit precompute --model gpt2-xl
  fastmemit precompute --model smollm2 --corpus articles.jsonl --multiplier 10
  fastmemit precompute --model ./my-model --corpus self --layers 4-8

With several GPUs, each takes its share of the text and the result is the same to rounding:
  torchrun --nproc-per-node 8 -m fastmemit precompute --model gpt2-xl --corpus articles.jsonl
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_model(verb)
    add_corpus(verb, default="wikipedia")
    verb.add_argument("--layers", help="such as 4-8 or 4,6 (default: those of all methods' settings)")


def run(args: argparse.Namespace) -> None:
    """Collect, and say where the files are; of several processes, the first one does."""
    from fastmemit import parallel
    from fastmemit.data.corpora import is_at_hand, load_corpus
    from fastmemit.methods.config import parse_layers

    processes = parallel.current()
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
    found = editor.precompute(
        corpus,
        multiplier=DEFAULT_MULTIPLIER if args.multiplier is None else args.multiplier,
        layers=layers,
        allow_fewer=args.allow_fewer,
        max_length=args.max_length,
        field=args.field,
    )
    if processes is not None and not processes.first:
        return
    print(
        f"{editor.name}: second moments of {len(found.paths)} layers, {found.describe()}, "
        f"in {time.perf_counter() - begun:.1f} s"
    )
    if found.throughput is not None:
        whose = "" if processes is None else f"process 0 of {processes.size}: "
        print(f"  {whose}{found.throughput}")
    for path in found.paths.values():
        print(f"  {path}")
