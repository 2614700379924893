"""A text file becomes tokens and windows; every token is predicted once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmemit.errors import BadConfig, BadData
from fastmemit.evaluation.perplexity import DEFAULT_CONTEXT, PerplexityText, _ids, read_text
from tiny_editors import texts
from tiny_tokenizers import tiny_tokenizer


def text_of(n: int, **settings: Any) -> PerplexityText:
    return PerplexityText("text", "0" * 64, tuple(range(100, 100 + n)), **settings)


def test_windows_lie_side_by_side_and_begin_with_a_token_that_is_not_predicted() -> None:
    windows = text_of(10, context=4).windows()
    assert [window.ids for window in windows] == [(100, 101, 102, 103), (104, 105, 106, 107), (108, 109)]
    assert [window.first for window in windows] == [1, 1, 1]
    assert [window.predicted for window in windows] == [3, 3, 1]


def test_a_last_window_of_one_token_predicts_nothing_and_is_left_out() -> None:
    assert len(text_of(9, context=4).windows()) == 2


def test_special_tokens_stand_in_front_of_every_window_and_are_not_predicted() -> None:
    windows = text_of(5, context=4, lead=(1,)).windows()
    assert [window.ids for window in windows] == [(1, 100, 101, 102), (1, 103, 104)]
    assert [window.predicted for window in windows] == [3, 2]


def test_a_stride_makes_windows_overlap() -> None:
    windows = text_of(7, context=4, stride=2).windows()
    assert [window.ids for window in windows] == [(100, 101, 102, 103), (102, 103, 104, 105), (104, 105, 106)]
    assert [window.first for window in windows] == [1, 2, 2]


@given(st.integers(2, 60), st.integers(3, 20), st.integers(0, 1), st.integers(1, 20))
def test_with_overlap_or_bos_every_token_is_predicted_once(n: int, context: int, lead: int, stride: int) -> None:
    stride = min(stride, context - lead)
    windows = text_of(n, context=context, stride=stride, lead=(1,) * lead).windows()
    assert all(len(window.ids) <= context for window in windows)
    assert all(window.first >= max(1, lead) for window in windows)
    predicted = [token for window in windows for token in window.ids[window.first :]]
    assert len(predicted) == len(set(predicted))
    whole = set(range(100, 100 + n))
    if lead or stride < context:
        assert whole - set(predicted) == (set() if lead else {100})


def test_the_context_is_the_models_at_most_the_default() -> None:
    long = text_of(5000)
    assert max(len(window.ids) for window in long.windows()) == DEFAULT_CONTEXT
    assert max(len(window.ids) for window in long.windows(131072)) == DEFAULT_CONTEXT
    assert max(len(window.ids) for window in long.windows(256)) == 256
    with pytest.raises(BadConfig, match="context is 300 tokens but the model takes 256"):
        text_of(5000, context=300).windows(256)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"context": 1}, "context of 1 tokens predicts nothing"),
        ({"context": 1, "lead": (1,)}, "context of 1 tokens predicts nothing"),
        ({"stride": 0}, "stride must be 1 or more but is 0"),
    ],
)
def test_windows_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        text_of(10, **settings)


def test_a_stride_longer_than_a_window_would_leave_tokens_out() -> None:
    with pytest.raises(BadConfig, match="stride is 4 tokens but a window has room for 3"):
        text_of(10, context=4, stride=4, lead=(1,)).windows()


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe_bos", "metaspace", "adds_eos", "slow_bytes"])
def test_a_file_is_tokenised_whole_with_its_special_tokens_apart(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("One é 🙂.\r\n\r\nTwo.\n".encode())
    tokenizer = tiny_tokenizer(kind)
    text = read_text(path, tokenizer)
    assert text.name == "text.txt"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert text.lead == (() if kind == "byte_bpe" else (1,))
    plain = tokenizer("One é 🙂.\n\nTwo.\n", add_special_tokens=False)["input_ids"]
    assert text.ids == tuple(plain)


@pytest.mark.parametrize("kind", ["byte_bpe", "metaspace", "slow_bytes"])
def test_the_first_tokens_are_those_of_the_whole_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(texts(300)))
    tokenizer = tiny_tokenizer(kind)
    whole = read_text(path, tokenizer)
    seen: list[int] = []

    def counting(part: str, **settings: Any) -> Any:
        seen.append(len(part))
        return tokenizer(part, **settings)

    assert _ids(counting, path.read_text(), 100) == list(whole.ids[:100])
    assert read_text(path, tokenizer, tokens=100).ids == whole.ids[:100]
    assert max(seen) < len(path.read_text())  # a part was enough
    assert read_text(path, tokenizer, tokens=len(whole.ids)).ids == whole.ids


def test_files_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    path = tmp_path / "text.txt"
    with pytest.raises(BadData, match="does not exist"):
        read_text(path, tokenizer)
    with pytest.raises(BadData, match="is a folder"):
        read_text(tmp_path, tokenizer)
    path.write_bytes(b"")
    with pytest.raises(BadData, match="is empty"):
        read_text(path, tokenizer)
    path.write_bytes(b"abc\xff")
    with pytest.raises(BadData, match=r"not UTF-8 text: byte 3 \(0xff\)"):
        read_text(path, tokenizer)
    path.write_bytes(b"a")
    with pytest.raises(BadData, match="has 1 tokens but 2 are needed"):
        read_text(path, tokenizer)
    assert len(read_text(path, tiny_tokenizer("bpe_bos")).windows()) == 1
    with pytest.raises(BadData, match=r"has 1 tokens but 50 are needed.*ask for fewer"):
        read_text(path, tokenizer, tokens=50)
    with pytest.raises(BadConfig, match="1 tokens predict nothing"):
        read_text(path, tokenizer, tokens=1)
    monkeypatch.setattr("fastmemit.data.reading.MAX_WHOLE_FILE", 0)
    with pytest.raises(BadData, match="GiB that are read in one piece; give a part of it"):
        read_text(path, tokenizer)
