"""``sweep.json``: what all cells of a sweep share, and the refusal to mix two sweeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastcov.bench.machine import machine
from fastcov.parsing import parse_json
from fastcov.store import atomic_file
from fastmemit.data import Corpus
from fastmemit.editor import Editor
from fastmemit.errors import BadData
from fastmemit.experiments.schema import Sweep
from fastmemit.methods import CONFIGS, EditConfig
from fastmemit.methods.config import config_class

FORMAT = 1
HEADER = "sweep.json"


def make_header(
    editor: Editor,
    data: Mapping[str, Any],
    corpus: Corpus,
    methods: Sequence[str],
    *,
    max_length: int | None = None,
    full_keys: int | None = None,
    perplexity: Mapping[str, Any] | None = None,
) -> Sweep:
    """What a sweep is of.

    Args:
        editor: Of the unedited model.
        data: Name and sha256 of the records.
        corpus: Where statistics come from.
        methods: Whose settings are written down.
        max_length: Where documents are cut.
        full_keys: Of the full precompute.
        perplexity: Name and sha256 of the text, and how much of it is read.
    """
    return Sweep(
        format=FORMAT,
        model=editor.name,
        fingerprint=editor.fingerprint,
        tokenizer=str(editor.sources.identity()["tokenizer"]),
        dtype=str(editor.model.dtype).removeprefix("torch."),
        data=dict(data),
        corpus={"name": corpus.name, "fingerprint": corpus.fingerprint},
        seed=editor.seed,
        max_length=max_length,
        full_keys=full_keys,
        perplexity=None if perplexity is None else dict(perplexity),
        methods={method: editor.config(method, **as_published(method)).as_dict() for method in methods},
    )


def as_published(method: str | EditConfig, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings by name for an experiment, which takes few keys as they are, as the papers do."""
    if isinstance(method, EditConfig) and getattr(method, "relative_ridge", None) is not None:
        return dict(settings or {})
    own = method if isinstance(method, EditConfig) else config_class(method)
    solves = "relative_ridge" in own.settings()
    return {**({"relative_ridge": 0.0} if solves else {}), **(settings or {})}


def check_header(folder: Path, header: Sweep) -> None:
    """Write the header of a new sweep, or see that it is that of the sweep in the folder.

    Methods may be added; what was there must be the same.

    Raises:
        BadData: The folder holds another sweep, or its header cannot be read.
    """
    wanted = json.loads(json.dumps(header))
    path = folder / HEADER
    if path.is_file():
        try:
            stored = parse_json(path.read_bytes())
            before = dict(stored["methods"])
            known = {method: with_defaults(method, settings) for method, settings in before.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise BadData(f"{str(path)!r} is not the header of a sweep ({error}); name another folder.") from error
        for name, value in wanted.items():
            if name == "methods":
                continue
            if stored.get(name) != value:
                raise BadData(
                    f"{str(folder)!r} holds a sweep with another {name} "
                    f"({_shown(stored.get(name))}, now {_shown(value)}); name another folder, or "
                    "give the same."
                )
        for method, settings in wanted["methods"].items():
            full = with_defaults(method, settings)
            if known.get(method, full) != full:
                raise BadData(
                    f"{str(folder)!r} holds a sweep with other settings of {method}; name another "
                    "folder, or give the same."
                )
        wanted["methods"] = {**before, **wanted["methods"]}
        if wanted == stored:
            return
    with atomic_file(path) as file:
        file.write((json.dumps(wanted, indent=1, ensure_ascii=False) + "\n").encode())


def with_defaults(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were written down, with those that there were none of at that time.

    And without those of other methods, which were written down too once, and changed nothing.

    Raises:
        KeyError: There is no such method.
        TypeError: The settings are no object.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"the settings of {method:.40} are {settings!r:.40}")
    own = {**CONFIGS[method].settings(), **as_published(method)}
    own |= {"scale": "published", "v_lr": 0.5}  # there was no other before they were written down
    known = {name: settings.get(name, value) for name, value in own.items()}
    return {"method": method, **known, "preset": settings.get("preset", "default")}


def file_identity(path: str | Path) -> dict[str, str]:
    """Name and sha256 of a file, for a header; of what is no file the name alone."""
    found = Path(path)
    if not found.is_file():
        return {"name": str(path)}
    with open(found, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"name": found.name, "sha256": digest.hexdigest()}


def hardware(device: torch.device) -> str:
    """The processor that did the work, in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    found = machine(device)
    threads = f"{found.cores} cores, {torch.get_num_threads()} threads"
    return f"{found.cpu} ({', '.join(found.isa)}), {threads}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
