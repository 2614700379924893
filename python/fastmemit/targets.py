"""Target vectors: what the edited block should put out at the subject so that the fact is told.

All requests of a batch run together, each with its own loss, optimiser state, norm limit and stop, so that every one
follows the path it would follow alone (ROME, equation 4; MEMIT, equation 16):

    loss = mean over prompts of [-(1/|target|) sum log p(target token)]
         + kl_factor * KL(p || p0) at the KL prompt's subject, p0 unedited
         + weight_decay * ||delta|| / ||v0||^2
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
from typing import Any, Literal

import torch
from torch import Tensor

from fastcov.files import atomic_file, parse_json, write_safetensors
from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import FastmemitError
from fastmemit.files import shared_folder
from fastmemit.models import ModelAdapter, check_lengths
from fastmemit.partial_forward import FullForward, SuffixForward, forward_for
from fastmemit.request import EditRequest
from fastmemit.text import RequestRows, lead, like_lengths, request_rows

log = logging.getLogger(__name__)


BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's usual constants (Kingma & Ba 2015)


@dataclass(frozen=True)
class TargetSettings:
    """How target vectors are optimised; everything that a vector depends on but model and request.

    Attributes:
        layer: The block at which the change enters (the last edited one).
        site: ``"block"``: at the block's output (MEMIT, EMMET); ``"projection"``: at the edited projection's output
            (ROME).
        steps: Loss evaluations at most; there are at most ``steps - 1`` updates.
        learning_rate: Adam's.
        weight_decay: Factor of ``||delta|| / ||v0||^2``.
        clamp: ``||delta||`` is held at most at ``clamp * ||v0||``.
        kl_factor: Factor of the KL term.
        early_stop: A request is finished once its loss is below this.
        stop: ``"loss"``: as `early_stop` says; ``"most-probable"``: a request is finished once every token of its
            target is the most probable one at its place, in every context (ENCORE, arXiv 2502.01636), and `early_stop`
            says nothing.
        scale: ``"published"``: as above. ``"median"``: the learning rate is in typical coordinates of v0, ``m = median
            |v0| / 0.6745``, and ``m sqrt(d)`` stands for ``||v0||``.
    """

    layer: int
    site: Literal["block", "projection"] = "block"
    steps: int = 25
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 1.0
    kl_factor: float = 0.0625
    early_stop: float = 0.05
    stop: Literal["loss", "most-probable"] = "loss"
    scale: Literal["published", "median"] = "published"

    def units(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """What a step and a length are measured by, each (R, 1), for starts v0 (R, d)."""
        length = torch.linalg.vector_norm(start, dim=1, keepdim=True)
        if self.scale == "published":
            return torch.ones_like(length), length
        # Of a Gaussian this is the root mean square; a few huge coordinates do not enter it.
        typical = start.abs().median(dim=1, keepdim=True).values / 0.6745
        # Where most coordinates are 0 no median says how long the others are.
        typical = torch.where(typical > 0, typical, length / start.shape[1] ** 0.5)
        return typical, typical * start.shape[1] ** 0.5


@dataclass(frozen=True)
class Target:
    """One optimised vector.

    Attributes:
        vector: (d,) float32, ``v0 + delta``.
        start: (d,) float32, ``v0``: the unedited value in the bare prompt.
        losses: The loss at each step, the first one unedited.
    """

    vector: Tensor
    start: Tensor
    losses: tuple[float, ...]


@isolated(gradients=True)
def optimise(
    adapter: ModelAdapter,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    settings: TargetSettings,
    *,
    batch_tokens: int = 1024,
    progress: Callable[[int], None] | None = None,
) -> list[Target]:
    """Optimise the target vectors of all requests on the unedited model.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        requests: The facts.
        contexts: Texts before the prompts, the first one ``""``.
        settings: See `TargetSettings`.
        batch_tokens: Most padded tokens of requests that run together; it bounds the memory. One always runs.
        progress: Called with the number of request-steps done since the last call; in total ``len(requests) * steps``.

    Returns:
        One `Target` per request, in their order, on the CPU.

    Raises:
        BadLayer: The layer does not exist.
        UnknownArchitecture: The model is not causal, or a change cannot enter at this layer.
        BadRequest: Subject and target cannot be told apart in tokens, or a request is longer than the model's context.
        FastmemitError: A loss became non-finite.
    """
    adapter.check_layer(settings.layer)
    adapter.check_causal()
    rows: list[RequestRows] = []
    for request in requests:
        rows.append(request_rows(tokenizer, request, contexts))
    check_lengths(adapter.model, [row.ids for each in rows for row in each.rows])
    targets: dict[int, Target] = {}
    with evaluation_mode(adapter.model, frozen=True):
        for group in like_lengths(rows, batch_tokens):
            log.debug("targets: a group of %d requests", len(group))
            members = [rows[index] for index in group]
            names = [requests[index].text for index in group]
            flat = [row for member in members for row in member.rows]
            forward = forward_for(adapter, settings.layer, flat, settings.site)
            run = _Group(forward, members, settings, names)
            for index, target in zip(group, run.optimise(progress), strict=True):
                targets[index] = target
    return [targets[index] for index in range(len(rows))]


class _Group:
    """Requests that are optimised side by side."""

    def __init__(
        self,
        forward: SuffixForward | FullForward,
        members: Sequence[RequestRows],
        settings: TargetSettings,
        names: Sequence[str],
    ) -> None:
        self._forward, self._members, self._settings, self._names = forward, members, settings, names
        self._device = forward.start.device
        firsts, offset = [], 0
        for member in members:
            firsts.append(offset)  # rows[0] is the bare prompt
            offset += len(member.rows)
        self._start = self._forward.start[firsts].clone()  # (R, d)
        self._active = list(range(len(members)))
        self._told: Tensor | None = None
        self._index()

    def _index(self) -> None:
        """Where the loss of each running request is read, in the present order of rows."""
        self._row_owner: list[int] = []
        rows, columns, tokens, owners, weights = [], [], [], [], []
        kl_rows: list[int] = []
        for owner, number in enumerate(self._active):
            member, base = self._members[number], len(self._row_owner)
            prompts = sum(bool(row.reads) for row in member.rows)
            for offset, row in enumerate(member.rows):
                for index, token in row.reads:
                    rows.append(base + offset)
                    columns.append(index - row.subject)
                    tokens.append(token)
                    owners.append(owner)
                    weights.append(1.0 / (len(row.reads) * prompts))
            kl_rows.append(base + member.kl)
            self._row_owner += [owner] * len(member.rows)
        self._reads = (rows + kl_rows, columns + [0] * len(kl_rows))
        self._tokens = torch.tensor(tokens, device=self._device)
        self._owners = torch.tensor(owners, device=self._device)
        self._weights = torch.tensor(weights, device=self._device)

    def _losses(self, delta: Tensor, start: Tensor, log_p0: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss per running request (R,), and the KL prompts' log-probabilities (R, vocabulary)."""
        settings = self._settings
        value = self._forward.start + delta[self._row_owner]  # (N, d)
        logits = self._forward.logits(value, *self._reads)
        log_p = torch.log_softmax(logits.to(self._device, torch.float32), dim=-1)
        count = len(self._tokens)
        if settings.stop == "most-probable":
            self._told = log_p[:count].detach().argmax(-1) == self._tokens
        nll = -log_p[:count].gather(1, self._tokens[:, None])[:, 0] * self._weights
        loss = torch.zeros(len(delta), device=self._device).index_add(0, self._owners, nll)
        log_q = log_p[count:]
        log_p0 = log_q.detach() if log_p0 is None else log_p0
        kl = (log_q.exp() * (log_q - log_p0)).sum(-1)
        decay = torch.linalg.vector_norm(delta, dim=1) / settings.units(start)[1][:, 0].square()
        return loss + settings.kl_factor * kl + settings.weight_decay * decay, log_q.detach()

    def optimise(self, progress: Callable[[int], None] | None) -> list[Target]:
        """Run all members to their ends; in the members' order."""
        settings, start = self._settings, self._start
        delta = torch.zeros_like(start)
        first, second = torch.zeros_like(start), torch.zeros_like(start)
        unit, length = settings.units(start)
        limit = settings.clamp * length
        log_p0: Tensor | None = None
        history: list[list[float]] = [[] for _ in self._members]
        done: dict[int, Tensor] = {}
        for step in range(1, settings.steps + 1):
            delta.requires_grad_(True)
            losses, log_q = self._losses(delta, start, log_p0)
            log_p0 = log_q if log_p0 is None else log_p0
            values = losses.tolist()
            self._record(values, history, step)
            last = step == settings.steps
            finished = self._finished(values)
            going = [i for i, end in enumerate(finished) if not (last or end)]
            for owner, number in enumerate(self._active):
                if owner not in going:
                    done[number] = (start[owner] + delta[owner]).detach().cpu()
            if progress is not None:
                stopped = len(self._active) - len(going)
                progress(len(self._active) + stopped * (settings.steps - step))
            if not going:
                break
            (gradient,) = torch.autograd.grad(losses[going].sum(), delta)
            delta = delta.detach()
            if len(going) < len(self._active):
                self._drop(going)
                delta, gradient, start, limit, unit = (t[going] for t in (delta, gradient, start, limit, unit))
                first, second, log_p0 = (t[going] for t in (first, second, log_p0))
            first = BETA1 * first + (1 - BETA1) * gradient
            second = BETA2 * second + (1 - BETA2) * gradient.square()
            scale = (second / (1 - BETA2**step)).sqrt() + EPSILON
            delta = delta - settings.learning_rate * unit / (1 - BETA1**step) * first / scale
            norm = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
            delta = torch.where(norm > limit, delta * (limit / norm), delta)
        starts = self._start.cpu()
        return [Target(done[number], starts[number], tuple(history[number])) for number in range(len(self._members))]

    def _finished(self, values: list[float]) -> list[bool]:
        """Whether each running request may stop where it is now, before the next step."""
        if self._told is None:
            return [value < self._settings.early_stop for value in values]
        # What greedy decoding would say is what counts: of two equal logits the first.
        missed = torch.zeros(len(values), dtype=torch.int64, device=self._device)
        missed.index_add_(0, self._owners, (~self._told).long())
        return [count == 0 for count in missed.tolist()]

    def _record(self, values: list[float], history: list[list[float]], step: int) -> None:
        for number, value in zip(self._active, values, strict=True):
            if not -float("inf") < value < float("inf"):
                raise FastmemitError(
                    f"The target loss of {self._names[number]!r} is {value} at step {step}; load "
                    "the model in float32 or bfloat16, or lower v_lr or clamp."
                )
            history[number].append(value)

    def _drop(self, going: list[int]) -> None:
        """Finished requests leave the batch with their rows."""
        stay = set(going)
        self._forward = self._forward.select([i for i, owner in enumerate(self._row_owner) if owner in stay])
        self._active = [self._active[owner] for owner in going]
        self._index()


# Part of every key: raise it when the computation or the file changes, so that nothing stale is
# served. The seal is over names and shapes too since 2; the KL term is KL(p || p0) since 3, and the
# file says what it is of.
RECIPE = 3
# What a system says of a file that may not be written.
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class TargetKey:
    """Everything that a target vector depends on: names and values as JSON, always written in the same way."""

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
        """Everything that the vector of a request depends on.

        Args:
            model: What identifies model and tokenizer as they are now.
            request: The fact; its true answer does not matter.
            contexts: Texts before the prompt.
            settings: How it is optimised.
            front: What the bare prompt stands behind, `fastmemit.text.lead`.
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
