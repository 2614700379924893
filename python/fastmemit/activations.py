"""What modules take in and put out at the subject's last token, for many rows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastmemit.models import ModelAdapter, check_lengths, hidden_of
from fastmemit.targets.rows import Row
from fastmemit.tokens import length_batches, pad_batch


class _AllRead(Exception):
    """Every module has been read; the rest of the forward is not needed."""


@torch.no_grad()
def read_at_subject(
    adapter: ModelAdapter,
    rows: Sequence[Row],
    *,
    inputs: Sequence[nn.Module] = (),
    outputs: Sequence[nn.Module] = (),
    batch_tokens: int = 8192,
) -> tuple[list[Tensor], list[Tensor]]:
    """Read activations at each row's subject.

    Only the tokens up to the subject run, only as far up as the last module read, and equal rows
    run once.

    Args:
        adapter: The model.
        rows: N rows.
        inputs: Modules of which the input is wanted (an edited projection's input is its key).
        outputs: Modules of which the output is wanted.
        batch_tokens: Padded tokens a forward takes at most (one row always runs).

    Returns:
        Two lists of float32 tensors (N, width), in the order of `inputs` and `outputs`.
    """
    wanted = [row.ids[: row.subject + 1] for row in rows]
    chunks = length_batches(dict.fromkeys(wanted), batch_tokens)
    read: list[list[Tensor]] = [[] for _ in (*inputs, *outputs)]
    training = adapter.model.training
    adapter.model.eval()
    try:
        for chunk in chunks:
            values = _read_batch(adapter, chunk, inputs, outputs)
            for collected, value in zip(read, values, strict=True):
                collected.append(value)
    finally:
        adapter.model.train(training)
    place = {ids: number for number, ids in enumerate(ids for chunk in chunks for ids in chunk)}
    back = torch.tensor([place[ids] for ids in wanted])
    joined = [torch.cat(parts)[back.to(parts[0].device)] for parts in read]
    return joined[: len(inputs)], joined[len(inputs) :]


def _read_batch(
    adapter: ModelAdapter,
    ids: Sequence[Sequence[int]],
    inputs: Sequence[nn.Module],
    outputs: Sequence[nn.Module],
) -> list[Tensor]:
    check_lengths(adapter.model, ids)
    batch = pad_batch(ids, device=adapter.device)
    shape = batch["input_ids"].shape
    last = torch.tensor([len(row) - 1 for row in ids])
    values: dict[int, Tensor] = {}
    total = len(inputs) + len(outputs)

    def keep(slot: int, tensor: Tensor) -> None:
        tokens = tensor.reshape(*shape, -1)  # some blocks flatten their tokens before the MLP
        values[slot] = tokens[torch.arange(len(last)), last].float()
        if len(values) == total:
            raise _AllRead

    def on_input(slot: int) -> Callable[..., None]:
        return lambda _module, args: keep(slot, args[0])

    def on_output(slot: int) -> Callable[..., None]:
        return lambda _module, _args, out: keep(slot, hidden_of(out))

    with ExitStack() as hooks:
        for slot, module in enumerate(inputs):
            hooks.callback(module.register_forward_pre_hook(on_input(slot)).remove)
        for slot, module in enumerate(outputs, start=len(inputs)):
            hooks.callback(module.register_forward_hook(on_output(slot)).remove)
        try:
            call: dict[str, Any] = {**batch, "use_cache": False}
            adapter.model(**call)
        except _AllRead:
            pass
    return [values[slot] for slot in range(total)]
