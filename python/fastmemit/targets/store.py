"""Target vectors on disk, found by what they depend on and by nothing else.

A target depends on the model, the request, the contexts and the optimiser's settings, not on any covariance: a sweep
over multipliers, batch sizes and methods pays for it once.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcov.parsing import parse_json
from fastcov.printable import printable_logger
from fastcov.store import atomic_file, write_safetensors
from fastmemit.cache import shared_folder
from fastmemit.errors import FastmemitError
from fastmemit.models import ModelAdapter
from fastmemit.request import EditRequest
from fastmemit.targets.optimise import Target, TargetSettings, optimise
from fastmemit.targets.rows import lead

log = printable_logger(__name__)

# Part of every key: raise it when the computation or the file changes, so that nothing stale is
# served. The seal is over names and shapes too since 2; the KL term is KL(p || p0) since 3, and the
# file says what it is of.
RECIPE = 3
# What a system says of a file that may not be written.
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class TargetKey:
    """Everything that a target vector depends on.

    Attributes:
        content: Names and values as JSON, always written in the same way.
    """

    content: str

    @property
    def digest(self) -> str:
        """SHA-256 of the content, which the file is called by."""
        return hashlib.sha256(self.content.encode()).hexdigest()


#: A loss, in nats, at which a fact is unlikely to be told: its tokens have 37 % on average.
UNLIKELY = 1.0


class TargetStore:
    """A folder of target vectors, one small safetensors file each.

    Args:
        folder: Where; None keeps vectors in memory only.
        held: How many of those that are in the folder are held in memory as well: the last ones.
    """

    def __init__(self, folder: Path | None, held: int = 256) -> None:
        self._folder, self._held = folder, held
        self._memory: dict[TargetKey, Target] = {}

    def key(
        self, model: str, request: EditRequest, contexts: Sequence[str], settings: TargetSettings, front: str = ""
    ) -> TargetKey:
        """Everything that the vector depends on.

        Args:
            model: What identifies model and tokenizer as they are now.
            request: The fact; its true answer does not matter.
            contexts: Texts before the prompt.
            settings: Of the optimiser.
            front: What the bare prompt stands behind, `fastmemit.targets.rows.lead`.
        """
        content = {
            "recipe": RECIPE,
            "model": model,
            "request": [request.prompt, request.subject, request.target],
            "contexts": list(contexts),
            "settings": _what_matters(settings),
        }
        if front:
            content["front"] = front
        return TargetKey(json.dumps(content, sort_keys=True, allow_nan=False))

    def get(self, key: TargetKey) -> Target | None:
        """The stored target, or None.

        A file that is damaged, or of something else than its name says, is reported and counts as absent.
        """
        if key in self._memory or self._folder is None:
            return self._memory.get(key)
        path = self._path(key)
        if not path.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                parts = {name: file.get_tensor(name) for name in ("vector", "start", "losses")}
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            log.warning("the stored target %s is unreadable (%s) and is made again", path, error)
            return None
        content = metadata.get("content", "")
        if not _fit(parts) or metadata.get("sha256") != _seal(parts, content):
            log.warning("the stored target %s has changed on the disk and is made again", path)
            return None
        if not _finite(parts):
            log.warning("the stored target %s has values that are not finite and is made again", path)
            return None
        if content != key.content:
            log.warning("the stored target %s is %s and is made again", path, _other(content, key))
            return None
        target = Target(parts["vector"], parts["start"], tuple(parts["losses"].tolist()))
        self._remember(key, target)
        return target

    def put(self, key: TargetKey, target: Target) -> None:
        """Keep a target.

        Raises:
            FastmemitError: A value of it is not finite; nothing is kept.
            OSError: The file cannot be written; the target is in memory all the same.
        """
        parts = {
            "vector": target.vector.contiguous(),
            "start": target.start.contiguous(),
            "losses": torch.tensor(target.losses, dtype=torch.float64),
        }
        if not _finite(parts):
            request = json.loads(key.content)["request"]
            raise FastmemitError(
                f"The target vector of {request[0]!r:.80} about {request[1]!r:.80} is not finite; load the model in "
                "float32 or bfloat16, or lower v_lr or clamp."
            )
        self._remember(key, target)
        if self._folder is None:
            return
        shared_folder(self._path(key).parent)
        with atomic_file(self._path(key)) as file:
            metadata = {"content": key.content, "sha256": _seal(parts, key.content)}
            write_safetensors(file, parts, metadata)

    def _remember(self, key: TargetKey, target: Target) -> None:
        """Hold a target; thousands of edits in one process must not hold all of theirs."""
        self._memory.pop(key, None)
        self._memory[key] = target
        while self._folder is not None and len(self._memory) > self._held:
            del self._memory[next(iter(self._memory))]  # the first that came

    def _path(self, key: TargetKey) -> Path:
        assert self._folder is not None
        return self._folder / key.digest[:2] / f"{key.digest}.safetensors"


def _other(content: str, key: TargetKey) -> str:
    """In which field the content of a file is another than that of a key, in words."""
    expected = _flat(json.loads(key.content))
    try:
        found = _flat(parse_json(content))
    except (ValueError, AttributeError, TypeError):
        return f"of something that it does not say ({content!r:.80})"
    for name in (*expected, *found):
        if name not in found or name not in expected or found[name] != expected[name]:
            wanted, said = (f"{values[name]!r:.160}" if name in values else "nothing" for values in (expected, found))
            return f"of another {name} ({said}, not {wanted})"
    return f"of something else than {key.digest:.12}"


def stored_or_optimised(
    store: TargetStore,
    model: str,
    adapter: ModelAdapter,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    settings: TargetSettings,
    *,
    batch_tokens: int,
    together: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Target]:
    """Targets from the store where they are there, the others optimised together and stored.

    Args and errors are those of `TargetStore.key` and `fastmemit.targets.optimise`, but one: `together` makes all of
    them again unless all are there. The last bits of a vector depend on what it was optimised beside, so an interrupted
    run and an unbroken one then agree in them.
    """
    keys = [store.key(model, request, contexts, settings, lead(tokenizer, request)) for request in requests]
    found = {key: target for key in keys if (target := store.get(key)) is not None}
    if together and len(found) < len(set(keys)):
        found = {}
    missing = {key: r for key, r in zip(keys, requests, strict=True) if key not in found}
    if progress is not None and len(missing) < len(keys):
        progress(settings.steps * (len(keys) - len(missing)))
    if missing:
        made = optimise(
            adapter, tokenizer, list(missing.values()), contexts, settings, batch_tokens=batch_tokens, progress=progress
        )
        for key, target in zip(missing, made, strict=True):
            found[key] = target
            try:
                store.put(key, target)
            except OSError as error:
                if error.errno not in _READ_ONLY:
                    raise
                log.warning("the cache cannot be written (%s), so targets are not stored", error)
    targets = [found[key] for key in keys]
    _name_unfinished(requests, targets, settings)
    return targets


def _name_unfinished(requests: Sequence[EditRequest], targets: Sequence[Target], settings: TargetSettings) -> None:
    """Count the targets that ran out of steps above the limit, and name the worst.

    The published limit, 0.05 for the sum of all terms, is seldom reached: a warning is for those that are so far above
    it that their facts are unlikely to be told.
    """
    if settings.stop != "loss":
        return
    ends = sorted(
        (
            (target.losses[-1], request.text + request.target)
            for request, target in zip(requests, targets, strict=True)
            if len(target.losses) >= settings.steps and target.losses[-1] >= settings.early_stop
        ),
        reverse=True,
    )
    if ends:
        named = "; ".join(f"{text!r:.80} {loss:.2f}" for loss, text in ends[:5])
        log.log(
            logging.WARNING if ends[0][0] > UNLIKELY else logging.INFO,
            "%d of %d targets stopped at the last of %d steps above the loss limit of %g: %s%s",
            *(len(ends), len(targets), settings.steps, settings.early_stop, named),
            "" if len(ends) <= 5 else f"; and {len(ends) - 5} more",
        )


def _what_matters(settings: TargetSettings) -> dict[str, Any]:
    """The settings of a key: all, but for the limit of the loss where nothing reads it."""
    values = dataclasses.asdict(settings)
    if settings.stop != "loss":
        del values["early_stop"]
    return values


def _fit(parts: dict[str, Any]) -> bool:
    """Whether these are a vector, its start, both float32 (d,), and losses, float64 (steps,)."""
    dtypes = [str(parts[name].dtype) for name in ("vector", "start", "losses")]
    return (
        dtypes == ["torch.float32", "torch.float32", "torch.float64"]
        and all(part.dim() == 1 for part in parts.values())
        and parts["vector"].shape == parts["start"].shape
    )


def _finite(parts: dict[str, Any]) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in parts.values())


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """The settings by their own names, beside the rest."""
    rest = {name: value for name, value in content.items() if name != "settings"}
    return {**rest, **content.get("settings", {})}


def _seal(parts: dict[str, Any], content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass") + b"\0")
    for name in sorted(parts):
        digest.update(f"{name}{tuple(parts[name].shape)}".encode())
        digest.update(parts[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
