"""Edits and statistics to the hub, with a card; or to a folder, to look at first."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fastmemit.delta import Delta
from fastmemit.errors import HubError
from fastmemit.models import new_folder
from fastmemit.sharing.cards import edit_card, statistics_card
from fastmemit.sharing.moment_files import open_statistics
from fastmemit.sharing.repository import CARD, EDIT, MOMENTS, check_repo, told_plainly
from fastmemit.statistics import Statistics


def push_edit(
    delta: Delta,
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    private: bool = False,
    dry_run: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> str:
    """Put an edit on the hub: ``edit.safetensors`` and a card that says what it changes.

    Everything on record goes with it: prompts, subjects, answers, settings, contexts.

    Args:
        delta: The edit (``edit.delta`` of an `fastmemit.Edit`).
        repo: ``USER/NAME``; made if it does not exist, replaced if it holds an earlier edit.
        license: As the hub writes it, such as ``apache-2.0``; None says nothing of it.
        base_model: The model's name on the hub; None takes the name on record, if it can be one.
        private: Only you may see it.
        dry_run: Write what would be pushed into this new folder, and ask nobody.
        token: Of the hub; None takes the one that you are logged in with.

    Returns:
        Where it is: an address, or the folder.

    Raises:
        BadConfig: A name that is none.
        BadData: The facts on record are no facts.
        HubError: The hub refuses, or cannot be reached; or the repository is not for this: it holds other files, or is
            public though `private` is wanted.
        FileExistsError: `dry_run` holds something already.
    """
    card = edit_card(delta, check_repo(repo), license=license, base_model=base_model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / EDIT
        delta.save(file)
        return _push({EDIT: file}, card, repo, private, dry_run, token)


def push_statistics(
    found: Statistics | str | os.PathLike[str],
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    private: bool = False,
    dry_run: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> str:
    """Put second moments on the hub: one file for each module, and a card.

    Args:
        found: What `fastmemit.Editor.precompute` gave, or a folder of moments.
        repo: ``USER/NAME``.
        license: See `push_edit`, as all that follow.
        base_model: See there.
        private: See there.
        dry_run: See there.
        token: See there.

    Returns:
        Where they are: an address, or the folder.

    Raises:
        FileNotFoundError: There is no moment in the folder.
        StoreDamaged: A file is not what was written.
        DamagedFile: The files do not belong together.
        BadConfig: See `push_edit`, as all that follow.
        HubError: See there.
        FileExistsError: See there.
    """
    if not isinstance(found, Statistics):
        found = open_statistics(found)
    card = statistics_card(found, check_repo(repo), license=license, base_model=base_model)
    files = {f"{MOMENTS}/{module}.safetensors": path for module, path in found.paths.items()}
    return _push(files, card, repo, private, dry_run, token)


def _push(
    files: Mapping[str, Path],
    card: str,
    repo: str,
    private: bool,
    dry_run: str | os.PathLike[str] | None,
    token: str | None,
) -> str:
    if dry_run is not None:
        with new_folder(dry_run) as partial:
            for name, path in files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, partial / name)
            (partial / CARD).write_text(card, encoding="utf-8")
        return os.fspath(dry_run)
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"The repository {repo!r} cannot be written, because HF_HUB_OFFLINE is set; unset it, "
            "or write to a folder by --dry-run (dry_run=...)."
        )
    if token is None and huggingface_hub.get_token() is None:
        raise HubError(
            f"The repository {repo!r} cannot be written, because you are not logged in to the hub; "
            "run hf auth login, or set HF_TOKEN."
        )
    api = huggingface_hub.HfApi(token=token)
    with told_plainly(repo, "written"):
        api.create_repo(repo, private=private, exist_ok=True)
        _check_place(repo, files, private, api.model_info(repo).private, api.list_repo_files(repo))
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)
            for name, source in {**files, CARD: card.encode()}.items()
        ]
        what = "Edit" if EDIT in files else "Second moments"
        api.create_commit(repo, operations, commit_message=f"{what} from fastmemit")
    return f"https://huggingface.co/{repo}"


def _check_place(repo: str, files: Mapping[str, Path], private: bool, hidden: bool | None, there: list[str]) -> None:
    """Refuse a repository that is for something else.

    Raises:
        HubError: It is public though it shall be private, or holds files of another kind, whose card would be lost.
    """
    if private and not hidden:
        raise HubError(
            f"The repository {repo!r} exists and is public, so nothing was put there; make it "
            "private on its page first, or name another."
        )
    foreign = [name for name in there if name not in {*files, CARD, ".gitattributes"}]
    if foreign:
        raise HubError(
            f"The repository {repo!r} holds {foreign[0]!r:.80} already, which is not replaced by "
            "this push, so nothing was put there; name another."
        )
