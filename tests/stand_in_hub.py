"""A hub in a folder, for tests without a network: what fastmemit calls of huggingface_hub.

hub = stand_in_hub(monkeypatch, tmp_path)
hub.repos["me/edit"]  # a folder, once something was pushed
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@dataclass
class StandInHub:
    """Repositories as folders; `error` is raised by the next thing that asks for anything."""

    at: Path
    repos: dict[str, Path] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    error: Exception | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    def repo(self, name: str, private: bool = False) -> Path:
        """The folder of a repository, made if it is not there."""
        if name not in self.repos:
            self.repos[name] = self.at / "hub" / name
            self.repos[name].mkdir(parents=True)
            (self.repos[name] / ".gitattributes").write_text("")
            self.private[name] = private
        return self.repos[name]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self._fail()
        assert exist_ok
        self.repo(repo_id, private)

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private[repo_id])

    def list_repo_files(self, repo_id: str) -> list[str]:
        root = self.repos[repo_id]
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())

    def create_commit(self, repo_id: str, operations: Sequence[Any], *, commit_message: str) -> None:
        assert commit_message
        for operation in operations:
            target = self.repos[repo_id] / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as source:
                target.write_bytes(source.read())

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], token: str | None
    ) -> str:
        self._fail()
        self.asked.append({"repo": repo_id, "revision": revision, "patterns": allow_patterns})
        copy = self.at / f"snapshot{len(self.asked)}"
        copy.mkdir()
        for name in self.list_repo_files(repo_id):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.repos[repo_id] / name, copy / name)
        return str(copy)


def stand_in_hub(monkeypatch: pytest.MonkeyPatch, at: Path) -> StandInHub:
    """Put a hub in the place of the real one, with somebody logged in."""
    import huggingface_hub
    from huggingface_hub import constants

    hub = StandInHub(at)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub
