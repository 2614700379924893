"""Whether a second moment can be of a model's keys at all, seen on a little text.

A file of statistics does not say which model and layer it is of; its width is all that could be compared. But each
coordinate of a key is one neuron, and which neurons are active and which are not is the same on any text, and unlike in
another layer or model. So the mean square of every coordinate, the diagonal of C, is compared with the model's own on
the package's prose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcov import KeyHooks, SecondMoment
from fastcov.hooks import evaluation_mode, isolated, key_rows
from fastmemit.data import load_corpus
from fastmemit.data.feed import corpus_batches
from fastmemit.editor import Editor
from fastmemit.errors import WrongModel

TOKENS = 2048
LENGTH = 128

#: Below this correlation the keys are of another layer or model; see docs/other-codebases.md.
LEAST_CORRELATION = 0.3
#: A sum that was divided already, or a count of something else, is wrong by more than this.
MOST_TIMES = 10.0


@dataclass(frozen=True)
class Likeness:
    """How far a second moment resembles that of a model's own keys.

    Attributes:
        correlation: Of the logarithms of the mean squares, over coordinates; 1 is the same.
        times: How many times larger the file's mean squares are, in the median coordinate.
    """

    correlation: float
    times: float


@isolated()
def likeness(diagonal: Tensor, mean_squares: Tensor) -> Likeness:
    """Compare the diagonal of C (d_k,) with mean squares of keys (d_k,).

    Coordinates that are zero in either are left out: a little text cannot tell a dead neuron from a rare one.
    """
    theirs, mine = diagonal.double().cpu(), mean_squares.double().cpu()
    alive = (theirs > 0) & (mine > 0)
    if int(alive.sum()) < 2:
        return Likeness(0.0, 0.0)
    logs = torch.stack([theirs[alive].log(), mine[alive].log()])
    correlation = torch.corrcoef(logs)[0, 1].nan_to_num(0.0)  # NaN: one of them is constant
    return Likeness(float(correlation), float((logs[0] - logs[1]).median().exp()))


@isolated()
def check_likeness(editor: Editor, moments: Mapping[str, SecondMoment]) -> dict[str, Likeness]:
    """Refuse moments that are unlike those of the model's own keys.

    Args:
        editor: Of the unedited model.
        moments: Module name -> what is said to be its moment.

    Raises:
        WrongModel: One is of another layer, another model, or not a sum of as many keys as it says; or the model is
            edited now.
    """
    if editor.edits:
        raise WrongModel(
            f"{len(editor.edits)} edits are in the weights, and statistics belong to the unedited "
            "model; undo them first."
        )
    own = mean_squares(editor, list(moments))
    found = {}
    for name, moment in moments.items():
        found[name] = alike = likeness(moment.lower.diagonal() / moment.count, own[name])
        if alike.correlation < LEAST_CORRELATION:
            raise WrongModel(
                f"The statistics for {name} are not of this model's keys: the mean squares of the "
                f"coordinates correlate by {alike.correlation:.2f} with those on a little text "
                f"(the same model has above {LEAST_CORRELATION:g}); take the file of this model "
                "and layer, or pass check=False (--no-check) if you know better."
            )
        if not 1 / MOST_TIMES < alike.times < MOST_TIMES:
            raise WrongModel(
                f"The statistics for {name} are {alike.times:.3g} times what this model's keys "
                f"have, so their count ({moment.count}) is not that of their keys; get the file "
                "again, or pass check=False (--no-check) if you know better."
            )
    return found


@isolated()
def mean_squares(editor: Editor, modules: Sequence[str]) -> dict[str, Tensor]:
    """The mean square of each coordinate of the keys on some prose, module name -> (d_k,).

    The first position of a text is left out: its key is unlike all others, and how much it weighs depends on how long
    texts are.
    """
    model = editor.adapter.model
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)

    def add(name: str, x: Tensor, mask: Tensor | None) -> None:
        for rows, part in key_rows(x, mask):
            kept = rows if part is None else rows[part.to(rows.device)]
            squares = kept.double().square().sum(0).cpu()
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] += kept.shape[0]

    with (
        corpus_batches(
            load_corpus("builtin"), editor.tokenizer, editor.adapter.device, tokens=TOKENS, context=LENGTH, skip=1
        ) as batches,
        KeyHooks(model, modules, add) as hooks,
        evaluation_mode(model),
    ):
        for batch in batches:
            moved = {k: v.to(editor.adapter.device) for k, v in batch.items() if k != "key_mask"}
            hooks.run({**moved, "use_cache": False}, batch.get("key_mask"))
    return {name: sums[name] / counts[name] for name in modules}
