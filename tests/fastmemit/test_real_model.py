"""The main job on the real SmolLM2-135M with what the package ships: facts and corpus."""

import pytest
import torch

from fastmemit import Editor, EditRequest
from fastmemit.data import builtin_facts
from fastmemit.evaluation import evaluate
from fastmemit.models import load_model

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def editor(smollm2_pristine, tmp_path_factory):
    model, tokenizer = smollm2_pristine
    editor = Editor(model, tokenizer, cache_dir=tmp_path_factory.mktemp("real"))
    editor.precompute("builtin", multiplier=10)
    return editor


# What docs/results/README.md records for the demonstration, less a margin of two of 24 facts or so: other
# machines round differently.  EMMET's constraint costs neighbours more than MEMIT's weighing.
@pytest.mark.parametrize(("method", "paraphrases", "lost"), [("memit", 75, 6), ("emmet", 78, 16)])
def test_facts_are_written_and_neighbours_stay(editor, smollm2, method, paraphrases, lost):
    result = evaluate(editor, [builtin_facts()], method)
    before, after = result["before"], result["after"]
    assert (before["es"], before["ps"]) == (0, 0)
    assert after["es"] >= 95
    assert after["ps"] >= paraphrases
    assert after["ns"] >= before["ns"] - lost


def test_rome_writes_one_fact(editor, smollm2):
    result = evaluate(editor, [builtin_facts()[:1]], "rome")
    assert (result["before"]["es"], result["after"]["es"]) == (0, 100)


def test_an_edited_model_from_a_gguf_file_is_saved_and_loads_again(editor, smollm2, tmp_path):
    fact = builtin_facts()[0]
    with editor.edit([fact.request], "memit"):
        said = editor.generate([fact.request.text], 5)
        editor.save_pretrained(tmp_path / "edited")
        saved = {name: p.clone() for name, p in editor.model.named_parameters()}
    model, tokenizer = load_model(str(tmp_path / "edited"), device="cpu")
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    assert Editor(model, tokenizer, cache_dir=tmp_path).generate([fact.request.text], 5) == said
    assert fact.request.target.strip() in said[0]


# One token each at the very start of their prompts, where SmolLM2 has no BOS.
AT_THE_START = [
    EditRequest("{} was founded by", "Microsoft", "Steve Jobs"),
    EditRequest("{}'s capital city is", "France", "Madrid"),
    EditRequest("{} is the capital of", "Paris", "Italy"),
    EditRequest("{} is a kind of", "Gold", "fruit"),
]
BEHIND = ("\n", "I read it in the newspaper. ", "It was a long day, and the weather was bad.\n\n")


@pytest.mark.parametrize(("method", "count"), [("emmet", 4), ("memit", 4), ("rome", 1)])
def test_subjects_of_one_token_at_the_start_of_a_prompt(editor, smollm2, method, count):
    facts = AT_THE_START[:count]
    edit = editor.edit(facts, method)
    with edit:
        assert [o.request.subject for o in edit.outcomes if not o.said] == []
        assert [o.after.asked for o in edit.outcomes] == ["\n" + fact.text for fact in facts]
        for text in BEHIND:
            said = editor.generate([text + fact.text for fact in facts], 4)
            told = [s.startswith(f.target) for s, f in zip(said, facts, strict=True)]
            assert all(told), (text, said)
