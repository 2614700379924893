"""Run a model, or one block of it, and measure what a batched or a shortened run may rely on.

What a config says of a model (that it is causal, which kinds of state its layers keep) is not what decides: a few tiny
forwards do. Part of a model, or a batch of padded rows, stands for the whole model on one row only where both give the
same to rounding.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import weakref
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastcov.hooks import evaluation_mode, input_device, isolated
from fastmemit.errors import BadRequest, UnknownArchitecture

if TYPE_CHECKING:
    from fastmemit.models.adapter import ModelAdapter

Padding = Literal["unmasked", "masked", "none"]
Found = TypeVar("Found")
Ids = TypeVar("Ids", bound=Sequence[int])

_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_LONG, _SHORT, _CHANGED = 12, 7, 4  # tokens of the rows that are tried, and of a changed ending


# -- what goes in and comes out -----------------------------------------------------------------------


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder, or of the whole model where it is one; UnknownArchitecture if it has none."""
    config = getattr(model, "config", None)
    if config is None:
        raise UnknownArchitecture(
            f"{type(model).__name__} has no config; give a causal language model of transformers."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnknownArchitecture(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be edited."
        )
    read = getattr(config, "get_text_config", None)
    return read(decoder=True) if callable(read) else config


def context_limit(model: nn.Module) -> int | None:
    """The longest input that a model's config states, in tokens; None where it states none."""
    if getattr(model, "config", None) is None:
        return None
    config = text_config(model)
    for field in _LIMITS:
        limit = getattr(config, field, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def check_lengths(model: nn.Module, rows: Sequence[Sequence[int]], more: int = 0) -> None:
    """Refuse, by a BadRequest, rows of tokens that the model has no positions for, with `more` added to each."""
    limit = context_limit(model)
    longest = max((len(row) for row in rows), default=0) + more
    if limit is not None and longest > limit:
        raise BadRequest(
            f"A text comes to {longest} tokens but {type(model).__name__} takes {limit} at once; "
            "shorten the prompt or the subject."
        )


def pad_batch(
    rows: Sequence[Sequence[int]], side: str = "right", device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Rows of token ids, of any lengths, as one batch (n, L) for a model, padded on the "right" or the "left".

    What pads is masked, so any id of the vocabulary will do. Positions count a row's own tokens from 0 on either side.

    Raises:
        ValueError: `side` is neither.
    """
    if side not in ("right", "left"):
        raise ValueError(f"The padding side must be 'right' or 'left', not {side!r}.")
    width = max((len(row) for row in rows), default=0)
    starts = [0 if side == "right" else width - len(row) for row in rows]
    batch = place_rows(rows, starts, width)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def place_rows(rows: Sequence[Sequence[int]], starts: Sequence[int], width: int) -> dict[str, Tensor]:
    """Rows of token ids in a batch (n, width), each from a column of its own on; see `pad_batch`."""
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[index, start : start + len(row)] = torch.tensor(list(row), dtype=torch.int64)
        mask[index, start : start + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def packed(items: Iterable[Found], size: Callable[[list[Found]], float], most: float) -> list[list[Found]]:
    """Items in their order, in batches whose size is `most` at most; one item always goes."""
    batches: list[list[Found]] = [[]]
    for item in items:
        batches[-1].append(item)
        if len(batches[-1]) > 1 and size(batches[-1]) > most:
            batches.append([batches[-1].pop()])
    return batches if batches[0] else []


def length_batches(rows: Iterable[Ids], batch_tokens: int) -> list[list[Ids]]:
    """Rows of like lengths together, so that padding costs little, `batch_tokens` padded tokens in each at most.

    They come shortest first, and rows of equal length keep their order.
    """
    return packed(sorted(rows, key=len), lambda batch: len(batch) * len(batch[-1]), batch_tokens)


def hidden_of(output: Any) -> Tensor:
    """The hidden states (B, L, d) in a block's output, be it a tensor, a tuple or a ModelOutput; else a TypeError."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        first = next(iter(output.values()), None)
    else:
        first = output[0] if isinstance(output, (tuple, list)) and output else None
    if not isinstance(first, Tensor):
        raise TypeError(
            f"A block returned {type(output).__name__} without a tensor in first place; "
            "its hidden states cannot be found."
        )
    return first


def token_states(output: Any, shape: tuple[int, int], d: int, of: str) -> Tensor:  # (rows, L, d)
    """The hidden states in the output of a module, named `of`, one of width `d` for each token of a batch (rows, L).

    Some blocks flatten rows and tokens before their MLP: (rows * L, d).

    Raises:
        UnknownArchitecture: There are several states a token (Gemma 3n), or not one for every token (a routed expert).
    """
    hidden = output if isinstance(output, Tensor) else hidden_of(output)
    rows, length = shape
    if tuple(hidden.shape) not in {(rows, length, d), (rows * length, d)}:
        raise UnknownArchitecture(
            f"{of} handles a tensor of shape {tuple(hidden.shape)} for {rows} rows of {length} tokens, not one state "
            f"of width {d} a token, so it can be neither read nor changed at the subject."
        )
    return hidden.reshape(rows, length, d)


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same kind of object as `output`, with its hidden states replaced by `hidden`."""
    hidden_of(output)  # the same refusal for what cannot be read
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, dict):
        return type(output)(**{**output, next(iter(output)): hidden})
    if hasattr(output, "_replace"):  # a named tuple takes its fields one by one
        return output._replace(**{output._fields[0]: hidden})
    return type(output)((hidden, *output[1:]))


def replaced_output(
    module: nn.Module, shape: Sequence[int], value: Tensor, columns: int | Sequence[int] = 0
) -> AbstractContextManager[Any]:
    """Put `value` (rows, d) in place of a module's output at a token of each row of a batch (rows, tokens) inside."""
    rows = slice(None) if isinstance(columns, int) else torch.arange(shape[0])

    def put(_module: nn.Module, _args: object, out: object) -> object:
        hidden = hidden_of(out)
        changed = hidden.reshape(*shape, -1).clone()  # some blocks (OPT) flatten rows and tokens before their MLP
        changed[rows, columns] = value.to(changed)
        changed = changed.reshape(hidden.shape)
        return changed if hidden is out else with_hidden(out, changed)

    return module.register_forward_hook(put)


def accepted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without the optional ones that the model's forward does not know.

    BLOOM, MPT and Mamba count positions themselves; where padding stands they read from the mask.
    """
    known = inspect.signature(model.forward).parameters
    optional = {"position_ids", "use_cache"} - known.keys()
    return {name: value for name, value in inputs.items() if name not in optional}


# -- what may be relied on ----------------------------------------------------------------------------


def tolerance(model: Any) -> float:
    """The largest `difference` between two runs of a model that rounding alone can explain.

    In float32 it is a thousandth, hundreds of times what is seen. Half precision rounds every activation, and what
    reaches the logits of a deep model is several of its epsilons.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1}
    epsilons = [torch.finfo(dtype).eps for dtype in dtypes]
    if torch.backends.cuda.matmul.allow_tf32 and input_device(model).type == "cuda":
        epsilons.append(2.0**-10)
    return max(1e-3, 12 * max(epsilons, default=0.0))


def difference(got: Tensor, want: Tensor) -> float:
    """How far two results (rows, width) of a model are apart: the largest share of a row's length.

    A row's length is counted from its mean, because logits may share a large offset. What is not finite in `want` is
    left out: forbidden words, or a broken model, which is not judged here.
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


class ModelState:
    """What a model was when something was found out about it."""

    def __init__(self, model: Any) -> None:
        self._config = _config(model)
        self._modules = [(weakref.ref(module), _settings(module)) for module in model.modules()]
        self._weights = [_Seen(weight) for weight in model.parameters()]
        self._buffers = [_Seen(buffer) for buffer in model.buffers()]

    def holds(self, model: Any, *, weights: bool) -> bool:
        """Whether a model still has the same modules, settings and buffers and, if asked for, the same weights."""
        modules: list[nn.Module] = list(model.modules())
        return (
            self._config == _config(model)
            and len(modules) == len(self._modules)
            and all(ref() is m and was == _settings(m) for m, (ref, was) in zip(modules, self._modules, strict=True))
            and _same(self._weights, list(model.parameters()), written=weights)
            and _same(self._buffers, list(model.buffers()), written=True)
        )


class _Seen:
    """A tensor, where it lay and how often it had been written to."""

    def __init__(self, tensor: Tensor) -> None:
        # One that is offloaded is another object after each run.
        self._tensor = None if tensor.is_meta else weakref.ref(tensor)
        self._place, self._version = _place(tensor), _version(tensor)

    def is_still(self, tensor: Tensor, *, written: bool) -> bool:
        """Whether it is this one, in its place and, if `written` counts, with what was in it."""
        return (
            (self._tensor is None or self._tensor() is tensor)
            and self._place == _place(tensor)
            and (not written or tensor.is_meta or self._version == _version(tensor))
        )


def _same(seen: list[_Seen], tensors: list[Tensor], *, written: bool) -> bool:
    return len(seen) == len(tensors) and all(map(partial(_Seen.is_still, written=written), seen, tensors))


def _settings(module: Any) -> list[tuple[str, object]]:
    """What decides on how a module runs, beside its parts: plain attributes, hooks, a config, a forward of its own."""
    found: list[tuple[str, object]] = []
    for name, value in vars(module).items():
        if isinstance(value, dict):  # told apart first, and most are empty: a model has thousands of these
            if value and name.endswith("_hooks"):
                found.append((name, tuple(value)))
        elif isinstance(value, _PLAIN):
            if name != "training":
                found.append((name, value))
        elif name == "forward" or name.endswith("config"):
            found.append((name, id(value)))
        elif type(value) is tuple and {*_PLAIN}.issuperset(map(type, value)):
            found.append((name, value))
    return found


def _config(model: Any) -> str:
    config: Any = getattr(model, "config", None)
    as_dict = config.to_dict() if hasattr(config, "to_dict") else {}
    return f"{getattr(config, '_attn_implementation', None)} {as_dict}"


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to."""
    return 0 if tensor.is_inference() else tensor._version


def _place(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.device, tensor.shape, 0 if tensor.is_meta else tensor.data_ptr()


_PLAIN = (bool, int, float, str, type(None))

_found: weakref.WeakKeyDictionary[Any, dict[Hashable, tuple[ModelState, Any]]] = weakref.WeakKeyDictionary()


def remembered(model: Any, what: Hashable, measure: Callable[[], Found], *, weights: bool = False) -> Found:
    """What was measured on a model, once for as long as it stays what it was; with `weights`, its weights too."""
    found = _found.setdefault(model, {})
    if what not in found or not found[what][0].holds(model, weights=weights):
        value = measure()
        found[what] = ModelState(model), value
    result: Found = found[what][1]
    return result


@dataclass(frozen=True)
class Traits:
    """What batched and shortened runs of a model may rely on."""

    changed: str | None  # a weight that running the model changes
    causal: bool  # whether no token's output depends on later tokens
    right_padding: Padding  # what rows padded on the right need; see `padding`


@contextmanager
def one_of_each_kind(model: Any, also: Container[int] = ()) -> Iterator[None]:
    """Of blocks that are alike let the first one run, beside those numbered in `also`; the others hand on their input.

    Blocks are alike if their modules have the same classes, settings, constants and shapes of weights, whatever the
    weights. What a block lets one token see of another is the same for all of a kind, so a trial need not run each of
    them.
    """
    config = text_config(model) if getattr(model, "config", None) is not None else None
    depth = getattr(config, "num_hidden_layers", 0)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(part) for each in lists for block in each for part in block.modules()}
    fields = [v for v in config.to_dict().values() if isinstance(v, list | tuple) and len(v) == depth] if config else []
    with evaluation_mode(model), ExitStack() as stack:  # which also takes off what an interrupt leaves
        for blocks in lists:
            if id(blocks) in inner or len(blocks) != depth:  # experts, a vision tower
                continue
            seen: dict[str, dict[str, Any]] = {}
            for number, block in enumerate(blocks):
                kind = f"{_kind(block, number)} {[field[number] for field in fields]}"
                if kind in seen and number not in also:
                    stack.enter_context(forward_as(block, partial(_handed_on, seen[kind])))
                elif kind not in seen:
                    seen[kind] = {}
                    stack.enter_context(block.register_forward_hook(partial(_noted, seen[kind])))
        yield


def _kind(block: nn.Module, number: int) -> list[object]:
    """What two blocks have in common that are alike; their own numbers tell none apart."""
    kind: list[object] = []
    for name, part in block.named_modules():
        kind += [name, type(part)]
        for key, value in _settings(part):
            own = value == number and ("layer" in key or key.endswith(("idx", "index")))
            kind.append((key, "own number" if own else value))
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                kind.append((key, tensor.shape, tensor.dtype, tensor.device))
            if key in part._non_persistent_buffers_set and tensor is not None and not tensor.is_meta:
                # A constant, such as a mask, and no weight: what is in it tells blocks apart.
                kind.append(hashlib.blake2b(tensor.detach().contiguous().cpu().view(torch.uint8).numpy()).hexdigest())
    return kind


def _noted(last: dict[str, Any], _module: nn.Module, _args: Any, output: Any) -> None:
    last["output"] = output


def _handed_on(last: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """What a block of this kind returns, with the states that it was given in place of its own."""
    given, output = args[0] if args else kwargs["hidden_states"], last["output"]
    return given if isinstance(output, Tensor) else with_hidden(output, given)


@contextmanager
def forward_as(module: nn.Module, forward: Any) -> Iterator[None]:
    """Give a module another `forward`; one that a library set on the instance comes back after."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@isolated()
def traits(model: Any) -> Traits:
    """The traits of a model, by two tiny forwards where it is like most; see `is_causal` and `padding`."""
    return remembered(model, "traits", partial(_measure, model))


def _measure(model: Any) -> Traits:
    weights = dict(model.named_parameters())
    before = {name: w._version for name, w in weights.items() if not w.is_inference()}
    usual = False
    with suppress(Exception), one_of_each_kind(model):  # where a model cannot be run so, the whole decides
        usual = _is_usual(model, headless=True)
    usual = usual or _is_usual(model)
    changed = next((name for name, version in before.items() if weights[name]._version != version), None)
    if usual:
        return Traits(changed, True, "unmasked")
    return Traits(changed, is_causal(model), padding(model, "right"))


def _is_usual(model: Any, *, headless: bool = False) -> bool:
    """Whether one batch without a mask shows a model to be causal and indifferent to padding on the right."""
    long, short, other = probe_ids(model), probe_ids(model, _SHORT), _changed_ending(model)
    with evaluation_mode(model):
        alone = output_of(model, headless=headless, **_batch(model, [short]))[0]
        together = output_of(model, headless=headless, **_batch(model, [long, other, short], masked=False))
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
        first, second = (output_of(model, **_batch(model, [row]))[0, :kept] for row in (ids, _changed_ending(model)))
    return agrees(model, second, first)


@isolated()
def padding(model: Any, side: Literal["left", "right"]) -> Padding:
    """What rows of different lengths in one batch need so that each is run as if alone.

    Nothing (``"unmasked"``), where what pads a row is seen by none of its tokens; an attention mask (``"masked"``); or
    nothing helps, and rows of different lengths do not go together (``"none"``).
    """
    long, short = probe_ids(model), probe_ids(model, _SHORT)
    own = slice(len(short)) if side == "right" else slice(len(long) - len(short), None)
    forms: tuple[Padding, Padding] = ("unmasked", "masked")
    for part in (True, False):  # one block of each kind; where it cannot be run so, or disagrees, the whole decides
        with ExitStack() as stack:
            if part:
                stack.enter_context(suppress(Exception))
                stack.enter_context(one_of_each_kind(model))
            stack.enter_context(evaluation_mode(model))
            alone = output_of(model, headless=part, **_batch(model, [short]))[0]
            for form in forms:
                batch = _batch(model, [long, short], side, masked=form == "masked")
                if agrees(model, output_of(model, headless=part, **batch)[1, own], alone):
                    return form
    return "none"


def _batch(model: Any, rows: Sequence[Sequence[int]], side: str = "right", *, masked: bool = True) -> dict[str, Any]:
    batch = pad_batch(rows, side=side, device=input_device(model))
    if not masked:
        del batch["attention_mask"]
    return batch


def output_of(model: Any, *, headless: bool = False, **inputs: Any) -> Tensor:
    """Logits (rows, L, vocabulary); what enters the output head (rows, L, d), for a model without one or if asked for.

    Asked for, the head does not run.
    """
    inputs.setdefault("use_cache", False)
    seen: list[Tensor] = []

    def reached(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise Reached

    head = model.get_output_embeddings() if headless else None
    with nullcontext() if head is None else head.register_forward_pre_hook(reached), suppress(Reached):
        return hidden_of(model(**accepted(model, inputs)))
    return seen[0]


# -- one block as a function of what its projection puts out ------------------------------------------
#
# An edit changes what leaves the projection; a target says how the block's output shall move. Most blocks add the one
# to the stream as it is. Others scale it (MiniCPM, Granite, the gate of a shared expert), normalise it (Gemma, OLMo 2)
# or work on the sum as well (Gemma 4), and a list of names is never complete. So the map between the two is read off
# the block: what enters the block is kept, its projection's output is replaced, and what comes out is looked at.

_BATCH_TOKENS = 8192


class Reached(Exception):
    """All that was wanted has been seen; the rest of the forward is not needed."""


class _Run(NamedTuple):
    """One batch of rows: their numbers, the index of the last token of each, and what entered the block."""

    members: list[int]
    last: list[int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockMap:
    """One block as a function of its projection's output at the last token of each of B rows of token ids."""

    def __init__(self, adapter: ModelAdapter, layer: int, rows: Sequence[Sequence[int]]) -> None:
        self._block, self._projection = adapter.block(layer), adapter.projection(layer)
        half = next(self._projection.parameters()).element_size() < 4
        self._runs = []
        order = iter(sorted(range(len(rows)), key=lambda n: len(rows[n])))
        for batch in length_batches(rows, _BATCH_TOKENS):
            args, kwargs = _entering(adapter, self._block, batch)
            if half:
                args, kwargs = _in_float32(args), _in_float32(kwargs)
            self._runs.append(_Run([next(order) for _ in batch], [len(row) - 1 for row in batch], args, kwargs))
        if half:
            # On a copy in float32: what is looked at is small against the stream, and half precision would round it
            # away.
            name = next(n for n, part in self._block.named_modules() if part is self._projection)
            self._block = copy.deepcopy(self._block).float()
            self._projection = self._block.get_submodule(name)
        # As it is now: while targets are optimised another one stands in its place.
        self._forward = self._block.forward

    def __call__(self, outputs: Tensor | None) -> Tensor:
        """What leaves the block (B, d), in float32 or wider, with these outputs (B, d) of its projection or its own."""
        parts = []
        for run in self._runs:
            parts.append(self._run(run, None if outputs is None else outputs[run.members]))
        order = torch.tensor([n for run in self._runs for n in run.members])
        return torch.cat(parts)[torch.argsort(order).to(parts[0].device)]

    def _run(self, run: _Run, outputs: Tensor | None) -> Tensor:
        rows = torch.arange(len(run.members))
        # A block may write into what it is given.
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in run.args)
        kwargs = dict(run.kwargs)
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = kwargs["hidden_states"].clone()
        shape = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[:2]
        with nullcontext() if outputs is None else replaced_output(self._projection, shape, outputs, run.last):
            states = hidden_of(self._forward(*args, **kwargs))[rows, run.last]
        return states if states.dtype == torch.float64 else states.float()


@torch.no_grad()
def _entering(adapter: ModelAdapter, block: nn.Module, rows: Sequence[Sequence[int]]) -> Any:
    """What a block is called with when the model runs these rows: arguments by place, and by name."""
    seen = []

    def on_entry(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise Reached

    with block.register_forward_pre_hook(on_entry, with_kwargs=True), suppress(Reached):
        adapter.run(**pad_batch(rows, device=adapter.device), use_cache=False)
    return seen[0]


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _in_float32(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_in_float32(part) for part in value)
    return value


@contextmanager
def head_reads(adapter: ModelAdapter, rows: Sequence[int] | Tensor, columns: Sequence[int] | Tensor) -> Iterator[None]:
    """Let the model's output head see M positions, in these rows and columns of the batch, instead of every one.

    Inside, a forward returns logits (1, M, vocabulary), with whatever the model does to logits after its head (scaling,
    soft caps) done to them. Tensors on the head's device are read without waiting for it.

    Raises:
        UnknownArchitecture: The model does not call its output head.
    """
    chosen = [torch.as_tensor(places, dtype=torch.int64) for places in (rows, columns)]
    called = False

    def gather(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal called
        called = True
        row, column = (places.to(args[0].device) for places in chosen)
        return (args[0][row, column][None], *args[1:])

    with adapter.lm_head.register_forward_pre_hook(gather):
        yield
    if not called:
        raise UnknownArchitecture(
            f"{type(adapter.model).__name__} does not call {type(adapter.lm_head).__name__}, which it names as its "
            "output head, so its logits cannot be told from others; load it with AutoModelForCausalLM."
        )
