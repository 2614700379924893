"""What a block makes of its projection's output, measured by running the block itself.

An edit changes what leaves the projection; a target says how the block's output shall move.  Most
blocks add the one to the stream as it is.  Others scale it (MiniCPM, Granite, the gate of a shared
expert), normalise it (Gemma, OLMo 2) or work on the sum as well (Gemma 4), and a list of names is
never complete.  So the map between the two is read off the block: what enters the block is kept,
its projection's output is replaced, and what comes out is looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastcov.hooks import isolated
from fastmemit.models.running import hidden_of
from fastmemit.tokens import pad_batch

if TYPE_CHECKING:
    from fastmemit.models.adapter import ModelAdapter

BATCH_TOKENS = 8192
#: How far from a straight line a response may be before the map counts as bent, beside rounding.
STRAIGHT = 1e-3
#: Corrections of a bent map, each by one run of the block.
CORRECTIONS = 6
#: By what share of a wanted move a prediction may be off before a norm does not explain a block.
UNEXPLAINED = 0.05
#: Steps of descent where no norm explains it.
DESCENT = 30
#: A probe is this long in every coordinate: any epsilon of a norm is negligible against it.
PROBE = 16.0
#: How much staying near the present u counts beside the wanted output, in median squared gains.
NEAR = 0.1


class _Entered(Exception):
    """The block has been reached; the rest of the forward is not needed."""


@dataclass
class _Run:
    """One batch of rows, and what entered the block in it."""

    members: list[int]
    last: list[int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockMap:
    """One block as a function of its projection's output at the last token of each row.

    Args:
        adapter: The model.
        layer: The block.
        rows: B rows of token ids; the output is replaced at a row's last token.
    """

    def __init__(self, adapter: ModelAdapter, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._block = adapter.block(layer)
        self._projection = adapter.projection(layer)
        half = next(self._projection.parameters()).element_size() < 4
        self._runs = []
        for members in _alike(rows):
            args, kwargs = _entering(adapter, self._block, [rows[n] for n in members])
            if half:
                args, kwargs = _in_float32(args), _in_float32(kwargs)
            self._runs.append(_Run(members, [len(rows[n]) - 1 for n in members], args, kwargs))
        if half:
            # On a copy in float32: what is looked at is small against the stream, and half
            # precision would round it away.
            name = next(n for n, part in self._block.named_modules() if part is self._projection)
            self._block = copy.deepcopy(self._block).float()
            self._projection = self._block.get_submodule(name)
        # As it is now: while targets are optimised another one stands in its place.
        self._forward = self._block.forward

    def __call__(self, outputs: Tensor | None) -> Tensor:
        """What leaves the block with these outputs of the projection in place of its own.

        Args:
            outputs: (B, d); gradients pass through. None leaves the projection's own.

        Returns:
            (B, d), in float32 or wider.
        """
        parts = [self._run(run, None if outputs is None else outputs[run.members]) for run in self._runs]
        order = torch.tensor([n for run in self._runs for n in run.members])
        return torch.cat(parts)[torch.argsort(order).to(parts[0].device)]

    def _run(self, run: _Run, outputs: Tensor | None) -> Tensor:
        rows = torch.arange(len(run.members))
        width = 0

        def replaced(_module: nn.Module, _args: Any, out: Any) -> Tensor | None:
            if outputs is None:
                return None
            states = hidden_of(out)
            # Some blocks flatten their tokens before the projection: (N * L, d).
            tokens = states.reshape(len(run.members), width, -1).clone()
            tokens[rows, run.last] = outputs.to(tokens)
            return tokens.reshape(states.shape)

        # A block may write into what it is given.
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in run.args)
        kwargs = dict(run.kwargs)
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = kwargs["hidden_states"].clone()
        width = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[1]
        handle = self._projection.register_forward_hook(replaced)
        try:
            out = hidden_of(self._forward(*args, **kwargs))
        finally:
            handle.remove()
        states = out[rows, run.last]
        return states if states.dtype == torch.float64 else states.float()


@isolated()
def inverse(
    f: BlockMap,
    outputs: Tensor,  # (B, d)
    residual: Tensor,  # (B, d)
) -> tuple[Tensor, Tensor]:  # (B, d), (B,)
    """The change of the projection's output that moves the block's output by `residual`.

    Three kinds of map are told apart by what comes out.  A block that adds the output as it is: the
    change is the residual.  One that scales it by s: the residual over s.  One that normalises it:
    with u = y / rms(y) and gains g, read off by a probe, all that can come out is ``g u`` with
    ``mean(u^2) = 1``.  The u' of that ellipsoid is taken that is nearest to what is wanted,
    ``c = g u + r``, and a little to what is there,

        min ||g u' - c||^2 + nu ||u' - u||^2:   u' = (g c + nu u) / (g^2 + nu + mu),

    mu by bisection, and ``y' = a u'`` with the a that makes y' nearest to y.  (Dividing r by g asks
    nearly closed coordinates for everything, and the norm then shrinks all others away.)  What is
    still missing is added to c and solved for again.  Where a norm alone does not explain what
    comes out (Gemma 4 goes on with the sum), descent along the block's own gradients follows.  Of
    each row the best y' is taken.

    Args:
        f: The block, at the rows that the outputs are of.
        outputs: y, what leaves the projection now.
        residual: r, by how much the block's output shall move.

    Returns:
        ``y' - y`` in the dtype of `residual`, and the share of r that it reaches: the projection of
        the block's measured move on r, as a multiple of r.  Both are zero for a row of which
        nothing better than no change was found, and the share is 1 where nothing is wanted.
    """
    h = f(outputs.float())
    y, r = outputs.to(h), residual.to(h)
    size = torch.linalg.vector_norm(r, dim=1, keepdim=True)  # (B, 1)
    square = size.square().clamp_min(torch.finfo(h.dtype).tiny)
    rounding = 64 * torch.finfo(h.dtype).eps * torch.linalg.vector_norm(h, dim=1, keepdim=True)
    moved = f(y + r) - h
    if _within(moved - r, STRAIGHT * size + rounding):
        return residual, torch.ones_like(size[:, 0])
    s = (moved * r).sum(1, keepdim=True) / square  # (B, 1)
    change, share = torch.zeros_like(r), torch.zeros_like(size[:, 0])
    if _within(moved - s * r, STRAIGHT * s.abs() * size + rounding):
        open_ = s.abs() > STRAIGHT
        change = torch.where(open_, r / torch.where(open_, s, 1.0), change)
        share = torch.where(open_[:, 0], 1.0, share)
    else:
        norm, aim, error, explained = _Norm(f, y, h), r, size[:, 0], True
        for turn in range(CORRECTIONS + 1):
            if turn < CORRECTIONS:
                trial = norm.solve(aim) - y
            elif explained:
                break
            else:
                trial = _descend(f, y, h, r, change, norm.scale)
            got = f(y + trial) - h
            if turn == 0:
                explained = _within(norm.move(y + trial) - got, UNEXPLAINED * size + rounding)
            distance = torch.linalg.vector_norm(r - got, dim=1)
            better = distance < error
            error = torch.where(better, distance, error)
            change = torch.where(better[:, None], trial, change)
            share = torch.where(better, ((got * r).sum(1, keepdim=True) / square)[:, 0], share)
            aim = aim + (r - got)
    return change.to(residual), torch.where(size[:, 0] > 0, share, 1.0)


class _Norm:
    """What a norm behind the projection can put out: an ellipsoid, and where on it the block is."""

    def __init__(self, f: BlockMap, y: Tensor, h: Tensor) -> None:
        signs = torch.ones(y.shape[1], device=h.device)
        signs[1::2] = -1  # no mean, for norms that take it off
        probe = (PROBE * signs).expand_as(y)
        plus, minus = f(probe), f(-probe)
        self._gain = (plus - minus) / 2 * signs  # (B, d)
        self._out = h - (plus + minus) / 2  # (B, d), what the norm puts out now
        self._y = y
        self._length = y.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)  # (B, 1)
        self._near = NEAR * self._gain.square().median(1, keepdim=True).values

    @property
    def scale(self) -> Tensor:
        """(B, d) by how much a coordinate of y must change, about, for a change of 1 behind it."""
        return self._length / (self._gain.square() + self._near).sqrt().clamp_min(1e-30)

    def move(self, outputs: Tensor) -> Tensor:
        """By how much the block's output would move with these outputs, if this norm were all."""
        length = outputs.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        return self._gain * outputs / length - self._out

    def solve(self, residual: Tensor) -> Tensor:
        """The y' (B, d) that gives what is nearest to the present output plus `residual`."""
        g, u = self._gain, self._y / self._length
        wanted = g * (self._out + residual) + self._near * u
        stiff = g.square() + self._near
        # mean(u'^2) falls from infinity to 0 as mu grows from -min(stiff).
        low = -stiff.amin(1, keepdim=True)
        high = torch.linalg.vector_norm(wanted, dim=1, keepdim=True)
        for _ in range(60):
            mu = (low + high) / 2
            long = (wanted / (stiff + mu)).square().mean(1, keepdim=True) > 1
            low, high = torch.where(long, mu, low), torch.where(long, high, mu)
        u = wanted / (stiff + high)
        along = (u * self._y).mean(1, keepdim=True)  # the nearest length, since mean(u'^2) = 1
        return torch.maximum(along, 0.1 * self._length) * u


def _descend(f: BlockMap, y: Tensor, h: Tensor, r: Tensor, begin: Tensor, scale: Tensor) -> Tensor:
    """The change (B, d) with the smallest error that descent from `begin` finds."""
    size = r.square().sum(1).clamp_min(torch.finfo(r.dtype).tiny)
    z = (begin / scale).requires_grad_(True)
    optimiser = torch.optim.LBFGS([z], max_iter=DESCENT, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = ((f(y + z * scale) - h - r).square().sum(1) / size).sum()
            (z.grad,) = torch.autograd.grad(loss, z)
        return loss.detach()

    optimiser.step(closure)
    return (z * scale).detach()


def _within(difference: Tensor, allowed: Tensor) -> bool:
    return bool((torch.linalg.vector_norm(difference, dim=1, keepdim=True) <= allowed).all())


def _alike(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of rows of like lengths, `BATCH_TOKENS` at most together; one row always goes."""
    batches: list[list[int]] = []
    for n in sorted(range(len(rows)), key=lambda n: len(rows[n])):
        if not batches or (len(batches[-1]) + 1) * len(rows[n]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(n)
    return batches


@torch.no_grad()
def _entering(
    adapter: ModelAdapter, block: nn.Module, rows: Sequence[Sequence[int]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with when the model runs these rows."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def on_entry(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Entered

    handle = block.register_forward_pre_hook(on_entry, with_kwargs=True)
    try:
        adapter.run(**pad_batch(rows, device=adapter.device), use_cache=False)
    except _Entered:
        pass
    finally:
        handle.remove()
    return seen[0]


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _in_float32(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_in_float32(part) for part in value)
    return value
