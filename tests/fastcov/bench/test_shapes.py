from __future__ import annotations

import pytest
import torch

from benchmarks.shapes import SHAPES, Attention, Stack, build

CPU = torch.device("cpu")


def test_the_shapes_are_those_of_the_models():
    widths = {name: (shape.d, shape.d_k, list(shape.layers)) for name, shape in SHAPES.items()}
    assert widths["gpt-j"] == (4096, 16384, [3, 4, 5, 6, 7, 8])
    assert widths["llama-2-7b"] == (4096, 11008, [4, 5, 6, 7, 8])
    assert widths["smollm2-135m"] == (576, 1536, [4, 5, 6, 7, 8])


def test_a_stack_has_the_modules_it_names_and_documents_enough():
    model, modules, documents = build("tiny", CPU)
    assert modules == ["layers.1.mlp.down_proj", "layers.2.mlp.down_proj"]
    assert all(model.get_submodule(path).in_features == 128 for path in modules)
    assert sum(map(len, documents)) >= 1280
    assert max(map(len, documents)) <= SHAPES["tiny"].context
    assert build("tiny", CPU)[2] == documents


@pytest.mark.parametrize("parallel", [False, True])
def test_padding_on_the_right_changes_nothing_before_it(parallel):
    from dataclasses import replace

    torch.manual_seed(0)
    model = Stack(replace(SHAPES["tiny"], gated=not parallel, parallel=parallel)).eval()
    ids = torch.randint(0, 512, (1, 9))
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.int64)), 1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded)[:, :9], model(ids), rtol=1e-5, atol=1e-5)


def test_attention_looks_back_and_knows_positions():
    torch.manual_seed(0)
    model = Stack(SHAPES["tiny"]).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        plain, changed = model(ids), model(torch.cat((torch.tensor([[7]]), ids[:, 1:]), 1))
        swapped = model(ids[:, [1, 0, *range(2, 8)]])
    assert not torch.allclose(plain[:, -1], changed[:, -1])
    assert not torch.allclose(plain[:, -1], swapped[:, -1], atol=1e-6)
    assert isinstance(model.layers[0].attention, Attention)
