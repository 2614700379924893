"""One collect in several processes: each runs its share of the batches, and the sums are added up.

Every process reads the whole corpus and makes the same batches, and runs each `size`-th of them. It counts the keys of
the others' batches too, so it knows which of its own are within the budget: the keys of all processes together are
those that one process would have taken, and only the order in which they are summed differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastcov.batches import chained
from fastcov.errors import FastcovError, ProcessLost
from fastcov.moments import SecondMoment
from fastcov.processes import Processes
from fastcov.tally import Tally


class Division:
    """The batches of one collect, divided between processes.

    Args:
        processes: Those that take part.
        tally: This process's.
        progress: Called with the keys of each batch that another process runs.
    """

    def __init__(self, processes: Processes, tally: Tally, progress: Callable[[int], None] | None = None) -> None:
        self._processes, self._tally, self._progress = processes, tally, progress
        self._text = b""  # a digest of all batches: whether every process reads the same

    def read(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """All batches as they are, remembered, with a look at the other processes before each.

        Raises:
            FailedElsewhere: Another process has failed.
        """
        for batch in batches:
            self._processes.check()
            self._text = chained(self._text, batch)
            yield batch

    def own(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Of batches that were `read`, those that this process runs; the rest are counted."""
        for batch in batches:
            if self._processes.runs(self._tally.batches):
                yield batch
            else:
                self._tally.start(batch.get("key_mask", batch.get("attention_mask")))
                self._tally.pass_over(_tokens(batch))
                if self._progress is not None:
                    self._progress(max(self._tally.took().values()))
            if self._tally.done():
                return

    def total(
        self, wanted: Mapping[str, int | None], dtype: torch.dtype, device: torch.device
    ) -> dict[str, SecondMoment]:
        """The moments of all processes together, the same in each of them.

        Args:
            wanted: The modules.
            dtype: Of the sums.
            device: Where the sum of a module is made of which this process ran no batch.

        Raises:
            FailedElsewhere: Another process has failed.
            FastcovError: The processes have not read the same text.
            ProcessLost: A process has gone away.
        """
        held = self._tally.moments
        found = {name: self._tally.found(name) for name in wanted}
        widths = {name: moment.d for name, moment in held.items()}
        own = self._text.hex()
        said = self._processes.gather("sums", [own, found, widths])
        for rank, (text, keys, _) in enumerate(said):
            if (text, keys) != (own, found):
                raise FastcovError(
                    f"Process {rank} has read other text than process {self._processes.rank} "
                    f"({sum(keys.values())} and {sum(found.values())} keys); give all of them the "
                    "same corpus, tokenizer and seed."
                )
        everywhere = {name: d for _, _, theirs in said for name, d in theirs.items()}
        moments = {}
        for name in wanted:
            moment = held.get(name)
            if moment is None:
                moment = SecondMoment(everywhere[name], dtype=dtype, device=device)
            try:
                moments[name] = moment.all_reduce(self._processes.group)
            except RuntimeError as error:
                raise ProcessLost(
                    f"The sums of {name!r} could not be added up over {self._processes.size} "
                    f"processes ({str(error).splitlines()[0]:.120}); see which of them has ended, "
                    "and run again."
                ) from error
            if moment.count != found[name]:
                raise FastcovError(
                    f"The {self._processes.size} processes have {moment.count} keys of {name!r} "
                    f"together but {found[name]} were counted; please report this."
                )
        return moments


def _tokens(batch: Mapping[str, Any]) -> int:
    """How many positions a batch has, padding included."""
    ids = batch.get("input_ids", batch.get("attention_mask"))
    if not isinstance(ids, Tensor):
        raise FastcovError(
            "A batch has neither input_ids nor an attention_mask, so its keys cannot be counted "
            "without running it; add one of them, or collect in one process."
        )
    return ids.numel()
