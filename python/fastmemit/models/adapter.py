"""One way to ask any decoder for its blocks, its edited projections and their weights."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcov.hooks import evaluation_mode, input_device, isolated, skinny_products
from fastmemit.errors import BadLayer, FastmemitError, UnknownArchitecture, WrongModel
from fastmemit.models.running import (
    BlockMap,
    ModelState,
    Traits,
    accepted,
    context_limit,
    head_reads,
    hidden_of,
    one_of_each_kind,
    pad_batch,
    probe_ids,
    remembered,
    text_config,
    token_states,
    traits,
    with_hidden,
)

log = logging.getLogger(__name__)

#: Where a target's change enters: at the output of a block, or of the edited projection in it.
Site = Literal["block", "projection"]

CONTEXT_LIMIT = 2048
REFUSED, WARNED = 0.1, 0.5  # mean shares of a wanted change, below which a layer is refused or warned of
ROWS_MATTER = 0.1  # share of a move by which it may be another one among other tokens
STRAIGHT = 1e-3  # how far from a straight line a response may be before the map counts as bent, beside rounding
CORRECTIONS = 6  # corrections of a bent map, each by one run of the block
UNEXPLAINED = 0.05  # by what share of a wanted move a prediction may be off before a norm does not explain a block
DESCENT = 30  # steps of descent where no norm explains it
PROBE = 16.0  # a probe is this long in every coordinate: any epsilon of a norm is negligible against it
NEAR = 0.1  # how much staying near the present u counts beside the wanted output, in median squared gains


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear map stores its weight as (in, out), as Conv1D does, instead of (out, in)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear map, quantised ones included; None for anything else."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.nf)
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(found[0], int) and isinstance(found[1], int):
        return found[0], found[1]
    return None


class ModelAdapter:
    """What editing needs to know about a model.

    Args:
        model: A causal language model.
        module: The edited projection with ``{}`` for the layer, ``model.layers.{}.mlp.down_proj``.

    Attributes:
        model: The model itself.
        d: The hidden size, which is the output of every edited projection.
        template: `module`.
        measured: What was found out by running the model, by what it is about; see `look`.
    """

    def __init__(self, model: nn.Module, module: str) -> None:
        self.model = model
        self.template = module
        self._where, _, self._inside = module.partition(".{}.")
        self._state = ModelState(model)  # when it was measured
        self.measured: dict[Hashable, Any] = {}
        shapes = (self._shape(layer) for layer in range(self.n_layers))
        self.d = next(shape[1] for shape in shapes if shape is not None)

    @property
    def _blocks(self) -> nn.ModuleList:
        """Looked up each time: the model's own list may have been replaced since."""
        blocks = self.model.get_submodule(self._where)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    def look(self) -> None:
        """Forget what was measured if the model is not what it was; each piece of work on a model begins with it."""
        if not self._state.holds(self.model, weights=False):
            self._state, self.measured = ModelState(self.model), {}

    def _shape(self, layer: int) -> tuple[int, int] | None:
        try:
            return linear_shape(self._blocks[layer].get_submodule(self._inside))
        except AttributeError:
            return None

    @property
    def layers(self) -> list[int]:
        """The layers that can be edited: those whose block has a projection of its own."""
        return [
            layer for layer in range(self.n_layers) if self._shape(layer) is not None and len(self._sharing(layer)) == 1
        ]

    def _sharing(self, layer: int) -> list[int]:
        """The layers whose projection is, or has the weight of, this layer's; itself among them."""
        if "identities" not in self.measured:
            self.measured["identities"] = [self._identity(other) for other in range(self.n_layers)]
        identities = self.measured["identities"]
        return [other for other, identity in enumerate(identities) if identity & identities[layer]]

    def _identity(self, layer: int) -> set[int]:
        """What a layer's projection is made of: the module and its weight."""
        if self._shape(layer) is None:
            return set()
        module = self._blocks[layer].get_submodule(self._inside)
        return {id(part) for part in (module, module._parameters.get("weight")) if part is not None}

    def check_layer(self, layer: int) -> None:
        """Refuse a layer that cannot be edited.

        Raises:
            BadLayer: `layer` is no integer in ``[0, n_layers)``, that block has no projection of this name, or another
                block has the same one.
        """
        self._check_number(layer)
        if self._shape(layer) is None:
            raise BadLayer(
                f"Layer {layer} has no linear map {self._inside!r}; the layers that have one are "
                f"{', '.join(map(str, self.layers))}."
            )
        sharing = self._sharing(layer)
        if len(sharing) > 1:
            free = ", ".join(map(str, self.layers)) or "none"
            raise BadLayer(
                f"The layers {', '.join(map(str, sharing))} share one {self._inside!r}, so that an edit of layer "
                f"{layer} would change all of them; the layers with one of their own are {free}."
            )

    def _check_number(self, layer: int) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise BadLayer(f"A layer must be an integer, not {layer!r}.")
        if not 0 <= layer < len(self._blocks):
            raise BadLayer(
                f"Layer {layer} is out of range: {type(self.model).__name__} has the layers 0 to {self.n_layers - 1}."
            )

    def block(self, layer: int) -> nn.Module:
        """The decoder block of a layer, whether it can be edited or not."""
        self._check_number(layer)
        return self._blocks[layer]

    def projection(self, layer: int) -> nn.Module:
        """The edited projection of a layer: keys (..., d_k) in, (..., d) out."""
        self.check_layer(layer)
        return self._blocks[layer].get_submodule(self._inside)

    def projection_name(self, layer: int) -> str:
        """The projection's full module name, such as ``model.layers.4.mlp.down_proj``."""
        self.check_layer(layer)
        return self.template.replace("{}", str(layer))

    def d_k(self, layer: int) -> int:
        """The width of a layer's keys: the input of its projection."""
        self.check_layer(layer)
        shape = self._shape(layer)
        assert shape is not None
        return shape[0]

    def weight_name(self, layer: int) -> str:
        """The name of the weight in the model's state dict."""
        return f"{self.projection_name(layer)}.weight"

    def weight_is_transposed(self, layer: int) -> bool:
        """Whether the model stores the weight as (d_k, d), as Conv1D does, instead of (d, d_k)."""
        return is_transposed(self.projection(layer))

    def weight(self, layer: int) -> torch.Tensor:  # (d, d_k)
        """The projection's weight as (d, d_k): a view, so that writing to it changes the model.

        Raises:
            WrongModel: It is not stored as a plain floating-point matrix, or not in memory.
        """
        module, name = self.projection(layer), self.projection_name(layer)
        stored = {**module._parameters, **module._buffers}.get("weight")
        shape = self._shape(layer)
        expected = shape if self.weight_is_transposed(layer) else (shape or ())[::-1]
        if stored is not None and stored.is_meta:
            raise WrongModel(
                f"The weight of {name} is not in memory (device meta); load the model without "
                "offloading the layers to edit."
            )
        if stored is None and isinstance(getattr(module, "base_layer", None), nn.Module):
            raise WrongModel(
                f"{name} ({type(module).__name__}) adds an adapter to its weight, so an edit of "
                "the weight alone is not what the model uses; call merge_and_unload() first."
            )
        if stored is None:
            what = "no plain weight of its own"
        elif type(stored) not in (nn.Parameter, torch.Tensor):
            what = f"a weight of type {type(stored).__name__}"
        elif not stored.is_floating_point() or stored.element_size() < 2:
            what = f"a weight in {str(stored.dtype).removeprefix('torch.')}"
        elif tuple(stored.shape) != expected:
            what = f"a weight of shape {tuple(stored.shape)} where {expected} belongs"
        else:
            view = stored.detach()
            return view.t() if self.weight_is_transposed(layer) else view
        raise WrongModel(
            f"{name} ({type(module).__name__}) has {what}, so it cannot be edited; load the model "
            "in floating point (float32, bfloat16 or float16), without quantisation."
        )

    @isolated()
    def adds_plainly(self, layer: int) -> bool:
        """Whether the block adds its projection's output to its stream as it is, by measurement."""
        key = ("response", layer)
        if key not in self.measured:
            probe = torch.linspace(-3, 3, 4 * self.d, device=self.device).sin()
            probe = probe.reshape(4, self.d)
            with evaluation_mode(self.model):
                change, share = inverse(BlockMap(self, layer, self._any_rows(4)), probe, probe.flip(0))
            self.measured[key] = torch.equal(change.to(probe), probe.flip(0)), bool((share == 1).all())
        return bool(self.measured[key][0])

    def moves_freely(self, layer: int) -> bool:
        """Whether the projection can move its block's output by anything, by measurement: it is added, scaled or not.

        Behind a norm it cannot, since the length of what comes out is given.
        """
        return self.adds_plainly(layer) or bool(self.measured["response", layer][1])

    @isolated()
    def reach(self, layer: int) -> float:
        """How far the projection can move its block's output, as a measured share of it; it compares layers."""
        self.check_constant()  # before anything runs the model
        key = ("reach", layer)
        if key not in self.measured:
            # Outputs that are large in every coordinate go in, with either sign: half of the way between what comes
            # out, over the length of what the block puts out now.
            probe = torch.full((4, self.d), PROBE, device=self.device)
            probe[:, 1::2] *= -1
            with evaluation_mode(self.model):
                block = BlockMap(self, layer, self._any_rows(4))
                up, down, now = block(probe), block(-probe), block(None)
            share = (up - down).norm(dim=1) / 2 / now.norm(dim=1)
            self.measured[key] = float(share.median())
        return float(self.measured[key])

    def _any_rows(self, count: int) -> list[list[int]]:
        """Rows of four arbitrary tokens."""
        head: Any = self.lm_head
        size = int(head.weight.shape[0])
        return [[(7 * n + 13 * k + 3) % size for k in range(4)] for n in range(count)]

    @isolated()
    def projection_residual(
        self,
        layer: int,
        output: torch.Tensor,  # (B, d)
        residual: torch.Tensor,  # (B, d)
        rows: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:  # (B, d)
        """What to add to the projection's output (B, d) so that the block's output moves by `residual` (B, d).

        For most architectures the residual itself, which is measured once a layer; see
        `inverse`.

        Args:
            layer: The edited layer.
            output: The projection's output now.
            residual: By how much the block's output shall move.
            rows: The token ids up to where each output is of; None takes arbitrary ones, which is right as long as what
                the block does behind its MLP does not depend on them.

        Raises:
            BadLayer: The block's output cannot be moved so, not even by a tenth; or it depends on tokens that were not
                given.
        """
        if self.adds_plainly(layer):
            return residual
        named = rows is not None
        rows = self._any_rows(len(output)) if rows is None else rows
        with evaluation_mode(self.model):
            block = BlockMap(self, layer, rows)
            change, share = inverse(block, output, residual)
            if not named:  # what the change does here, and what among the same tokens in another order
                other = BlockMap(self, layer, [row[::-1] for row in rows])
                here, there = (f(output + change) - f(output) for f in (block, other))
                if float((there - here).norm()) > ROWS_MATTER * float(here.norm()):
                    raise BadLayer(
                        f"What {type(self.block(layer)).__name__} {layer} makes of its projection's output depends on "
                        "the tokens; name them (rows=...)."
                    )
        reached = float(share.mean())
        if reached < REFUSED:
            raise BadLayer(
                f"Layer {layer} cannot carry the change: its block's output would go {reached:.2f} "
                f"of the way, for {type(self.block(layer)).__name__} normalises or closes what its "
                "projection puts out; edit other layers (layers=...), or use the method rome."
            )
        if reached < WARNED:
            log.warning(
                "layer %d reaches %.2f of the wanted change (mean of %d facts; the lowest %.2f), because its block "
                "normalises what its projection puts out; later layers and other layers may carry more",
                *(layer, reached, len(share), float(share.min())),
            )
        return change

    @property
    def lm_head(self) -> nn.Module:
        """The map from hidden states to logits, tied to the embeddings or not.

        Raises:
            UnknownArchitecture: The model has none.
        """
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module):
            raise UnknownArchitecture(
                f"{type(self.model).__name__} has no output head, so it gives no probabilities; "
                "load it with AutoModelForCausalLM."
            )
        return head

    @property
    def max_context(self) -> int:
        """How many tokens to run at once: the config's limit, at most 2048.

        Models state limits such as 131072, which nobody wants to allocate for a covariance.
        """
        return min(context_limit(self.model) or CONTEXT_LIMIT, CONTEXT_LIMIT)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embeddings."""
        return input_device(self.model)

    def run(self, **inputs: Any) -> Any:
        """The model's output, without the optional inputs that it does not know."""
        with skinny_products(self.model):
            return self.model(**accepted(self.model, inputs))

    @property
    def traits(self) -> Traits:
        """What batched and shortened runs of the model may rely on, as measured on it."""
        if "traits" not in self.measured:
            self.measured["traits"] = traits(self.model)
        found: Traits = self.measured["traits"]
        return found

    def check_constant(self) -> None:
        """Refuse a model whose forward changes its own weights, as RWKV's first one does.

        Raises:
            UnknownArchitecture: It does.
        """
        if torch.is_inference_mode_enabled():
            return
        name = traits(self.model).changed
        if name is not None:
            way = "use another model"
            if hasattr(text_config(self.model), "rescale_every"):
                way = "load it with rescale_every=0 in its config"
            raise UnknownArchitecture(
                f"{type(self.model).__name__} changes its own weights as it runs ({name}), so "
                f"no edit of them could be undone or saved; {way}."
            )

    def check_causal(self) -> None:
        """Refuse a model that cannot be scored or edited as one that predicts the next token.

        Raises:
            UnknownArchitecture: A later token changes what the model says at an earlier one.
        """
        self.look()
        if self.traits.causal:
            return
        config = text_config(self.model)
        fix = "use a model that predicts the next token"
        if getattr(config, "use_bidirectional_attention", False):
            fix = "load it with use_bidirectional_attention=False in its config"
        elif getattr(config, "is_decoder", True) is False:
            fix = "load it with is_decoder=True in its config"
        raise UnknownArchitecture(
            f"{type(self.model).__name__} is not causal: a later token changes what it says at an "
            f"earlier one, so it can be neither edited nor scored token by token; {fix}."
        )

    def module_at(self, layer: int, site: Site) -> nn.Module:
        """The module at whose output a target's change enters."""
        return self.block(layer) if site == "block" else self.projection(layer)

    @isolated()
    def check_targets(self, layers: Sequence[int]) -> None:
        """Refuse a model whose targets cannot be computed at these layers, before anything is paid for statistics.

        A few tokens run at each kind of block among them.

        Raises:
            UnknownArchitecture: The model is not causal, changes its own weights, or no change can enter at such a
                block.
        """
        self.check_constant()
        self.check_causal()
        named = {layer: self.block(layer).named_modules() for layer in sorted(layers)}
        kinds = {tuple((name, type(module)) for name, module in parts): layer for layer, parts in named.items()}
        with evaluation_mode(self.model, frozen=True):
            for layer in kinds.values():
                what = ("can be changed", self.template, layer)
                remembered(self.model, what, partial(_try_out, self, layer), weights=True)


def _try_out(adapter: ModelAdapter, layer: int) -> None:
    try:
        _check_change(adapter, layer, "block")
    except UnknownArchitecture as why:
        try:
            _check_change(adapter, layer, "projection")
        except UnknownArchitecture:
            raise why from why.__cause__
        log.warning("%s Only method rome can edit this layer.", why)


def _check_change(adapter: ModelAdapter, layer: int, site: Site) -> None:
    """Refuse a layer where no change can enter; where one block of each kind refuses, the whole model decides."""
    with suppress(UnknownArchitecture), one_of_each_kind(adapter.model, also=[layer]):
        _check_gradient(adapter, layer, site)
        return
    _check_gradient(adapter, layer, site)


def _check_gradient(adapter: ModelAdapter, layer: int, site: Site) -> None:
    """Refuse a site for whose output the logits of a few tokens have no gradient."""
    ids = probe_ids(adapter.model)[:6]
    module, what = adapter.module_at(layer, site), f"A change of what the {site} of layer {layer}"
    what = f"{what} of {type(adapter.model).__name__} puts out"
    entered: list[Tensor] = []

    def put(_module: nn.Module, _args: Any, out: Any) -> Any:
        states = token_states(out, (1, len(ids)), adapter.d, type(module).__name__)
        entered.append(states.detach().clone().requires_grad_(True))
        return with_hidden(out, entered[0].reshape(hidden_of(out).shape))

    try:
        with torch.enable_grad(), module.register_forward_hook(put), head_reads(adapter, [0], [len(ids) // 2]):
            logits = adapter.run(**pad_batch([ids], device=adapter.device), use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), entered)
    except (FastmemitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise UnknownArchitecture(f"{what} cannot be tried out ({why}); edit another model.") from error
    if bool((gradient[0, len(ids) // 2] == 0).all()):
        raise UnknownArchitecture(f"{what} does not reach the logits; edit another model.")


@isolated()
def inverse(f: BlockMap, outputs: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The change ``y' - y`` (B, d) of the projection's output y that moves a block's output by the residual r (B, d).

    Three kinds of map are told apart by what comes out. A block that adds the output as it is: the change is the
    residual. One that scales it by s: the residual over s. One that normalises it: with u = y / rms(y) and gains g,
    read off by a probe, all that can come out is ``g u`` with ``mean(u^2) = 1``; the u' of that ellipsoid is taken that
    is nearest to what is wanted, ``c = g u + r``, and a little to what is there (`_Norm.solve`). What is still missing
    is added to c and solved for again. Where a norm alone does not explain what comes out (Gemma 4 goes on with the
    sum), descent along the block's own gradients follows. Of each row the best y' is taken.

    The block is at the rows that the outputs y are of. Also given is the share of r that the change reaches (B,): the
    projection of the block's measured move on r, as a multiple of r. Both are zero for a row of which nothing better
    than no change was found, and the share is 1 where nothing is wanted.
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
        """The y' (B, d) that gives what is nearest to the present output plus `residual`.

        ``min ||g u' - c||^2 + nu ||u' - u||^2`` is ``u' = (g c + nu u) / (g^2 + nu + mu)``, mu by bisection; then ``y'
        = a u'`` with the a that makes y' nearest to y. (Dividing r by g asks nearly closed coordinates for everything,
        and the norm then shrinks all others away.)
        """
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
