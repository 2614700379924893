"""What the caller has set in torch changes no bit of a result, and is afterwards as it was."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from fastmemit.answers import judge_answers
from fastmemit.delta import Delta
from fastmemit.editor import Editor
from fastmemit.errors import WrongModel
from fastmemit.evaluation.downstream import evaluate_tasks
from fastmemit.evaluation.perplexity import PerplexityText, perplexity
from fastmemit.models import find_adapter
from fastmemit.sharing import compose, compressed, parts, remove
from fastmemit.text import continue_texts
from fastmemit.tracing import TraceSettings, choose_facts, trace
from tiny_editors import FACTS, QUICK, texts, tiny_editor
from tiny_models import tiny_model, tiny_tokenizer
from tiny_tasks import task_folder
from torch_states import STATES, of_model, random_states, settings

QUESTIONS = [("The piano is in", " Rome"), ("The capital of France is", " Berlin")]


def half_trained():
    """A model in whose modes and parameters nothing is uniform."""
    model = tiny_model("llama")
    model.model.layers[1].train()
    model.model.norm.weight.requires_grad_(False)
    return model


def results(model):
    """Weights of an edit, what they were made from, and what the edited model says."""
    with tempfile.TemporaryDirectory() as folder:
        editor = tiny_editor(Path(folder), model=model)
        edit = editor.edit(FACTS[:2], "memit", **QUICK)
        weights = [weight.clone() for weight in model.state_dict().values()]
        said = judge_answers(editor.adapter, editor.tokenizer, QUESTIONS)
        text = continue_texts(model, editor.tokenizer, ["The piano"], 4, top_k=5, seed=3)
        before = settings()
        edit.undo()
        with edit:
            assert settings() == before
            again = [weight.clone() for weight in model.state_dict().values()]
        assert all(map(torch.equal, weights, again))
        return weights, edit.delta.digest(), said, text


@functools.cache
def plain():
    return results(half_trained())


@pytest.mark.parametrize("state", STATES)
def test_no_setting_changes_a_bit_and_everything_comes_back(state):
    weights, digest, said, text = plain()
    model = half_trained()
    before, seeds = of_model(model), random_states()
    with STATES[state]():
        caller = settings()
        got = results(model)
        assert settings() == caller
    assert (of_model(model), random_states()) == (before, seeds)
    assert all(map(torch.equal, weights, got[0]))
    assert got[1:] == (digest, said, text)


def test_everything_comes_back_after_an_exception(tmp_path):
    model = half_trained()
    editor = tiny_editor(tmp_path, model=model)
    tokenizer = editor.tokenizer

    def broken(*_):
        raise ZeroDivisionError

    handle = model.model.layers[2].register_forward_pre_hook(broken)
    before, seeds = of_model(model), random_states()
    for state in ("inference_mode", "autocast", "default dtype bfloat16", "torch.device meta"):
        with STATES[state]():
            caller = settings()
            for action in (
                lambda: editor.edit(FACTS[:1], "memit", **QUICK),
                lambda: judge_answers(editor.adapter, tokenizer, QUESTIONS),
                lambda: continue_texts(model, tokenizer, ["The piano"], 2),
            ):
                with pytest.raises(ZeroDivisionError):
                    action()
                assert settings() == caller
    handle.remove()
    assert random_states() == seeds
    assert of_model(model) == before | {"hooks": before["hooks"] - 1}


def test_autocast_does_not_go_on_with_a_copy_of_the_former_weight(tmp_path):
    editor = tiny_editor(tmp_path)
    edit = editor.load(_saved(editor, tmp_path))
    ids = torch.arange(5, 15)[None]
    with torch.autocast("cpu", torch.bfloat16):
        unedited = editor.model(ids).logits.detach()
        edit.apply()
        edited = editor.model(ids).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = editor.model(ids).logits.detach()
    assert torch.equal(edited, wanted) and not torch.equal(edited, unedited)


def _saved(editor, folder):
    edit = editor.edit(FACTS[:1], "memit", **QUICK)
    edit.save(folder / "edit.safetensors")
    edit.undo()
    return folder / "edit.safetensors"


def test_a_model_made_under_inference_mode_is_refused_in_one_sentence(tmp_path):
    with torch.inference_mode():
        model = tiny_model("gpt2").double()
    with pytest.raises(WrongModel, match=r"inference_mode\(\)"):
        Editor(model, tiny_tokenizer("byte_bpe"), cache_dir=tmp_path)


def perplexity_of(model, folder):
    ids = tuple(tiny_tokenizer()(" ".join(texts(6)))["input_ids"][:90])
    return perplexity(find_adapter(model), PerplexityText("text", "0" * 64, ids, context=40))


def traced(model, folder):
    adapter = find_adapter(model)
    settings = TraceSettings(samples=2, window=2, only_known=False, batch_tokens=200)
    facts = choose_facts(adapter, tiny_tokenizer(), FACTS[:2], settings).facts
    found = trace(adapter, facts, settings)
    effects = {kind: {group: values.tolist() for group, values in of.items()} for kind, of in found.effects.items()}
    return found.std, found.clean.tolist(), found.corrupted.tolist(), repr(effects)


def downstream(model, folder):
    found = evaluate_tasks(model, tiny_tokenizer(), ["tiny_facts"], limit=3, include_path=task_folder(folder))
    return found["scores"]


def composed(model, folder):
    random = torch.Generator().manual_seed(0)
    deltas = []
    for number in range(2):
        pair = [torch.randn(size, 3, generator=random, dtype=torch.float32, device="cpu") for size in (4, 6)]
        deltas.append(Delta({"weight": tuple(pair)}, {"model": "m", "number": number}))
    one = compose(deltas)
    made = [one, compressed(compose(deltas)), *parts(one), remove(one, deltas[0].digest())]
    return [delta.digest() for delta in made]


@functools.cache
def alone(work):
    with tempfile.TemporaryDirectory() as folder:
        return work(half_trained(), Path(folder))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("work", [perplexity_of, traced, downstream, composed])
def test_what_is_measured_or_composed_is_the_same_under_every_setting(work, state, tmp_path):
    if work is downstream:
        pytest.importorskip("lm_eval")
    expected, model = alone(work), half_trained()
    before, seeds = of_model(model), random_states()
    with STATES[state]():
        caller = settings()
        got = work(model, tmp_path)
        assert settings() == caller
    assert (of_model(model), random_states()) == (before, seeds)
    assert got == expected
