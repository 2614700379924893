"""The facts that the package ships: complete, consistent, and known to the model of the demo."""

from __future__ import annotations

import pytest

from fastmemit.data import Record, builtin_facts, load_records

FACTS = builtin_facts()


def test_there_are_two_dozen_with_a_subject_each() -> None:
    assert len(FACTS) == 24
    assert [record.case_id for record in FACTS] == list(range(24))
    assert len({record.request.subject.lower() for record in FACTS}) == 24
    assert len({record.relation_id for record in FACTS}) >= 12
    assert load_records("builtin") == FACTS


@pytest.mark.parametrize("record", FACTS, ids=lambda record: record.request.subject)
def test_each_fact_can_be_scored(record: Record) -> None:
    request = record.request
    assert len(record.paraphrases) == 2
    assert len(set(record.neighbourhood)) == 10
    assert len(record.generations) >= 4
    assert request.target_true is not None
    assert request.target_true != request.target_new
    assert len(request.target_new.split()) == len(request.target_true.split()) == 1
    for prompt in (*record.paraphrases, *record.generations):
        assert request.subject in prompt
        assert prompt == prompt.strip()
    for prompt in record.neighbourhood:
        assert request.subject.lower() not in prompt.lower()
        assert request.target_true not in prompt  # the answer must not stand in the question
        assert prompt == prompt.strip()


def test_no_fact_disturbs_the_neighbourhood_of_another() -> None:
    subjects = [record.request.subject for record in FACTS]
    for record in FACTS:
        for prompt in record.neighbourhood:
            assert not [subject for subject in subjects if subject in prompt]
