"""A model that an exception leaves as it was: without our hooks, in its modes."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class intact:
    """Where something is raised inside, the model has afterwards what it had before.

    An interrupt can come between the registration of a hook and the note of how to remove it, or just as a context is
    left, before it could do anything. A hook that stays would make every later forward raise. So whatever contexts
    inside were stopped at, here hooks that are new go, a replaced ``forward`` goes, and modules, parameters and
    gradients have the modes that they had.

    Hooks that somebody else puts on the model inside go as well if something is raised.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Hooks are numbered in the order in which they come.
        self._first = RemovableHandle.next_id
        self._gradients = torch.is_grad_enabled()
        self._modules = [(m, m.training, m.__dict__.get("forward")) for m in model.modules()]
        self._parameters = [(p, p.requires_grad) for p in model.parameters()]

    def __enter__(self) -> None:
        """Nothing: what there is was noted when this was made."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put back what is not as it was, if something was raised."""
        if error is None:
            return
        torch.set_grad_enabled(self._gradients)  # torch.no_grad may be stopped as it is left
        for module, training, forward in self._modules:
            for name in _HOOKS:
                hooks: dict[int, object] = module.__dict__.get(name) or {}
                for number in [each for each in hooks if each >= self._first]:
                    hooks.pop(number, None)
            if module.training is not training:
                module.training = training
            if module.__dict__.get("forward") is not forward:
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward
        for parameter, asks in self._parameters:
            if parameter.requires_grad is not asks:
                parameter.requires_grad_(asks)
