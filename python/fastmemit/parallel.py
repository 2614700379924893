"""Several processes started by torchrun that collect statistics together.

    torchrun --nproc-per-node 8 -m fastmemit precompute --model NAME --corpus articles.jsonl

Each has the whole model on a device of its own and runs its share of the batches; the first one writes the files. See
`fastcov.collect_moments` for the division.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch

import fastcov
from fastcov import FailedElsewhere, Processes
from fastcov.distributed import TIMEOUT
from fastmemit.errors import BadConfig

_ENTERED = count()
#: The processes of the `together` that code runs in; None where there is one process.
CURRENT: ContextVar[Processes | None] = ContextVar("fastmemit_processes", default=None)


@contextmanager
def together(*, timeout: float = TIMEOUT) -> Iterator[Processes | None]:
    """Divide what is collected inside the block between the processes that torchrun started.

    All of them must enter the block and make the same calls in it; a process may give no sign of life, which is a batch
    or a file, for `timeout` seconds. An error in one ends the block in all: there it is raised, in the others
    `fastcov.FailedElsewhere`. Where torchrun started nothing, or one process, the block changes nothing and yields
    None.

    Raises:
        FailedElsewhere: Another process failed.
        ProcessLost: Another process does not answer.
    """
    if not started():
        yield None
        return
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # in no stub of torch
    from torch.distributed.rendezvous import rendezvous

    wait = timedelta(seconds=timeout)
    store, rank, size = next(rendezvous("env://", timeout=wait))
    prefix = f"fastmemit/{next(_ENTERED)}"  # what an earlier block has said is not for this one
    processes = Processes(PrefixStore(prefix, store), rank, size, timeout=timeout)
    with processes.guarded(), ExitStack() as stack:
        gpus = torch.cuda.is_available()
        if gpus and (own := own_gpus()):
            torch.cuda.set_device(own[0])
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo",
                store=PrefixStore(f"{prefix}/sums", store),
                rank=rank,
                world_size=size,
                timeout=wait,
            )
            stack.callback(dist.destroy_process_group)
        stack.callback(CURRENT.reset, CURRENT.set(processes))
        yield processes
        processes.leave()


@contextmanager
def for_verb(verb: str, divided: Sequence[str]) -> Iterator[None]:
    """What the command line runs a verb in; BadConfig if torchrun started several processes for one not `divided`."""
    if not started():
        yield
        return
    if os.environ["RANK"] != "0":
        logging.getLogger().setLevel(logging.ERROR)  # what there is to warn of, the first one says
    if verb not in divided:
        if os.environ["RANK"] != "0":
            raise FailedElsewhere(f"{verb} cannot be divided", rank=0)
        raise BadConfig(
            f"fastmemit {verb} runs in one process but torchrun started {os.environ['WORLD_SIZE']}; only "
            f"{', '.join(divided)} is divided, so run {verb} without torchrun."
        )
    with together():
        yield


def started() -> bool:
    """Whether this is one of several processes that torchrun started."""
    world = os.environ.get("WORLD_SIZE", "1")
    return world.isdecimal() and int(world) > 1 and "RANK" in os.environ


def local_device(device: str | None) -> str | None:
    """The first GPU of this process where several share a machine, if a GPU was asked for or none; else a BadConfig."""
    own = own_gpus() if device in (None, "cuda") else None
    return device if own is None else f"cuda:{own[0]}"


def own_gpus() -> list[int] | None:
    """This process's equal share of the machine's GPUs, None where it may take all; BadConfig if they are too few."""
    if not started() or not torch.cuda.is_available():
        return None
    rank, here = (int(os.environ.get(f"LOCAL_{name}", "0")) for name in ("RANK", "WORLD_SIZE"))
    gpus = torch.cuda.device_count()
    share = gpus // max(here, rank + 1)
    if share == 0:
        raise BadConfig(
            f"There are more processes on this machine than its {gpus} GPUs; start torchrun with "
            f"--nproc-per-node {gpus}, or pass --device cpu."
        )
    return list(range(rank * share, (rank + 1) * share))


def agreed(processes: Processes, identity: Mapping[str, Any], missing: Sequence[str]) -> list[str]:
    """The modules that some process does not find files of; BadConfig if they are about to collect different things."""
    said = processes.gather("what is missing", [dict(identity), list(missing)])
    ours = said[processes.rank][0]  # as JSON gives it back
    for rank, (theirs, _) in enumerate(said):
        for field in ours:
            if theirs.get(field) != ours[field]:
                raise BadConfig(
                    f"Process {rank} has another {field} ({theirs.get(field)!r:.80}) than process {processes.rank} "
                    f"({ours[field]!r:.80}); give all of them the same model, corpus and options."
                )
    anywhere = {name for _, names in said for name in names}
    return [name for name in ours["modules"] if name in anywhere]


def save_once(processes: Processes, path: Path, moment: fastcov.SecondMoment, provenance: Mapping[str, Any]) -> None:
    """Let the first process write a moment; one that does not see it then, on another machine, writes its own."""
    if processes.first:
        fastcov.save_moment(path, moment, provenance)
    processes.gather(path.name)
    if not path.is_file():
        fastcov.save_moment(path, moment, provenance)
