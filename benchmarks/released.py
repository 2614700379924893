"""The released code of ROME, MEMIT, EMMET and AlphaEdit beside ours: the same facts, contexts and file of C, one run.

    git clone https://github.com/kmeng01/memit memit                                                   # ROME, MEMIT
    git clone https://github.com/scalable-model-editing/unified-model-editing unified-model-editing    # EMMET
    git clone https://github.com/jianghoucheng/AlphaEdit AlphaEdit
    python benchmarks/released.py --repo memit --methods rome,memit --data counterfact.json --corpus articles.jsonl

Their code runs as it is but for four things that this machine and model ask for: "cuda" is read as "cpu"; a block's
output, which is a tensor since transformers 5, is shown to their hooks as the tuple that it was; the model's config
gets the names of GPT-2's; and its head is untied from the embeddings. C comes from a file that
`fastmemit.compat.export_statistics` wrote, by their own loader, or with --drop-in from `fastmemit.compat.get_cov` in
the place of theirs; contexts are ours, since theirs are sampled.

A line is printed and written for each method: the relative difference of the change of each weight, the scores of
both, and the processor time of both for all that an edit takes once C is there. --collect N compares C itself, of N
documents, by their layer_stats, which reads its data set from memory here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    sys.path.insert(0, str(folder))

from fastcov.machine import this_machine  # noqa: E402
from fastmemit import Editor, compat  # noqa: E402
from fastmemit.data import Record, batches, load_corpus, load_records  # noqa: E402
from fastmemit.data.corpora import corpus_from_texts  # noqa: E402
from fastmemit.evaluation.scores import score_records  # noqa: E402
from fastmemit.models import load_model  # noqa: E402
from fastmemit.statistics import versions  # noqa: E402
from fastmemit.targets import TargetStore  # noqa: E402
from fastmemit.text import Contexts  # noqa: E402

#: How their folders, modules and functions are called, where not as here.
NAMES = {"alphaedit": "AlphaEdit"}
#: A file of settings that each of them has for each method.
LIKE = "EleutherAI_gpt-j-6B.json"
#: Where a repository looks for files of C, if not where MEMIT does.
LAYOUTS = {"AlphaEdit": "alphaedit"}
#: Settings of ours that are the released ones where ours have another default.
RELEASED = {"rome": {"keys": "original"}}
SCORES = ("es", "ps", "ns", "ea", "pa", "na")


class OnCpu(SourceFileLoader):
    """Reads "cuda" as "cpu"."""

    def get_data(self, path: str) -> bytes:
        """The source."""
        return super().get_data(path).replace(b'"cuda"', b'"cpu"').replace(b".cuda()", b".cpu()")


def open_repository(repo: Path, stats: Path) -> None:
    """Make the modules of a checkout importable, with its statistics in another folder."""
    sys.dont_write_bytecode = True  # a cached module would be one that still says "cuda"
    finder = FileFinder.path_hook((OnCpu, [".py"]))

    def hook(path: str) -> FileFinder:
        if not Path(path).resolve().is_relative_to(repo):
            raise ImportError
        return finder(path)

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    sys.path.insert(0, str(repo))
    os.chdir(repo)  # globals.yml
    importlib.import_module("util.globals").STATS_DIR = stats
    show_tuples(importlib.import_module("util.nethook").Trace)


def show_tuples(trace: Any) -> None:
    """Have the hooks of their Trace see a block's output as a tuple, and give back a tensor."""
    init = trace.__init__

    def __init__(self: Any, module: nn.Module, layer: str | None = None, *args: Any, **named: Any) -> None:
        init(self, module, layer, *args, **named)
        handle = self.registered_hook
        hooks = handle.hooks_dict_ref()
        theirs = hooks[handle.id]

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            alone = isinstance(output, Tensor) and re.search(r"\.\d+$", layer or "") is not None
            found = theirs(module, inputs, (output,) if alone else output)
            return found[0] if alone else found

        hooks[handle.id] = hook

    trace.__init__ = __init__


def their_settings(editor: Editor, config: Any, like: Path, kind: type) -> Any:
    """Their hyper-parameters: those of a file of theirs, with this model's names and our settings."""
    adapter = editor.adapter
    projection = adapter.projection_name(0)
    block, _, inner = projection.partition(".0.")
    values = json.loads(like.read_text())
    values.update(
        layers=list(config.layers),
        v_num_grad_steps=config.steps,
        v_lr=0.5 if config.v_lr is None else config.v_lr,
        v_weight_decay=config.weight_decay,
        clamp_norm_factor=config.clamp,
        kl_factor=config.kl_factor,
        v_loss_layer=adapter.n_layers - 1,
        rewrite_module_tmp=f"{block}.{{}}.{inner}",
        layer_module_tmp=f"{block}.{{}}",
        mlp_module_tmp=f"{block}.{{}}.{inner.rpartition('.')[0]}",
        attn_module_tmp=f"{block}.{{}}.self_attn",
        ln_f_module="model.norm",
        lm_head_module="lm_head",
    )
    if config.method in ("memit", "emmet"):
        values["mom2_update_weight"] = adapter.d_k(config.layers[0]) if config.weight is None else config.weight
    if config.method == "emmet":
        values["emmet_lambda"] = config.lambda_e
    if config.method == "alphaedit":
        values.update(L2=config.l2, nullspace_threshold=config.null_threshold)
    return kind(**values)


def their_change(
    method: str, model: nn.Module, tokenizer: Any, requests: list[dict[str, Any]], hparams: Any, contexts: Sequence[str]
) -> dict[str, Tensor]:
    """What their code adds to each weight, (d, d_k) float64 on the CPU."""
    templates: list[Any] = [context + "{}" for context in contexts]
    folder = NAMES.get(method, method)
    main = importlib.import_module(f"{folder}.{folder}_main")
    main.CONTEXT_TEMPLATES_CACHE = templates if method == "rome" else [templates[:1], templates[1:]]
    names = [hparams.rewrite_module_tmp.format(layer) + ".weight" for layer in hparams.layers]
    weights = dict(model.named_parameters())
    before = {name: weights[name].detach().double() for name in names}
    if method == "alphaedit":
        width = weights[names[0]].shape[1]
        P = torch.stack([_projector(main, model, tokenizer, hparams, layer) for layer in hparams.layers])
        main.apply_AlphaEdit_to_model(
            model, tokenizer, requests, hparams, cache_c=torch.zeros(len(names), width, width), P=P
        )
    else:
        getattr(main, f"apply_{method}_to_model")(model, tokenizer, requests, hparams)
    return {name: weights[name].detach().double() - before[name] for name in names}


def _projector(main: Any, model: nn.Module, tokenizer: Any, hparams: Any, layer: int) -> Tensor:
    """P (d_k, d_k), which the script that calls it hands in: of the directions below the threshold."""
    name = hparams.rewrite_module_tmp.format(layer)
    C = main.get_cov(model, tokenizer, name, hparams.mom2_dataset, hparams.mom2_n_samples, hparams.mom2_dtype)
    U, S, _ = torch.linalg.svd(C.cpu(), full_matrices=False)
    small = U[:, hparams.nullspace_threshold > S]
    return small @ small.T


def collect(editor: Editor, layers: Sequence[int], texts: Sequence[str], stats: Path) -> dict[str, Any]:
    """C of some layers of all tokens of some documents, by both."""
    module = importlib.import_module("rome.layer_stats")
    module.load_dataset = lambda *_: {"train": [{"text": text} for text in texts]}
    model, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    fit(model, tokenizer)
    spent, moments = {}, {}
    begun = time.perf_counter(), time.process_time()
    for layer in layers:
        name = editor.adapter.projection_name(layer)
        found = module.layer_stats(
            model, tokenizer, name, stats, "wikipedia", ["mom2"], sample_size=len(texts), precision="float32",
            download=False, progress=lambda each, **_: each,
        )  # fmt: skip
        moments[name] = found.mom2.moment().double(), int(found.mom2.count)
    spent["theirs"] = time.perf_counter() - begun[0], time.process_time() - begun[1]
    begun = time.perf_counter(), time.process_time()
    ours = editor.precompute(
        corpus_from_texts("documents", texts), multiplier=1000, allow_fewer=True, layers=layers, max_length=2048
    )
    spent["ours"] = time.perf_counter() - begun[0], time.process_time() - begun[1]
    differences = {}
    for name, (C, count) in moments.items():
        mine = ours.second_moment(name).double()
        differences[name] = float((mine - C).norm() / C.norm())
        assert count == ours.moment(name).count, f"{count} keys there and {ours.moment(name).count} here"
    return {
        "documents": len(texts),
        "keys": count,
        "layers": list(layers),
        "relative_difference": differences,
        "seconds": {name: round(clock, 2) for name, (clock, _) in spent.items()},
        "processor_seconds": {name: round(own, 2) for name, (_, own) in spent.items()},
    }


def main() -> None:
    """Run each method by both, compare, print, write."""
    args = _arguments()
    repo, out = args.repo.resolve(), args.json and args.json.resolve()
    data, corpus = args.data.resolve(), args.corpus.resolve()
    editor = Editor.from_pretrained("smollm2", device="cpu", dtype="float32", cache_dir=args.cache)
    records = [one[0] for one in batches(load_records(data), 1, seed=0)][args.first : args.first + args.facts]
    raw = {one["case_id"]: one["requested_rewrite"] for one in json.loads(data.read_text(encoding="utf-8"))}
    commit = subprocess.check_output(["git", "-C", str(repo), "rev-parse", "HEAD"], text=True).strip()
    here = {"processor": this_machine(torch.device("cpu")).cpu, "threads": torch.get_num_threads(), **versions()}
    with tempfile.TemporaryDirectory() as folder:
        open_repository(repo, Path(folder))
        if args.collect:
            texts = list(load_corpus(str(corpus)).documents(seed=0))[: args.collect]
            layers = editor.config("memit").layers
            said = {"repository": repo.name, "commit": commit, **collect(editor, layers, texts, Path(folder)), **here}
            tell(said, out)
        for method in filter(None, args.methods.split(",")):
            settings = {**RELEASED.get(method, {}), **({"null_threshold": args.threshold} if args.threshold else {})}
            config = editor.config(method, **settings)
            editor.precompute(str(corpus), multiplier=10, layers=config.layers)
            line = {
                "repository": repo.name,
                "commit": commit,
                "method": method,
                "drop_in": args.drop_in,
                "first": args.first,
                **compare(editor, config, records, raw, repo, Path(folder), str(corpus) if args.drop_in else None),
                **here,
            }
            tell(line, out)


def tell(line: dict[str, Any], out: Path | None) -> None:
    """Print a line, and append it to a file."""
    print(json.dumps(line, indent=1), flush=True)
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def compare(
    editor: Editor,
    config: Any,
    records: Sequence[Record],
    raw: dict[Any, Any],
    repo: Path,
    stats: Path,
    corpus: str | None,
) -> dict[str, Any]:
    """One method by both; with a corpus by our function in the place of theirs, which makes C of it."""
    method, batch = config.method, [one.request for one in records]
    singles = [[one] for one in records] if method == "rome" else [list(records)]
    contexts = Contexts(editor.model, editor.tokenizer, 0).of(method)
    model, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    fit(model, tokenizer)
    folder, upper = NAMES.get(method, method), NAMES.get(method, method.upper())
    kind = getattr(importlib.import_module(f"{folder}.{folder}_hparams"), f"{upper}HyperParams")
    hparams = their_settings(editor, config, repo / "hparams" / upper / LIKE, kind)
    if corpus:
        module = importlib.import_module(f"{folder}.{'compute_u' if method == 'rome' else f'{folder}_main'}")
        compat.configure(corpus=corpus, multiplier=10, layers=list(config.layers))
        name = "get_inv_cov" if method == "rome" else "get_cov"
        setattr(module, name, getattr(compat.efficient if method == "emmet" else compat, name))
    else:
        place = compat.StatsPlace(stats, LAYOUTS.get(repo.name, "memit"), model.config._name_or_path)
        compat.export_statistics(editor.statistics, place, overwrite=True)
    editor.workspace.stored_targets = TargetStore(None)  # what another method made of the same facts is no time of ours
    differences: dict[str, list[float]] = {}
    scores: dict[str, list[Any]] = {"ours": [], "theirs": []}
    spent = {"ours": 0.0, "theirs": 0.0}
    weights = dict(editor.model.named_parameters())
    unedited = {name: value.detach().clone() for name, value in model.named_parameters()}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        found = work()
        spent[name] += time.process_time() - begun
        return found

    for part in singles:
        facts = [one.request for one in part]
        edit = timed("ours", lambda facts=facts: editor.plan(facts, config))
        ours = {name: left.double() @ right.double().T for name, (left, right) in edit.delta.factors.items()}
        requests = [{**raw[one.case_id], "case_id": one.case_id} for one in part]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            theirs = timed(
                "theirs", lambda requests=requests: their_change(method, model, tokenizer, requests, hparams, contexts)
            )
        for name, change in theirs.items():
            differences.setdefault(name, []).append(float((ours[name] - change).norm() / change.norm()))
        with edit:
            scores["ours"] += score_records(editor.adapter, editor.tokenizer, part)
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(unedited[name])
            for name, change in theirs.items():
                weights[name].add_(change.float())
            scores["theirs"] += score_records(editor.adapter, editor.tokenizer, part)
            for name in theirs:
                weights[name].copy_(unedited[name])
    return {
        "facts": len(batch),
        "layers": list(config.layers),
        "contexts": len(contexts),
        "relative_difference": {name: max(values) for name, values in differences.items()},
        "scores": {
            name: {score: round(100 * sum(one.shares()[score] for one in found) / len(found), 2) for score in SCORES}
            for name, found in scores.items()
        },
        "processor_seconds": {name: round(value, 1) for name, value in spent.items()},
    }


def fit(model: Any, tokenizer: Any) -> None:
    """What their code asks a model and its tokenizer for."""
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.config.n_embd, model.config.n_positions = model.config.hidden_size, 2048
    # Tied to the embeddings it is no parameter of its own, under whose name they look for it.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", type=Path, required=True, help="a checkout")
    parser.add_argument(
        "--methods", default="memit", help='of rome, memit, emmet, alphaedit, those that it has; "" is none'
    )
    parser.add_argument("--collect", type=int, metavar="N", help="compare C too, of the first N documents")
    parser.add_argument("--data", type=Path, required=True, help="CounterFact")
    parser.add_argument("--corpus", type=Path, required=True, help="what C is made of")
    parser.add_argument("--facts", type=int, default=16)
    parser.add_argument(
        "--first", type=int, default=128, help="position of the first record (docs/guide/evaluation.md)"
    )
    parser.add_argument("--threshold", type=float, help="null_threshold, of AlphaEdit alone")
    parser.add_argument(
        "--drop-in", action="store_true", help="fastmemit.compat's function in the place of their files"
    )
    parser.add_argument("--cache", help="cache folder")
    parser.add_argument("--json", type=Path, help="append a line for each method")
    return parser.parse_args()


if __name__ == "__main__":
    main()
