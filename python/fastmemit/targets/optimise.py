"""Target vectors: what the edited block should put out at the subject so that the fact is told.

All requests of a batch run together, each with its own loss, optimiser state, norm limit and stop, so that every one
follows the path it would follow alone (ROME, equation 4; MEMIT, equation 16):

    loss = mean over prompts of [-(1/|target|) sum log p(target token)]
         + kl_factor * KL(p || p0) at the KL prompt's subject, p0 unedited
         + weight_decay * ||delta|| / ||v0||^2
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import FastmemitError
from fastmemit.models import ModelAdapter, check_lengths
from fastmemit.request import EditRequest
from fastmemit.targets.forward import forward_for
from fastmemit.targets.rows import RequestRows, like_lengths, request_rows

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
    """Optimise the target vectors of all requests.

    Args:
        adapter: The unedited model.
        tokenizer: Its tokenizer.
        requests: The facts.
        contexts: Texts before the prompts, the first one ``""``.
        settings: See `TargetSettings`.
        batch_tokens: Upper bound on the padded tokens of one group of requests that run together;
            it bounds the memory.  One request always runs, however long.
        progress: Called with the number of request-steps done since the last call; in total ``len(requests) * steps``.

    Returns:
        One `Target` per request, in their order, on the CPU.

    Raises:
        BadLayer: The layer does not exist.
        UnknownArchitecture: The model is not causal, or a change cannot enter at this layer.
        BadRequest: A request's subject and target cannot be told apart in tokens, or it is longer than the model's
            context.
        FastmemitError: A loss became non-finite.
    """
    adapter.check_layer(settings.layer)
    adapter.check_causal()
    rows = [request_rows(tokenizer, request, contexts) for request in requests]
    check_lengths(adapter.model, [row.ids for request in rows for row in request.rows])
    targets: dict[int, Target] = {}
    with evaluation_mode(adapter.model, frozen=True):
        for group in like_lengths(rows, batch_tokens):
            log.debug("targets: a group of %d requests", len(group))
            members = [rows[index] for index in group]
            names = [requests[index].text for index in group]
            run = _Group(adapter, members, settings, names)
            for index, target in zip(group, run.optimise(progress), strict=True):
                targets[index] = target
    return [targets[index] for index in range(len(rows))]


class _Group:
    """Requests that are optimised side by side."""

    def __init__(
        self, adapter: ModelAdapter, members: Sequence[RequestRows], settings: TargetSettings, names: Sequence[str]
    ) -> None:
        self._members, self._settings, self._names = members, settings, names
        flat = [row for member in members for row in member.rows]
        self._forward = forward_for(adapter, settings.layer, flat, settings.site)
        self._device = self._forward.start.device
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
        with self._forward.installed():
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
        self._forward.keep([i for i, owner in enumerate(self._row_owner) if owner in stay])
        self._active = [self._active[owner] for owner in going]
        self._index()
