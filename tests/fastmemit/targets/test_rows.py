"""Rows: where the change enters, where the loss reads, and when the KL prompt needs no row."""

from fastmemit.request import EditRequest
from fastmemit.text import lead, request_rows, subject_row
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


def test_a_context_is_a_stem_that_requests_share():
    one = request_rows(TOKENIZER, EditRequest("{} is located in", "Paris", "Rome"), ("", "Yes. ", "So it goes. "))
    other = request_rows(TOKENIZER, EditRequest("The town of {} is", "Ann", "Rome"), ("", "Yes. ", "So it goes. "))
    for row, same, context in zip(one.rows, other.rows, ("", "Yes.", "So it goes."), strict=False):
        # The space behind a context may be a token of its own or belong to the next word.
        assert text(row.ids[: row.stem]).strip() == text(same.ids[: same.stem]).strip() == context
        assert row.stem <= row.subject


def test_subject_row_ends_with_the_subject():
    request = EditRequest("The town of {} is in", "New York", "Rome")
    row = subject_row(TOKENIZER, "So {it} goes. ", request)
    assert text(row.ids) == "So {it} goes. The town of New York"
    assert row.subject == len(row.ids) - 1


def test_a_subject_that_would_be_the_first_token_stands_behind_a_line_break():
    request = EditRequest("{} is located in", "I", "Rome")
    assert lead(TOKENIZER, request) == "\n"
    row = subject_row(TOKENIZER, "", request)
    assert (text(row.ids), row.subject) == ("\nI", 1)
    assert text(subject_row(TOKENIZER, "Yes. ", request).ids) == "Yes. I"
    rows = request_rows(TOKENIZER, request, ("", "Yes. "))
    assert [text(row.ids[: row.reads[0][0] + 1]) for row in rows.rows] == ["\nI is located in", "Yes. I is located in"]
    # The KL prompt stands behind it as well, so that the bare row serves for it.
    assert rows.kl == 0 and rows.rows[0].subject == 1


def test_only_such_a_subject_has_a_lead():
    for prompt, subject, kind in [
        ("{} is located in", "Paris", "byte_bpe"),  # two tokens
        ("In {} there is", "I", "byte_bpe"),
        ("{} is located in", "I", "bpe_bos"),
        ("{} is located in", "I", "metaspace"),
        ("{} is located in", "I", "slow_words"),
    ]:
        tokenizer, request = tiny_tokenizer(kind), EditRequest(prompt, subject, "Rome")
        assert lead(tokenizer, request) == ""
        whole = tokenizer.decode(list(subject_row(tokenizer, "", request).ids))
        assert "\n" not in whole
    # A KL prompt is bare where the prompt is, though its subject is then the first token.
    rows = request_rows(TOKENIZER, EditRequest("In {} there is", "I", "Rome"), ("",))
    assert [text(row.ids) for row in rows.rows][1:] == ["I"]


def test_a_context_stands_behind_the_bos_that_a_prompt_brings():
    tokenizer = tiny_tokenizer("bpe_bos")
    bare = EditRequest("The town of {} is in", "Paris", "Rome")
    request = EditRequest("<s>The town of {} is in", "Paris", "Rome")
    for prefix in ("", "Yes. "):
        assert subject_row(tokenizer, prefix, request) == subject_row(tokenizer, prefix, bare)
    ours, theirs = (request_rows(tokenizer, r, ("", "Yes. ")) for r in (request, bare))
    assert ours == theirs
    # What a tokenizer does not add is text, and contexts stand before it.
    row = subject_row(TOKENIZER, "Yes. ", request)
    assert text(row.ids) == "Yes. <s>The town of Paris"


def test_the_answer_joins_the_prompt_as_the_request_says():
    for join, prompt, whole in [
        (None, "The town of {} is in ", "The town of Paris is in Rome"),
        (None, 'The town of {} is "', 'The town of Paris is "Rome'),
        ("", "The town of {} is in", "The town of Paris is inRome"),
        (None, "The town of {} is in", "The town of Paris is in Rome"),
    ]:
        request = EditRequest(prompt, "Paris", "Rome", join=join)
        row = request_rows(TOKENIZER, request, ("",)).rows[0]
        assert text((*row.ids, row.reads[-1][1])) == whole
