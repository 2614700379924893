"""From a hooked module to key rows.

A key is the input of an edited projection at one token. This file is the only one that knows how to read a module: it
hooks the projections' inputs, and lets no forward pass run further than the last of them.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastcov.errors import BadInput, FastcovError, HookNeverRan, UnknownModule, WrongWidth
from fastcov.inputs import matrix
from fastcov.mode import isolated

OnKeys = Callable[[str, Tensor, Tensor | None], None]


def flatten_keys(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """View keys as rows.

    Rows and mask are permuted together where only that spares a copy (a transposed batch), so row i always belongs to
    mask entry i, but the rows need not be in row-major order. A copy is made only where the strides allow no view at
    all, as in ``x[:, 1:]``; `key_rows` makes none there either.

    Args:
        x: Keys, shape (..., d_k).
        mask: What to keep, shape (...) or any shape with as many entries (some models flatten tokens before the
            projection); non-zero means kept. None keeps all.

    Returns:
        The rows (n, d_k), and the mask as bool (n,) on the rows' device, or None.

    Raises:
        WrongWidth: x is a scalar, or the mask has another number of entries than x has rows.
    """
    x, mask = _outermost_first(x, mask)
    if mask is not None:
        mask = mask.to(x.device).reshape(-1)
    return x.reshape(-1, x.shape[-1]), mask


def key_rows(x: Tensor, mask: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """View keys as rows without ever copying them: in one piece where the strides allow it.

    Where they do not, as in ``x[:, 1:]``, each entry of the outermost dimension is a piece of its own: one sequence of
    the batch. As in `flatten_keys`, a row and its mask entry stay together and the order is that of the memory.

    Args:
        x: Keys, shape (..., d_k).
        mask: As in `flatten_keys`.

    Yields:
        A view of some rows (n, d_k) and their mask as bool (n,), on the device of the mask that was given, or None.
        Every row is in exactly one piece.

    Raises:
        WrongWidth: As in `flatten_keys`.
    """
    x, mask = _outermost_first(x, mask)
    pieces = [(x, mask)]
    while pieces:
        x, mask = pieces.pop()
        try:
            rows = x.view(x.shape[:-1].numel(), x.shape[-1])
        except RuntimeError:  # a matrix has a view always, so this ends
            masks = [None] * len(x) if mask is None else list(mask)
            pieces.extend(reversed(list(zip(x, masks, strict=True))))
        else:
            yield rows, None if mask is None else mask.reshape(-1)


def _outermost_first(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys (..., d_k) and mask (...) with dimensions in the order of the memory."""
    x = matrix(x, "Keys") if not isinstance(x, Tensor) or x.layout is not torch.strided else x
    if x.dim() == 0:
        raise WrongWidth("Keys must have shape (..., d_k) but are a scalar; pass the projection's input.")
    if mask is not None:
        mask = _as_mask(mask)
        if mask.numel() * x.shape[-1] != x.numel():
            raise WrongWidth(
                f"A mask of shape {tuple(mask.shape)} does not fit keys of shape {tuple(x.shape)}; "
                "it needs one entry for each row."
            )
        mask = mask.to(torch.bool).reshape(x.shape[:-1])
    if x.dim() > 2:
        order = sorted(range(x.dim() - 1), key=x.stride, reverse=True)
        x = x.permute(*order, x.dim() - 1)
        mask = None if mask is None else mask.permute(order)
    return x, mask


def _as_mask(mask: Any) -> Tensor:
    """A mask as a tensor of any real dtype, of an array too."""
    if not isinstance(mask, Tensor):
        numpy: Any = sys.modules.get("numpy")
        if numpy is None or not isinstance(mask, numpy.ndarray) or mask.dtype.kind not in "biuf":
            raise BadInput(
                f"A mask must be a tensor or a NumPy array but is a {type(mask).__name__}; "
                "convert it with torch.as_tensor."
            )
        return torch.from_numpy(mask != 0)
    if mask.layout is not torch.strided or mask.is_complex():
        raise BadInput(f"A mask must be a dense tensor of truth values but is {mask.layout}, {mask.dtype}; convert it.")
    return mask


class KeyHooks:
    """Reads the inputs of named modules during a forward pass that ends at the last of them.

    The pass ends before the last hooked module computes anything: neither its own product nor a module above it runs.
    Hooks are removed on leaving the context, whatever happened inside.

    Example:
        >>> with KeyHooks(model, ["layers.0.mlp.down_proj"], print) as hooks:
        ...     hooks.run({"input_ids": ids, "attention_mask": mask})

    Args:
        model: The model, called as ``model(**batch)``.
        modules: Paths of the modules, as in ``model.named_modules()``.
        on_keys: Called as ``on_keys(path, x, mask)`` with the module's input x (..., d_k) and the mask that `run` was
            given. It must not keep x without a copy: the tensor is the model's.

    Raises:
        UnknownModule: A path is not in the model.
        ValueError: No path at all, or two paths that are the same module.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str], on_keys: OnKeys) -> None:
        if isinstance(modules, str) or not modules:
            raise ValueError(
                f"modules must be a list of at least one module path but is {modules!r}; "
                'write ["model.layers.4.mlp.down_proj"], for example.'
            )
        self._model = model
        self._on_keys = on_keys
        self._targets: dict[str, nn.Module] = {}
        known = dict(model.named_modules(remove_duplicate=False))
        for path in modules:
            if path not in known:
                raise UnknownModule(_unknown(path, known))
            for other, module in self._targets.items():
                if module is known[path]:
                    raise ValueError(f"The paths {other!r} and {path!r} are the same module; name it once.")
            self._targets[path] = known[path]
        self._handles: list[RemovableHandle] = []
        self._fired: set[str] = set()
        self._mask: Tensor | None = None
        self._running = False

    @property
    def attached(self) -> int:
        """How many hooks are on the model now."""
        return len(self._handles)

    def __enter__(self) -> KeyHooks:
        """Put the hooks on."""
        if self._handles:
            raise FastcovError("These hooks are on the model already; enter the context once.")
        for path, module in self._targets.items():
            # Registered last and with keywords: the key is the input after every other pre-hook had
            # its way, wherever the caller puts it.
            hook = module.register_forward_pre_hook(self._hook(path), with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    @isolated()
    def run(self, batch: Mapping[str, Any], mask: Tensor | None = None) -> None:
        """Run the model on one batch, up to the last hooked module, without gradients.

        Args:
            batch: The model's keyword arguments.
            mask: Which tokens are keys, handed on to ``on_keys``; by default the batch's ``attention_mask`` where it
                has one.

        Raises:
            HookNeverRan: The forward pass ended and a hooked module was never called.
            FastcovError: The hooks are not on the model, or a hooked module was called twice before the last one was
                reached.
        """
        if not self._handles:
            raise FastcovError("The hooks are not on the model; use KeyHooks in a with statement.")
        self._mask = batch.get("attention_mask") if mask is None else mask
        self._fired.clear()
        self._running = True
        try:
            self._model(**batch)
        except _Reached as reached:
            if reached.by is not self:
                raise
        finally:
            self._running = False
            self._mask = None
        missing = [path for path in self._targets if path not in self._fired]
        if missing:
            raise HookNeverRan(
                f"The module {', '.join(map(repr, missing))} was never called in a complete "
                "forward pass; name the projection that the model really runs."
            )

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._running:  # somebody else's forward, while the hooks happen to be on
                return
            if path in self._fired:
                raise FastcovError(
                    f"The module {path!r} was called twice in one forward pass, so its keys cannot "
                    "be told apart; name modules that run once."
                )
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is None:
                raise FastcovError(f"The module {path!r} was called without a tensor; name a projection.")
            self._fired.add(path)
            self._on_keys(path, x.detach(), self._mask)
            if len(self._fired) == len(self._targets):
                raise _Reached(self)

        return hook


class _Reached(BaseException):
    """The last hooked module was reached. Not an Exception, so that no model catches it."""

    def __init__(self, by: KeyHooks) -> None:
        super().__init__("the last hooked module was reached")
        self.by = by


def _unknown(path: str, known: Mapping[str, nn.Module]) -> str:
    near = difflib.get_close_matches(path, [name for name in known if name], n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else ("look at model.named_modules() for the paths that exist.")
    )
    return f"The model has no module {path!r}; {hint}"
