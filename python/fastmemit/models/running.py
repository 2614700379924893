"""Run a model, and measure on it what a batched or a shortened run of it may rely on.

What a config says of a model (that it is causal, which kinds of state its layers keep) is not what
decides: a few tiny forwards do.  Part of a model, or a batch of padded rows, stands for the whole
model on one row only where both give the same to rounding.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastcov.hooks import evaluation_mode, isolated
from fastmemit.errors import BadRequest, UnknownArchitecture
from fastmemit.models.structure import text_config
from fastmemit.tokens import pad_batch

_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def context_limit(model: nn.Module) -> int | None:
    """The longest input that a model's config states, in tokens; None where it states none."""
    if getattr(model, "config", None) is None:
        return None
    config = text_config(model)
    stated = (getattr(config, field, None) for field in _FIELDS)
    return next((limit for limit in stated if isinstance(limit, int) and limit > 0), None)


def check_lengths(model: nn.Module, rows: Sequence[Sequence[int]], more: int = 0) -> None:
    """Refuse rows of tokens that the model has no positions for.

    Args:
        model: The model.
        rows: Token ids.
        more: Tokens that will be added to each.

    Raises:
        BadRequest: A row is too long; the message says by how much.
    """
    limit = context_limit(model)
    longest = max((len(row) for row in rows), default=0) + more
    if limit is not None and longest > limit:
        raise BadRequest(
            f"A text comes to {longest} tokens but {type(model).__name__} takes {limit} at once; "
            "shorten the prompt or the subject."
        )


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states (B, L, d) in a block's output, be it a tensor, a tuple or a ModelOutput.

    Raises:
        TypeError: The output holds no tensor in first place.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):
        first = next(iter(output.values()), None)
    else:
        first = output[0] if isinstance(output, (tuple, list)) and output else None
    if not isinstance(first, torch.Tensor):
        raise TypeError(
            f"A block returned {type(output).__name__} without a tensor in first place; "
            "its hidden states cannot be found."
        )
    return first


def token_states(output: Any, shape: tuple[int, int], d: int, of: str) -> torch.Tensor:  # (rows, L, d)
    """The hidden states in a module's output, one of width `d` a token.

    Some blocks flatten rows and tokens before their MLP: (rows * L, d).

    Args:
        output: What the module put out.
        shape: (rows, L) of the batch.
        d: The width.
        of: The module in words, for the error.

    Raises:
        UnknownArchitecture: There are several states a token (Gemma 3n), or not one for every token (a routed expert).
    """
    hidden = hidden_of(output)
    rows, length = shape
    if tuple(hidden.shape) not in {(rows, length, d), (rows * length, d)}:
        raise UnknownArchitecture(
            f"{of} handles a tensor of shape {tuple(hidden.shape)} for {rows} rows of {length} "
            f"tokens, not one state of width {d} a token, so it can be neither read nor changed at "
            "the subject."
        )
    return hidden.reshape(rows, length, d)


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """The same kind of object as `output`, with its hidden states replaced by `hidden`."""
    hidden_of(output)  # the same refusal for what cannot be read
    if isinstance(output, torch.Tensor):
        return hidden
    if isinstance(output, dict):
        first = next(iter(output))
        return type(output)(**{**output, first: hidden})
    if hasattr(output, "_replace"):  # a named tuple takes its fields one by one
        return output._replace(**{output._fields[0]: hidden})
    return type(output)((hidden, *output[1:]))


Padding = Literal["unmasked", "masked", "none"]
Found = TypeVar("Found")

_LONG, _SHORT, _CHANGED = 12, 7, 4  # tokens of the rows that are tried, and of a changed ending


def input_device(model: Any) -> torch.device:
    """Where a model's token ids go: the device of its input embeddings."""
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    # Weights offloaded by accelerate are on "meta" until their module runs.
    hook: Any = getattr(embeddings, "_hf_hook", None)
    if device.type == "meta" and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return device


def run_model(model: Any, **inputs: Any) -> Any:
    """What a model gives for some inputs, without the names that its forward does not know.

    BLOOM, MPT and Mamba count positions themselves; where padding stands they read from the mask.
    """
    known = inspect.signature(model.forward).parameters
    optional = {"position_ids", "use_cache"} - known.keys()
    return model(**{name: value for name, value in inputs.items() if name not in optional})


def tolerance(model: Any) -> float:
    """The largest `difference` between two runs of a model that rounding alone can explain.

    In float32 it is a thousandth, hundreds of times what is seen.  Half precision rounds every
    activation, and what reaches the logits of a deep model is several of its epsilons.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1}
    epsilons = [torch.finfo(dtype).eps for dtype in dtypes]
    if torch.backends.cuda.matmul.allow_tf32 and input_device(model).type == "cuda":
        epsilons.append(2.0**-10)
    return max(1e-3, 12 * max(epsilons, default=0.0))


def difference(got: Tensor, want: Tensor) -> float:
    """How far two results (rows, width) of a model are apart: the largest share of a row's length.

    A row's length is counted from its mean, because logits may share a large offset.  What is not
    finite in `want` is left out: forbidden words, or a broken model, which is not judged here.
    """
    got, want = got.detach().to(want.device).double(), want.detach().double()
    finite = want.isfinite()
    if not bool(got[finite].isfinite().all()):
        return float("inf")
    count = finite.sum(-1, keepdim=True).clamp(min=1)
    known = torch.where(finite, want, 0.0)
    centred = torch.where(finite, want - known.sum(-1, keepdim=True) / count, 0.0)
    off = torch.where(finite, got - want, 0.0).norm(dim=-1)
    share = torch.where(off > 0, off / centred.norm(dim=-1), 0.0)
    return float(share.max()) if share.numel() else 0.0


def agrees(model: Any, got: Tensor, want: Tensor) -> bool:
    """Whether two results (rows, width) of a model are the same to rounding."""
    return got.shape == want.shape and difference(got, want) <= tolerance(model)


def probe_ids(model: Any, length: int = _LONG) -> tuple[int, ...]:
    """Some token ids to try a model on, fewer where it takes fewer."""
    words = model.get_input_embeddings().weight.shape[0]
    length = min(length, context_limit(model) or length)
    return tuple((20 + 3 * place) % words for place in range(length))


class _State:
    """What a model was when something was found out about it."""

    def __init__(self, model: Any) -> None:
        self._modules = [(weakref.ref(module), _settings(module)) for module in model.modules()]
        self._config = _config(model)
        self._tensors = [(weakref.ref(tensor), _place(tensor), version) for tensor, version in _tensors(model)]

    def holds(self, model: Any, *, weights: bool) -> bool:
        """Whether a model still has the same modules and settings and, if asked for, the same weights."""
        modules, tensors = list(model.modules()), list(_tensors(model))
        return (
            self._config == _config(model)
            and len(modules) == len(self._modules)
            and all(ref() is m and was == _settings(m) for m, (ref, was) in zip(modules, self._modules, strict=True))
            and len(tensors) == len(self._tensors)
            and all(
                ref() is tensor and place == _place(tensor) and (was == now or not weights)
                for (tensor, now), (ref, place, was) in zip(tensors, self._tensors, strict=True)
            )
        )


def _settings(module: Any) -> list[tuple[str, object]]:
    """What decides on how a module runs, beside its parts: plain attributes, hooks, a forward of its own."""
    found: list[tuple[str, object]] = []
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, dict):
            found.append((name, tuple(value)))
        elif name == "forward":
            found.append((name, id(value)))
        elif name != "training" and isinstance(value, (bool, int, float, str, type(None))):
            found.append((name, value))
    return found


def _config(model: Any) -> str:
    config = getattr(model, "config", None)
    as_dict = config.to_dict() if hasattr(config, "to_dict") else {}
    return f"{getattr(config, '_attn_implementation', None)} {as_dict}"


def _tensors(model: Any) -> Iterator[tuple[Tensor, int]]:
    """The parameters of a model and how often each was written to."""
    for tensor in model.parameters():
        yield tensor, 0 if tensor.is_inference() else tensor._version


def _place(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.device, tensor.shape, 0 if tensor.is_meta else tensor.data_ptr()


_found: weakref.WeakKeyDictionary[Any, dict[Hashable, tuple[_State, Any]]] = weakref.WeakKeyDictionary()


def remembered(model: Any, what: Hashable, measure: Callable[[], Found], *, weights: bool = False) -> Found:
    """What was measured on a model, once for as long as the model stays what it was.

    Args:
        model: The model.
        what: What is measured.
        measure: Measures it.
        weights: Whether the result depends on the weights as well, so that an edit makes it void.
    """
    found = _found.setdefault(model, {})
    if what not in found or not found[what][0].holds(model, weights=weights):
        value = measure()
        found[what] = _State(model), value
    result: Found = found[what][1]
    return result


@dataclass(frozen=True)
class Traits:
    """What batched and shortened runs of a model may rely on.

    Attributes:
        changed: A weight that running the model changes, or None.
        causal: Whether no token's output depends on later tokens.
        right_padding: What rows padded on the right need; see `padding`.
    """

    changed: str | None
    causal: bool
    right_padding: Padding


@isolated()
def traits(model: Any) -> Traits:
    """The traits of a model, by two tiny forwards where it is like most; see `is_causal` and `padding`."""
    return remembered(model, "traits", lambda: _measure(model))


def _measure(model: Any) -> Traits:
    weights = dict(model.named_parameters())
    before = {name: w._version for name, w in weights.items() if not w.is_inference()}
    usual = _is_usual(model)
    changed = next((name for name, version in before.items() if weights[name]._version != version), None)
    if usual:
        return Traits(changed, True, "unmasked")
    return Traits(changed, is_causal(model), padding(model, "right"))


def _is_usual(model: Any) -> bool:
    """Whether one batch without a mask shows a model to be causal and indifferent to padding on the right."""
    long, short, other = probe_ids(model), probe_ids(model, _SHORT), _changed_ending(model)
    with evaluation_mode(model):
        alone = _output(model, [short])[0]
        batch = pad_batch([long, other, short], device=input_device(model))
        del batch["attention_mask"]
        together = hidden_of(run_model(model, **batch, use_cache=False))
    kept = max(len(long) - _CHANGED, 0)
    return agrees(model, together[1, :kept], together[0, :kept]) and agrees(model, together[2, : len(short)], alone)


def _changed_ending(model: Any) -> tuple[int, ...]:
    """The tokens of `probe_ids` with others at the end."""
    ids = probe_ids(model)
    kept = max(len(ids) - _CHANGED, 0)
    words = model.get_input_embeddings().weight.shape[0]
    return (*ids[:kept], *((token + words // 2) % words for token in ids[kept:]))


@isolated()
def is_causal(model: Any) -> bool:
    """Whether no token's output depends on later tokens: other ones behind it are tried."""
    ids = probe_ids(model)
    kept = len(ids) - _CHANGED
    if kept < 1:
        return True
    with evaluation_mode(model):
        first, second = (_output(model, [row])[0, :kept] for row in (ids, _changed_ending(model)))
    return agrees(model, second, first)


@isolated()
def padding(model: Any, side: Literal["left", "right"]) -> Padding:
    """What rows of different lengths in one batch need so that each is run as if alone.

    Returns:
        ``"unmasked"``: nothing, what pads a row is seen by none of its tokens; ``"masked"``: an attention mask;
        ``"none"``: nothing helps, rows of different lengths do not go together.
    """
    long, short = probe_ids(model), probe_ids(model, _SHORT)
    batch = pad_batch([long, short], side=side, device=input_device(model))
    own = slice(len(short)) if side == "right" else slice(len(long) - len(short), None)
    with evaluation_mode(model):
        alone = _output(model, [short])[0]
        free = {name: value for name, value in batch.items() if name != "attention_mask"}
        forms: list[tuple[Padding, dict[str, Tensor]]] = [("unmasked", free), ("masked", batch)]
        for name, inputs in forms:
            together = hidden_of(run_model(model, **inputs, use_cache=False))[1, own]
            if agrees(model, together, alone):
                return name
    return "none"


def _output(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:  # (rows, L, vocabulary)
    """Logits of rows of one length; the hidden states of a model without a head."""
    batch = pad_batch(rows, device=input_device(model))
    return hidden_of(run_model(model, **batch, use_cache=False))
