"""Statistics: right to the last key, or refused with the value and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import torch

import fastcov
from fastmemit.data import Corpus, corpus_from_texts
from fastmemit.data import corpora as corpora_module
from fastmemit.display import Bar
from fastmemit.editor import Editor
from fastmemit.edits import EditStack
from fastmemit.errors import BadConfig, BadLayer
from fastmemit.models import find_adapter
from fastmemit.statistics import Collection, StatisticsStore
from tiny_editors import tiny_corpus, tiny_editor
from tiny_models import D_K, tiny_model, tiny_tokenizer

LAYERS = (0, 2)


def literal(editor: Editor, corpus: Corpus, layer: int, budget: int, context: int) -> torch.Tensor:
    """C as it is defined: the documents one by one, whole forward passes, sums in float64."""
    documents = list(islice(corpus.documents(editor.seed), 60))
    rows: list[torch.Tensor] = []
    projection = editor.adapter.projection(layer)
    handle = projection.register_forward_pre_hook(lambda _, args: rows.append(args[0][0].double()))
    left = budget
    for text in documents:
        ids = editor.tokenizer(text)["input_ids"][: min(context, left)]
        with torch.no_grad():
            editor.model(input_ids=torch.tensor([ids]))
        left -= len(ids)
        if left == 0:
            break
    handle.remove()
    keys = torch.cat(rows)
    assert keys.shape == (budget, D_K)
    return keys.T @ keys / budget


@pytest.mark.parametrize(
    ("architecture", "tokenizer", "max_length"),
    [("llama", "bpe_bos", None), ("gpt2", "byte_bpe", 16), ("gemma3", "adds_eos", None)],
)
def test_it_is_the_literal_second_moment(
    tmp_path: Path, architecture: str, tokenizer: str, max_length: int | None
) -> None:
    editor = tiny_editor(tmp_path, architecture, tokenizer=tokenizer, layers=None, seed=3)
    corpus = tiny_corpus()
    found = editor.precompute(corpus, multiplier=6.3, layers=LAYERS, max_length=max_length)
    for layer in LAYERS:
        got = found.second_moment(editor.adapter.projection_name(layer)).double()
        want = literal(editor, corpus, layer, 403, max_length or editor.adapter.max_context)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))
        assert torch.equal(got, got.T)


def test_text_that_the_model_writes_is_collected_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The model writes while its keys are being collected: what it writes with must not count.
    monkeypatch.setattr(corpora_module, "WRITTEN_TOKENS", 6)
    editor = tiny_editor(tmp_path, layers=None)
    found = editor.precompute("self", multiplier=10, layers=[1])
    corpus = corpora_module.self_written(editor.model, editor.tokenizer, editor.fingerprint)
    got = found.second_moment(editor.adapter.projection_name(1)).double()
    want = literal(editor, corpus, 1, 640, editor.adapter.max_context)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize(("multiplier", "keys"), [(2.5, 160), (1 / 3, 21), (0.01, 1), (4, 256)])
def test_the_budget_is_exact(tmp_path: Path, multiplier: float, keys: int) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    found = editor.precompute(tiny_corpus(), multiplier=multiplier, layers=LAYERS)
    for path in found.paths.values():
        moment, provenance = fastcov.load_moment(path)
        assert moment.count == provenance["budget"] == provenance["keys"] == keys
    assert found.describe() == f"corpus tiny0, multiplier {multiplier:g}, {keys} keys"


@pytest.mark.parametrize("multiplier", [0, -1, float("nan"), float("inf"), 0.001])
def test_a_multiplier_that_asks_for_nothing(tmp_path: Path, multiplier: float) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    with pytest.raises(fastcov.BadInput, match=r"multiplier .*10 is recommended"):
        editor.precompute("wikipedia", multiplier=multiplier, layers=[0])  # before any network
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layer", [3, -1, 99])
def test_a_layer_out_of_range(tmp_path: Path, layer: int) -> None:
    with pytest.raises(BadLayer, match=rf"{layer}"):
        tiny_editor(tmp_path, layers=(0, layer))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, -3, 257])
def test_a_length_that_the_model_cannot_take(tmp_path: Path, length: int) -> None:
    with pytest.raises(BadConfig, match=rf"from 1 to .* 256 tokens but is {length}"):
        tiny_editor(tmp_path, layers=None).precompute(tiny_corpus(), max_length=length)


def test_no_layer_at_all(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="There is no layer"):
        tiny_editor(tmp_path, layers=None).precompute(tiny_corpus(), layers=[])


def test_a_corpus_that_is_too_short(tmp_path: Path) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    corpus = corpus_from_texts("short", ["The capital of France is Paris.", "I play the violin."])
    tokens = sum(len(editor.tokenizer(text)["input_ids"]) for text in corpus.documents())
    with pytest.raises(fastcov.BudgetNotMet, match=rf"has {tokens} keys .* but 640") as caught:
        editor.precompute(corpus, multiplier=10, layers=LAYERS)
    assert (caught.value.found, caught.value.wanted) == (tokens, 640)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    found = editor.precompute(corpus, multiplier=10, layers=LAYERS, allow_fewer=True)
    assert found.describe() == f"corpus short, multiplier 10, {tokens} keys of the 640 wanted"
    assert fastcov.load_moment(next(iter(found.paths.values())))[0].count == tokens
    # What was allowed once is not taken where it is not allowed.
    with pytest.raises(fastcov.BudgetNotMet):
        editor.precompute(corpus, multiplier=10, layers=LAYERS)


def test_text_that_gives_no_token(tmp_path: Path) -> None:
    def read(seed: int) -> Iterator[str]:
        return iter(["", ""])

    adapter = find_adapter(tiny_model("llama"))
    with pytest.raises(fastcov.BudgetNotMet, match="gave no key at all"):
        StatisticsStore(adapter, tiny_tokenizer(), EditStack.of(adapter.model), tmp_path).collect(
            Collection(Corpus("empty", "0" * 64, read), [0])
        )


def test_a_model_with_nan_is_reported(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(fastcov.NonFinite, match="hold NaN or infinity"):
        tiny_editor(tmp_path, model=model)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_reading_is_counted_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer("byte_bpe"), cache_dir=tmp_path, progress=True)
    counts: dict[str, list[int]] = {"tokens read": [], "keys": []}

    class Counting(Bar):
        def __init__(self, count: Callable[[int], None]) -> None:
            self._count = count

        def __call__(self, done: int) -> None:
            self._count(done)

        def note(self, text: str) -> None:
            pass

    @contextmanager
    def bar(what: str, *_: object) -> Iterator[Bar]:
        yield Counting(counts[what].append)

    monkeypatch.setattr("fastmemit.statistics.bar", bar)
    corpus = corpus_from_texts("tiny", [f"The {i} old boats by the sea" for i in range(60)])
    editor.precompute(corpus, layers=[1], multiplier=3)
    read, taken = counts.values()
    assert sum(taken) == 3 * editor.adapter.d_k(1)
    assert len(read) > 1
    assert sum(read) >= sum(taken)


def test_how_fast_it_went_is_with_what_was_just_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("fastmemit.display._Lines.note", lambda self, text: notes.append(text))
    editor = tiny_editor(tmp_path, layers=None, progress=True)
    first = editor.precompute(tiny_corpus(), multiplier=4, layers=LAYERS)
    assert first.throughput is not None and first.throughput.share is not None
    assert (first.throughput.keys, first.throughput.modules) == (4 * D_K, 2)
    # The two triangles, and what the forward pass costs besides.
    assert first.throughput.flops > 2 * 4 * D_K * D_K * (D_K + 1)
    assert notes and all("tokens/s" in note for note in notes)
    kept = editor.precompute(tiny_corpus(), multiplier=4, layers=LAYERS)
    assert kept.throughput is None and kept == first
    quiet = tiny_editor(tmp_path, layers=None)
    assert quiet.precompute(tiny_corpus(), multiplier=5, layers=LAYERS).throughput is None


def test_forward_passes_in_bfloat16_are_statistics_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmemit.statistics.why_no_bfloat", lambda: None)
    editor = tiny_editor(tmp_path, layers=None)
    corpus, name = tiny_corpus(), editor.adapter.projection_name(1)
    plain = editor.precompute(corpus, multiplier=4, layers=[1])
    narrow = editor.precompute(corpus, multiplier=4, layers=[1], forward="bfloat16")
    assert narrow.provenance == {**plain.provenance, "forward": "bfloat16"} and "forward" not in plain.provenance
    assert narrow.describe() == f"{plain.describe()}, bfloat16 forward passes"
    assert narrow.moment(name).dtype == torch.float32
    C, wanted = narrow.second_moment(name), plain.second_moment(name)
    assert 1e-4 * wanted.norm() < (C - wanted).norm() < 0.03 * wanted.norm()
    assert all(weight.dtype == torch.float32 for weight in editor.model.parameters())
    # Each is found again as what it is, also where it could not be collected.
    monkeypatch.setattr("fastmemit.statistics.why_no_bfloat", lambda: "no such instructions")
    assert editor.precompute(corpus, multiplier=4, layers=[1], forward="bfloat16").paths == narrow.paths
    assert editor.precompute(corpus, multiplier=4, layers=[1]).paths == plain.paths != narrow.paths


def test_forward_passes_that_cannot_be_in_bfloat16_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(tmp_path, layers=None)
    with pytest.raises(BadConfig, match=r"forward must be 'bfloat16' but is 'float16'; leave it out"):
        editor.precompute(tiny_corpus(), multiplier=4, layers=[1], forward="float16")
    monkeypatch.setattr("fastmemit.statistics.why_no_bfloat", lambda: "this processor lacks its instructions")
    with pytest.raises(BadConfig, match=r"slower here than float32 \(this processor lacks its instructions\); leave"):
        editor.precompute(tiny_corpus(), multiplier=4, layers=[1], forward="bfloat16")
    monkeypatch.setattr("fastmemit.statistics.why_no_bfloat", lambda: None)
    half = tiny_editor(tmp_path, layers=None, model=tiny_model("llama").to(torch.bfloat16))
    with pytest.raises(BadConfig, match="is for a model in float32 on the CPU and this one is in bfloat16 on cpu"):
        half.precompute(tiny_corpus(), multiplier=4, layers=[1], forward="bfloat16")
