"""From a hooked module, or what a caller hands in, to key rows and matrices; and torch as it must be meanwhile.

A key is the input of an edited projection at one token. This file is the only one that knows how to read a module: it
hooks the projections' inputs, and lets no forward pass run further than the last of them.

What is computed must not depend on where it was called from: a moment summed under autocast, or an edit written with
TF32 on, would be stored under the name of the right one. So `isolated` stands at every public entry point; nested, it
costs a few reads. `SkinnyProducts` is the one thing of torch that is not left as it is: products of few rows are ours.
"""

from __future__ import annotations

import difflib
import functools
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fastcov.errors import BadInput, FastcovError
from fastcov.kernels.cpu import native, skinny_kernel

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip

_cuda: Any = torch.cuda  # in part untyped
_C: Any = torch._C
_overrides: Any = torch.overrides
_AUTOCAST = tuple(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)
_UNSEEN = tuple(kind for kind in ("mps", "mtia") if kind in _AUTOCAST)
# torch's own values. Named by the attributes of torch.backends.cuda.matmul; older torch lacks some.
_CUDA_PRODUCTS = {
    "allow_fp16_reduced_precision_reduction": True,
    "allow_bf16_reduced_precision_reduction": True,
    "allow_fp16_accumulation": False,
}


_Function = TypeVar("_Function", bound=Callable[..., Any])


class isolated:
    """Torch as it is when it has just been imported, with gradients off unless asked for; a decorator or a context.

    Inside, autocast, inference mode, TF32 and other short products of float32 are off on every device, the default
    dtype is float32, the default device is the CPU, and reductions of 16-bit products are as torch has them by default.
    All of it is afterwards as it was, also after an exception. Gradients, inference mode, autocast and the default
    device are those of the running thread; the other settings are the whole process's.
    ``torch.use_deterministic_algorithms`` is left as it is: nothing here needs an operator that it forbids.

    It must not enclose a ``yield`` to a caller, whose settings are the caller's own; a decorated generator would not
    run inside it at all.
    """

    def __init__(self, *, gradients: bool = False) -> None:
        self._gradients = gradients
        self._before: bool | None = None  # whether gradients were on, once it is entered
        self._undo: list[Callable[[], object]] = []

    def __call__(self, function: _Function) -> _Function:
        """The function with each of its calls inside."""

        @functools.wraps(function)
        def inside(*args: Any, **named: Any) -> Any:
            each = isolated(gradients=self._gradients)
            # An interrupt can come as the inner one is left, before it could do anything: then the outer one does it.
            with each, each:
                return function(*args, **named)

        return cast(_Function, inside)

    def __enter__(self) -> None:
        try:
            if self._before is None:
                self._before = torch.is_grad_enabled()
                self._change()
        except BaseException:
            self._restore()
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._restore()
        if error is not None and self._before is not None:  # torch.no_grad may have been stopped as it was left
            torch.set_grad_enabled(self._before)
        self._before = None  # so that it can be entered again

    def _change(self) -> None:
        """Set what is not as it should be; how to undo it, once or twice, is noted before it is done."""
        undo = self._undo
        if torch.is_inference_mode_enabled():
            normal = torch.inference_mode(False)

            def inference_again() -> None:
                if not torch.is_inference_mode_enabled():
                    normal.__exit__(None, None, None)

            undo.append(inference_again)
            normal.__enter__()
        if torch.is_grad_enabled() is not self._gradients:
            undo.append(partial(torch.set_grad_enabled, not self._gradients))
            torch.set_grad_enabled(self._gradients)
        for kind in _AUTOCAST if _any_autocast() else ():
            if torch.is_autocast_enabled(kind):
                undo.append(partial(torch.set_autocast_enabled, kind, True))
                torch.set_autocast_enabled(kind, False)
        dtype = torch.get_default_dtype()
        if dtype is not torch.float32:
            undo.append(partial(torch.set_default_dtype, dtype))
            torch.set_default_dtype(torch.float32)
        # A default device is a mode on this stack; to ask for the device itself takes far longer.
        if torch._C._len_torch_function_stack() and torch.get_default_device().type != "cpu":
            cpu, depth = torch.device("cpu"), torch._C._len_torch_function_stack()

            def device_again() -> None:
                if torch._C._len_torch_function_stack() > depth:
                    cpu.__exit__(None, None, None)

            undo.append(device_again)
            cpu.__enter__()
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:  # newer settings contradict it
            precision = None
        if precision != "highest":
            undo.append(_precision_restorer(precision))
            if precision is not None:
                torch.set_float32_matmul_precision("highest")
            for where in _newer_settings():
                where.fp32_precision = "ieee"
        if _cuda.is_initialized():
            products: Any = torch.backends.cuda.matmul
            for name, value in _CUDA_PRODUCTS.items():
                if hasattr(products, name) and (before := getattr(products, name)) is not value:
                    if hasattr(products, split := f"{name}_split_k"):  # of newer torch, set together with it
                        before = (before, getattr(products, split))
                    undo.append(partial(setattr, products, name, before))
                    setattr(products, name, value)

    def _restore(self) -> None:
        try:
            while self._undo:
                self._undo[-1]()
                del self._undo[-1]  # not before it is done
        except BaseException:  # an interrupt comes once
            self._restore()
            raise


def _any_autocast() -> bool:
    """Whether one of `_AUTOCAST` may be on: asked of each in turn, it is most of what `isolated` costs."""
    # The first of these knows most kinds of device in one call, but not all.
    return torch._C._is_any_autocast_enabled() or any(torch.is_autocast_enabled(kind) for kind in _UNSEEN)


def _newer_settings() -> list[Any]:
    """Where torch 2.9 and newer keep the precision of float32 products, for each backend."""
    found = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [where for where in found if hasattr(where, "fp32_precision")]


def _precision_restorer(precision: str | None) -> Callable[[], None]:
    newer = [(where, where.fp32_precision) for where in _newer_settings()]

    def restore() -> None:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for where, before in newer:
            # "none" stands for what is set for the backend or for all of them, and so reads alike.
            where.fp32_precision = "none"
            if where.fp32_precision != before:
                where.fp32_precision = before

    return restore


class evaluation_mode:
    """No submodule trains inside, and, frozen, no parameter asks for a gradient; afterwards each is as it was before.

    Where something is raised inside, hooks that are new go (those of somebody else as well), a replaced ``forward``
    goes, and so does a `SkinnyProducts` that an interrupt left; modules, parameters and gradients have the modes that
    they had.
    """

    # An interrupt can come between the registration of a hook and the note of how to remove it, or just as a
    # context is left, before it could do anything; a hook that stays would make every later forward raise.
    # Only modules that train are touched: setting the mode of all of them took a tenth of planning one edit.

    def __init__(self, model: nn.Module, *, frozen: bool = False) -> None:
        self._frozen = frozen
        self._first = RemovableHandle.next_id  # hooks are numbered in the order in which they come
        self._modes = _C._len_torch_function_stack()
        self._gradients = torch.is_grad_enabled()
        self._modules = [(m, m.training, m.__dict__.get("forward")) for m in model.modules()]
        # Read off the modules, a shared one twice: model.parameters() takes several times as long.
        found = [module._parameters for module, _, _ in self._modules]
        self._parameters = [(p, p.requires_grad) for own in found for p in own.values() if p is not None]

    def __enter__(self) -> None:
        try:
            for module, training, _ in self._modules:
                if training:
                    module.training = False
            for parameter, asks in self._parameters if self._frozen else ():
                if asks:
                    parameter.requires_grad_(False)
        except BaseException as error:  # an interrupt
            self.__exit__(type(error), error, None)
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            torch.set_grad_enabled(self._gradients)  # torch.no_grad may be stopped as it is left
            while _C._len_torch_function_stack() > self._modes and isinstance(
                _overrides._get_current_function_mode(), SkinnyProducts
            ):
                _overrides._pop_mode()
            for module, _, forward in self._modules:
                for name in _HOOKS:
                    hooks: dict[int, object] = module.__dict__.get(name) or {}
                    for number in [each for each in hooks if each >= self._first]:
                        hooks.pop(number, None)
                if module.__dict__.get("forward") is not forward:
                    if forward is None:
                        del module.forward
                    else:
                        module.forward = forward
        for module, training, _ in self._modules:
            if (training or error is not None) and module.training is not training:
                module.training = training
        for parameter, asks in self._parameters if self._frozen or error is not None else ():
            if (asks or error is not None) and parameter.requires_grad is not asks:
                parameter.requires_grad_(asks)


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """The random states of Python, NumPy and torch, on every device, are afterwards as before.

    Inside, torch's generators begin with the seed; None leaves them where they are.
    """
    numpy: Any = sys.modules.get("numpy")  # who has not imported it has no state of it either
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices: list[Any] = [torch.cuda, torch.xpu]
    devices = [device for device in devices if device.is_initialized()]
    states = [(device, device.get_rng_state_all()) for device in devices]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    cpu = torch.get_rng_state()
    try:
        if seed is not None:
            # Not torch.manual_seed: what it notes down for a device that was never used comes
            # true when the caller first uses it.
            torch.default_generator.manual_seed(seed)
            for device in devices:
                device.manual_seed_all(seed)
            if mps is not None:
                torch.mps.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        for device, state in states:
            device.set_rng_state_all(state)
        if arrays is not None:
            numpy.random.set_state(arrays)
        random.setstate(python)


def key_rows(x: Tensor, mask: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """View keys as rows without ever copying them, in the order of the memory, each beside its mask entry.

    Keys x are (..., d_k). Of the mask (...), or of any shape with as many entries (some models flatten tokens before
    the projection), non-zero means kept. Where the strides allow no view of all, as in ``x[:, 1:]``, each entry of the
    outermost dimension is a piece of its own: one sequence of the batch.

    Yields:
        A view of rows (n, d_k), each row in one piece, and their mask as bool (n,) on the device of the mask, or None.

    Raises:
        BadInput: x is a scalar, or the mask is none or has another number of entries than x has rows.
    """
    x = matrix(x, "Keys") if not isinstance(x, Tensor) or x.layout is not torch.strided else x
    if x.dim() == 0:
        raise BadInput("Keys must have shape (..., d_k) but are a scalar; pass the projection's input.")
    if mask is not None:
        mask = _as_mask(mask)
        if mask.numel() * x.shape[-1] != x.numel():
            raise BadInput(
                f"A mask of shape {tuple(mask.shape)} does not fit keys of shape {tuple(x.shape)}; "
                "it needs one entry for each row."
            )
        mask = mask.to(torch.bool).reshape(x.shape[:-1])
    if x.dim() > 2:
        order = sorted(range(x.dim() - 1), key=x.stride, reverse=True)
        x = x.permute(*order, x.dim() - 1)
        mask = None if mask is None else mask.permute(order)
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


def matrix(x: Any, name: str, *, meta: bool = False) -> Tensor:
    """A floating-point tensor of what a caller gave, without its gradient, which is read and never written to.

    It may be a dense tensor of any shape and strides, on the meta device only where `meta` says so, or a NumPy array,
    which gives a tensor on the CPU that shares its memory where possible. A message begins with `name`.

    Raises:
        BadInput: It is something else, or its entries are not real floating-point numbers.
    """
    found = x if isinstance(x, Tensor) else _from_array(x, name)
    if found.layout is not torch.strided or found.is_nested:
        layout = "nested" if found.is_nested else str(found.layout).removeprefix("torch.")
        raise BadInput(f"{name} must be a dense tensor, not {layout}; call its to_dense().")
    if found.is_meta and not meta:
        raise BadInput(f"{name} cannot lie on the device meta, which holds no numbers; load it.")
    if not found.is_floating_point():
        raise BadInput(
            f"{name} must be of real floating-point numbers, not "
            f"{str(found.dtype).removeprefix('torch.')}; convert to float64."
        )
    return found.detach() if found.requires_grad else found


def square(x: Any, name: str, *, meta: bool = False) -> Tensor:
    """As `matrix`, of shape (d, d) with d at least 1; another shape is BadInput."""
    found = matrix(x, name, meta=meta)
    if found.dim() != 2 or found.shape[0] != found.shape[1] or found.shape[0] == 0:
        raise BadInput(f"{name} must be a square matrix but has shape {tuple(found.shape)}; pass (d, d).")
    return found


def _from_array(x: Any, name: str) -> Tensor:
    numpy: Any = sys.modules.get("numpy")  # who has not imported it has no array
    if numpy is None or not isinstance(x, (numpy.ndarray, numpy.floating)):
        mean = hasattr(type(x), "second_moment")
        fix = "pass its second_moment" if mean else "pass a torch tensor or a NumPy array"
        raise BadInput(f"{name} must be a matrix of numbers, not a {type(x).__name__}; {fix}.")
    if isinstance(x, numpy.ma.MaskedArray):
        raise BadInput(f"{name} must have all entries, not be a masked array; call filled().")
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise BadInput(f"{name} must be of real floating-point numbers, not an array of {x.dtype}; convert to float64.")
    # Torch knows neither negative strides nor the other order of bytes.
    plain = numpy.ascontiguousarray(x, x.dtype.newbyteorder("=")).reshape(x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an array is read-only; it is only read
        return torch.from_numpy(plain)


def shares_entries(x: Tensor) -> bool:
    """Whether two entries of a matrix are the same place in memory, as in an expanded one."""
    (rows, columns), (down, right) = x.shape, x.stride()
    if right == 1 and down >= columns:  # the usual layout, answered first
        return False
    if rows < 2 or columns < 2:
        return (rows > 1 and down == 0) or (columns > 1 and right == 0)
    if not (down and right):
        return True
    common = math.gcd(down, right)
    # Going `right / common` rows down leads where going `down / common` columns to the right does.
    return right // common < rows and down // common < columns


def input_device(model: nn.Module) -> torch.device:
    """Where a model's token ids go: where its input embeddings are, or accelerate will bring their input."""
    whole: Any = model  # of transformers, or of any other kind
    try:
        first: nn.Module = whole.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        first = model
    parameter = next(chain(first.parameters(), model.parameters()), None)
    if parameter is not None and parameter.device.type != "meta":
        return parameter.device
    target = getattr(getattr(first, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if target is None else target)


class KeyHooks:
    """Reads the inputs of named modules during a forward pass that ends before the last of them computes anything.

    Hooks are removed on leaving the context, whatever happened inside.

    Example:
        >>> with KeyHooks(model, ["layers.0.mlp.down_proj"], print) as hooks:
        ...     hooks.run({"input_ids": ids, "attention_mask": mask})

    Args:
        model: The model, called as ``model(**batch)``.
        modules: Paths of the modules, as in ``model.named_modules()``.
        on_keys: Called as ``on_keys(path, x)`` with the module's input x (..., d_k), the model's own tensor: copy it.

    Raises:
        BadInput: A path is not in the model.
        ValueError: No path at all, or two paths that are the same module.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str], on_keys: Callable[[str, Tensor], None]) -> None:
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
                raise BadInput(_unknown(path, known))
            for other, module in self._targets.items():
                if module is known[path]:
                    raise ValueError(f"The paths {other!r} and {path!r} are the same module; name it once.")
            self._targets[path] = known[path]
        self._handles: list[RemovableHandle] = []
        self._fired: set[str] = set()
        self._running = False

    def __enter__(self) -> KeyHooks:
        if self._handles:
            raise FastcovError("These hooks are on the model already; enter the context once.")
        for path, module in self._targets.items():
            # Registered last and with keywords: the key is the input after every other pre-hook had
            # its way, wherever the caller puts it.
            hook = module.register_forward_pre_hook(self._hook(path), with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @isolated()
    def run(self, batch: Mapping[str, Any], inside: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Run the model on one batch, its keyword arguments, up to the last hooked module, without gradients.

        Args:
            batch: The keyword arguments.
            inside: Makes a context for the forward pass alone, such as autocast, of which nothing else here has any.

        Raises:
            BadInput: The forward pass ended and a hooked module was never called.
            FastcovError: The hooks are not on the model, or a module was called twice before the last one was reached.
            _Reached: By other hooks around these, for whom it is.
        """
        if not self._handles:
            raise FastcovError("The hooks are not on the model; use KeyHooks in a with statement.")
        self._fired.clear()
        self._running = True
        try:
            with inside():
                self._model(**batch)
        except _Reached as reached:
            if reached.by is not self:
                raise
        finally:
            self._running = False
        if missing := [path for path in self._targets if path not in self._fired]:
            raise BadInput(
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
            self._on_keys(path, x.detach())
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
    hint = f"did you mean {' or '.join(map(repr, near))}?"
    none = "look at model.named_modules() for the paths that exist."
    return f"The model has no module {path!r}; {hint if near else none}"


# -- products of few rows --------------------------------------------------------------------------------------------
#
# Such a product reads a whole matrix from memory for a handful of rows. A library packs the matrix first, as it must
# for many rows, and here that takes most of the time. `SkinnyProducts` puts kernels of our own (csrc/cpu/skinny.h) in
# its place, forwards and backwards, for as long as it is entered (measured: docs/results/performance.md).

_SMALLEST = 1 << 16  # numbers of a matrix, below which a call costs more than it saves
_PLAIN = (Tensor, nn.Parameter)


def skinny_products(model: nn.Module) -> AbstractContextManager[object]:
    """`SkinnyProducts`, or nothing where no matrix of the model could use it."""
    if skinny_kernel() is not None:
        for parameter in model.parameters():
            if parameter.dtype is torch.float32 and parameter.device.type == "cpu" and parameter.numel() >= _SMALLEST:
                return SkinnyProducts()
    return nullcontext()


class SkinnyProducts(TorchFunctionMode):
    """Inside, ``linear`` and ``addmm`` of few rows of float32 on a CPU are computed by our kernels.

    Matrices that ask for a gradient are left to torch, and so is whatever the kernels do not take. Results differ from
    torch's by rounding, and there is no gradient of a gradient. Of the running thread alone.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions."""
        if not kwargs:
            if func is nn.functional.linear and len(args) in (2, 3):
                x, weight, bias = (*args, None)[:3]
                if _takes(x, weight, bias, across=False):
                    y = _multiplied(x.reshape(-1, x.shape[-1]), weight, False).reshape(*x.shape[:-1], -1)
                    return y if bias is None else y + bias
            elif func is torch.addmm and len(args) == 3:
                bias, x, weight = args
                if _takes(x, weight, bias, across=True) and x.dim() == 2:
                    return _multiplied(x, weight, True) + bias
        return func(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    """x (m, k) with W: x W^T, or x W where `across`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, across: bool) -> Tensor:
        ctx.save_for_backward(weight)  # so that torch refuses to go back through one that was changed meanwhile
        ctx.across = across
        return product(x, weight, across=across)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if len(gradient) in _rows(across=not ctx.across):
            return product(gradient, weight, across=not ctx.across), None, None
        return gradient @ (weight.T if ctx.across else weight), None, None


_multiplied: Callable[[Tensor, Tensor, bool], Tensor] = _Product.apply


def product(x: Tensor, weight: Tensor, *, across: bool = False) -> Tensor:
    """``x W^T`` (m, n) of x (m, k) and W (n, k), or ``x W`` (m, k) of x (m, n) where `across`; float32, on the CPU.

    x has at least one row, and no more than the kernel can take; W's columns lie side by side. Nothing is checked but
    the number of rows: `SkinnyProducts` asks what fits before it calls.

    Raises:
        RuntimeError: x has more rows than the kernel takes.
    """
    kernel = skinny_kernel()
    assert kernel is not None
    x = x.contiguous()
    n, k = weight.shape
    y = x.new_empty(len(x), k if across else n)  # whatever torch's default dtype and device are
    native().cpu_skinny(
        variant=kernel.name, x=x.data_ptr(), x_stride=x.stride(0), m=len(x), w=weight.data_ptr(),
        w_stride=weight.stride(0), n=n, k=k, y=y.data_ptr(), across=across, threads=torch.get_num_threads(),
    )  # fmt: skip
    return y


def _rows(*, across: bool) -> range:
    """How many rows a product may have that is faster by our kernel."""
    kernel = skinny_kernel()
    return range(0) if kernel is None else kernel.across if across else kernel.along


def _takes(x: Any, weight: Any, bias: Any, *, across: bool) -> bool:
    """Whether the kernel takes the product of x (..., width) with this matrix, and a bias behind it."""
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or weight.dim() != 2 or not x.dim():
        return False
    out, width = reversed(weight.shape) if across else weight.shape
    plain = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(type(each) in _PLAIN and each.dtype is torch.float32 and each.device.type == "cpu" for each in plain)
        and (bias is None or bias.shape == (out,))
        and x.shape[-1] == width
        and weight.numel() >= _SMALLEST
        and x.numel() // width in _rows(across=across)
        and weight.stride(1) == 1
        and weight.stride(0) >= weight.shape[1]
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not _C._are_functorch_transforms_active()
    )
