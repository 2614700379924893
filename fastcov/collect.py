"""One pass over a corpus: a second moment for each named module, each from exactly its budget."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.errors import BadBudget, BudgetNotMet, EmptyCorpus, NonFiniteKeys, WrongWidth
from fastcov.keys import KeyHooks
from fastcov.moments import SecondMoment

logger = logging.getLogger(__name__)


def collect(
    model: nn.Module,
    modules: Sequence[str],
    batches: Iterable[Mapping[str, Any]],
    budget: int | Mapping[str, int] | None,
    *,
    allow_fewer: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, SecondMoment]:
    """Collect the second moments of several modules' inputs in one pass.

    Every token that the attention mask keeps is a key, the first of a document included. The moment
    of each module is ``sum of k k^T`` over its first `budget` keys in the order of the batches, row
    by row: C_0 of equation (2) of arXiv 2506.04226 once divided by the count. Collect on the
    unedited model. Each forward pass ends before the last of the modules computes anything, and no
    batch is read after all budgets are met.

    The model runs without gradients, without a key-value cache and in evaluation mode; every
    submodule is in its former mode afterwards, and no hook stays behind.

    Args:
        model: Called as ``model(**batch)``.
        modules: Paths of the projections, as in ``model.named_modules()``.
        batches: Keyword arguments of the model, with ``attention_mask`` (B, L) where tokens are
            padded (see `fastcov.bucket`). Tensors are moved to the device of the input embeddings.
        budget: How many keys, for all modules or one number for each; None takes all there are.
        allow_fewer: Accept a corpus that ends before the budget, with a warning.
        dtype: Of the sums, float32 or float64.
        progress: Called after each batch with the number of keys that it gave to the module that
            took most.

    Returns:
        A moment for each module, in the order given, on the device of that module's input.

    Raises:
        BadBudget: A budget that is not a whole number above 0, or none for one of the modules.
        EmptyCorpus: There was no key at all.
        BudgetNotMet: There were fewer keys than wanted, and `allow_fewer` is off.
        NonFiniteKeys: Keys hold NaN or infinity, or their squares overflow the sum.
        WrongWidth: A module's input is not as wide as the module, or changes its width.
        UnknownModule: A path is not in the model.
        HookNeverRan: A module was never called.
    """
    wanted = _budgets(modules, budget)
    taker = _Taker(model, wanted, dtype)
    with (
        KeyHooks(model, modules, taker.take) as hooks,
        torch.no_grad(),
        _evaluation(model),
        _without_cache(model) as extra,
    ):
        device = _input_device(model)
        drop = _unaccepted(model)
        for batch in batches:
            moved = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
                if name not in drop
            }
            taker.start(batch.get("attention_mask"))
            hooks.run({**moved, **extra}, mask=taker.mask)
            if progress is not None:
                progress(taker.took())
            if taker.done():
                break
    return taker.finish(allow_fewer)


class _Taker:
    """Cuts the keys of each module at its budget, and sums them."""

    def __init__(
        self, model: nn.Module, wanted: Mapping[str, int | None], dtype: torch.dtype
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._dtype = dtype
        self._moments: dict[str, SecondMoment] = {}
        self._batch = -1
        self._before: dict[str, int] = {}
        self.mask: Tensor | None = None

    def start(self, mask: Tensor | None) -> None:
        """Begin a batch with the mask of its tokens."""
        self._batch += 1
        self.mask = None if mask is None else mask.bool()
        self._before = {name: self._found(name) for name in self._wanted}

    def took(self) -> int:
        """How many keys the batch gave to the module that took most."""
        return max(self._found(name) - before for name, before in self._before.items())

    def take(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        """Add a module's keys x (..., d_k), as many as its budget leaves room for."""
        width = getattr(self._model.get_submodule(name), "in_features", None)
        moment = self._moments.get(name)
        expected = moment.d if moment is not None else width
        if isinstance(expected, int) and (x.dim() == 0 or x.shape[-1] != expected):
            raise WrongWidth(
                f"The input of {name!r} has shape {tuple(x.shape)} in batch {self._batch} but its "
                f"last dimension must be {expected}; name the projection whose input is the key."
            )
        if not x.is_floating_point():
            raise ValueError(
                f"The input of {name!r} is {x.dtype} and not floating point; name a projection."
            )
        limit = self._wanted[name]
        left = None if limit is None else limit - self._found(name)
        if left == 0:
            return
        mask = _first(mask, x.shape[:-1], left)
        if moment is None:
            moment = SecondMoment(x.shape[-1], dtype=self._dtype, device=x.device)
            self._moments[name] = moment
        moment.update(x, mask)
        # The diagonal of the sum holds the sums of squares: one bad number in any key shows there,
        # without a second look at the keys.
        if not bool(moment.lower.diagonal().isfinite().all()):
            raise NonFiniteKeys(self._bad(name, x, mask))

    def done(self) -> bool:
        """Whether every budget is met."""
        return all(
            limit is not None and self._found(n) >= limit for n, limit in self._wanted.items()
        )

    def finish(self, allow_fewer: bool) -> dict[str, SecondMoment]:
        """The moments, after the last batch."""
        if all(self._found(name) == 0 for name in self._wanted):
            raise EmptyCorpus(
                f"The corpus gave no key at all in {self._batch + 1} batches; "
                "pass documents with at least one token."
            )
        for name, limit in self._wanted.items():
            found = self._found(name)
            if limit is None or found >= limit:
                continue
            if not allow_fewer:
                raise BudgetNotMet(
                    f"The corpus has {found} keys for {name!r} but {limit} were wanted; pass more "
                    "text, a smaller budget, or allow_fewer=True.",
                    found=found,
                    wanted=limit,
                )
            logger.warning("only %d of the %d keys wanted for %s", found, limit, name)
        return {name: self._moments[name] for name in self._wanted}

    def _found(self, name: str) -> int:
        moment = self._moments.get(name)
        return 0 if moment is None else moment.count

    def _bad(self, name: str, x: Tensor, mask: Tensor | None) -> str:
        bad = ~x.isfinite().all(-1)
        if mask is not None:
            bad &= mask.to(x.device).reshape(bad.shape)
        rows = int(bad.sum())
        if rows == 0:
            return (
                f"The squares of the keys of {name!r} overflow {self._dtype} in batch "
                f"{self._batch} (largest key {float(x.abs().max()):.3g}); pass dtype=torch.float64."
            )
        return (
            f"{rows} of {bad.numel()} keys of {name!r} hold NaN or infinity in batch "
            f"{self._batch}; "
            "run the model in another dtype (bfloat16 or float32)."
        )


def _first(mask: Tensor | None, shape: torch.Size, left: int | None) -> Tensor | None:
    """The mask with only its first `left` kept entries, counted row by row."""
    if left is None:
        return mask
    if mask is None:
        if shape.numel() <= left:
            return None
        return (torch.arange(shape.numel()) < left).reshape(shape)
    if int(mask.sum()) <= left:
        return mask
    return mask & (mask.flatten().cumsum(0).reshape(mask.shape) <= left)


def _budgets(
    modules: Sequence[str], budget: int | Mapping[str, int] | None
) -> dict[str, int | None]:
    wanted: dict[str, int | None] = {}
    for name in [modules] if isinstance(modules, str) else modules:
        if isinstance(budget, Mapping) and name not in budget:
            raise BadBudget(f"There is no budget for the module {name!r}; add one.")
        keys = budget[name] if isinstance(budget, Mapping) else budget
        if keys is not None and (isinstance(keys, bool) or not isinstance(keys, int) or keys < 1):
            raise BadBudget(
                f"The budget of {name!r} must be a whole number of keys above 0 but is {keys!r}; "
                "see fastcov.budget."
            )
        wanted[name] = keys
    return wanted


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each submodule is in the mode that it was in before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[dict[str, Any]]:
    """No key-value cache: by argument where the model takes it, else by its configuration."""
    config: Any = getattr(model, "config", None)
    if "use_cache" in inspect.signature(model.forward).parameters:
        yield {"use_cache": False}
    elif hasattr(config, "use_cache"):
        before = config.use_cache
        config.use_cache = False
        try:
            yield {}
        finally:
            config.use_cache = before
    else:
        yield {}


def _unaccepted(model: nn.Module) -> set[str]:
    """Batch entries that the model has no argument for; some models count positions themselves."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return set()
    return {"position_ids"} - set(parameters)


def _input_device(model: nn.Module) -> torch.device:
    """Where the input embeddings are, or where a hook of accelerate will bring their input."""
    try:
        first: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        first = model
    device: torch.device = next(
        (parameter.device for parameter in (*first.parameters(), *model.parameters())),
        torch.device("cpu"),
    )
    if device.type == "meta":
        hook = getattr(first, "_hf_hook", None)
        target = getattr(hook, "execution_device", None)
        return torch.device("cpu" if target is None else target)
    return device
