"""Kept statistics: collected once, found again, and never those of another model."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcov
from fastmemit import statistics
from fastmemit.data import Corpus, corpora, load_corpus
from fastmemit.errors import BadCorpus, WrongModel
from fastmemit.statistics import Statistics
from tiny_editors import FACTS, texts, tiny_corpus, tiny_editor
from tiny_models import tiny_model

LAYERS = (0, 2)


#: An editor tries its model on so many tokens at most (causality, padding); collecting takes more.
PROBE = 36


class Forwards:
    """Counts the forward passes of a model that are of more than some number of tokens."""

    def __init__(self, model: Any, over: int = 0) -> None:
        self.count, self.over = 0, over
        model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        self.count += ids.numel() > self.over


def test_the_same_again_is_not_collected_again(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    counter = Forwards(editor.model)
    first = editor.precompute(tiny_corpus(), multiplier=4, layers=LAYERS)
    assert counter.count > 0
    counter.count = 0
    stamps = {path: path.stat().st_mtime_ns for path in first.paths.values()}
    second = editor.precompute(tiny_corpus(), multiplier=4, layers=LAYERS)
    assert counter.count == 0
    assert second == first and {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_text_that_the_model_writes_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "WRITTEN_TOKENS", 4)
    editor = tiny_editor(tmp_path, layers=None)
    counter = Forwards(editor.model)
    found = editor.precompute("self", multiplier=0.5, layers=[1])
    counter.count = 0
    assert editor.precompute("self", multiplier=0.5, layers=[1]) == found
    assert counter.count == 0


def test_names_of_model_and_corpus_say_nothing(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "elsewhere" / "two.txt"
    one.write_text("\n\n".join(texts(60)))
    two.parent.mkdir()
    shutil.copy(one, two)
    editor = tiny_editor(tmp_path / "cache", layers=None, name="gpt2-xl")
    first = editor.precompute(one, multiplier=4, layers=LAYERS)
    again = tiny_editor(tmp_path / "cache", layers=None, name="./models/gpt2-xl")
    counter = Forwards(again.model, PROBE)
    assert again.precompute(two, multiplier=4, layers=LAYERS).paths == first.paths
    assert counter.count == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"corpus": tiny_corpus(seed=1)},
        {"seed": 1},
        {"multiplier": 4.5},
        {"tokenizer": "bpe_bos"},
        {"max_length": 20},
        {"model": tiny_model("llama", seed=1)},
        {"model": tiny_model("llama").to(torch.bfloat16)},
    ],
    ids=["corpus", "seed", "multiplier", "tokenizer", "max_length", "weights", "dtype"],
)
def test_what_statistics_depend_on_gives_them_another_folder(tmp_path: Path, changed: dict[str, Any]) -> None:
    def collected(
        corpus: Corpus | None = None, multiplier: float = 4, max_length: int | None = None, **kwargs
    ) -> tuple[Path, int]:
        editor = tiny_editor(tmp_path, layers=None, **kwargs)
        counter = Forwards(editor.model, PROBE)
        found = editor.precompute(corpus or tiny_corpus(), multiplier=multiplier, layers=[1], max_length=max_length)
        (path,) = found.paths.values()
        return path.parent, counter.count

    base, _ = collected()
    other, forwards = collected(**changed)
    assert other != base and forwards > 0
    assert collected() == (base, 0)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(tmp_path / "whole", layers=None)
    whole = editor.precompute(tiny_corpus(), multiplier=4, layers=(0, 1, 2))
    save, written = fastcov.save_moment, []

    def full_at_the_second(path: Path, *args: Any) -> None:
        if len(written) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(path, *args)
        written.append(path)

    again = tiny_editor(tmp_path / "parts", layers=None)
    monkeypatch.setattr(fastcov, "save_moment", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        again.precompute(tiny_corpus(), multiplier=4, layers=(0, 1, 2))
    monkeypatch.undo()
    assert [p for p in (tmp_path / "parts").rglob("*") if p.is_file()] == written
    stamp = written[0].stat().st_mtime_ns
    parts = again.precompute(tiny_corpus(), multiplier=4, layers=(0, 1, 2))
    assert written[0].stat().st_mtime_ns == stamp
    for name in whole.paths:
        assert torch.equal(whole.second_moment(name), parts.second_moment(name))


def test_a_module_that_was_not_precomputed(tmp_path: Path) -> None:
    found = tiny_editor(tmp_path, layers=None).precompute(tiny_corpus(), multiplier=1, layers=[0])
    with pytest.raises(fastcov.FastcovError, match=r"no second moment of x\.y among .*layers\.0\."):
        found.second_moment("x.y")


def broken_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"count": "256"', b'"count": "257"'))
    assert path.read_bytes() != data


def broken_sum(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [broken_header, broken_sum])
def test_a_damaged_file_is_refused_and_named(tmp_path: Path, damage: Any) -> None:
    editor = tiny_editor(tmp_path)
    path = editor.store.covering([1]).paths[editor.adapter.projection_name(1)]
    damage(path)
    fresh = tiny_editor(tmp_path, layers=None)
    before = {name: tensor.clone() for name, tensor in fresh.model.state_dict().items()}
    with pytest.raises(fastcov.StoreDamaged, match=r"layers\.1\.mlp\.down_proj.* delete it and pre"):
        fresh.edit(FACTS[:1], "memit", layers=(0, 1), steps=2)
    assert all(torch.equal(t, before[n]) for n, t in fresh.model.state_dict().items())


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    mine = tiny_editor(tmp_path / "mine")
    other = tiny_editor(tmp_path / "other", model=tiny_model("llama", seed=1))
    name = mine.adapter.projection_name(1)
    target = mine.store.covering([1]).paths[name]
    shutil.copy(other.store.covering([1]).paths[name], target)
    with pytest.raises(fastcov.StoreMismatch) as caught:
        mine.edit(FACTS[:1], "memit", layers=(0, 1), steps=2)  # with statistics found before
    assert caught.value.field == "model"
    assert (caught.value.stored, caught.value.expected) == (other.fingerprint, mine.fingerprint)
    fresh = tiny_editor(tmp_path / "mine", layers=None)
    for wants in (
        lambda: fresh.edit(FACTS[:1], "memit", layers=(0, 1), steps=2),
        lambda: fresh.precompute(tiny_corpus(), multiplier=4, layers=(0, 1)),
    ):
        with pytest.raises(fastcov.StoreMismatch, match=r"are of another model .* delete it"):
            wants()
    assert fastcov.read_provenance(target)["model"] == other.fingerprint  # and not overwritten


def test_statistics_of_another_model_cannot_be_used(tmp_path: Path) -> None:
    other = tiny_editor(tmp_path, model=tiny_model("llama", seed=1))
    mine = tiny_editor(tmp_path)
    with pytest.raises(WrongModel, match=rf"{other.fingerprint[:16]} .*{mine.fingerprint[:16]}"):
        mine.store.use(other.store.covering([0]))


def test_statistics_belong_to_the_unedited_model(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path)
    edit = editor.edit(FACTS[:1], "rome", layers=(1,), steps=2)
    with pytest.raises(WrongModel, match="1 edit is in the weights"):
        editor.precompute(tiny_corpus(1), layers=[0])
    edit.undo()
    editor.precompute(tiny_corpus(seed=1), multiplier=1, layers=[0])


def test_find_takes_the_newest_that_has_all_modules(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    made: list[Statistics] = []
    for age, (multiplier, layers) in enumerate([(4, (0, 1)), (2, (0, 1, 2)), (3, (1,))]):
        made.append(editor.precompute(tiny_corpus(), multiplier=multiplier, layers=layers))
        home = next(iter(made[-1].paths.values())).parent
        os.utime(home, (1000 + age, 1000 + age))

    def multiplier_of(layers: tuple[int, ...], wanted: float | None = None) -> float | None:
        found = tiny_editor(tmp_path, layers=None).store.find(layers, wanted)
        return None if found is None else found.provenance["multiplier"]

    assert multiplier_of((1,)) == 3
    assert multiplier_of((0, 1)) == multiplier_of((2,)) == 2
    assert multiplier_of((0, 1), 4) == 4
    assert multiplier_of((2,), 4) is None
    other = tiny_editor(tmp_path, layers=None, tokenizer="bpe_bos")
    assert other.store.find((1,)) is None  # its tokens are others
    found = tiny_editor(tmp_path, layers=None).store.find((0, 1), 4)
    assert found == Statistics(made[0].paths, made[0].provenance)


def test_find_says_what_it_took_where_others_would_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    homes: list[Path] = []
    made = [
        editor.precompute(tiny_corpus(seed=seed), multiplier=multiplier, layers=(0, 1), **more)
        for seed, multiplier, more in (
            (0, 4, {}),
            (0, 2, {"max_length": 16, "bos": False}),
            (1, 2, {}),
            (1, 2, {"quartic": True}),
        )
    ]
    for age, each in enumerate(made):
        homes.append(next(iter(each.paths.values())).parent)
        os.utime(homes[-1], (1000 + age, 1000 + age))

    def found(**wanted: Any) -> tuple[int | None, list[str]]:
        """Which of those that were made, and what was said."""
        caplog.clear()
        taken = tiny_editor(tmp_path, layers=None).store.find((0, 1), **wanted)
        return None if taken is None else made.index(taken), caplog.messages

    one, other = ("'tiny" + f"{seed}' ({tiny_corpus(seed=seed).fingerprint:.8})" for seed in (0, 1))
    context = editor.adapter.max_context
    last = "; to take others, name them (--corpus, --multiplier, --max-length; in Python by precompute)"
    assert found() == (3, [
        f"4 stored statistics have these layers; taken are those of corpus {other} (not {one}); multiplier 2.0 "
        f"(not 4.0); context {context} (not 16); bos True (not False){last}"
    ])  # fmt: skip
    assert found(multiplier=2) == (3, [
        f"3 stored statistics have these layers; taken are those of corpus {other} (not {one}); "
        f"context {context} (not 16); bos True (not False){last}"
    ])  # fmt: skip
    assert found(quartic=True)[0] == 3
    # What is asked for is what is taken, and alone it needs no word; fourth powers change no sum.
    assert found(context=16) == (1, []) and found(multiplier=4) == (0, [])
    assert found(corpus=tiny_corpus(seed=1).fingerprint) == (3, [])
    assert found(corpus=tiny_corpus(seed=1).fingerprint, context=16) == (None, []) and found(context=7) == (None, [])
    # A damaged file is an error where it would be taken, and none behind others.
    spoilt = next(homes[0].glob("*.safetensors"))
    spoilt.write_bytes(b"no header")
    assert found()[0] == 3
    with pytest.raises(fastcov.StoreDamaged):
        found(multiplier=4)
    assert [found(context=16)[0], found(multiplier=2)[0]] == [1, 3]


def test_an_edit_without_statistics_says_what_to_do(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path, layers=None, name="my-model")
    with pytest.raises(fastcov.FastcovError, match=r"\[1\] of my-model; .*fastmemit precompute"):
        editor.edit(FACTS[:1], "rome", layers=(1,))


def test_a_changed_corpus_file_is_another_corpus(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(texts(60)))
    editor = tiny_editor(tmp_path / "cache", layers=None)
    first = editor.precompute(path, multiplier=4, layers=[0])
    opened = load_corpus(path)
    path.write_text("\n\n".join(texts(60, seed=1)))
    assert editor.precompute(path, multiplier=4, layers=[0]).paths != first.paths
    with pytest.raises(BadCorpus, match="has changed since it was opened"):
        editor.precompute(opened, multiplier=5, layers=[0])


def test_versions_are_on_record(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path)
    (path, _) = editor.store.covering([0, 1]).paths.values()
    stored = fastcov.read_provenance(path)
    assert stored["versions"] == statistics.versions()
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["model"] == editor.fingerprint
    assert {"model_name", "tokenizer", "corpus", "seed", "multiplier", "context"} <= stored.keys()
