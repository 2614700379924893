"""``fastmemit plan``: what statistics of a model would take, before anything is loaded."""

from __future__ import annotations

import argparse

from fastmemit.cli.options import DEFAULT_MULTIPLIER, above_zero

HELP = "Count the memory, time and bytes that a model's statistics take, and load nothing."
EPILOG = """examples:
  fastmemit plan --shape llama-3-70b --layers 4-8 --processes 8
  fastmemit plan --shape ./my-model --layers 4-8 --multiplier 2,10 --machine h100 --share 0.4

Operations and bytes are counted as the code does them. Seconds divide them by a machine's rates;
the last line says which of these were measured and which are assumed.
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument(
        "--shape",
        required=True,
        help="gpt2-xl, gpt-j-6b, llama-2-7b, llama-3-8b, llama-3-70b, smollm2, or a model's folder",
    )
    verb.add_argument("--layers", default="4-8", help="edited layers (default: %(default)s)")
    verb.add_argument(
        "--multiplier",
        default=f"{DEFAULT_MULTIPLIER:g}",
        metavar="M,...",
        help="keys as multiples of their width, beside 44 million (default: %(default)s)",
    )
    verb.add_argument("--machine", choices=("h100", "2-core"), default="h100")
    verb.add_argument("--flops", type=float, help="operations a second of its products instead")
    verb.add_argument("--share", type=float, help="the part of them that a collect reaches")
    verb.add_argument("--processes", type=above_zero, default=1, help="that divide the text")
    verb.add_argument("--batch-tokens", type=above_zero, default=16384, metavar="N")
    verb.add_argument("--length", type=above_zero, default=1024, metavar="N", help="tokens of a document")


def run(args: argparse.Namespace) -> None:
    """Count, and print a column for each number of keys."""
    import dataclasses

    import fastcov
    from fastmemit.capacity import FULL_KEYS, MACHINES, plan, shape_of
    from fastmemit.errors import BadConfig
    from fastmemit.methods.config import parse_layers

    shape = shape_of(args.shape)
    machine = MACHINES[args.machine]
    for name in ("flops", "share"):
        value = getattr(args, name)
        if value is not None:
            if not 0 < value < float("inf"):
                raise BadConfig(f"--{name} must be above 0 but is {value:g}; give what is real.")
            machine = dataclasses.replace(machine, **{name: value})
    layers = parse_layers(args.layers)
    try:
        wanted = [fastcov.budget(float(m), shape.d_k) for m in args.multiplier.split(",")]
    except ValueError as error:
        if isinstance(error, fastcov.FastcovError):
            raise
        raise BadConfig(f"--multiplier {args.multiplier!r} is no list of numbers; write 10, or 2,10.") from error
    plans = [
        plan(shape, machine, layers, keys, processes=args.processes, batch_tokens=args.batch_tokens, length=args.length)
        for keys in dict.fromkeys([*wanted, FULL_KEYS])
    ]
    print(
        f"{args.shape}: {shape.weights / 1e9:.2f} billion weights, {shape.layers} layers, "
        f"d {shape.d}, d_k {shape.d_k}; statistics of layers {args.layers}, "
        f"{args.processes} x {args.machine}"
    )
    rows = [
        ("keys of each layer", [f"{p.keys:,}" for p in plans]),
        ("memory of a process", []),
        ("  the whole model", [_bytes(p.weights) for p in plans]),
        ("  the part that runs", [_bytes(p.weights_run) for p in plans]),
        ("  a batch", [_bytes(p.activations) for p in plans]),
        ("  the sums", [_bytes(p.moments) for p in plans]),
        ("  what runs, in all", [_bytes(p.memory) for p in plans]),
        ("seconds", []),
        *((f"  {step}", [_seconds(p.seconds[step]) for p in plans]) for step in plans[0].seconds),
        ("  in all", [_seconds(p.total) for p in plans]),
        ("operations", []),
        ("  forward passes", [f"{p.flops:.2e}" for p in plans]),
        ("  triangles", [f"{p.triangles:.2e}" for p in plans]),
        ("bytes moved", []),
        ("  device memory", [_bytes(p.read) for p in plans]),
        ("  between processes", [_bytes(p.sent) for p in plans]),
        ("  to disk, each layer", [_bytes(p.file) for p in plans]),
        ("then, for each layer", []),
        ("  a factor in float64", [_bytes(p.factor) for p in plans]),
        ("  in float32, refined", [_bytes(p.factor / 2) for p in plans]),
        ("  seconds in float64", [_seconds(p.factor_seconds) for p in plans]),
    ]
    for name, cells in rows:
        print(f"{name:24}" + "".join(f"{cell:>14}" for cell in cells))
    if plans[-1].memory > machine.memory:
        print(
            f"what runs does not fit into the {_bytes(machine.memory)} of one device: spread the "
            "model (--device auto), or take fewer layers or a smaller batch"
        )
    print(f"rates: {machine.source}")
    if args.flops is not None or args.share is not None:
        print("rates given on the command line replace those")


def _bytes(number: float) -> str:
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:.2f} {unit}"
    return f"{number / 1000:.2f} TB"


def _seconds(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
