"""A tiny model folder for all tests of the command line; each test gets a place of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_commands import Place, make_place, save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture
def place(tmp_path: Path, model_folder: str) -> Place:
    return make_place(tmp_path, model_folder)
