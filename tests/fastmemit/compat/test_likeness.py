"""How like a second moment is to the keys of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmemit.compat import npz_files
from fastmemit.compat.npz_files import Likeness, mean_squares
from tiny_editors import tiny_editor
from tiny_models import ARCHITECTURES


def test_a_likeness_by_hand() -> None:
    mine = torch.tensor([1.0, 2.0, 4.0, 0.0, 8.0])
    theirs = torch.tensor([3.0, 6.0, 12.0, 5.0, 0.0])  # the last two are left out
    alike = npz_files.likeness(theirs, mine)
    assert alike.correlation == pytest.approx(1) and alike.times == pytest.approx(3)
    turned = npz_files.likeness(torch.tensor([4.0, 2.0, 1.0]), mine[:3])
    assert turned.correlation == pytest.approx(-1) and turned.times == pytest.approx(1)
    assert npz_files.likeness(torch.ones(3), torch.tensor([0.0, 0.0, 1.0])) == Likeness(0, 0)
    assert npz_files.likeness(torch.ones(2), torch.tensor([1.0, 2.0])).correlation == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox"])
def test_mean_squares_are_those_of_the_keys(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz_files, "TOKENS", 200)
    monkeypatch.setattr(npz_files, "LENGTH", 50)
    assert architecture in ARCHITECTURES
    editor = tiny_editor(tmp_path, architecture, layers=None)
    names = [editor.adapter.projection_name(layer) for layer in (0, 2)]
    editor.model.train()
    own = mean_squares(editor, names)
    assert editor.model.training
    editor.model.eval()
    from fastmemit.data import load_corpus

    keys: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        editor.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: keys[name].append(args[0].reshape(-1, 64)[1:])
        )
        for name in names
    ]
    left = 200
    for text in load_corpus("builtin").documents(0):
        ids = editor.tokenizer(text)["input_ids"][: min(50, left + 1)]
        if left <= 0:
            break
        with torch.no_grad():
            editor.model(torch.tensor([ids]))
        left -= len(ids) - 1
    for handle in handles:
        handle.remove()
    for name in names:
        rows = torch.cat(keys[name]).double()
        assert len(rows) == 200
        assert torch.allclose(own[name], rows.square().mean(0), rtol=1e-4)
