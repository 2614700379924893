"""Target vectors: what the edited block should put out at the subject so that the fact is told.

All requests of a batch run together, each with its own loss, optimiser state, norm limit and stop, so that every one
follows the path it would follow alone (ROME, equation 4; MEMIT, equation 16):

    loss = mean over prompts of [-(1/|target|) sum log p(target token)]
         + kl_factor * KL(p || p0) at the KL prompt's subject, p0 unedited
         + weight_decay * ||delta|| / ||v0||^2

`Adam` reads every prompt at every step, as published; `Rotate` reads two of them, in turns.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastcov.files import StrPath, atomic_file, parse_json, write_safetensors
from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import FastmemitError
from fastmemit.files import shared_folder
from fastmemit.models import ModelAdapter
from fastmemit.models.running import check_lengths
from fastmemit.partial_forward import FullForward, SuffixForward, forward_for
from fastmemit.request import EditRequest
from fastmemit.text import RequestRows, lead, like_lengths, request_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetSettings:
    """How target vectors are optimised; everything that a vector depends on but model and request.

    The fields are those of `fastmemit.methods.TargetConfig`, which says what they mean, with every value put in.
    """

    layer: int  # the block at which the change enters, the last edited one
    site: Literal["block", "projection"] = "block"  # at the output of which (MEMIT and EMMET, or ROME)
    optimiser: Literal["adam", "rotate"] = "adam"
    steps: int = 25  # loss evaluations; the last one is followed by no update
    learning_rate: float = 0.5  # v_lr there
    rho: float = 0.3
    weight_decay: float = 0.5
    clamp: float = 1.0
    kl_factor: float = 0.0625
    early_stop: float = 0.05
    #: "most-probable" is ENCORE's (arXiv 2502.01636). Where a step reads some of the contexts, each says so in turn.
    stop: Literal["loss", "nll", "most-probable"] = "loss"
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
    """One optimised vector."""

    vector: Tensor  # (d,) float32, ``v0 + delta``
    start: Tensor  # (d,) float32, ``v0``: the unedited value in the bare prompt
    losses: tuple[float, ...]  # at each step, the first one unedited


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
    """Optimise the target vectors of all requests on the unedited model: one each, in their order, on the CPU.

    The first of the contexts is ``""``. Requests run together in `batch_tokens` padded tokens at most, which bounds the
    memory; one always runs. `progress` is called with the number of request-steps done since its last call, of
    ``len(requests) * steps`` in all.

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
            run = _Group(forward, members, len(contexts), settings, names)
            for index, target in zip(group, run.optimise(progress), strict=True):
                targets[index] = target
    return [targets[index] for index in range(len(rows))]


class Adam:
    """Adam (Kingma & Ba 2015) on all of a request's prompts at once, as published (ROME, MEMIT), from v0 (R, d)."""

    BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
    turn = 1  #: steps until every context has been read

    def __init__(self, settings: TargetSettings, start: Tensor, contexts: int) -> None:
        self._contexts, self._steps = contexts, 0
        self._rate = settings.learning_rate * settings.units(start)[0]  # (R, 1)
        self._first, self._second = torch.zeros_like(start), torch.zeros_like(start)

    def prompts(self, step: int) -> tuple[int, ...]:
        """Which of the contexts step 1, 2, ... reads."""
        return tuple(range(self._contexts))

    def move(self, gradient: Tensor, nll: Tensor) -> Tensor:
        """By how much delta moves, (R, d), for the gradient of the loss (R, d) and its first term (R,)."""
        self._steps += 1
        self._first = self.BETA1 * self._first + (1 - self.BETA1) * gradient
        self._second = self.BETA2 * self._second + (1 - self.BETA2) * gradient.square()
        scale = (self._second / (1 - self.BETA2**self._steps)).sqrt() + self.EPSILON
        return -self._rate / (1 - self.BETA1**self._steps) * self._first / scale

    def keep(self, going: Tensor) -> None:
        """Only these of the R requests go on."""
        self._rate, self._first, self._second = (t[going] for t in (self._rate, self._first, self._second))


class Rotate:
    """Steps of a length of their own on the bare prompt and one context, another one each time.

    Adam moves each coordinate by about its learning rate whatever the gradient is, so it walks for many steps to where
    a vector has to go and goes on there at the same pace. Here the length of a step is what is still missing: ``rho
    limit max(1 - exp(-2 nll), 0.1)``, with nll the first term of the loss and limit the norm that delta may have. Its
    direction is the sum of the normalised gradients so far, each step's weighing 0.7 of the next one's, every
    coordinate divided by its gradients' root mean square. What one context asks for, the next ones mostly ask for too.
    (Measured: docs/results/README.md.) Arguments are those of `Adam`.
    """

    # Without the division the gradient goes where a model's few huge coordinates are (Gemma), and MEMIT cannot write
    # what it finds there.
    MOMENTUM, SQUARES, EPSILON, LEAST = 0.7, 0.9, 1e-8, 0.1

    def __init__(self, settings: TargetSettings, start: Tensor, contexts: int) -> None:
        self.turn = max(1, contexts - 1)
        self._contexts, self._steps = contexts, 0
        self._longest = settings.rho * settings.clamp * settings.units(start)[1]  # (R, 1)
        self._velocity, self._second = torch.zeros_like(start), torch.zeros_like(start)

    def prompts(self, step: int) -> tuple[int, ...]:
        """The bare prompt and the next context; see `Adam.prompts`."""
        return (0, 1 + (step - 1) % self.turn) if self._contexts > 1 else (0,)

    def move(self, gradient: Tensor, nll: Tensor) -> Tensor:
        """See `Adam.move`."""
        self._steps += 1
        unit = torch.nn.functional.normalize(gradient, dim=1)
        self._velocity = self.MOMENTUM * self._velocity - unit
        self._second = self.SQUARES * self._second + (1 - self.SQUARES) * unit.square()
        scale = (self._second / (1 - self.SQUARES**self._steps)).sqrt() + self.EPSILON
        length = self._longest * (1 - torch.exp(-2 * nll)).clamp_min(self.LEAST)[:, None]
        return length * torch.nn.functional.normalize(self._velocity / scale, dim=1)

    def keep(self, going: Tensor) -> None:
        """See `Adam.keep`."""
        self._longest, self._velocity, self._second = (t[going] for t in (self._longest, self._velocity, self._second))


@dataclass(frozen=True)
class _Step:
    """Which rows a step reads for the R requests that go on, and where their losses are, on the device.

    Made once for the prompts that it reads, as long as the requests are the same ones: a tensor that is made of a list
    in a step would make a GPU wait.
    """

    chosen: list[int]  # the N rows of the group's forward
    index: Tensor  # (N,) the same
    owners: Tensor  # (N,) whose each row is, as a place among the R requests
    reads: tuple[Tensor, Tensor]  # rows and columns of the M answer tokens, then of the R KL prompts' subjects
    tokens: Tensor  # (M,) the answer tokens
    of: Tensor  # (M,) whose each is
    weights: Tensor  # (M,) each token's part in the first term of the loss


class _Group:
    """Requests that are optimised side by side."""

    def __init__(
        self,
        forward: SuffixForward | FullForward,
        members: Sequence[RequestRows],
        contexts: int,
        settings: TargetSettings,
        names: Sequence[str],
    ) -> None:
        self._forward, self._members, self._settings, self._names = forward, list(members), settings, list(names)
        self._device = forward.start.device
        self._index()
        self._start = forward.start[self._firsts].clone()  # (R, d), of the bare prompts
        rule = Rotate if settings.optimiser == "rotate" else Adam
        self._rule: Adam | Rotate = rule(settings, self._start, contexts)

    def _index(self) -> None:
        """Where each request's rows begin in the forward."""
        self._firsts = [0, *itertools.accumulate(len(member.rows) for member in self._members[:-1])]
        self._steps: dict[tuple[int, ...], _Step] = {}
        self._part: tuple[_Step, SuffixForward | FullForward] | None = None

    def _step(self, prompts: tuple[int, ...]) -> _Step:
        """The step that reads these prompts of every request."""
        if prompts in self._steps:
            return self._steps[prompts]
        chosen: list[int] = []
        whose, kl_rows = [], []
        rows, columns, tokens, of, weights = [], [], [], [], []
        for owner, (member, base) in enumerate(zip(self._members, self._firsts, strict=True)):
            for number in dict.fromkeys((*prompts, member.kl)):
                if number == member.kl:
                    kl_rows.append(len(chosen))
                if number in prompts:
                    row = member.rows[number]
                    for index, token in row.reads:
                        rows.append(len(chosen))
                        columns.append(index - row.subject)
                        tokens.append(token)
                        of.append(owner)
                        weights.append(1.0 / (len(row.reads) * len(prompts)))
                chosen.append(base + number)
                whose.append(owner)
        numbers, owners, rows_of, columns_of, read, asked, parts = (
            torch.tensor(each, device=self._device)
            for each in (chosen, whose, rows + kl_rows, columns + [0] * len(kl_rows), tokens, of, weights)
        )
        step = _Step(chosen, numbers, owners, (rows_of, columns_of), read, asked, parts)
        self._steps[prompts] = step
        return step

    def _rows_of(self, step: _Step) -> SuffixForward | FullForward:
        """The forward of a step's rows.

        The last one is held, and no other: each has a copy of its rows' part of the prefix.
        """
        if self._part is None or self._part[0] is not step:
            self._part = None
            everything = len(step.chosen) == len(self._forward.start)
            self._part = step, self._forward if everything else self._forward.select(step.chosen, step.index)
        return self._part[1]

    def optimise(self, progress: Callable[[int], None] | None) -> list[Target]:
        """Run all members to their ends; in the members' order."""
        settings, rule, start = self._settings, self._rule, self._start
        active = list(range(len(self._members)))
        delta = torch.zeros_like(start)
        length = settings.units(start)[1]  # (R, 1)
        log_p0: Tensor | None = None
        history: list[list[float]] = [[] for _ in active]
        met = [0] * len(active)  # steps in a row at which each request could have stopped
        done: dict[int, Tensor] = {}
        for step in range(1, settings.steps + 1):
            reads = self._step(rule.prompts(step))
            forward = self._rows_of(reads)
            delta.requires_grad_(True)
            logits = forward.logits(forward.start + delta[reads.owners], *reads.reads)
            log_p = torch.log_softmax(logits.to(self._device, torch.float32), dim=-1)
            answers, log_q = log_p[: len(reads.tokens)], log_p[len(reads.tokens) :]
            costs = -answers.gather(1, reads.tokens[:, None])[:, 0] * reads.weights
            nll = torch.zeros(len(delta), device=self._device).index_add(0, reads.of, costs)
            log_p0 = log_q.detach() if log_p0 is None else log_p0
            kl = (log_q.exp() * (log_q - log_p0)).sum(-1)
            decay = torch.linalg.vector_norm(delta, dim=1) / length[:, 0].square()
            losses = nll + settings.kl_factor * kl + settings.weight_decay * decay
            nll = nll.detach()

            values, stops = self._looked_at(losses.detach(), nll, answers, reads)
            for number, now, stop in zip(active, values, stops, strict=True):
                self._check(now, number, step)
                history[number].append(now)
                met[number] = met[number] + 1 if stop else 0
            last = step == settings.steps
            going = [i for i, number in enumerate(active) if not last and met[number] < rule.turn]
            for i in set(range(len(active))).difference(going):
                done[active[i]] = (start[i] + delta[i]).detach()
            if progress is not None:
                progress(len(active) + (len(active) - len(going)) * (settings.steps - step))
            if not going:
                break
            (gradient,) = torch.autograd.grad(losses.sum(), delta)  # each row's of its own loss
            delta = delta.detach()
            del forward  # the next step copies rows of its own
            if len(going) < len(active):
                kept = self._drop(going)
                active = [active[i] for i in going]
                delta, gradient, start, length, nll, log_p0 = (
                    t[kept] for t in (delta, gradient, start, length, nll, log_p0)
                )
            delta = delta + rule.move(gradient, nll)
            norm, limit = torch.linalg.vector_norm(delta, dim=1, keepdim=True), settings.clamp * length
            delta = torch.where(norm > limit, delta * (limit / norm), delta)
        vectors, starts = torch.stack([done[number] for number in range(len(history))]).cpu(), self._start.cpu()
        ends = zip(vectors, starts, history, strict=True)
        return [Target(vector.clone(), start.clone(), tuple(losses)) for vector, start, losses in ends]

    def _looked_at(self, losses: Tensor, nll: Tensor, answers: Tensor, step: _Step) -> tuple[list[float], list[bool]]:
        """The loss of each request, and whether it could stop where it is now: one copy from the device."""
        if self._settings.stop == "most-probable":
            # What greedy decoding would say is what counts: of two equal logits the first.
            missed = (answers.detach().argmax(-1) != step.tokens).float()
            judged, limit = torch.zeros_like(losses).index_add(0, step.of, missed), 0.5
        else:
            judged, limit = nll if self._settings.stop == "nll" else losses, self._settings.early_stop
        values, found = torch.stack([losses, judged]).tolist()
        return values, [value < limit for value in found]

    def _check(self, value: float, number: int, step: int) -> None:
        if not math.isfinite(value):
            raise FastmemitError(
                f"The target loss of {self._names[number]!r} is {value} at step {step}; load "
                "the model in float32 or bfloat16, or lower v_lr or clamp."
            )

    def _drop(self, going: list[int]) -> Tensor:
        """Finished requests leave the batch with their rows; the others' numbers, on the device."""
        rows = [self._firsts[i] + offset for i in going for offset in range(len(self._members[i].rows))]
        self._forward = self._forward.select(rows)
        self._members = [self._members[i] for i in going]
        kept = torch.tensor(going, device=self._device)
        self._rule.keep(kept)
        self._index()
        return kept


# Part of every key: raise it when the computation or the file changes, so that nothing stale is
# served. The seal is over names and shapes too since 2; the KL term is KL(p || p0) since 3, and the
# file says what it is of.
RECIPE = 3
# The same for the vectors of "rotate" alone: each coordinate by its root mean square since 2.
ROTATE_RECIPE = 2
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


#: Steps of "rotate" by which MEMIT and EMMET write zsRE's answers better than by its usual 14 (docs/results/zsre.md).
FURTHER = 25
#: A loss, in nats, at which a fact is unlikely to be told: its tokens have 37 % on average.
UNLIKELY = 1.0


class TargetStore:
    """A folder of target vectors, one small safetensors file each, the last `held` of them in memory too.

    Without a folder they are in memory alone.
    """

    def __init__(self, folder: StrPath | None, held: int = 256) -> None:
        self._folder, self._held = None if folder is None else Path(folder), held
        self._memory: dict[TargetKey, Target] = {}

    def key(
        self, model: str, request: EditRequest, contexts: Sequence[str], settings: TargetSettings, front: str = ""
    ) -> TargetKey:
        """Everything that the vector of a request, whose true answer does not matter, depends on.

        `model` identifies model and tokenizer as they are now, `front` is what the bare prompt stands behind (`lead`).
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
        """Keep a target, in memory also where its file cannot be written (OSError); FastmemitError if not finite."""
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

    Raises:
        OSError: A vector cannot be written, where the cache is not one that nobody may write.
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
        further = settings.optimiser == "rotate" and settings.steps >= FURTHER
        log.log(
            logging.WARNING if ends[0][0] > UNLIKELY else logging.INFO,
            "%d of %d targets stopped at the last of %d steps above the loss limit of %g: %s%s%s",
            *(len(ends), len(targets), settings.steps, settings.early_stop, named),
            "" if len(ends) <= 5 else f"; and {len(ends) - 5} more",
            "" if further else f"; optimiser=rotate with steps={FURTHER} may go further",
        )


def _what_matters(settings: TargetSettings) -> dict[str, Any]:
    """The settings of a key: all that something reads.

    Adam's are named as they were when there was no other optimiser, so that what was stored then is found.
    """
    values = dataclasses.asdict(settings)
    idle: tuple[str, ...] = ("optimiser", "rho") if settings.optimiser == "adam" else ("learning_rate",)
    if settings.stop == "most-probable":
        idle += ("early_stop",)
    if settings.optimiser == "rotate":
        values["rotate"] = ROTATE_RECIPE
    return {name: value for name, value in values.items() if name not in idle}


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
