"""The level of the noise, and that a fact always gets the same."""

from __future__ import annotations

import pytest
import torch

from fastmemit.errors import BadRequest
from fastmemit.models import find_adapter
from fastmemit.request import EditRequest
from fastmemit.tracing import TracedFact, added_to_embeddings, subject_embeddings, subject_noise
from tiny_models import tiny_model

REQUEST = EditRequest("{} is", "a", "b", "c")
FACTS = [TracedFact(REQUEST, (4, 5, 6, 7), 1, 2, 0), TracedFact(REQUEST, (8, 9), 0, 0, 0)]


def test_the_level_is_that_of_the_subjects_embeddings() -> None:
    model = tiny_model("gpt2")
    std, width = subject_embeddings(find_adapter(model), FACTS)
    values = model.transformer.wte.weight[[5, 6, 8]].detach().double()
    assert width == 32
    mean = values.sum() / values.numel()
    assert std == pytest.approx(float(((values - mean) ** 2).sum() / (values.numel() - 1)) ** 0.5)


def test_scaled_embeddings_count_as_they_leave_the_module() -> None:
    model = tiny_model("gemma3")
    std, _ = subject_embeddings(find_adapter(model), FACTS)
    values = model.get_input_embeddings().weight[[5, 6, 8]].detach()
    assert std == pytest.approx(float(values.std()) * 32**0.5, rel=1e-5)


def test_noise_depends_on_the_fact_and_the_seed_only() -> None:
    torch.manual_seed(1)
    noise = subject_noise(FACTS[0], 3, 32, 2.0, seed=0)
    torch.manual_seed(2)
    assert noise.shape == (3, 2, 32)
    assert torch.equal(noise, subject_noise(FACTS[0], 3, 32, 2.0, seed=0))
    assert not torch.equal(noise, subject_noise(FACTS[0], 3, 32, 2.0, seed=1))
    assert not torch.equal(noise[:, :1], subject_noise(FACTS[1], 3, 32, 2.0, seed=0))
    torch.testing.assert_close(2 * noise, subject_noise(FACTS[0], 3, 32, 4.0, seed=0))


def test_the_noise_is_gaussian_of_the_given_width() -> None:
    noise = subject_noise(FACTS[0], 200, 256, 3.0, seed=0)
    assert float(noise.std()) == pytest.approx(3, rel=0.02)
    assert abs(float(noise.mean())) < 0.05
    assert float((noise.abs() < 3).float().mean()) == pytest.approx(0.6827, abs=0.01)


def test_noise_is_added_inside_the_block_alone() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[4, 5]])
    embed = model.get_input_embeddings()
    plain = embed(ids)
    noise = torch.randn(1, 2, 32)
    with added_to_embeddings(find_adapter(model), noise):
        assert torch.equal(embed(ids), plain + noise)
    assert torch.equal(embed(ids), plain)


def test_embeddings_that_are_all_alike() -> None:
    model = tiny_model("gpt2")
    torch.nn.init.zeros_(model.transformer.wte.weight)
    with pytest.raises(BadRequest, match="3 subject tokens have a standard deviation of 0"):
        subject_embeddings(find_adapter(model), FACTS)
