"""UltraEdit (arXiv 2505.14679, Gu et al. 2025): one step along normalised gradients, with no C and no target vectors.

One forward and one backward pass of a batch give, at each edited projection and token, what enters it, the key h, and
the gradient g of the answer's loss by what it puts out. Both side by side are a feature, which is normalised by the
mean and the standard deviation of all features edited so far, this batch's among them ("lifelong normalisation"). With
h~ and g~ so normalised the step that a token asks for is ``v = -eta ||h~||^2 g~``, and the weight changes by the ridge
regression of the steps on the keys as they were, ``Delta = V^T H (H^T H + I)^-1`` with keys and steps as rows.

The mean and the standard deviation are part of an edit: those of its own tokens are stored in it, in memory and in its
file, and those that the next edit is normalised by are joined from the edits that are in the weights then. So an undo
takes an edit's share out, and whether an edit was made here or comes from a file changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcov import closed_form
from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import FastmemitError, UnknownArchitecture
from fastmemit.methods.base import Draft, log, register
from fastmemit.methods.config import UltraEditConfig
from fastmemit.models import ModelAdapter
from fastmemit.models.running import check_lengths, head_reads, pad_batch, token_states
from fastmemit.request import EditRequest
from fastmemit.text import Row, like_lengths, request_rows

RIDGE = 1.0  # the I of ``H^T H + I``


@dataclass(frozen=True)
class Moments:
    """Mean and deviations of features that came in several parts."""

    count: int  # features
    mean: Tensor  # (w,) float64
    squares: Tensor  # (w,) float64, the sum of squared deviations from the mean

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Those of features (n, w) float64."""
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).square().sum(0))

    @classmethod
    def read(cls, count: int, stored: Tensor) -> Moments:
        """Those that `stored` wrote down."""
        mean, deviation = stored.double()
        return cls(count, mean, deviation.square() * count)

    def stored(self) -> Tensor:
        """Mean and root mean square deviation, (2, w) float32 on the CPU, as `fastmemit.delta.Delta` holds them."""
        return torch.stack([self.mean, (self.squares / self.count).sqrt()]).to("cpu", torch.float32)

    def joined(self, other: Moments) -> Moments:
        """Those of the features of both (Chan et al. 1979)."""
        count = self.count + other.count
        apart = other.mean.to(self.mean) - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart.square() * (self.count * other.count / count)
        return Moments(count, mean, self.squares + other.squares.to(self.squares) + between)

    def normalised(self, features: Tensor) -> Tensor:
        """Features (n, w) less their mean, in standard deviations; 0 where there is no deviation."""
        deviation = (self.squares / max(self.count - 1, 1)).sqrt()
        return torch.where(deviation > 0, (features - self.mean) / deviation, 0.0)


@register(UltraEditConfig)
def write_ultraedit(draft: Draft[UltraEditConfig], requests: list[EditRequest], goal: Tensor) -> None:
    """Write a batch into ``config.layers``, all of which are read before any is written.

    A token that stands alone, in a first edit of one fact with an answer of one token, has no deviation: it changes
    nothing, which is said before it is read, and is what the next edit is normalised by.
    """
    config, work = draft.config, draft.work
    names = {layer: draft.adapter.weight_name(layer) for layer in config.layers}
    counts = [(edit.delta.moments, edit.delta.provenance.get("tokens")) for edit in work.stack.edits]
    earlier = [(stored, count) for stored, count in counts if type(count) is int and count > 0]
    alone = len(requests) == 1 and config.tokens == "answer"
    if alone and not any(name in stored for stored, _ in earlier for name in names.values()):
        row = request_rows(work.tokenizer, requests[0], ("",)).rows[0]
        if len(row.reads) == 1:
            log.warning(
                "The answer %r of %r is one token, which has no deviation to be normalised by, so this edit changes "
                "nothing; pass tokens='all' (--set tokens=all), or write several facts together.",
                requests[0].target,
                requests[0].text,
            )
    room = work.batch_tokens or (1024 if draft.adapter.device.type == "cpu" else 16384)
    read = read_features(draft.adapter, work.tokenizer, requests, config, room)
    for layer, (keys, gradients) in read.items():
        features = torch.cat([keys, gradients], 1)
        moments = Moments.of(features)
        draft.moments[names[layer]] = moments.stored()
        for stored, count in earlier:
            if names[layer] in stored:
                moments = Moments.read(count, stored[names[layer]].to(keys.device)).joined(moments)
        h, g = moments.normalised(features).split([keys.shape[1], gradients.shape[1]], 1)
        steps = -config.eta * h.square().sum(1, keepdim=True) * g  # (n, d)
        draft.write(layer, closed_form.ridge(keys.T, steps.T, RIDGE), keys.T)
    draft.tokens = len(keys)


@isolated(gradients=True)
def read_features(
    adapter: ModelAdapter, tokenizer: Any, requests: Sequence[EditRequest], config: UltraEditConfig, batch_tokens: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer, keys (n, d_k) and the gradients (n, d) of facts' losses by what the projection puts out, in float64.

    A fact's loss is the mean cost of its answer's tokens after the bare prompt, which is read behind its
    `fastmemit.text.lead` if it has one; no fact's gradient depends on what it runs beside.

    Raises:
        BadRequest: Subject and target cannot be told apart in tokens, or a request is longer than the model's context.
        UnknownArchitecture: The model is not causal, or a layer's output is not one vector a token on which the logits
            depend.
        FastmemitError: A loss is not finite.
    """
    adapter.check_causal()
    rows = [request_rows(tokenizer, request, ("",)) for request in requests]
    check_lengths(adapter.model, [each.rows[0].ids for each in rows])
    found: dict[int, dict[int, tuple[Tensor, Tensor]]] = {layer: {} for layer in config.layers}  # by layer and fact
    with evaluation_mode(adapter.model, frozen=True):
        for group in like_lengths(rows, batch_tokens if adapter.traits.right_padding != "none" else 1):
            bare = [rows[index].rows[0] for index in group]
            losses, states = _run(adapter, bare, config.layers)
            for index, value in zip(group, losses.tolist(), strict=True):
                if not math.isfinite(value):
                    raise FastmemitError(
                        f"The loss of {requests[index].text!r} is {value}; load the model in float32 or bfloat16."
                    )
            for layer, (keys, gradients) in states.items():
                for at, (index, row) in enumerate(zip(group, bare, strict=True)):
                    places = [t for t, _ in row.reads] if config.tokens == "answer" else list(range(len(row.ids)))
                    found[layer][index] = keys[at, places].double(), gradients[at, places].double()
    return {
        layer: (torch.cat([by[i][0] for i in range(len(rows))]), torch.cat([by[i][1] for i in range(len(rows))]))
        for layer, by in found.items()
    }


def _run(
    adapter: ModelAdapter, rows: Sequence[Row], layers: Sequence[int]
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """The rows' losses (n,), and by layer what enters the projection (n, L, d_k) and the gradient by its output."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            given = out.detach().requires_grad_() if layer == layers[0] else out
            seen[layer] = (token_states(args[0], shape, args[0].shape[-1], type(module).__name__).detach(), given)
            return given if layer == layers[0] else None  # below it nothing needs a gradient

        return adapter.projection(layer).register_forward_hook(hook)

    reads = [(at, index, token) for at, row in enumerate(rows) for index, token in row.reads]
    of, columns, tokens = (list(part) for part in zip(*reads, strict=True))
    with ExitStack() as hooks, head_reads(adapter, of, columns):
        for layer in layers:
            hooks.enter_context(note(layer))
        batch = pad_batch([row.ids for row in rows], device=adapter.device)
        logits = adapter.run(**batch, use_cache=False).logits[0]  # (tokens, vocabulary)
    costs = nn.functional.cross_entropy(logits.float(), torch.tensor(tokens, device=logits.device), reduction="none")
    share = torch.tensor([1 / len(rows[at].reads) for at in of], device=costs.device)
    losses = costs.new_zeros(len(rows)).index_add(0, torch.tensor(of, device=costs.device), costs * share)
    lacking = [layer for layer in layers if layer not in seen]
    gradients: Sequence[Tensor | None] = ()
    if not losses.requires_grad:
        lacking = list(layers)
    if not lacking:
        gradients = torch.autograd.grad(losses.sum(), [seen[layer][1] for layer in layers], allow_unused=True)
        lacking = [layer for layer, gradient in zip(layers, gradients, strict=True) if gradient is None]
    if lacking:
        raise UnknownArchitecture(
            f"What the projection of layer {lacking[0]} of {type(adapter.model).__name__} puts out does not reach the "
            "logits, so there is no gradient to edit by; choose other layers."
        )
    states = {}
    for layer, gradient in zip(layers, gradients, strict=True):
        name = type(adapter.projection(layer)).__name__
        assert gradient is not None
        states[layer] = (seen[layer][0], token_states(gradient, shape, gradient.shape[-1], name))
    return losses.detach(), states
