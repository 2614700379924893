"""A second real model, whose blocks normalise what their projections put out: Gemma 3 270M."""

import pytest
import torch

from fastmemit import Editor
from fastmemit.data import builtin_facts
from fastmemit.partial_forward import read_at_subject
from fastmemit.text import subject_row

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def editor(gemma3, tmp_path_factory):
    model, tokenizer = gemma3
    editor = Editor(model, tokenizer, cache_dir=tmp_path_factory.mktemp("gemma"))
    editor.precompute("builtin", multiplier=1, layers=[2, 3])
    return editor


def test_emmet_writes_facts_through_the_norm(editor):
    facts = [record.request for record in builtin_facts()[:4]]
    config = editor.config("emmet")
    assert (config.layers, config.site, config.scale) == ((3,), "projection", "median")
    with editor.edit(facts, "emmet") as edit:
        assert [outcome.said for outcome in edit.outcomes] == [True] * 4


def test_memit_writes_facts_in_two_layers_through_their_norms(editor):
    records = builtin_facts()[:4]
    config = editor.config("memit", optimiser="rotate")
    assert (config.layers, config.site, config.weight) == ((2, 3), "projection", 512.0)
    with editor.edit([record.request for record in records], config) as edit:
        assert [outcome.said for outcome in edit.outcomes] == [True] * 4


def test_half_of_a_move_gets_through_the_norm(editor):
    # Dividing the move by the norm's gains, which run from 0.000 to 585, reached 14 to 43 % of it.
    adapter = editor.adapter
    rows = [subject_row(editor.tokenizer, "", r.request) for r in builtin_facts()[:8]]
    modules = [adapter.projection(3), adapter.block(3)]
    _, (output, block) = read_at_subject(adapter, rows, outputs=modules)
    wanted = torch.randn_like(block)
    wanted *= 100 / wanted.norm(dim=1, keepdim=True)
    change = adapter.projection_residual(3, output, wanted, [row.ids for row in rows])
    norm = adapter.block(3).post_feedforward_layernorm
    with torch.no_grad():
        moved = norm(output + change) - norm(output)
    share = (moved * wanted).sum(1) / wanted.square().sum(1)
    assert float(share.min()) > 0.5
    assert float((change.norm(dim=1) / output.norm(dim=1)).max()) < 1.5
