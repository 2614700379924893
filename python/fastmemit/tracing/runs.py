"""The clean, the corrupted and the restored runs of a batch, each token and block run once.

What is restored at one token of one layer reaches neither the tokens before it nor the blocks
below.  There the restored run is the corrupted one, so that run is done once and its states kept:
the attention keys and values of the earlier tokens, and the hidden states that leave each block. Every restored run
then begins at the restored layer and token, through the model's own code, as in `fastmemit.targets.suffix`; a model of
which such a part is not the whole is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from fastmemit.errors import FastmemitError, UnknownArchitecture
from fastmemit.logits import head_reads
from fastmemit.models import ModelAdapter, agrees, hidden_of, probe_ids, token_states, with_hidden
from fastmemit.request import EditRequest
from fastmemit.targets.rows import Row
from fastmemit.targets.suffix import PrefixLayer, align, forward_as
from fastmemit.tokens import pad_batch
from fastmemit.tracing.facts import TracedFact, probability
from fastmemit.tracing.noise import added_to_embeddings
from fastmemit.tracing.settings import Kind
from fastmemit.tracing.sites import replaced_output, restored_module


@dataclass(frozen=True)
class Spot:
    """One place to restore.

    Attributes:
        fact: The fact.
        position: The token, from the subject's first one on.
        noise: (samples, subject tokens, width) what the corrupted runs add to the subject.
    """

    fact: TracedFact
    position: int
    noise: Tensor

    @property
    def suffix(self) -> int:
        """Tokens from the restored one on."""
        return len(self.fact.ids) - self.position


class Runs:
    """The runs of n spots, `samples` corrupted rows each; rows of one spot lie together.

    Args:
        adapter: The model, in evaluation mode.
        spots: The spots, with equally many noise samples and S tokens from the restored one on, which stands in column
            P; earlier tokens to the left of it, padded on the left.
        kinds: What will be restored.

    Attributes:
        clean: (n,) probability of each answer in the clean run, float32.
        corrupted: (n, samples) the same with the subject hidden by noise.
    """

    def __init__(self, adapter: ModelAdapter, spots: Sequence[Spot], kinds: Sequence[Kind]) -> None:
        self._adapter = adapter
        self._samples = samples = spots[0].noise.shape[0]
        self._column = max(spot.position for spot in spots)
        self._suffix = spots[0].suffix
        rows = [Row(spot.fact.ids, spot.position) for spot in spots]
        ids, mask = (part.to(adapter.device) for part in align(rows, self._column, self._suffix))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self._answers = torch.tensor([spot.fact.answer for spot in spots])
        self.clean = self._run_clean(ids, mask, positions, kinds)
        self._ids, self._mask, self._positions = (part.repeat_interleave(samples, 0) for part in (ids, mask, positions))
        self._answers = self._answers.repeat_interleave(samples)
        self._noise = self._aligned_noise(spots)
        self.corrupted = self._run_corrupted()

    def _aligned_noise(self, spots: Sequence[Spot]) -> Tensor:  # (rows, P + S, width)
        noise = torch.zeros(*self._ids.shape, spots[0].noise.shape[-1])
        for number, spot in enumerate(spots):
            begin = self._column - spot.position + spot.fact.first
            rows = slice(number * self._samples, (number + 1) * self._samples)
            noise[rows, begin : begin + spot.noise.shape[1]] = spot.noise
        return noise.to(self._ids.device)

    def _run_clean(self, ids: Tensor, mask: Tensor, positions: Tensor, kinds: Sequence[Kind]) -> Tensor:
        """Probabilities; and what each module puts out at the restored token, in `_values`."""
        self._values: dict[tuple[Kind, int], Tensor] = {}  # (n, d) each

        def keep(place: tuple[Kind, int]) -> Any:
            def read(_module: nn.Module, _args: object, out: object) -> None:
                tokens = hidden_of(out).reshape(*ids.shape, -1)
                self._values[place] = tokens[:, self._column].clone()

            return read

        with ExitStack() as hooks:
            for kind in kinds:
                for layer in range(self._adapter.n_layers):
                    module = restored_module(self._adapter, kind, layer)
                    hooks.callback(module.register_forward_hook(keep((kind, layer))).remove)
            return self._probability(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)

    def _run_corrupted(self) -> Tensor:
        """Probabilities; and the states that restored runs begin with, in `_hidden` and `_kept`."""
        self._hidden: list[Tensor] = []  # per block its output, (rows, S, d)
        cache = DynamicCache()

        def keep(_module: nn.Module, _args: object, out: object) -> None:
            self._returns_tuple = isinstance(out, tuple)
            # A copy, so that the columns before it are freed.
            self._hidden.append(hidden_of(out)[:, self._column :].clone())

        with ExitStack() as hooks:
            for layer in range(self._adapter.n_layers):
                block = restored_module(self._adapter, "hidden", layer)
                hooks.callback(block.register_forward_hook(keep).remove)
            hooks.enter_context(added_to_embeddings(self._adapter, self._noise))
            found = self._probability(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=cache,
                use_cache=True,
            )
        earlier = slice(0, self._column)
        self._kept = [
            (entry.keys[:, :, earlier].clone(), entry.values[:, :, earlier].clone()) for entry in cache.layers
        ]
        return found.reshape(-1, self._samples)

    def restored(self, kind: Kind, first: int, last: int) -> Tensor:  # (n, samples)
        """Probabilities with the clean values of the layers `first` to `last` put back.

        Args:
            kind: What is restored.
            first: Lowest restored layer.
            last: Highest one, not below `first`.
        """
        begin = first + 1 if kind == "hidden" else first  # the first block that runs
        with ExitStack() as changes:
            for layer in range(begin):
                out = self._injected(kind, layer) if layer == begin - 1 else None
                block = restored_module(self._adapter, "hidden", layer)
                changes.enter_context(forward_as(block, self._passing(out)))
            shape = (self._ids.shape[0], self._suffix)
            for layer in range(begin, last + 1):
                module = restored_module(self._adapter, kind, layer)
                value = self._value(kind, layer)
                changes.enter_context(replaced_output(module, shape, value))
            later = self._noise[:, self._column :]
            changes.enter_context(added_to_embeddings(self._adapter, later))
            found = self._probability(
                input_ids=self._ids[:, self._column :],
                attention_mask=self._mask,
                position_ids=self._positions[:, self._column :],
                past_key_values=self._cache(begin),
                use_cache=True,
            )
        return found.reshape(-1, self._samples)

    def _value(self, kind: Kind, layer: int) -> Tensor:  # (rows, d)
        return self._values[kind, layer].repeat_interleave(self._samples, 0)

    def _injected(self, kind: Kind, layer: int) -> Tensor:  # (rows, S, d)
        """What leaves the last block that does not run."""
        if kind != "hidden":
            return self._hidden[layer]
        value = self._value(kind, layer).to(self._hidden[layer])
        return torch.cat([value[:, None], self._hidden[layer][:, 1:]], dim=1)

    def _passing(self, out: Tensor | None) -> Any:
        """A block's forward that does nothing, or puts out a given state."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            given = hidden_states if out is None else out
            return (given,) if self._returns_tuple else given

        return forward

    def _cache(self, begin: int) -> Cache:
        # The model asks the first layer how long the past is; the passed-through layers answer with
        # a tensor of that length that has no memory behind it.
        empty = self._hidden[0].new_zeros(()).expand(self._ids.shape[0], 1, self._column, 1)
        below = [PrefixLayer(empty, empty) for _ in range(begin)]
        return Cache(layers=below + [PrefixLayer(k, v) for k, v in self._kept[begin:]])

    def _probability(self, **call: Any) -> Tensor:  # (rows,)
        """Run the model; probabilities of the answers, read at the last column."""
        rows, columns = call["input_ids"].shape
        with head_reads(self._adapter, range(rows), [columns - 1] * rows):
            logits = self._adapter.run(**call).logits[0]
        return probability(logits, self._answers).cpu()


def check_tracing(adapter: ModelAdapter) -> None:
    """See once that runs which begin in the middle of a model are those of the whole model.

    Some tokens run with noise at the first two and one clean state put back at a later one: in part and beside a
    shorter row, and whole and alone.

    Args:
        adapter: The model, in evaluation mode.

    Raises:
        UnknownArchitecture: The model is not causal, or the two differ by more than rounding.
    """
    if adapter.measured.get("traced in part"):
        return
    adapter.check_causal()
    ids = probe_ids(adapter.model)
    layer, position = adapter.n_layers // 2, len(ids) // 2
    model: Any = adapter.model
    embeddings = model.get_input_embeddings().weight.detach()
    wave = torch.linspace(-1, 1, embeddings.shape[1]) * float(embeddings.float().std())
    noise = wave.repeat(1, 2, 1)  # (1 sample, 2 tokens, width)
    request = EditRequest("{}", "a", "b")  # a fact's words are not read here, its tokens are
    spots = [
        Spot(TracedFact(request, row, 0, 1, ids[-1]), position - len(ids) + len(row), noise) for row in (ids, ids[2:])
    ]
    heads: list[Tensor] = []
    handle = adapter.lm_head.register_forward_hook(lambda _m, _a, out: heads.append(out[0, 0]))
    try:
        _whole(adapter, ids, position, layer, noise)
        want = heads[-1]
        Runs(adapter, spots, ("hidden",)).restored("hidden", layer, layer)
        why = "is off by more than rounding"
        same = agrees(adapter.model, heads[-1][None], want[None])
    except (FastmemitError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a model makes of kept states is its own affair
        why, same = f"fails ({type(error).__name__}: {str(error)[:200]})", False
    finally:
        handle.remove()
    if not same:
        raise UnknownArchitecture(
            f"Causal tracing runs part of a model for each state that it restores, and part of "
            f"{type(adapter.model).__name__} {why}, so it cannot be traced; choose layers by the "
            "scores of edits instead."
        )
    adapter.measured["traced in part"] = True


def _whole(adapter: ModelAdapter, ids: tuple[int, ...], position: int, layer: int, noise: Tensor) -> None:
    """The restored run as it is defined: every token through every block."""
    block = adapter.block(layer)
    clean: list[Tensor] = []

    def restore(_module: nn.Module, _args: object, out: object) -> object:
        states = token_states(out, (1, len(ids)), adapter.d, type(block).__name__).clone()
        if not clean:
            clean.append(states[0, position])
            return None
        states[0, position] = clean[0]
        return with_hidden(out, states.reshape(hidden_of(out).shape))

    added = torch.zeros(1, len(ids), noise.shape[-1])
    added[:, : noise.shape[1]] = noise
    batch = pad_batch([ids], device=adapter.device)
    handle = block.register_forward_hook(restore)
    try:
        for change in (torch.zeros_like(added), added):
            with added_to_embeddings(adapter, change), head_reads(adapter, [0], [len(ids) - 1]):
                adapter.run(**batch, use_cache=False)
    finally:
        handle.remove()
