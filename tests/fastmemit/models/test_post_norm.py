"""The change before a norm that gives a wanted change behind it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastmemit.models.post_norm import find_post_norm, through_post_norm


def norms(gain: torch.Tensor) -> list[nn.Module]:
    """Two spellings of y -> gain * y / rms(y)."""
    gemma, llama = Gemma2RMSNorm(len(gain), eps=1e-6), LlamaRMSNorm(len(gain), eps=1e-6)
    gemma.weight.data = gain - 1
    llama.weight.data = gain.clone()
    return [gemma, llama]


@pytest.mark.parametrize("which", [0, 1])
def test_hand_computed_change(which: int) -> None:
    # rms([1, 7]) = 5, gain (2, 4): y' - y = 5 r / g
    norm = norms(torch.tensor([2.0, 4.0]))[which]
    change = through_post_norm(norm, torch.tensor([[1.0, 7.0]]), torch.tensor([[0.4, 0.8]]))
    assert_close(change, torch.tensor([[1.0, 1.0]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_the_direction_behind_the_norm_is_exact(which: int) -> None:
    norm = norms(torch.rand(16) + 0.5)[which]
    y, residual = torch.randn(5, 16), torch.randn(5, 16)
    reached = norm(y + through_post_norm(norm, y, residual))
    wanted = norm(y) + residual
    assert_close(torch.cosine_similarity(reached, wanted), torch.ones(5), rtol=0, atol=1e-6)


def test_a_small_output_is_read_with_the_norms_epsilon() -> None:
    norm = LlamaRMSNorm(2, eps=3e-2)
    y = torch.tensor([[0.1, -0.1]])  # rms with epsilon is sqrt(0.01 + 0.03) = 0.2
    change = through_post_norm(norm, y, torch.tensor([[1.0, 0.0]]))
    assert_close(change, torch.tensor([[0.2, 0.0]]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_closed_coordinates_are_left_alone(which: int) -> None:
    norm = norms(torch.tensor([1.0, 0.0, -2.0]))[which]
    change = through_post_norm(norm, torch.ones(1, 3), torch.tensor([[1.0, 5.0, 1.0]]))
    assert_close(change, torch.tensor([[1.0, 0.0, -0.5]]), rtol=1e-5, atol=1e-6)


def test_an_output_of_zero_and_a_residual_of_zero_stay_finite() -> None:
    norm = LlamaRMSNorm(4)
    assert torch.isfinite(through_post_norm(norm, torch.zeros(1, 4), torch.ones(1, 4))).all()
    assert_close(through_post_norm(norm, torch.ones(1, 4), torch.zeros(1, 4)), torch.zeros(1, 4))


def test_half_precision_gains_are_read_exactly_and_the_norm_is_not_changed() -> None:
    norm = norms(torch.tensor([2.0, 4.0]))[1].to(torch.bfloat16)
    y, residual = torch.tensor([[1.0, 7.0]]), torch.tensor([[0.4, 0.8]], dtype=torch.float64)
    change = through_post_norm(norm, y.bfloat16(), residual)
    assert change.dtype == torch.float64
    assert_close(change, torch.ones(1, 2, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert norm.weight.dtype == torch.bfloat16


def test_a_norm_is_found_by_what_the_block_calls_it() -> None:
    block = nn.Module()
    assert find_post_norm(block) is None
    block.post_feedforward_layernorm = nn.Identity()
    assert find_post_norm(block) is block.post_feedforward_layernorm
