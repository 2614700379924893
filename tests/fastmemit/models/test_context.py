"""Texts longer than the model's context are refused in words, wherever text enters a model."""

from types import SimpleNamespace

import pytest
import torch

from fastmemit import Editor, EditRequest
from fastmemit.errors import BadRequest
from fastmemit.evaluation import judge_answers
from fastmemit.models.running import check_lengths, context_limit
from tiny_models import tiny_model, tiny_tokenizer

LONG = "A long way down the river " * 60


@pytest.mark.parametrize(("architecture", "limit"), [("gpt2", 64), ("llama", 64), ("opt", 64)])
def test_the_limit_is_the_config_s(architecture, limit):
    field = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    model = tiny_model(architecture, **{field: limit})
    assert context_limit(model) == limit
    check_lengths(model, [[1] * limit])
    with pytest.raises(BadRequest, match=r"65 tokens but \w+ takes 64"):
        check_lengths(model, [[1], [1] * (limit + 1)])
    with pytest.raises(BadRequest, match="66 tokens"):
        check_lengths(model, [[1] * 60], more=6)


def test_a_model_without_a_stated_limit_takes_all():
    model = torch.nn.Module()
    model.config = SimpleNamespace(hidden_size=4)  # such as ALiBi's
    assert context_limit(model) is None
    check_lengths(model, [[1] * 100_000])


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_every_way_into_the_model_says_so(architecture, tmp_path):
    editor = Editor(tiny_model(architecture), tiny_tokenizer("byte_bpe"), cache_dir=tmp_path)
    request = EditRequest(LONG + "{} is", "Ann", "x")
    config = editor.config("memit", layers=(1,), steps=2)
    with pytest.raises(BadRequest, match="takes 256 at once"):
        editor.targets([request], config)
    with pytest.raises(BadRequest, match="takes 256 at once"):
        judge_answers(editor.adapter, editor.tokenizer, [(LONG, " x")])
    with pytest.raises(BadRequest, match="takes 256 at once"):
        editor.generate([LONG])
