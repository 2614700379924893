"""Batched target vectors against the literal one-at-a-time computation, on every architecture."""

import dataclasses
import traceback
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastmemit.errors import BadLayer, BadRequest, FastmemitError
from fastmemit.models import find_adapter
from fastmemit.partial_forward import FullForward, SuffixForward
from fastmemit.request import EditRequest
from fastmemit.targets import TargetSettings, optimise
from reference.literal_targets import literal_target
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

CONTEXTS = ("", "The old man said so. ", "I think {that} it is {}. ")
REQUESTS = [
    EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English and a bit of French"),
    EditRequest("{}", "Paris", "x"),
    EditRequest("When asked, everybody in the small town knew that {} plays", "Ann", "the violin"),
]
SETTINGS = TargetSettings(layer=1, steps=6, clamp=0.8, learning_rate=0.2, weight_decay=0.3)


def literal(model, tokenizer, request, settings, site="block"):
    adapter = find_adapter(model)
    block = adapter.block(settings.layer)
    module = adapter.projection(settings.layer) if site == "projection" else None
    return literal_target(model, tokenizer, block, request, CONTEXTS, settings, module)


def assert_same(target, reference):
    vector, start, losses = reference
    assert len(target.losses) == len(losses)
    assert target.losses == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert (target.start - start).norm() <= 1e-5 * start.norm()
    assert (target.vector - vector).norm() <= 1e-4 * vector.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", ["block", "projection"])
def test_equals_the_literal_computation(architecture, site):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer("byte_bpe")
    settings = dataclasses.replace(SETTINGS, site=site)
    targets = optimise(find_adapter(model), tokenizer, REQUESTS, CONTEXTS, settings)
    for request, target in zip(REQUESTS, targets, strict=True):
        assert_same(target, literal(model, tokenizer, request, settings, site))


def test_with_a_bos_token_and_a_left_padding_tokenizer():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("bpe_bos")
    tokenizer.padding_side = "left"
    targets = optimise(find_adapter(model), tokenizer, REQUESTS, CONTEXTS, SETTINGS)
    for request, target in zip(REQUESTS, targets, strict=True):
        assert_same(target, literal(model, tokenizer, request, SETTINGS))


@pytest.mark.parametrize(("layer", "requests"), [(0, REQUESTS), (2, REQUESTS[2:3])])
def test_first_and_last_layer(layer, requests):
    # Above the last block nothing carries a change to later tokens, so only a prompt that ends with
    # its subject has a gradient there; the others' would be rounding, which Adam blows up.
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer("byte_bpe")
    settings = dataclasses.replace(SETTINGS, layer=layer)
    targets = optimise(find_adapter(model), tokenizer, requests, CONTEXTS, settings)
    for request, target in zip(requests, targets, strict=True):
        assert_same(target, literal(model, tokenizer, request, settings))


def test_each_request_stops_on_its_own():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("byte_bpe")
    adapter = find_adapter(model)
    free = optimise(adapter, tokenizer, REQUESTS, CONTEXTS, SETTINGS)
    # A limit that some requests pass early and others never, found from their own losses.
    lowest = sorted(min(target.losses) for target in free)
    settings = dataclasses.replace(SETTINGS, early_stop=(lowest[1] + lowest[2]) / 2, steps=8)
    targets = optimise(adapter, tokenizer, REQUESTS, CONTEXTS, settings)
    lengths = {len(target.losses) for target in targets}
    assert len(lengths) > 1
    for request, target in zip(REQUESTS, targets, strict=True):
        assert_same(target, literal(model, tokenizer, request, settings))


ROTATE = dataclasses.replace(SETTINGS, optimiser="rotate", steps=7, rho=0.15)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("site", ["block", "projection"])
@pytest.mark.parametrize("contexts", [CONTEXTS, CONTEXTS[:2], ("",)])
def test_rotate_equals_its_rule_written_out(architecture, site, contexts):
    model, tokenizer = tiny_model(architecture), tiny_tokenizer("byte_bpe")
    settings = dataclasses.replace(ROTATE, site=site)
    adapter = find_adapter(model)
    module = adapter.projection(1) if site == "projection" else None
    targets = optimise(adapter, tokenizer, REQUESTS, contexts, settings)
    for request, target in zip(REQUESTS, targets, strict=True):
        reference = literal_target(model, tokenizer, adapter.block(1), request, contexts, settings, module)
        assert_same(target, reference)
        assert len(set(target.losses)) == settings.steps  # gradients come through


def test_a_group_holds_one_part_of_the_prefix_beside_the_whole(monkeypatch):
    alive, most = weakref.WeakSet(), []
    plain = SuffixForward.select

    def select(self, rows, index=None):
        made = plain(self, rows, index)
        alive.add(made)
        most.append(len(alive))
        return made

    monkeypatch.setattr(SuffixForward, "select", select)
    settings = dataclasses.replace(SETTINGS, optimiser="rotate", early_stop=0.0)
    optimise(find_adapter(tiny_model("llama")), tiny_tokenizer("byte_bpe"), REQUESTS[:2], CONTEXTS, settings)
    assert len(most) == 1 + settings.steps and max(most) == 1  # one trial; the contexts take turns


class Blocking(TorchFunctionMode):
    """Notes what makes a GPU wait: numbers read from a tensor, and tensors or indices made of lists or masks.

    Not what transformers does by itself inside a forward.
    """

    READS = (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "masked_select",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    )
    MAKES = ("tensor", "as_tensor")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        parts = args[1] if name in ("__getitem__", "__setitem__") else ()
        listed = [
            p for p in (parts if isinstance(parts, tuple) else (parts,)) if isinstance(p, list | torch.BoolTensor)
        ]
        made = name in self.MAKES and not isinstance(args[0], torch.Tensor)
        if name in self.READS or made or listed:
            callers = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
            if "/transformers/" not in next(file for file in callers if file != __file__ and "/torch/" not in file):
                self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [SuffixForward, FullForward])
@pytest.mark.parametrize("site", ["block", "projection"])
@pytest.mark.parametrize("optimiser", ["adam", "rotate"])
def test_a_step_waits_for_nothing_but_the_losses(optimiser, site, form, monkeypatch):
    monkeypatch.setattr("fastmemit.targets.forward_for", form)
    adapter, tokenizer = find_adapter(tiny_model("llama")), tiny_tokenizer("byte_bpe")
    settings = dataclasses.replace(SETTINGS, optimiser=optimiser, site=site, steps=8)
    seen = Blocking()
    steps = []  # how many were seen before the end of each

    def note(_done):
        steps.append(len(seen.seen))

    with seen:
        optimise(adapter, tokenizer, REQUESTS, CONTEXTS, settings, progress=note)
    made = 2 if optimiser == "rotate" else 1  # steps that read what none before has read
    later = [seen.seen[begin:end] for begin, end in zip(steps[made - 1 :], steps[made:], strict=False)]
    assert later == [["tolist"]] * (settings.steps - made)
    assert "tensor" in seen.seen[: steps[0]]  # such calls are seen
    assert seen.seen[steps[-1] :] == ["cpu", "cpu"]  # all vectors at once, and their starts


def test_rotate_stops_where_every_context_has_agreed_in_turn():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("byte_bpe")
    adapter = find_adapter(model)
    free = optimise(adapter, tokenizer, REQUESTS, CONTEXTS, dataclasses.replace(ROTATE, steps=10))
    # Two steps below the limit in a row, since there are two contexts beside the bare prompt.
    highest = sorted(min(map(max, zip(t.losses, t.losses[1:], strict=False))) for t in free)
    settings = dataclasses.replace(ROTATE, steps=10, early_stop=(highest[1] + highest[2]) / 2)
    targets = optimise(adapter, tokenizer, REQUESTS, CONTEXTS, settings)
    assert len({len(target.losses) for target in targets}) > 1
    for request, target in zip(REQUESTS, targets, strict=True):
        assert_same(target, literal(model, tokenizer, request, settings))


@pytest.mark.parametrize("optimiser", ["adam", "rotate"])
def test_the_limit_may_be_that_of_the_answer_s_costs_alone(optimiser):
    # In float64: a KL term that no limit is below multiplies what float32 rounds.
    model, tokenizer = tiny_model("llama").double(), tiny_tokenizer("byte_bpe")
    adapter = find_adapter(model)
    # The sum never stops, its first term does.
    settings = dataclasses.replace(SETTINGS, optimiser=optimiser, steps=8, kl_factor=1e4, clamp=2.0)
    (free,) = optimise(adapter, tokenizer, REQUESTS[2:3], ("",), settings)
    limit = free.losses[0] - 0.01  # at the first step KL is 0
    by_sum, by_nll = (dataclasses.replace(settings, stop=stop, early_stop=limit) for stop in ("loss", "nll"))
    (never,) = optimise(adapter, tokenizer, REQUESTS[2:3], ("",), by_sum)
    (soon,) = optimise(adapter, tokenizer, REQUESTS[2:3], ("",), by_nll)
    assert len(soon.losses) < len(never.losses) == 8 and min(never.losses[1:]) > limit
    assert_same(soon, literal_target(model, tokenizer, adapter.block(1), REQUESTS[2], ("",), by_nll))


PROBABLE = dataclasses.replace(
    SETTINGS, steps=12, clamp=20.0, learning_rate=0.5, weight_decay=0.0, kl_factor=0.0,
    stop="most-probable", early_stop=1e9,
)  # fmt: skip
SAID = [
    EditRequest("{}", "Paris", "Rome"),
    EditRequest("{}", "Ann", "Paris"),
    EditRequest("{}", "The poet", "the"),
    EditRequest("{}", "Ann", "the Paris"),
    EditRequest("{}", "Ann", "of the city"),
]


def loud_model(architecture):
    """A model that is easily brought to say a few words, which a random one is not."""
    model, tokenizer = tiny_model(architecture), tiny_tokenizer("byte_bpe")
    few = torch.full((len(model.get_output_embeddings().weight), 1), 0.2)
    few[tokenizer(" Rome Paris of the city")["input_ids"]] = 4.0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(few)
    return model, tokenizer


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["block", "projection"])
def test_stops_where_every_token_is_the_most_probable_in_every_context(architecture, site):
    model, tokenizer = loud_model(architecture)
    settings = dataclasses.replace(PROBABLE, site=site)
    targets = optimise(find_adapter(model), tokenizer, SAID, CONTEXTS, settings)
    lengths = [len(target.losses) for target in targets]
    # Some stop on their way, at different steps, and one never: not all of its tokens are reached.
    assert min(lengths) > 1 and lengths[4] == settings.steps
    assert len({n for n in lengths if n < settings.steps}) > 1
    if architecture == "llama":  # of two tokens both count
        assert lengths[2] < lengths[3] < settings.steps
    for request, target in zip(SAID, targets, strict=True):
        assert_same(target, literal(model, tokenizer, request, settings, site))


def test_every_context_counts():
    model, tokenizer = loud_model("llama")
    one = optimise(find_adapter(model), tokenizer, SAID[1:2], ("",), PROBABLE)
    three = optimise(find_adapter(model), tokenizer, SAID[1:2], CONTEXTS, PROBABLE)
    assert len(one[0].losses) < len(three[0].losses) < PROBABLE.steps


def test_what_is_told_already_is_not_moved():
    model, tokenizer = loud_model("llama")
    row = torch.tensor([tokenizer("Ann")["input_ids"]])
    word = tokenizer.decode(model(row).logits[0, -1].argmax()).strip()
    request = EditRequest("{}", "Ann", word)
    (target,) = optimise(find_adapter(model), tokenizer, [request], ("",), PROBABLE)
    assert len(target.losses) == 1 and torch.equal(target.vector, target.start)


def test_groups_do_not_change_the_result():
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer("byte_bpe")
    adapter = find_adapter(model)
    together = optimise(adapter, tokenizer, REQUESTS, CONTEXTS, SETTINGS, batch_tokens=100_000)
    alone = optimise(adapter, tokenizer, REQUESTS, CONTEXTS, SETTINGS, batch_tokens=1)
    for one, other in zip(together, alone, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        assert (one.vector - other.vector).norm() <= 1e-5 * one.vector.norm()


def test_a_group_stays_within_its_tokens(monkeypatch):
    from fastmemit import partial_forward as suffix

    model, tokenizer = tiny_model("llama"), tiny_tokenizer("byte_bpe")
    sizes = []
    original = suffix.align

    def spy(rows, prefix, width):
        sizes.append(len(rows) * (prefix + width))
        return original(rows, prefix, width)

    monkeypatch.setattr(suffix, "align", spy)
    short = [EditRequest("{} is", f"Name{i}", "x") for i in range(12)]
    optimise(find_adapter(model), tokenizer, short, CONTEXTS, SETTINGS, batch_tokens=300)
    assert len(sizes) > 1
    assert max(sizes) <= 300


def test_the_norm_limit_holds_and_v0_is_the_bare_prompt():
    model, tokenizer = tiny_model("gptj"), tiny_tokenizer("byte_bpe")
    settings = dataclasses.replace(SETTINGS, clamp=0.05, learning_rate=1.0)
    (target,) = optimise(find_adapter(model), tokenizer, REQUESTS[:1], CONTEXTS, settings)
    moved = float((target.vector - target.start).norm())
    assert moved == pytest.approx(0.05 * float(target.start.norm()), rel=1e-5)


def test_the_model_is_left_as_it_was():
    model, tokenizer = tiny_model("gemma2"), tiny_tokenizer("byte_bpe")
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimise(find_adapter(model), tokenizer, REQUESTS[:1], CONTEXTS, SETTINGS)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


def test_progress_counts_every_request_step():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("byte_bpe")
    done = []
    settings = dataclasses.replace(SETTINGS, early_stop=5.0)
    optimise(find_adapter(model), tokenizer, REQUESTS, CONTEXTS, settings, progress=done.append)
    assert sum(done) == len(REQUESTS) * settings.steps


def test_a_layer_out_of_range_is_refused():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("byte_bpe")
    with pytest.raises(BadLayer, match="7"):
        settings = dataclasses.replace(SETTINGS, layer=7)
        optimise(find_adapter(model), tokenizer, REQUESTS, CONTEXTS, settings)


def test_a_loss_that_is_not_finite_names_the_request():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("byte_bpe")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(FastmemitError, match="The Eiffel Tower is located"):
        optimise(find_adapter(model), tokenizer, REQUESTS[:1], CONTEXTS, SETTINGS)


def test_a_subject_that_merges_with_the_target_is_refused(monkeypatch):
    from fastmemit import text as rows
    from fastmemit.text import Encoded

    def merged(_tokenizer, text, target):
        return Encoded((5, 6), ((0, 4), (4, len(text) + len(target)))), 1

    monkeypatch.setattr(rows, "encode_with_target", merged)
    with pytest.raises(BadRequest, match="merges"):
        rows.request_rows(tiny_tokenizer("byte_bpe"), REQUESTS[2], CONTEXTS)


def test_contexts_must_begin_with_the_bare_prompt():
    from fastmemit.text import request_rows

    with pytest.raises(ValueError, match="bare prompt"):
        request_rows(tiny_tokenizer("byte_bpe"), REQUESTS[0], ("The end. ",))


def test_typical_coordinates_do_not_see_a_few_huge_ones():
    # Sorted sizes 1, 2, 3, 1000: torch's median is the lower middle, 2; m = 2 / 0.6745.
    start = torch.tensor([[1.0, -2.0, 3.0, -1000.0], [0.0, 0.0, 0.0, 8.0]])
    unit, length = TargetSettings(layer=0, scale="median").units(start)
    assert unit[:, 0].tolist() == pytest.approx([2 / 0.6745, 4.0])  # of the second: 8 / sqrt(4)
    assert length[:, 0].tolist() == pytest.approx([4 / 0.6745, 8.0])
    unit, length = TargetSettings(layer=0).units(start)
    assert unit[:, 0].tolist() == [1.0, 1.0]
    assert length[:, 0].tolist() == pytest.approx([1000014**0.5, 8.0])


@pytest.mark.parametrize("site", ["block", "projection"])
def test_a_relative_step_is_the_published_one_of_its_size(site):
    # One request alone: relative settings that come to the same absolute ones give the same path.
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("byte_bpe")
    adapter = find_adapter(model)
    settings = dataclasses.replace(SETTINGS, site=site, clamp=0.3, weight_decay=0.0)
    (probe,) = optimise(adapter, tokenizer, REQUESTS[:1], CONTEXTS, settings)
    relative = dataclasses.replace(settings, scale="median", learning_rate=0.2)
    unit, length = (float(t) for t in relative.units(probe.start[None]))
    same = dataclasses.replace(settings, learning_rate=0.2 * unit, clamp=0.3 * length / float(probe.start.norm()))
    (one,) = optimise(adapter, tokenizer, REQUESTS[:1], CONTEXTS, relative)
    (other,) = optimise(adapter, tokenizer, REQUESTS[:1], CONTEXTS, same)
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    assert (one.vector - other.vector).norm() <= 1e-5 * other.vector.norm()
    assert (one.vector - probe.vector).norm() > 1e-3 * probe.vector.norm()


def test_a_scaled_model_takes_the_same_relative_path():
    # The stream of a model without norms in it scales with its embeddings; here the head's norm
    # takes the scale off again, so that the whole model is the same one at another scale.
    tokenizer = tiny_tokenizer("byte_bpe")
    settings = dataclasses.replace(SETTINGS, scale="median", learning_rate=0.2, weight_decay=0.0)
    vectors = []
    for factor in (1.0, 64.0):
        model = tiny_model("llama", rms_norm_eps=1e-12, tie_word_embeddings=False)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(factor)
            for block in model.model.layers:
                block.self_attn.o_proj.weight.mul_(factor)
                block.mlp.down_proj.weight.mul_(factor)
        (target,) = optimise(find_adapter(model), tokenizer, REQUESTS[:1], CONTEXTS, settings)
        vectors.append(target.vector / factor)
    assert (vectors[1] - vectors[0]).norm() <= 1e-3 * vectors[0].norm()
