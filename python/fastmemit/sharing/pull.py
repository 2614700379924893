"""Edits and statistics from the hub: a few named files, verified like any file from a stranger."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import fastcov
from fastmemit.cache import cache_dir
from fastmemit.delta import Delta
from fastmemit.errors import HubError, WrongModel
from fastmemit.sharing.moment_files import keep_statistics, open_statistics
from fastmemit.sharing.repository import EDIT, EDIT_FILES, MOMENT_FILES, MOMENTS, check_repo, told_plainly
from fastmemit.statistics import Statistics


def pull_edit(repo: str, *, revision: str | None = None, model: str | None = None, token: str | None = None) -> Delta:
    """Fetch an edit from the hub; a copy that was fetched before serves without a network.

    Args:
        repo: ``USER/NAME``.
        revision: A branch, a tag or a commit; None takes the newest.
        model: The fingerprint that it must be of (`fastmemit.Editor.fingerprint`); None takes any, and
            `fastmemit.Editor.load` will compare.
        token: Of the hub; None takes the one that you are logged in with.

    Returns:
        The edit, verified; not applied.

    Raises:
        BadConfig: The name is none.
        HubError: It cannot be fetched, or the repository holds no edit.
        DamagedFile: The file is not what was written.
        WrongModel: It is of another model.
    """
    folder = _fetched(repo, revision, token, EDIT_FILES)
    if not (folder / EDIT).is_file():
        raise HubError(f"The repository {repo!r} holds no {EDIT}; name one that has an edit.")
    delta = Delta.load(folder / EDIT)
    if model is not None and delta.model != model:
        raise WrongModel(
            f"The edit in {repo!r} was made for the model {delta.model!s:.16} "
            f"({delta.provenance.get('model_name')!s:.80}) but this one is {model:.16}; load that "
            "model, with the same dtype."
        )
    return delta


def pull_statistics(
    repo: str,
    *,
    revision: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Statistics:
    """Fetch second moments from the hub to where edits of their model find them.

    Args:
        repo: ``USER/NAME``.
        revision: A branch, a tag or a commit; None takes the newest.
        model: The fingerprint that they must be of (`fastmemit.Editor.fingerprint`); None takes any, and they are found
            by the model that they are of.
        tokenizer: The fingerprint of the tokenizer that they must be of, likewise.
        cache: The cache folder; None takes `fastmemit.cache.cache_dir`.
        token: Of the hub; None takes the one that you are logged in with.

    Returns:
        The statistics in the cache, for `fastmemit.Editor.use`.

    Raises:
        BadConfig: The name is none.
        HubError: They cannot be fetched, or the repository holds none.
        StoreDamaged: A file is not what was written.
        StoreMismatch: They are of another model or tokenizer, or of a newer format.
        DamagedFile: The files do not belong together, or do not say what they are of.
        OSError: The cache cannot be written.
    """
    folder = _fetched(repo, revision, token, MOMENT_FILES) / MOMENTS
    if not any(folder.glob("*.safetensors")):
        raise HubError(
            f"The repository {repo!r} holds no second moments; name one that has some, or pull an edit (--save FILE)."
        )
    found = open_statistics(folder)
    for field, expected in (("model", model), ("tokenizer", tokenizer)):
        stored = found.provenance[field]
        if expected is not None and stored != expected:
            raise fastcov.StoreMismatch(
                f"The statistics in {repo!r} are of another {field} ({stored:.16}, not "
                f"{expected:.16}); load the model that they are of, with the same dtype.",
                field=field,
                stored=stored,
                expected=expected,
            )
    home = Path(cache) if cache is not None else cache_dir()
    return keep_statistics(found, home / "statistics")


def _fetched(repo: str, revision: str | None, token: str | None, files: Sequence[str]) -> Path:
    """A folder with those of the named files that the repository has."""
    check_repo(repo)
    import huggingface_hub

    with told_plainly(repo, "fetched"):
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(files), token=token))
