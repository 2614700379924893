from fastmemit.errors import counted

"""Words that messages share."""


def test_a_number_and_what_it_is_of() -> None:
    assert [counted(n, "fact") for n in (0, 1, 2)] == ["0 facts", "1 fact", "2 facts"]
    assert [counted(n, "batch is", "batches are") for n in (1, 2)] == ["1 batch is", "2 batches are"]
