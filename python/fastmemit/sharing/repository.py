"""What a repository of an edit or of statistics holds, and what the hub's refusals mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fastmemit.errors import BadConfig, HubError

EDIT, CARD, MOMENTS = "edit.safetensors", "README.md", "moments"
#: What is ever fetched; fnmatch patterns, as the hub's library takes them.
EDIT_FILES = (EDIT, CARD)
MOMENT_FILES = (f"{MOMENTS}/*.safetensors", CARD)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_repo(repo: str) -> str:
    """The name of a repository, if it can be one.

    Raises:
        BadConfig: It is not of the form ``USER/NAME``.
    """
    if not _NAME.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".")):
        raise BadConfig(f"{repo!r:.120} is no name of a repository on the hub; write USER/NAME.")
    return repo


@contextmanager
def told_plainly(repo: str, doing: str) -> Iterator[None]:
    """Turn what the hub's library raises into one sentence.

    Args:
        repo: The repository.
        doing: "fetched" or "written".

    Raises:
        HubError: Anything that has to do with the hub.  The disk's own errors pass.
    """
    try:
        yield
    except Exception as error:
        sentence = _sentence(repo, doing, error)
        if sentence is None:
            raise
        raise HubError(sentence) from error


def _sentence(repo: str, doing: str, error: Exception) -> str | None:
    """What an error means, or None if it is not the hub's."""
    from huggingface_hub import constants

    kinds = {kind.__name__ for kind in type(error).__mro__}  # they moved between versions
    status = getattr(getattr(error, "response", None), "status_code", None)
    start = f"The repository {repo!r} could not be {doing}"
    offline = constants.HF_HUB_OFFLINE or "OfflineModeIsEnabled" in kinds
    if offline and kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return f"{start}, because HF_HUB_OFFLINE is set and no copy is kept; unset it, or work from files."
    if "GatedRepoError" in kinds:
        return (
            f"{start}, because it is gated; ask for access at https://huggingface.co/{repo} and log in (hf auth login)."
        )
    if "RepositoryNotFoundError" in kinds:
        return (
            f"{start}, because there is none of this name, or it is private; correct the name, or "
            "log in (hf auth login) as somebody who may see it."
        )
    if "RevisionNotFoundError" in kinds:
        return f"{start}, because it has no such revision; name a branch, a tag or a commit of it."
    if "LocalTokenNotFoundError" in kinds or status == 401:
        return f"{start}, because you are not logged in; run hf auth login, or set HF_TOKEN."
    if status == 403:
        return (
            f"{start}, because your token may not do this; log in with one that may write to "
            f"{repo.partition('/')[0]} (hf auth login)."
        )
    unreachable = {"ConnectionError", "ConnectError", "Timeout", "TimeoutException", "TimeoutError"}
    if kinds & {"LocalEntryNotFoundError", *unreachable}:
        return f"{start}, because the hub cannot be reached from here; try again with a network."
    if kinds & {"HfHubHTTPError", "HTTPError", "EntryNotFoundError", "TransportError"}:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:160].rstrip(".") if lines else type(error).__name__
        return f"{start} ({reason}); try again later, or see https://huggingface.co/{repo}."
    return None
