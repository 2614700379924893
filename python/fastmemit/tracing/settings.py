"""The settings of a trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fastmemit.errors import BadConfig

Kind = Literal["mlp", "attention", "hidden"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Positions = Literal["last-subject", "all"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)

#: ROME restores 10 of GPT-2 XL's 48 layers together.
_PAPER_WINDOW, _PAPER_LAYERS = 10, 48


@dataclass(frozen=True)
class TraceSettings:
    """Everything that a trace depends on but the model and the facts.

    Attributes:
        samples: Corrupted runs per fact, each with noise of its own.
        noise: Standard deviation of the noise, in standard deviations of the subjects' embeddings.
        window: Layers whose MLP or attention output is restored together; None takes the paper's 10 of 48 in proportion
            to the depth, 1 at least and 10 at most.
        hidden_window: The same for hidden states.  One is enough: the output of a block replaces
            all that the blocks below wrote at this token.
        limit: Trace at most so many facts; None traces all.
        only_known: Leave out facts of which the model does not predict the answer.
        positions: ``"last-subject"`` restores at the subject's last token only, which decides which layers to edit;
            ``"all"`` at every token from the subject on.
        kinds: What is restored: ``"mlp"``, ``"attention"`` (their outputs), ``"hidden"`` (the block's output).
        seed: Of the noise, of the facts' order and of the intervals.
        batch_tokens: Padded tokens of a corrupted run at most (one fact with its samples always runs); None takes 2048
            on a CPU, else 16384.

    Raises:
        BadConfig: A value out of range.
    """

    samples: int = 10
    noise: float = 3.0
    window: int | None = None
    hidden_window: int = 1
    limit: int | None = None
    only_known: bool = True
    positions: Positions = "last-subject"
    kinds: tuple[Kind, ...] = KINDS
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        whole = ("samples", "hidden_window", "window", "limit", "batch_tokens")
        for name in whole:
            value = getattr(self, name)
            if value is None and name not in ("samples", "hidden_window"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadConfig(f"{name} must be a whole number above 0 but is {value!r}.")
        number = isinstance(self.noise, int | float) and not isinstance(self.noise, bool)
        if not number or not math.isfinite(self.noise) or self.noise <= 0:
            raise BadConfig(f"noise must be a finite number above 0 but is {self.noise!r}.")
        if self.positions not in POSITIONS:
            raise BadConfig(f"positions must be one of {', '.join(POSITIONS)} but is {self.positions!r}.")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise BadConfig(
                f"kinds must be different ones of {', '.join(KINDS)}, at least one, "
                f"but are {', '.join(map(repr, self.kinds)) or 'none'}."
            )

    def tokens_on(self, device: torch.device) -> int:
        """`batch_tokens`, or the default of a device."""
        return self.batch_tokens or (2048 if device.type == "cpu" else 16384)

    def window_of(self, kind: Kind, n_layers: int) -> int:
        """How many layers are restored together.

        Raises:
            BadConfig: The setting is more than the model's layers.
        """
        window = self.hidden_window if kind == "hidden" else self.window
        if window is None:
            return max(1, min(_PAPER_WINDOW, n_layers * _PAPER_WINDOW // _PAPER_LAYERS))
        if window > n_layers:
            raise BadConfig(f"The window of {window} layers is more than the model's {n_layers}; give a smaller one.")
        return window


def window_at(layer: int, window: int, n_layers: int) -> tuple[int, int]:
    """First and last layer of the window around a layer, cut where the model ends.

    A window of 10 reaches from 5 layers below to 4 above, as in ROME's own traces.
    """
    first = layer - window // 2
    return max(0, first), min(n_layers, first + window) - 1
