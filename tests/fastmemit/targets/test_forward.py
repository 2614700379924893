"""Targets run the short forward where it agrees with the whole model, and whole rows elsewhere."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastmemit.errors import UnknownArchitecture
from fastmemit.models import adapter as adapter_module
from fastmemit.models import find_adapter
from fastmemit.models.running import tolerance
from fastmemit.partial_forward import FullForward, SuffixForward, forward_for
from fastmemit.request import EditRequest
from fastmemit.targets import TargetSettings, optimise
from fastmemit.text import Row
from reference.literal_targets import literal_target
from tiny_models import ARCHITECTURES, LAYERS, VOCAB_SIZE, D, tiny_model, tiny_tokenizer

ROWS = [
    Row((5, 6, 7, 8, 9, 10, 11), 4, stem=3), Row((12, 13, 14), 1, stem=1), Row((15, 16, 17, 18, 19), 0),
    Row((5, 6, 7, 23), 3, stem=3),
]  # fmt: skip
READS = [(row, column) for row in range(4) for column in range(len(ROWS[row].ids) - ROWS[row].subject)]
SITES = ["block", "projection"]


def hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, (tuple, list)) else out


def literal(adapter: Any, layer: int, row: Row, site: str, value: Tensor | None) -> tuple[Any, Any]:
    """Logits of a row alone from the subject on, and what stood where the change enters."""
    module = adapter.block(layer) if site == "block" else adapter.projection(layer)
    seen: list[Tensor] = []

    def put(_module: nn.Module, _args: Any, out: Any) -> Any:
        states = hidden(out).reshape(1, len(row.ids), -1)
        seen.append(states[0, row.subject].clone())
        if value is None:
            return None
        changed = states.clone()
        changed[0, row.subject] = value.to(states)
        changed = changed.reshape(hidden(out).shape)
        return type(out)([changed, *out[1:]]) if isinstance(out, (tuple, list)) else changed

    handle = module.register_forward_hook(put)
    ids = torch.tensor([row.ids])
    logits = adapter.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    handle.remove()
    return logits[row.subject :], seen[0]


def assert_literal(made: Any, adapter: Any, layer: int, site: str) -> None:
    values = [literal(adapter, layer, row, site, None)[1].float() for row in ROWS]
    torch.testing.assert_close(made.start, torch.stack(values), rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    value = made.start + torch.randn(len(ROWS), D)
    with torch.no_grad():
        got = made.logits(value, *map(list, zip(*READS, strict=True)))
    with torch.no_grad():
        want = [literal(adapter, layer, r, site, v)[0] for r, v in zip(ROWS, value, strict=True)]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", SITES)
def test_every_form_equals_the_whole_model_on_each_row(architecture: str, site: Any) -> None:
    adapter = find_adapter(tiny_model(architecture))
    for layer in (0, 2):
        forms = [SuffixForward(adapter, layer, ROWS, site)]
        forms += [FullForward(adapter, layer, ROWS, site, alone=alone) for alone in (False, True)]
        for made in forms:
            assert_literal(made, adapter, layer, site)
        assert isinstance(forward_for(adapter, layer, ROWS, site), SuffixForward)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("alone", [False, True])
def test_rows_that_are_dropped_leave_the_others_as_they_were(site: Any, alone: bool) -> None:
    adapter = find_adapter(tiny_model("gpt2"))
    for made in (SuffixForward(adapter, 1, ROWS, site), FullForward(adapter, 1, ROWS, site, alone=alone)):
        with torch.no_grad():
            before = made.logits(made.start, [2, 0], [1, 2])
            fewer = made.select([0, 2])
            after = fewer.logits(fewer.start, [1, 0], [1, 2])
        assert fewer.start.shape == (2, D) and made.start.shape == (len(ROWS), D)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_what_rows_share_runs_once_and_suffixes_up_to_the_edited_block() -> None:
    adapter = find_adapter(tiny_model("llama"))
    ran = [0] * LAYERS
    for layer in range(LAYERS):
        adapter.block(layer).register_forward_pre_hook(
            lambda _m, args, layer=layer: ran.__setitem__(layer, ran[layer] + args[0].shape[0] * args[0].shape[1])
        )
    rows = [Row((5, 6, 7, 8, 9, 10), 4, stem=3), Row((5, 6, 7, 11, 9, 10), 4, stem=3), Row((12, 13, 9, 10), 2, stem=1)]
    SuffixForward(adapter, 0, rows)
    # Two stems of up to 3 tokens, three rests of one; then three suffixes of two in the edited block alone.
    assert ran == [6 + 3 + 6, *[6 + 3] * (LAYERS - 1)]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("architecture", ["gemma3", "gemma2", "mistral"])
def test_a_window_shorter_than_what_is_kept_is_exact(architecture: str, site: Any) -> None:
    fields = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    model = tiny_model(architecture, sliding_window=3, **(fields if "gemma" in architecture else {}))
    wider = tiny_model(architecture, sliding_window=64, **(fields if "gemma" in architecture else {}))
    ids = torch.tensor([ROWS[0].ids])
    assert not torch.allclose(model(ids).logits[0, -1], wider(ids).logits[0, -1], atol=0.1)  # the window matters
    adapter = find_adapter(model)
    for layer in (0, 1):
        made = forward_for(adapter, layer, ROWS, site)
        assert isinstance(made, SuffixForward)
        assert_literal(made, adapter, layer, site)


def test_rows_that_change_with_the_longest_of_their_batch_run_alone() -> None:
    # Positions are scaled otherwise once a row of the batch is longer than 8.
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    model = tiny_model("llama", original_max_position_embeddings=8, rope_scaling=scaling)
    adapter = find_adapter(model)
    rows = [Row((5, 6, 7, 23), 0), Row((15, 16, 17, 18, 19), 3), Row(tuple(range(30, 44)), 9)]
    made = forward_for(adapter, 1, rows, "block")
    with torch.no_grad():
        got = made.logits(made.start, [0, 1, 2], [3, 1, 4])
        want = [literal(adapter, 1, row, "block", None)[0][-1] for row in rows]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)


def hybrid(**fields: Any) -> Any:
    """Linear attention between full attention."""
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=D, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=0,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, pad_token_id=0, mlp_only_layers=[0, 1, 2],
        layer_types=["full_attention", "linear_attention", "full_attention"], **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "conv1d" not in name:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("site", SITES)
def test_a_model_with_other_state_runs_whole_rows_and_says_so_once(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    adapter = find_adapter(hybrid())
    with caplog.at_level(logging.WARNING):
        first, second = (forward_for(adapter, layer, ROWS, site) for layer in (1, 0))
    assert isinstance(first, FullForward) and isinstance(second, FullForward)
    assert_literal(first, adapter, 1, site)
    (record,) = [record for record in caplog.records if record.name.startswith("fastmemit")]
    assert "Qwen3NextForCausalLM: targets run whole rows" in record.getMessage()


CONTEXTS = ("", "The old man said so. ")
REQUESTS = [
    EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome"),
    EditRequest("Everybody knew that {} plays", "Ann", "the violin"),
]
SETTINGS = TargetSettings(layer=1, steps=5, clamp=0.8, learning_rate=0.2, weight_decay=0.3)


@pytest.mark.parametrize("site", SITES)
def test_targets_on_whole_rows_equal_the_literal_ones(site: Any) -> None:
    model, tokenizer = hybrid(), tiny_tokenizer("byte_bpe")
    adapter = find_adapter(model)
    settings = dataclasses.replace(SETTINGS, site=site)
    module = adapter.projection(1) if site == "projection" else None
    targets = optimise(adapter, tokenizer, REQUESTS, CONTEXTS, settings)
    for request, target in zip(REQUESTS, targets, strict=True):
        block = adapter.block(1)
        vector, start, losses = literal_target(model, tokenizer, block, request, CONTEXTS, settings, module)
        assert target.losses == pytest.approx(losses, rel=1e-4, abs=1e-5)
        assert len(set(target.losses)) == settings.steps  # gradients come through
        assert (target.start - start).norm() <= 1e-5 * start.norm()
        assert (target.vector - vector).norm() <= 1e-4 * vector.norm()


class Padded(nn.Module):
    """A block that adds what the first column of its batch holds, be it padding or not."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.mlp = block.mlp

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = hidden(self.block(hidden_states, *args, **kwargs))
        return out + out.mean((0, 1), keepdim=True)


def test_rows_run_one_by_one_where_a_batch_changes_them(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.model.layers[2] = Padded(model.model.layers[2])
    adapter = find_adapter(model, "model.layers.{}.mlp.down_proj")
    rows = [ROWS[0], ROWS[3]]
    with caplog.at_level(logging.WARNING):
        made = forward_for(adapter, 1, rows, "block")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "one row at a time" in said[1] and "off by" in said[1]
    with torch.no_grad():
        got = made.logits(made.start, [1, 0], [0, 2])
        want = [literal(adapter, 1, rows[1], "block", None)[0][0],
                literal(adapter, 1, rows[0], "block", None)[0][2]]  # fmt: skip
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)


def test_a_subtle_disagreement_counts_and_rounding_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SuffixForward.logits

    def off_by(share: float) -> Any:
        def logits(self: Any, *args: Any) -> Tensor:
            out = original(self, *args)
            return out + share * out.flip(-1)

        return logits

    model = tiny_model("llama")
    for share, form in ((1e-4, SuffixForward), (1e-2, FullForward)):
        monkeypatch.setattr(SuffixForward, "logits", off_by(share))
        assert isinstance(forward_for(find_adapter(model), 1, ROWS, "block"), form)
    half = tiny_model("llama").bfloat16()
    assert tolerance(half) > 0.05
    monkeypatch.setattr(SuffixForward, "logits", original)
    assert isinstance(forward_for(find_adapter(half), 1, ROWS, "block"), SuffixForward)
    monkeypatch.setattr(SuffixForward, "logits", off_by(0.2))
    assert isinstance(forward_for(find_adapter(half), 1, ROWS, "block"), FullForward)


def test_memory_that_runs_out_is_no_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(SuffixForward, "_run_once", full)
    with pytest.raises(torch.OutOfMemoryError):
        forward_for(find_adapter(tiny_model("llama")), 1, ROWS, "block")


class Wide(Padded):
    """A block that puts out its stream twice, side by side, as models of several streams do."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = hidden_states[0] if hidden_states.ndim == 4 else hidden_states
        out = hidden(self.block(given, *args, **kwargs))
        return torch.stack([out, out])


def wide_model() -> Any:
    model = tiny_model("llama")
    model.model.layers[1] = Wide(model.model.layers[1])
    model.model.layers[2].register_forward_pre_hook(lambda _m, args: (args[0][0], *args[1:]))
    return model


def test_a_block_without_one_state_a_token_is_left_to_rome(caplog: pytest.LogCaptureFixture) -> None:
    adapter = find_adapter(wide_model(), "model.layers.{}.mlp.down_proj")
    with pytest.raises(UnknownArchitecture, match=r"shape \(2, 1, 7, 32\) for 1 rows of 7 tokens"):
        forward_for(adapter, 1, ROWS, "block")
    with caplog.at_level(logging.WARNING):
        adapter.check_targets([1])
    assert "Only method rome" in caplog.records[-1].getMessage()
    assert_literal(forward_for(adapter, 1, ROWS, "projection"), adapter, 1, "projection")


def test_the_check_refuses_what_no_change_can_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownArchitecture, match="not causal"):
        find_adapter(tiny_model("gemma3", use_bidirectional_attention=True)).check_targets([0])
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda _m, _a, out: out.detach())
    with pytest.raises(UnknownArchitecture, match=r"block of layer 0.*cannot be tried out"):
        find_adapter(model).check_targets([0])
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(UnknownArchitecture, match="does not reach the logits"):
        find_adapter(model).check_targets([1])


def test_the_check_runs_once_for_each_kind_of_block(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    original = adapter_module._check_change

    def counted(adapter: Any, layer: int, *args: Any) -> Any:
        tried.append(layer)
        return original(adapter, layer, *args)

    monkeypatch.setattr(adapter_module, "_check_change", counted)
    adapter = find_adapter(tiny_model("llama"))
    adapter.check_targets([0, 1, 2])
    adapter.check_targets([0, 1, 2])
    assert tried == [2]
    tried.clear()
    model = hybrid().train()
    find_adapter(model).check_targets([0, 1, 2])
    assert tried == [1, 2] or tried == [2, 1]
    assert model.training and all(p.grad is None for p in model.parameters())
