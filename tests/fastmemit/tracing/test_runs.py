"""What a restored run costs: blocks and tokens that it cannot change do not run."""

from __future__ import annotations

import pytest
import torch

from fastmemit.errors import UnknownArchitecture
from fastmemit.models import find_adapter
from fastmemit.request import EditRequest
from fastmemit.tracing import KINDS, Runs, Spot, check_tracing, encode_fact, subject_noise
from tiny_models import ARCHITECTURES, LAYERS, tiny_model, tiny_tokenizer

REQUESTS = (
    EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    EditRequest("They say that {} is located in the city of", "France", "Rome", "Paris"),
)


@pytest.mark.parametrize(
    ("kind", "first", "last", "begin"),
    [("mlp", 1, 1, 1), ("attention", 0, 2, 0), ("hidden", 0, 1, 1), ("hidden", 2, 2, 3)],
)
def test_only_later_tokens_and_blocks_run(kind: str, first: int, last: int, begin: int) -> None:
    adapter = find_adapter(tiny_model("llama"))
    facts = [encode_fact(tiny_tokenizer(), request) for request in REQUESTS]
    spots = [Spot(f, f.last) for f in facts]
    suffix = spots[0].suffix
    assert spots[1].suffix == suffix and spots[0].position != spots[1].position
    with torch.no_grad():
        runs = Runs(adapter, spots, [subject_noise(f, 3, 32, 1.0, 0) for f in facts], KINDS)
        assert runs.clean.shape == (2,) and runs.corrupted.shape == (2, 3)
        seen: list[tuple[int, tuple[int, ...]]] = []
        for layer in range(LAYERS):
            adapter.projection(layer).register_forward_hook(
                lambda _m, args, _out, layer=layer: seen.append((layer, tuple(args[0].shape[:2])))
            )
        found = runs.restored(kind, first, last)  # type: ignore[arg-type]  # a Kind's words as a str
    assert found.shape == (2, 3)
    assert seen == [(layer, (6, suffix)) for layer in range(begin, LAYERS)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_models_are_traced_in_part(architecture: str) -> None:
    adapter = find_adapter(ARCHITECTURES[architecture]())
    with torch.no_grad():
        check_tracing(adapter)
    assert adapter.measured["traced in part"]
    assert not any(m._forward_hooks or "forward" in vars(m) for m in adapter.model.modules())


def test_a_model_of_which_a_part_is_not_the_whole_is_refused() -> None:
    model = tiny_model("llama")
    kept: dict[str, torch.Tensor] = {}
    model.model.layers[0].register_forward_hook(lambda _m, _a, out: kept.update(first=out))
    model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, out: out + kept["first"][:, :1])
    with torch.no_grad(), pytest.raises(UnknownArchitecture, match=r"part of Llama.* off by"):
        check_tracing(find_adapter(model))
    model = tiny_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: kept.update(first=out))
    model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, out: out + kept["first"])
    with torch.no_grad(), pytest.raises(UnknownArchitecture, match=r"part of Llama.* fails"):
        check_tracing(find_adapter(model))
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_a_model_that_sees_what_comes_is_not_traced() -> None:
    adapter = find_adapter(tiny_model("gemma3", use_bidirectional_attention=True))
    with pytest.raises(UnknownArchitecture, match="not causal"):
        check_tracing(adapter)
