"""What moves a block's output through whatever lies behind its projection, measured."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from fastmemit.errors import BadLayer
from fastmemit.models import find_adapter
from fastmemit.models.adapter import NEAR, inverse
from fastmemit.models.running import BlockMap, hidden_of
from tiny_models import VOCAB_SIZE, tiny_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
STREAM = torch.tensor([[3.0, -1.0]])


def test_what_is_added_as_it_is_needs_the_residual_itself() -> None:
    y, residual = torch.randn(5, 8), torch.randn(5, 8, dtype=torch.float64)
    change, share = inverse(lambda out: 2 + out, y, residual)
    assert change is residual
    assert share.tolist() == [1.0] * 5


def test_a_scale_of_each_rows_own_is_undone() -> None:
    gate = torch.tensor([[0.5], [0.2], [-2.0]])
    residual = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    change, share = inverse(lambda out: 7 + gate * out, torch.randn(3, 2), residual)
    assert_close(change, torch.tensor([[2.0, 4.0], [15.0, 20.0], [-2.5, -3.0]]))
    assert_close(share, torch.ones(3))


def test_a_closed_gate_reaches_nothing() -> None:
    gate = torch.tensor([[1.0], [0.0]])
    change, share = inverse(lambda out: gate * out, torch.ones(2, 2), torch.ones(2, 2))
    assert_close(change, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert share.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("residual", [(0.3, -0.2), (1.5, -2.0), (-4.0, 9.0)])
def test_a_norm_is_moved_to_the_nearest_point_that_it_can_put_out(residual: tuple[float, float]) -> None:
    gain, y, r = torch.tensor([2.0, 4.0]), torch.tensor([[1.0, 7.0]]), torch.tensor([residual])

    def norm(out: torch.Tensor) -> torch.Tensor:
        return STREAM + gain * out / out.square().mean(1, keepdim=True).sqrt()

    change, share = inverse(norm, y, r)
    # By hand: rms([1, 7]) = 5, so u = (0.2, 1.4), N = (0.4, 5.6), and all that can come out is
    # g u' with u' = sqrt(2) (cos, sin) of an angle; nu = NEAR * median(4, 16), the lower one.
    angles = torch.linspace(0, 2 * math.pi, 200_001, dtype=torch.float64)
    u = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], 1)
    wanted = torch.tensor([0.4, 5.6], dtype=torch.float64) + r.double()
    cost = (gain.double() * u - wanted).square().sum(1)
    cost += NEAR * 4 * (u - torch.tensor([0.2, 1.4], dtype=torch.float64)).square().sum(1)
    first = gain * u[cost.argmin()].float()  # what is put out where nothing is corrected
    reached = norm(y + change) - STREAM
    assert (reached - wanted).norm() <= (first - wanted).norm() + 1e-4
    moved = reached - torch.tensor([[0.4, 5.6]])
    assert_close(share, (moved * r).sum(1) / r.square().sum(1))


def test_a_small_change_of_a_norm_is_reached_along_it() -> None:
    torch.manual_seed(3)
    gain, y = torch.rand(64) + 0.5, torch.randn(6, 64)
    norm = lambda out: gain * out / out.square().mean(1, keepdim=True).sqrt()  # noqa: E731
    r = torch.randn(6, 64)
    r -= (r * y / gain).sum(1, keepdim=True) / (y / gain).square().sum(1, keepdim=True) * (y / gain)
    r *= 0.01  # along the ellipsoid, whose normal at g u is u / g
    change, share = inverse(norm, y, r)
    assert_close(norm(y + change) - norm(y), r, rtol=0, atol=5e-3 * float(r.norm(dim=1).max()))
    assert float(share.min()) > 0.99


def test_nearly_closed_coordinates_do_not_take_the_change_of_all() -> None:
    # Divided by the gains, the wanted change would be all in the last coordinate.
    torch.manual_seed(1)
    gain, y, r = torch.ones(32), torch.randn(4, 32), 0.3 * torch.randn(4, 32)
    gain[-1] = 1e-3
    norm = lambda out: gain * out / out.square().mean(1, keepdim=True).sqrt()  # noqa: E731
    change, share = inverse(norm, y, r)
    divided = norm(y + y.square().mean(1, keepdim=True).sqrt() * r / gain) - norm(y)
    assert float(share.min()) > 0.8
    assert float(((divided * r).sum(1) / r.square().sum(1)).mean()) < 0.3
    assert float((change.norm(dim=1) / y.norm(dim=1)).max()) < 0.6


def test_nothing_wanted_is_nothing_done() -> None:
    norm = nn.RMSNorm(4)
    y = torch.randn(2, 4)
    change, share = inverse(norm, y, torch.zeros(2, 4))
    assert_close(change, torch.zeros(2, 4))
    assert share.tolist() == [1.0, 1.0]
    assert torch.isfinite(inverse(norm, torch.zeros(2, 4), torch.ones(2, 4))[0]).all()


# -- on blocks ------------------------------------------------------------------------------------

BASE = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, **SIZES}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
BLOCKS = {
    "minicpm3": lambda: transformers.MiniCPM3Config(
        **BASE, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=4, num_key_value_heads=4, scale_depth=1.4, dim_model_base=16,
    ),
    "granite": lambda: transformers.GraniteConfig(**BASE, residual_multiplier=0.22),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **BASE, num_key_value_heads=2, num_experts=4, moe_intermediate_size=16,
        shared_expert_intermediate_size=48,
    ),
    "olmo2": lambda: transformers.Olmo2Config(**BASE),
    "gemma3": lambda: transformers.Gemma3TextConfig(**BASE, **HEADS),
    "glm4": lambda: transformers.Glm4Config(**BASE, **HEADS),
    "exaone4": lambda: transformers.Exaone4Config(**BASE, num_key_value_heads=2),
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **BASE, **HEADS, vocab_size_per_layer_input=VOCAB_SIZE, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, sliding_window=8,
    ),
    "opt, which normalises the sum": lambda: transformers.OPTConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=3, ffn_dim=64,
        num_attention_heads=4, do_layer_norm_before=False, word_embed_proj_dim=32, pad_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_moves_as_it_is_asked_to(name: str) -> None:
    config = BLOCKS[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            small = parameter.ndim == 1
            parameter.add_(0.1 * torch.randn_like(parameter)) if small else parameter.normal_(std=0.2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("layer_scalar"):
                buffer.fill_(0.6)
    inside = "model.layers.{}.mlp.shared_expert.down_proj" if name == "qwen2_moe" else None
    adapter = find_adapter(model, inside)
    assert not adapter.adds_plainly(1)
    ids = [5, 9, 3, 14, 2, 8]
    rows = [ids[:n] for n in (3, 6, 4)]
    seen: dict[str, torch.Tensor] = {}

    def run(shift: torch.Tensor | None = None) -> torch.Tensor:
        """The block's output at the rows' last tokens, each run alone by the model itself."""
        outputs = []
        for n, row in enumerate(rows):

            def on_projection(
                _m: nn.Module, _a: object, out: torch.Tensor, n: int = n, row: list[int] = row
            ) -> torch.Tensor:
                tokens = out.reshape(1, len(row), -1).clone()
                seen[f"y{n}"] = tokens[0, -1].clone()
                if shift is not None:
                    tokens[0, -1] += shift[n]
                return tokens.reshape(out.shape)

            hooks = [
                adapter.projection(1).register_forward_hook(on_projection),
                adapter.block(1).register_forward_hook(
                    lambda _m, _a, out: seen.__setitem__("h", hidden_of(out)[0, -1].clone())
                ),
            ]
            with torch.no_grad():
                model(input_ids=torch.tensor([row]), use_cache=False)
            for hook in hooks:
                hook.remove()
            outputs.append(seen["h"])
        return torch.stack(outputs)

    before = run()
    y = torch.stack([seen[f"y{n}"] for n in range(3)])
    assert_close(BlockMap(adapter, 1, rows)(y).detach(), before, rtol=1e-4, atol=1e-5)
    wanted = 0.01 * before.std() * torch.randn(3, adapter.d)
    change = adapter.projection_residual(1, y, wanted, rows)
    moved = run(change) - before
    share = (moved * wanted).sum(1) / wanted.square().sum(1)
    exact = name in ("minicpm3", "granite", "qwen2_moe")
    # A norm over 32 coordinates gives up one of them, its length.
    assert float(share.mean()) > (0.999 if exact else 0.85)
    assert float((moved - wanted).norm() / wanted.norm()) < (1e-3 if exact else 0.5)


def test_gradients_pass_and_the_block_is_left_as_it_was() -> None:
    model = tiny_model("gemma3")
    adapter = find_adapter(model)
    block_map = BlockMap(adapter, 1, [[3, 4, 5], [6, 7]])
    y = torch.randn(2, adapter.d, requires_grad=True)
    out = block_map(y)
    norm = adapter.block(1).post_feedforward_layernorm
    with torch.no_grad():
        stream = out - norm(y)
    (gradient,) = torch.autograd.grad(out.square().sum(), y)
    (expected,) = torch.autograd.grad((stream + norm(y)).square().sum(), y)
    assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_precision_is_measured_in_float32_on_a_copy() -> None:
    model = tiny_model("gemma2").to(torch.bfloat16)
    adapter = find_adapter(model)
    block_map = BlockMap(adapter, 1, [[3, 4, 5]])
    y = torch.randn(1, adapter.d)
    out = block_map(y)
    assert out.dtype == torch.float32
    # The difference of two runs is the norm's own, to float32's rounding and not bfloat16's.
    norm = adapter.block(1).post_feedforward_layernorm
    gain = 1 + norm.weight.float()
    expected = gain * y * (y.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    zero = block_map(torch.zeros_like(y))
    assert_close((out - zero).detach(), expected.detach(), rtol=1e-3, atol=1e-4)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_a_layer_that_carries_nothing_is_refused() -> None:
    model = tiny_model("gemma3")
    with torch.no_grad():
        model.model.layers[1].post_feedforward_layernorm.weight.fill_(-1.0)  # a gain of zero
    adapter = find_adapter(model)
    with pytest.raises(BadLayer, match=r"Layer 1 cannot carry.*0\.00 of the way"):
        adapter.projection_residual(1, torch.randn(2, adapter.d), torch.randn(2, adapter.d))


def test_a_layer_that_carries_little_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("gemma3")
    adapter = find_adapter(model)
    y, wanted = torch.randn(2, adapter.d), 5 * torch.randn(2, adapter.d)
    with caplog.at_level("WARNING"):
        adapter.projection_residual(1, y, wanted)
    assert "layer 1 reaches 0." in caplog.text


def test_what_depends_on_tokens_is_refused_where_none_are_named() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(BLOCKS["qwen2_moe"]()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    adapter = find_adapter(model, "model.layers.{}.mlp.shared_expert.down_proj")
    y, wanted = torch.randn(2, adapter.d), 0.01 * torch.randn(2, adapter.d)
    with pytest.raises(BadLayer, match=r"Qwen2MoeDecoderLayer 1 .* depends on the tokens; name them \(rows="):
        adapter.projection_residual(1, y, wanted)
    adapter.projection_residual(1, y, wanted, [[5, 9, 3], [14, 2]])
