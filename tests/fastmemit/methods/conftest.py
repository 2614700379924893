"""What tests of methods share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastmemit.editor import Editor
from tiny_editors import tiny_editor


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Editor:
    """An editor that knows the contexts of all methods in the module's ``SETTINGS``."""
    editor = tiny_editor(tmp_path_factory.mktemp("editor"))
    for method in request.module.SETTINGS:
        editor.contexts(method)
    return editor


@pytest.fixture
def editor(shared: Editor) -> Iterator[Editor]:
    """The module's ``shared`` editor; afterwards its weights must have their bits back."""
    before = {name: tensor.clone() for name, tensor in shared.model.state_dict().items()}
    yield shared
    for edit in reversed(shared.edits):
        edit.undo()
    now = shared.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
