"""Where the subject stands, what the answer is, and which facts are chosen."""

from __future__ import annotations

import pytest
import torch

from fastmemit.errors import BadRequest, UnknownArchitecture
from fastmemit.models import find_adapter
from fastmemit.request import EditRequest
from fastmemit.tracing import TracedFact, TraceSettings, choose_facts, encode_fact
from tiny_models import tiny_model, tiny_tokenizer

PARIS = EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
ANY = TraceSettings(only_known=False)


def test_the_subject_and_the_answer_are_tokens_of_the_text() -> None:
    tokenizer = tiny_tokenizer("bpe_bos")
    fact = encode_fact(tokenizer, PARIS)
    assert fact.ids[0] == tokenizer.bos_token_id and fact.first == 1
    assert tokenizer.decode(fact.ids[fact.first : fact.last + 1]) == "The Eiffel Tower"
    assert tokenizer.decode(fact.ids[1:]) == PARIS.text
    assert " Paris".startswith(tokenizer.decode([fact.answer]))
    whole = tokenizer(PARIS.text + " Paris")["input_ids"]
    assert [*fact.ids, fact.answer] == whole[: len(fact.ids) + 1]


def test_a_subject_inside_a_text() -> None:
    tokenizer = tiny_tokenizer("byte_bpe")
    fact = encode_fact(tokenizer, EditRequest("The capital of {} is", "Italy", "x", "Rome"))
    assert tokenizer.decode(fact.ids[fact.first : fact.last + 1]) == " Italy"
    assert tokenizer.decode(fact.ids[fact.last + 1 :]) == " is"


@pytest.mark.parametrize(
    ("length", "first", "last", "expected"),
    [
        (9, 1, 4, {1: "first subject", 2: "middle subject", 3: "middle subject",
                   4: "last subject", 5: "first after", 6: "further", 7: "further", 8: "last"}),
        (4, 0, 1, {0: "first subject", 1: "last subject", 2: "first after", 3: "last"}),
        (3, 1, 1, {1: "last subject", 2: "last"}),
    ],
)  # fmt: skip
def test_each_position_is_in_one_group(length: int, first: int, last: int, expected: dict[int, str]) -> None:
    assert TracedFact(PARIS, tuple(range(length)), first, last, 0).groups() == expected


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (EditRequest("{} is in", "Rome", "x"), "has no target_true"),
        (EditRequest("{}", "Rome", "x", "Italy"), "ends with its subject"),
        (EditRequest("I live in {}", "Rome", "x", "Italy"), "ends with its subject"),
    ],
)
def test_facts_that_cannot_be_traced(request_: EditRequest, part: str) -> None:
    with pytest.raises(BadRequest, match=part):
        encode_fact(tiny_tokenizer(), request_)


def some_facts() -> list[EditRequest]:
    subjects = ("Rome", "The Eiffel Tower", "Ann", "France", "the poet", "Lyon", "Berlin")
    return [EditRequest("{} is located in the city of", name, "x", "Paris") for name in subjects]


def test_only_facts_that_the_model_knows() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    facts = [encode_fact(tokenizer, request) for request in some_facts()]
    # A head that says the answer or <pad>, by the side of a plane on which the hidden state lies.
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.weight[facts[0].answer] = torch.randn(32)
        said = [int(model(torch.tensor([fact.ids])).logits[0, -1].argmax()) for fact in facts]
    known = {f.request.subject for f, token in zip(facts, said, strict=True) if token == f.answer}
    assert 1 < len(known) < 7
    adapter = find_adapter(model)
    chosen = choose_facts(adapter, tokenizer, some_facts(), TraceSettings())
    assert {fact.request.subject for fact in chosen.facts} == known
    assert (len(chosen.facts), chosen.looked_at) == (len(known), 7)
    first = choose_facts(adapter, tokenizer, some_facts(), TraceSettings(limit=1))
    assert first.facts == chosen.facts[:1] and 1 <= first.looked_at < 7
    strange = [request for request in some_facts() if request.subject not in known]
    with pytest.raises(BadRequest, match=f"knows none of the {len(strange)} facts.*--unknown-too"):
        choose_facts(adapter, tokenizer, strange, TraceSettings())


def test_the_limit_stops_and_the_seed_shuffles() -> None:
    adapter = find_adapter(tiny_model("gpt2"))

    def subjects(**settings: int) -> list[str]:
        chosen = choose_facts(adapter, tiny_tokenizer(), some_facts(), TraceSettings(only_known=False, **settings))
        assert chosen.looked_at == len(chosen.facts)
        return [fact.request.subject for fact in chosen.facts]

    everyone = subjects()
    assert len(everyone) == 7 and everyone != [fact.subject for fact in some_facts()]
    assert subjects(limit=3) == everyone[:3]
    assert subjects(seed=1) != everyone and sorted(subjects(seed=1)) == sorted(everyone)


def test_texts_that_are_too_long() -> None:
    adapter = find_adapter(tiny_model("llama"))
    request = EditRequest("{} " + "in the city " * 120 + "of", "Rome", "x", "Italy")
    with pytest.raises(BadRequest, match=r"comes to \d+ tokens but \w+ takes 256"):
        choose_facts(adapter, tiny_tokenizer(), [PARIS, request], ANY)


def test_no_facts_and_a_model_without_attention() -> None:
    model = tiny_model("llama")
    adapter = find_adapter(model)
    with pytest.raises(BadRequest, match="no fact to trace"):
        choose_facts(adapter, tiny_tokenizer(), [], ANY)
    model.model.layers[2].mixer = model.model.layers[2]._modules.pop("self_attn")
    type(model.model.layers[2].mixer).__name__, name = "Mixer", "LlamaAttention"
    try:
        with pytest.raises(UnknownArchitecture, match="--kinds mlp,hidden"):
            choose_facts(adapter, tiny_tokenizer(), [PARIS], ANY)
    finally:
        type(model.model.layers[2].mixer).__name__ = name
