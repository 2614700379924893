"""Whether sums stay finite, asked on their device and looked at there only now and then.

The diagonal of a sum holds the sums of squares. One bad number in any key shows there, and stays, so the keys need no
look of their own, and the oldest bad answer names the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcov.errors import NonFiniteKeys
from fastcov.moments import SecondMoment


@dataclass(frozen=True)
class _Answer:
    """Whether a module's sum was finite after what it was given from some batches."""

    name: str
    dtype: torch.dtype
    first: int
    last: int
    finite: Tensor  # (), bool, on the device of the sum


class Finite:
    """Answers that were asked for and not looked at yet."""

    def __init__(self) -> None:
        self._answers: list[_Answer] = []

    @property
    def oldest(self) -> int | None:
        """The batch after which the oldest of them was asked for."""
        return self._answers[0].last if self._answers else None

    def ask(self, name: str, moment: SecondMoment, first: int, last: int) -> None:
        """Ask about a module's sum, to which keys of some batches were just added."""
        finite = moment.lower.diagonal().isfinite().all()
        self._answers.append(_Answer(name, moment.dtype, first, last, finite))

    def look(self, name: str = "", batch: int = -1, x: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Look at all answers; this waits for their devices, once each.

        Args:
            name: A module whose keys are at hand, if there is one.
            batch: Which batch they are from.
            x: These keys (..., d_k), of which the message then says more.
            mask: Which of them count; None says that all do.

        Raises:
            NonFiniteKeys: Keys hold NaN or infinity, or their squares overflow the sum.
        """
        answers, self._answers = self._answers, []
        good: dict[int, bool] = {}
        for device in {answer.finite.device for answer in answers}:
            here = [i for i, answer in enumerate(answers) if answer.finite.device == device]
            read = torch.stack([answers[i].finite for i in here]).tolist()
            good.update(zip(here, read, strict=True))
        for i, answer in enumerate(answers):
            if not good[i]:
                at_hand = (answer.name, answer.first, answer.last) == (name, batch, batch)
                message = _late(answer) if x is None or not at_hand else _now(answer, x, mask)
                raise NonFiniteKeys(message)


def _now(answer: _Answer, x: Tensor, mask: Tensor | None) -> str:
    bad = ~x.isfinite().all(-1)
    if mask is not None:
        bad &= mask.to(x.device).reshape(bad.shape)
    rows = int(bad.sum())
    if rows == 0:
        return (
            f"The squares of the keys of {answer.name!r} overflow {answer.dtype} in batch "
            f"{answer.last} (largest key {float(x.abs().max()):.3g}); pass dtype=torch.float64."
        )
    return (
        f"{rows} of {bad.numel()} keys of {answer.name!r} hold NaN or infinity in batch "
        f"{answer.last}; "
        "run the model in another dtype (bfloat16 or float32)."
    )


def _late(answer: _Answer) -> str:
    where = (
        f"batch {answer.last}" if answer.first == answer.last else f"one of the batches {answer.first} to {answer.last}"
    )
    return (
        f"Keys of {answer.name!r} hold NaN or infinity, or their squares overflow {answer.dtype}, "
        f"in {where}; run the model in another dtype (bfloat16 or float32), or pass "
        "dtype=torch.float64."
    )
