"""What the hub says in a page, said in one sentence."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, errors

from fastmemit.errors import BadConfig, FastmemitError
from fastmemit.sharing.hub import check_repo, told_plainly


@pytest.mark.parametrize("name", ["me/edit", "A-1/b_c.d", "m/" + "x" * 96])
def test_names_of_repositories(name: str) -> None:
    assert check_repo(name) == name


@pytest.mark.parametrize(
    "name", ["", "edit", "me/edit/x", "../x", "me/..", "/abs/x", "me/a b", "me/x.git", "me/a--b",
             "https://huggingface.co/me/edit", "me/" + "x" * 97, "me/edit\n"],
)  # fmt: skip
def test_what_is_no_name_of_one(name: str) -> None:
    with pytest.raises(BadConfig, match="write USER/NAME"):
        check_repo(name)


def made(kind: Any, status: int | None = None, text: str = "a page\nof text") -> Exception:
    """An error of the hub's library, whose constructors differ between versions."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    error.response = SimpleNamespace(status_code=status)
    return error


class ConnectError(Exception):
    """As httpx calls it."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (made(errors.GatedRepoError, 403), "gated; ask for access at https://huggingface.co/me/e"),
        (made(errors.RepositoryNotFoundError, 404), "none of this name, or it is private"),
        (made(errors.RepositoryNotFoundError, 401), "none of this name, or it is private"),
        (made(errors.RevisionNotFoundError, 404), "no such revision"),
        (made(errors.LocalTokenNotFoundError), "not logged in; run hf auth login"),
        (made(errors.HfHubHTTPError, 401), "not logged in"),
        (made(errors.HfHubHTTPError, 403), "your token may not do this"),
        (made(errors.HfHubHTTPError, 503, "503 Unavailable."), r"\(503 Unavailable\); try again"),
        (made(errors.LocalEntryNotFoundError), "cannot be reached from here"),
        (ConnectionError("refused"), "cannot be reached from here"),
        (ConnectError("no route"), "cannot be reached from here"),
        (TimeoutError("late"), "cannot be reached from here"),
        (made(errors.OfflineModeIsEnabled), "because HF_HUB_OFFLINE is set"),
    ],
)
def test_one_sentence_for_each(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with (
        pytest.raises(FastmemitError, match=f"^The repository 'me/edit' could not be fetched.*{words}"),
        told_plainly("me/edit", "fetched"),
    ):
        raise error


def test_offline_is_named_where_it_is_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FastmemitError, match="HF_HUB_OFFLINE"), told_plainly("me/edit", "fetched"):
        raise made(errors.LocalEntryNotFoundError)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("ours")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, told_plainly("me/edit", "fetched"):
        raise error
    assert raised.value is error
