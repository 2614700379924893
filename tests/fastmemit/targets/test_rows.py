"""Rows: where the change enters, where the loss reads, and when the KL prompt needs no row."""

from fastmemit.request import EditRequest
from fastmemit.targets.rows import request_rows, subject_row
from tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer("byte_bpe")


def text(ids):
    return TOKENIZER.decode(list(ids))


def test_reads_predict_the_target_and_nothing_else():
    request = EditRequest("The mother tongue of {} is", "Danielle", "English")
    rows = request_rows(TOKENIZER, request, ("", "Yes. "))
    for row, prefix in zip(rows.rows, ("", "Yes. "), strict=False):
        target = [token for _, token in row.reads]
        assert text(row.ids[: row.reads[0][0] + 1]) == f"{prefix}The mother tongue of Danielle is"
        assert text(target) == " English"
        # Position p predicts the token at p + 1: the last target token is never an input.
        assert list(row.ids[row.reads[0][0] + 1 :]) == target[:-1]


def test_the_subject_is_found_by_its_place():
    request = EditRequest("Paris, or {}, is", "Paris", "Rome")
    (row, _kl) = request_rows(TOKENIZER, request, ("",)).rows
    assert text(row.ids[: row.subject + 1]).endswith("Paris, or Paris")


def test_a_prompt_that_begins_with_its_subject_carries_the_kl_term_itself():
    request = EditRequest("{} is located in", "Paris", "Rome")
    rows = request_rows(TOKENIZER, request, ("", "Yes. "))
    assert len(rows.rows) == 2
    assert rows.kl == 0


def test_another_prompt_gets_a_row_for_the_kl_term():
    request = EditRequest("The town of {} is in", "Paris", "Rome")
    rows = request_rows(TOKENIZER, request, ("", "Yes. "))
    assert rows.kl == 2
    assert text(rows.rows[2].ids) == "Paris"
    assert rows.rows[2].reads == ()


def test_subject_row_ends_with_the_subject():
    request = EditRequest("The town of {} is in", "New York", "Rome")
    row = subject_row(TOKENIZER, "So {it} goes. ", request)
    assert text(row.ids) == "So {it} goes. The town of New York"
    assert row.subject == len(row.ids) - 1
