"""Whether an edit took: what the model says, against greedy decoding one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastmemit import Editor
from fastmemit import answers as outcomes
from fastmemit.answers import Outcome, Reply, ask, compare, verdict
from fastmemit.errors import FastmemitError, MissedFacts
from fastmemit.models import find_adapter
from fastmemit.partial_forward import goes_on
from fastmemit.request import EditRequest
from fastmemit.text import encode, encode_with_target
from tiny_editors import FACTS, QUICK, tiny_editor
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

START = EditRequest("{} is located in the city of", "I", "Rome")  # one token at the start


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return tiny_editor(tmp_path_factory.mktemp("editor"))


def bits(editor: Editor) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in editor.model.state_dict().values()]


def literal(model: Any, ids: list[int], count: int) -> list[int]:
    """The `count` most probable tokens after `ids`, by forwards of one row without any cache."""
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
    return new


def literal_probability(model: Any, ids: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0].double()
    log_p = logits.log_softmax(-1)
    places = range(len(ids) - 1, len(ids) + len(answer) - 1)
    return math.exp(sum(float(log_p[i, t]) for i, t in zip(places, answer, strict=True)))


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe_bos"])
def test_replies_are_those_of_greedy_decoding(kind: str) -> None:
    tokenizer, model = tiny_tokenizer(kind), tiny_model("llama")
    adapter = find_adapter(model)
    asked = [*FACTS, EditRequest("{} is in", "Eiffel Tower", "a long answer, in many tokens")]
    for request, reply in zip(asked, ask(adapter, tokenizer, asked), strict=True):
        encoded, count = encode_with_target(tokenizer, request.text, request.target)
        ids, answer = list(encoded.ids[:-count]), list(encoded.ids[-count:])
        assert reply.asked == request.text and reply.at_start is None
        assert reply.probability == pytest.approx(literal_probability(model, ids, answer), rel=1e-4)
        shown, said = (literal(model, ids, n) for n in (max(count, outcomes.SHOWN), count + outcomes.MORE))
        if not request.target_new.startswith(
            tokenizer.decode(shown, skip_special_tokens=True).strip().rstrip("\ufffd")
        ):
            said = shown  # which could not become the answer any more
        assert not reply.said and said[:count] != answer
        assert reply.says == tokenizer.decode(said, skip_special_tokens=True).strip()


def said_anyway(model: Any, tokenizer: Any) -> tuple[EditRequest, list[int], list[int]]:
    """A fact that an unedited model says, with the tokens of its prompt and its answer."""
    for text in ("The capital of {} is", "The mother tongue of {} is", "I play the {} in"):
        ids = list(encode(tokenizer, text.format("France")).ids)
        answer = literal(model, ids, 2)
        words = tokenizer.decode(answer)
        if list(encode(tokenizer, text.format("France") + words).ids) == ids + answer:
            join = words[: len(words) - len(words.lstrip())]
            return EditRequest(text, "France", words.strip(), join=join), ids, answer
    raise AssertionError("the model says nothing that can be asked for; add a prompt")


def test_what_the_model_says_anyway_is_said() -> None:
    tokenizer, model = tiny_tokenizer("byte_bpe"), tiny_model("llama")
    request, ids, answer = said_anyway(model, tokenizer)
    (reply,) = ask(find_adapter(model), tokenizer, [request])
    assert reply.said and reply.says == request.target_new
    assert reply.probability == pytest.approx(literal_probability(model, ids, answer), rel=1e-4)


@pytest.mark.parametrize(
    ("says", "answer", "said"),
    [("Rome, Italy", "Rome", True), ("Romeo", "Rome", False), ("Rome", "Rome", True),
     ("Rom", "Rome", False), ("(Rome)x", "(Rome)", True), ("", "Rome", False)],
)  # fmt: skip
def test_an_answer_in_other_tokens_is_the_answer(says: str, answer: str, said: bool) -> None:
    assert outcomes._begins_with(says, answer) is said


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_kept_gives_the_continuations_of_whole_rows(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = tiny_tokenizer("byte_bpe"), tiny_model(architecture)
    adapter = find_adapter(model)
    answers = ("x", "Rome in Italy", "a much longer answer that has very many tokens indeed")
    asked = [EditRequest(prompt, "Paris", a) for a in answers for prompt in ("{} is", "It is known that {} was in")]
    widths: list[int] = []
    monkeypatch.setattr(outcomes, "MORE", 0)  # no row is followed further, which would run it again
    assert goes_on(adapter)
    model.register_forward_pre_hook(lambda _m, _a, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True)
    ask(adapter, tokenizer, asked)  # what was found out about the model is of one without the hook
    widths.clear()
    kept = ask(adapter, tokenizer, asked)
    assert len(widths) > 2 and set(widths[1:]) == {1}  # each prompt ran once
    monkeypatch.setattr(outcomes, "goes_on", lambda _: False)
    whole = ask(adapter, tokenizer, asked)
    assert [each.says for each in kept] == [each.says for each in whole]
    assert [each.probability for each in kept] == [each.probability for each in whole]


def test_a_row_that_may_still_become_the_answer_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = tiny_tokenizer("byte_bpe"), tiny_model("llama")
    request = EditRequest("{} is", "Paris", "Rome")
    spelled = list("Romeo says so")
    monkeypatch.setattr(outcomes, "end_tokens", lambda *_: set())
    said = {len(spelled[:n]): "".join(spelled[:n]) for n in range(1, 12)}
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: said[len(ids)], raising=False)
    (reply,) = ask(find_adapter(model), tokenizer, [request])
    assert not reply.said and reply.says == said[encode_with_target(tokenizer, "Paris is", " Rome")[1] + outcomes.MORE]


def test_a_prompt_that_fills_the_context_is_asked_as_far_as_it_goes() -> None:
    tokenizer, model = tiny_tokenizer("byte_bpe"), tiny_model("llama")
    short = EditRequest("{} is", "Paris", "x")
    word = " the"
    room = model.config.max_position_embeddings
    prompt = "{} is" + word * (room - len(encode(tokenizer, short.text)) - 2)
    long = EditRequest(prompt, "Paris", "x")
    length = len(encode(tokenizer, long.text))
    assert room - outcomes.MORE < length <= room
    replies = ask(find_adapter(model), tokenizer, [short, long])
    alone = ask(find_adapter(model), tokenizer, [short])[0]
    assert replies[0].says == alone.says
    new = literal(model, list(encode(tokenizer, long.text).ids), room - length)
    assert replies[1].says == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_subject_that_is_the_first_token_is_asked_behind_its_lead() -> None:
    tokenizer, model = tiny_tokenizer("byte_bpe"), tiny_model("llama")
    (reply,) = ask(find_adapter(model), tokenizer, [START])
    assert reply.asked == "\nI is located in the city of"
    encoded, count = encode_with_target(tokenizer, reply.asked, START.target)
    ids, answer = list(encoded.ids[:-count]), list(encoded.ids[-count:])
    assert reply.probability == pytest.approx(literal_probability(model, ids, answer), rel=1e-4)
    assert reply.at_start is False  # asked without it, too
    with_bos = tiny_tokenizer("bpe_bos")
    (other,) = ask(find_adapter(model), with_bos, [START])
    assert other.asked == START.text and other.at_start is None


def reply(says: str, said: bool = False, at_start: bool | None = None) -> Reply:
    return Reply("asked", 0.5, said, says, at_start)


def outcome(subject: str, says: str, said: bool, at_start: bool | None = None) -> Outcome:
    fact = EditRequest("{} was founded by", subject, "Steve Jobs")
    return Outcome(fact, reply("Bill Gates"), reply(says, said, at_start))


def test_the_verdict_in_words() -> None:
    told, missed = outcome("Apple", "Steve Jobs", True), outcome("IBM", "a\n \x1b[2Jgroup", False)
    assert verdict([told]) == "1 of 1 fact is now what the model says"
    assert verdict([told, told]) == "2 of 2 facts are now what the model says"
    assert verdict([told, missed]) == (
        "1 of 2 facts are now what the model says; not: IBM was founded by Steve Jobs (says: a \\x1b[2Jgroup)"
    )
    many = verdict([missed] * 12).split("; ")
    assert many[0] == "0 of 12 facts are now what the model says"
    assert len(many) == 12 and many[-1] == "and 2 more"
    start = outcome("Microsoft", "Steve Jobs", True, False)
    assert verdict([start, outcome("France", "Steve Jobs", True, True), told]).split("\n") == [
        "3 of 3 facts are now what the model says",
        "1 of these behind other text (a line break will do) but not at the very start of one, "
        "where one token is hardly told from another: Microsoft",
    ]
    assert missed.described() == (" 50.00% ->  50.00%  IBM was founded by Steve Jobs (before: Bill Gates)")


def test_an_edit_knows_what_became_of_its_facts(editor: Editor, caplog: pytest.LogCaptureFixture) -> None:
    before = ask(editor.adapter, editor.tokenizer, FACTS)
    edit = editor.edit(FACTS, "memit", **QUICK)
    try:
        after = ask(editor.adapter, editor.tokenizer, FACTS)
        assert edit.outcomes == compare(FACTS, before, after)
        assert [o.request for o in edit.outcomes] == list(FACTS)
        missed = [o for o in edit.outcomes if not o.said]
        said = [r.message for r in caplog.records if r.name != "fastmemit.targets"]
        assert said == ([verdict(edit.outcomes)] if missed else [])
        assert f"{3 - len(missed)} of them said" in repr(edit)
    finally:
        edit.undo()


def test_the_unedited_model_is_asked_once(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, int]] = []

    def counted(adapter: Any, tokenizer: Any, requests: Any) -> Any:
        asked.append((bool(editor.edits), len(requests)))
        return ask(adapter, tokenizer, requests)

    monkeypatch.setattr("fastmemit.editor.ask", counted)
    monkeypatch.setattr(editor, "_replies", ("", {}))
    first = editor.edit(FACTS[:1], "memit", **QUICK)
    first.undo()
    second = editor.edit(FACTS, "memit", **QUICK)
    assert asked == [(False, 1), (True, 1), (False, 2), (True, 3)]
    assert second.outcomes[0].before == first.outcomes[0].before
    editor.edit(FACTS[1:2], "memit", **QUICK).undo()  # of an edited model nothing is remembered
    assert asked[4:] == [(True, 1), (True, 1)]
    second.undo()
    with torch.no_grad():  # another model
        name, weight = next(iter(editor.model.named_parameters()))
        saved = weight.clone()
        weight[0] += 1
    asked.clear()
    try:
        editor._asked_before(list(FACTS))
        assert asked == [(False, 3)], name
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_facts_of_many_lengths_are_continued_as_each_alone() -> None:
    tokenizer, model = tiny_tokenizer("byte_bpe"), tiny_model("llama")
    answers = ("x", "Rome in Italy", "a much longer answer that has very many tokens indeed", "two words")
    asked = [EditRequest("{} is", "The Eiffel Tower", answer) for answer in answers]
    asked += [EditRequest("It is known that {} was in", "Paris", answer) for answer in answers]
    adapter = find_adapter(model)
    alone = [ask(adapter, tokenizer, [request])[0] for request in asked]
    for one, other in zip(alone, ask(adapter, tokenizer, asked), strict=True):
        assert (one.says, one.said) == (other.says, other.said)
        assert one.probability == pytest.approx(other.probability, rel=1e-4)


def test_nothing_is_asked_where_it_is_not_wanted(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmemit.editor.ask", None)
    edit = editor.edit(FACTS, "memit", verify=False, **QUICK)
    edit.undo()
    assert edit.outcomes == () and "said" not in repr(edit)


def test_a_strict_edit_that_misses_is_taken_back(editor: Editor) -> None:
    before = bits(editor)
    with pytest.raises(MissedFacts, match=r"0 of 3 facts .* not: .*; the model is left unedited"):
        editor.edit(FACTS, "memit", strict=True, **{**QUICK, "steps": 1})  # targets do not move
    assert editor.edits == ()
    assert all(map(torch.equal, before, bits(editor)))


def test_a_strict_edit_that_holds_stays(editor: Editor) -> None:
    request, _, _ = said_anyway(editor.model, editor.tokenizer)
    edit = editor.edit([request], "rome", strict=True, layers=(1,), steps=1)
    assert edit.applied and edit.outcomes[0].said
    edit.undo()


def test_an_error_while_asking_leaves_the_model_unedited(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bits(editor)

    def failing(*arguments: Any) -> Any:
        if editor.edits:
            raise FastmemitError("The logits are NaN.")
        return ask(*arguments)

    monkeypatch.setattr("fastmemit.editor.ask", failing)
    with pytest.raises(FastmemitError, match="NaN"):
        editor.edit(FACTS, "memit", **QUICK)
    assert editor.edits == () and all(map(torch.equal, before, bits(editor)))


def test_a_long_prompt_is_shown_by_its_end_which_says_what_was_asked() -> None:
    turn = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nThe {} is in<|im_end|>\n"
    fact = EditRequest(turn, "Eiffel Tower", "Rome", join="")
    found = Outcome(
        fact, Reply(fact.text, 0.25, False, "Paris", None), Reply(fact.text, 0.75, True, "Rome", None)
    ).described()
    assert found == (
        " 25.00% ->  75.00%  …ful assistant.<|im_end|> <|im_start|>user The Eiffel Tower is in<|im_end|> Rome"
        " (before: Paris)"
    )
    assert outcomes.one_line("a" * 81) == "a" * 79 + "…" and outcomes.one_line("a\n\x1b[2J b") == "a \\x1b[2J b"
