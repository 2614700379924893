"""Reading in stages: the same bits as one run from the first block, and nothing run twice."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch

from fastmemit import partial_forward as activations
from fastmemit.errors import UnknownArchitecture
from fastmemit.models import find_adapter
from fastmemit.partial_forward import SubjectPass, read_at_subject
from fastmemit.text import Row
from tiny_models import ARCHITECTURES, LAYERS, tiny_model

ROWS = [
    Row(ids, subject)
    for ids, subject in (
        ((5, 6, 7, 8, 9, 10), 4),
        ((5, 6, 7), 2),
        ((11, 12, 13, 14, 15, 16, 17), 6),
        ((5, 6, 7), 2),
        ((20,), 0),
    )
]


def test_it_is_what_a_plain_forward_of_each_row_has():
    adapter = find_adapter(tiny_model("gpt2"))
    projection = adapter.projection(1)
    (keys,), (blocks,) = read_at_subject(adapter, ROWS, inputs=[projection], outputs=[adapter.block(2)])
    seen = {}
    for row, key, block in zip(ROWS, keys, blocks, strict=True):
        hooks = [
            projection.register_forward_pre_hook(lambda _m, args: seen.update(key=args[0])),
            adapter.block(2).register_forward_hook(lambda _m, _a, out: seen.update(block=out)),
        ]
        with torch.no_grad():
            adapter.model(input_ids=torch.tensor([row.ids]))
        for hook in hooks:
            hook.remove()
        out = seen["block"][0] if isinstance(seen["block"], tuple) else seen["block"]
        torch.testing.assert_close(key, seen["key"].reshape(len(row.ids), -1)[row.subject])
        torch.testing.assert_close(block, out.reshape(len(row.ids), -1)[row.subject])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_begun_in_the_middle_it_gives_the_same_bits(architecture):
    adapter = find_adapter(tiny_model(architecture))
    first = SubjectPass.of(adapter, ROWS, batch_tokens=14)
    assert len(first.batches) > 1
    modules = {layer: adapter.projection(layer) for layer in range(LAYERS)}
    _, _, kept = first.read(adapter, inputs=[modules[1]], keep=1)
    assert kept.layer == 1 and all(kept.entering) and first.entering == (None,) * len(first.batches)
    _, _, higher = kept.read(adapter, inputs=[modules[2]], keep=2)
    assert higher.layer == 2
    # What lies above a kept state may change; what was kept is as it was.
    with torch.no_grad():
        adapter.weight(1).add_(0.3)
    wanted, out, _ = first.read(adapter, inputs=[modules[2]], outputs=[adapter.block(2)])
    again, out_again, same = kept.read(adapter, inputs=[modules[2]], outputs=[adapter.block(2)])
    assert same is kept
    assert torch.equal(wanted[0], again[0]) and torch.equal(out[0], out_again[0])
    stale, _, _ = higher.read(adapter, inputs=[modules[2]])
    assert not torch.equal(stale[0], wanted[0])  # its state lies above the change


def test_what_lies_below_the_kept_states_does_not_run_and_comes_back():
    adapter = find_adapter(tiny_model("llama"))
    calls: Counter[int] = Counter()
    for layer in range(LAYERS):
        adapter.block(layer).self_attn.register_forward_hook(lambda *_, layer=layer: calls.update([layer]))
    first = SubjectPass.of(adapter, ROWS)
    first.read(adapter, inputs=[adapter.projection(1)], keep=1)  # measured once what may be kept
    calls.clear()
    _, _, kept = first.read(adapter, inputs=[adapter.projection(1)], keep=1)
    assert calls == {0: 1, 1: 1}
    kept.read(adapter, inputs=[adapter.projection(2)])
    assert calls == {0: 1, 1: 2, 2: 1}
    assert not any("forward" in adapter.block(layer).__dict__ for layer in range(LAYERS))
    first.read(adapter, inputs=[adapter.projection(0)])
    assert calls[0] == 2


@pytest.mark.parametrize("how", ["differ", "fail"])
def test_a_block_that_takes_more_from_below_is_read_from_the_first_one_on(how, caplog):
    model = tiny_model("llama")
    adapter = find_adapter(model)
    said = {}

    def remember(_module, _args, out):
        said["first"] = out

    def borrow(_module, _args, out):
        return out + (said.pop("first") if how == "fail" else said["first"].mean(1, keepdim=True))

    model.model.layers[0].mlp.register_forward_hook(remember)
    model.model.layers[2].mlp.register_forward_hook(borrow)
    first = SubjectPass.of(adapter, ROWS, batch_tokens=1)
    block = adapter.block(2)
    with caplog.at_level(logging.WARNING):
        _, (want,), kept = first.read(adapter, outputs=[block], keep=1)
        assert kept.layer == 0
        _, (again,), _ = kept.read(adapter, outputs=[block], keep=1)
    assert torch.equal(again, want)
    (record,) = caplog.records  # said once
    assert f"runs that begin at block 1 {how}" in record.getMessage()


def test_a_row_that_padding_changes_is_a_batch_of_its_own():
    model = tiny_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: out + out.mean((0, 1)))
    adapter = find_adapter(model)
    assert adapter.traits.right_padding == "none"
    assert [len(batch) for batch in SubjectPass.of(adapter, ROWS).batches] == [1, 1, 1, 1]


def test_what_does_not_run_or_sees_some_tokens_alone_cannot_be_read():
    model = tiny_model("llama")
    model.model.layers[0].mlp.spare = torch.nn.Linear(4, 4)
    model.model.layers[0].mlp.some = torch.nn.Identity()
    model.model.layers[0].mlp.register_forward_hook(lambda module, _args, out: module.some(out[:, 1:]) is None or out)
    adapter = find_adapter(model, "model.layers.{}.mlp.down_proj")
    with pytest.raises(UnknownArchitecture, match="does not run its Linear"):
        read_at_subject(adapter, ROWS, inputs=[model.model.layers[0].mlp.spare])
    with pytest.raises(UnknownArchitecture, match=r"Identity handles a tensor of shape \(4, 6, 32\)"):
        read_at_subject(adapter, ROWS, outputs=[model.model.layers[0].mlp.some])


def test_states_that_do_not_fit_are_made_again(monkeypatch):
    adapter = find_adapter(tiny_model("llama"))
    first = SubjectPass.of(adapter, ROWS, batch_tokens=7)
    _, _, whole = first.read(adapter, inputs=[adapter.projection(1)], keep=1)
    one = whole.entering[0].hidden
    assert whole.nbytes == sum(e.hidden.numel() * 4 for e in whole.entering)
    monkeypatch.setattr(activations, "KEPT", one.numel() * 4)
    _, _, part = first.read(adapter, inputs=[adapter.projection(1)], keep=1)
    assert [e is not None for e in part.entering] == [True] + [False] * (len(first.batches) - 1)
    for kept in (whole, part):
        keys, _, _ = kept.read(adapter, inputs=[adapter.projection(2)])
        wanted, _, _ = first.read(adapter, inputs=[adapter.projection(2)])
        assert torch.equal(keys[0], wanted[0])


def test_an_error_inside_gives_the_blocks_back():
    adapter = find_adapter(tiny_model("llama"))
    _, _, kept = SubjectPass.of(adapter, ROWS).read(adapter, inputs=[adapter.projection(1)], keep=1)

    def broken(*_):
        raise KeyboardInterrupt

    hook = adapter.block(2).register_forward_pre_hook(broken)
    adapter.model.train()
    adapter.block(0).eval()
    modes = [module.training for module in adapter.model.modules()]
    with pytest.raises(KeyboardInterrupt):
        kept.read(adapter, inputs=[adapter.projection(2)])
    hook.remove()
    assert [module.training for module in adapter.model.modules()] == modes
    assert not any("forward" in adapter.block(layer).__dict__ for layer in range(LAYERS))
    assert not any(module._forward_hooks for module in adapter.model.modules())


def test_a_pass_does_not_go_back():
    adapter = find_adapter(tiny_model("llama"))
    _, _, kept = SubjectPass.of(adapter, ROWS).read(adapter, inputs=[adapter.projection(2)], keep=2)
    with pytest.raises(ValueError, match="begins at block 2, above block 1"):
        kept.read(adapter, inputs=[adapter.projection(2)], keep=1)
