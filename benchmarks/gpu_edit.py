"""The library itself on a GPU: statistics, edits by every method and undo beside the CPU's, then GPT-J's shape.

    python benchmarks/gpu_edit.py --out edit.jsonl
    python benchmarks/gpu_edit.py --device cpu --small     # what it does, without a GPU

A line a step. Of tiny models: how far an edit made on the device is from the one made on the CPU (relative, the largest
of its layers), whether two plans are the same bits, and whether an undo gives the weights back bit for bit. Of GPT-J's
shape with random weights, in bfloat16: the seconds of a fingerprint, a precompute of six layers and three edits, where
the second edit shows whether the factors were held, and the peak of memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "tests"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
import transformers  # noqa: E402

from fastmemit import Editor  # noqa: E402
from fastmemit.data import corpus_from_texts  # noqa: E402
from fastmemit.evaluation import evaluate  # noqa: E402
from tiny_editors import FACTS, QUICK, record, texts, tiny_editor  # noqa: E402
from tiny_models import tiny_model, tiny_tokenizer  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "memit": {}, "emmet": {"layers": (1,)}, "rome": {"layers": (1,)}, "pmet": {}, "encore": {},
    "alphaedit": {"null_relative": 0.5},
}  # fmt: skip

Line = dict[str, Any]
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # by weight, see `fastmemit.delta.Delta`


def tiny(architecture: str, dtype: torch.dtype, device: torch.device, folder: Path) -> Iterator[Line]:
    """Every method on a tiny model, on the CPU and on the device."""
    here = tiny_model(architecture).to(dtype)
    there = copy.deepcopy(here).to(device)
    ours = tiny_editor(folder / "cpu", architecture, model=here, name="cpu")
    editor = tiny_editor(folder / "device", architecture, model=there, name="device")
    before = [parameter.clone() for parameter in there.parameters()]

    def unedited() -> bool:
        return all(torch.equal(one, now) for one, now in zip(before, there.parameters(), strict=True))

    about = {"model": architecture, "dtype": str(dtype).removeprefix("torch.")}
    for method, more in METHODS.items():
        settings = {**QUICK, **more}
        with_method = {**about, "method": method}
        try:
            wanted, found, again = (one.plan(FACTS, method, **settings).delta.factors for one in (ours, editor, editor))
            edit = editor.edit(FACTS, method, verify=False, **settings)
            changed = not unedited()
            edit.undo()
            yield {
                **with_method,
                "off_cpu": max(_distance(part, found[name]) for name, part in wanted.items()),
                "same_twice": all(map(torch.equal, _parts(found), _parts(again))),
                "changed": changed,
                "undone": unedited(),
            }
        except Exception as error:  # the next method is to be tried too
            yield {**with_method, **_failure(error)}
    batches = [[record(10, FACTS[0]), record(11, FACTS[1])], [record(12, FACTS[2])]]
    try:
        evaluate(editor, batches, "memit", QUICK)
        yield {**about, "evaluate": "ok", "undone": unedited()}
    except Exception as error:
        yield {**about, **_failure(error)}


def shape(device: torch.device, folder: Path, small: bool) -> Iterator[Line]:
    """Statistics and edits of a model of GPT-J's shape, or of a tiny one."""
    tokenizer = tiny_tokenizer("byte_bpe")
    sizes = {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}
    if small:
        sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8}
    layers = (0, 1) if small else (3, 4, 5, 6, 7, 8)
    config = transformers.GPTJConfig(
        vocab_size=max(512, len(tokenizer)), n_positions=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    editor = Editor(model, tokenizer, cache_dir=folder, name="gptj-shape")
    corpus = corpus_from_texts("made", [" ".join(texts(60, seed)) for seed in range(6 if small else 120)])
    multiplier = 4.0 if small else 1.2
    edits: list[Any] = []

    def one() -> None:
        edits.append(editor.edit(FACTS, "memit", layers=layers, steps=20, relative_ridge=1e-3, verify=False))

    steps: list[tuple[str, Callable[[], Any]]] = [
        ("fingerprint", lambda: editor.fingerprint),
        ("precompute", lambda: editor.precompute(corpus, multiplier=multiplier, layers=layers, allow_fewer=True)),
    ]
    for turn in (1, 2, 3):
        steps += [(f"memit of 3 facts, batch {turn}", one), ("undo", lambda: edits.pop().undo())]
    for name, work in steps:
        try:
            yield {"step": name, "seconds": round(_seconds(work, device), 3)}
        except Exception as error:
            yield {"step": name, **_failure(error)}
    if device.type == "cuda":
        yield {"peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)}


def _parts(factors: Factors) -> list[torch.Tensor]:
    return [part for name in sorted(factors) for part in factors[name]]


def _distance(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The relative distance of two changes given by their factors, on the CPU."""
    (left, right), (left2, right2) = one, other
    wanted = left.double() @ right.double().T
    return float((wanted - left2.double() @ right2.double().T).norm() / wanted.norm())


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def _failure(error: Exception) -> Line:
    return {"failed": f"{type(error).__name__}: {error}"[:300], "at": traceback.format_exc().splitlines()[-3:]}


def main() -> int:
    """0 where every step went well, 1 where not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model in the place of GPT-J's shape")
    parser.add_argument("--out", type=Path, help="write the lines here too, each as soon as it is known")
    args = parser.parse_args()
    device, wrong = torch.device(args.device), 0
    float32, bfloat16 = torch.float32, torch.bfloat16
    models = [("llama", float32), ("gptj", float32), ("llama", bfloat16)][: 1 if device.type == "cpu" else None]
    with tempfile.TemporaryDirectory() as folder:
        runs = [tiny(name, dtype, device, Path(folder) / f"{name}-{dtype}") for name, dtype in models]
        for lines in (*runs, shape(device, Path(folder) / "shape", args.small)):
            for line in lines:
                wrong += "failed" in line or line.get("undone") is False or line.get("same_twice") is False
                print(json.dumps(line), flush=True)
                if args.out is not None:
                    with open(args.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
