"""SmolLM2-135M and real text for the suite collect.

    python -m fastcov.bench collect --load benchmarks.smollm2:load

Layers 4 to 8, five projections of width 1,536. The text is `wikipedia_en_sample.jsonl` in the folder that
FASTMEMIT_DATA names (default: ../shared/data beside the repository); where there is none, the texts that the package
ships, which are enough for a small --multiplier.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYERS = range(4, 9)
_CONTEXT = 2048  # the longest document, as the tokenizer's own limit has it


def load() -> tuple[Any, list[str], list[list[int]]]:
    """The model in float32, the paths of its projections, and token ids of every document."""
    sys.path.insert(0, str(ROOT / "python"))  # where fastmemit is not installed
    from fastmemit.data import load_corpus
    from fastmemit.models import find_adapter, load_model

    named = os.environ.get("FASTMEMIT_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    text = folder / "wikipedia_en_sample.jsonl"
    corpus = load_corpus(text if text.is_file() else "builtin")
    model, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    adapter = find_adapter(model)
    modules = [adapter.projection_name(layer) for layer in LAYERS]
    wanted, documents = 40 * adapter.d_k(LAYERS[0]), []
    for document in corpus.documents(seed=0):
        ids = tokenizer(document, truncation=True, max_length=_CONTEXT)["input_ids"]
        documents.append(ids)
        wanted -= len(ids)
        if wanted <= 0:
            break
    return model, modules, documents
