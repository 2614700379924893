"""ROME, EMMET and MEMIT on every architecture: what the edited projection does afterwards."""

import pytest
import torch

from fastmemit import Editor, EditRequest
from fastmemit.data.corpora import corpus_from_texts
from fastmemit.errors import BadRequest, FastmemitError
from fastmemit.methods import Draft, solve
from fastmemit.methods.base import averaged_keys
from fastmemit.models.running import hidden_of
from fastmemit.partial_forward import read_at_subject
from fastmemit.text import subject_row
from reference import closed_form as literal
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

WORDS = (
    *("the", "old", "river", "town", "of", "many", "small", "houses", "had"),
    *("a", "king", "and", "two", "green", "boats", "by", "the", "sea"),
)
TEXTS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(30)) + f" {i}" for i in range(40)]
REQUESTS = [
    EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("In those days {} played", "Ann of the Seven Hills", "the violin"),
]


def make_editor(architecture, cache, tokenizer="byte_bpe", **settings):
    model = tiny_model(architecture)
    editor = Editor(model, tiny_tokenizer(tokenizer), cache_dir=cache, **settings)
    editor.precompute(corpus_from_texts("tiny", TEXTS), multiplier=8, layers=[0, 1, 2])
    return editor


def snapshot(model):
    return {name: p.clone() for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def workspace(editor, method, **overrides):
    return Draft(editor.workspace, editor.config(method, **overrides))


def bare_outputs(editor, *modules):
    """What modules put out at the subjects of the bare prompts, each (B, width) float64."""
    rows = [subject_row(editor.tokenizer, "", request) for request in REQUESTS]
    _, outputs = read_at_subject(editor.adapter, rows, outputs=modules)
    return [output.double() for output in outputs]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_emmet_maps_each_key_to_its_residual_and_undo_is_bit_exact(architecture, tmp_path):
    editor = make_editor(architecture, tmp_path)
    settings = {"layers": (1,), "lambda_e": 0.0, "steps": 4, "site": "block"}
    before = snapshot(editor.model)
    work = workspace(editor, "emmet", **settings)
    keys = averaged_keys(work.context_outputs(1, REQUESTS).keys)  # (d_k, B)
    out, block = bare_outputs(editor, editor.adapter.projection(1), editor.adapter.block(1))
    targets = editor.targets(REQUESTS, editor.config("emmet", **settings))
    goal = torch.stack([t.vector for t in targets]).double()
    rows = [subject_row(editor.tokenizer, "", request).ids for request in REQUESTS]
    residual = editor.adapter.projection_residual(1, out, goal - block, rows)  # (B, d)
    old = editor.adapter.weight(1).double().clone()
    edit = editor.edit(REQUESTS, "emmet", **settings)
    moved = (editor.adapter.weight(1).double() - old) @ keys  # (d, B)
    assert residual.norm() > 1e-2
    assert (moved - residual.T).norm() <= 1e-4 * residual.norm()
    names = {n for n, p in editor.model.named_parameters() if not torch.equal(p, before[n])}
    assert names == {editor.adapter.weight_name(1)}
    edit.undo()
    assert_unchanged(editor.model, before)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_emmets_target_before_a_norm_is_the_projections_own_output(architecture, tmp_path):
    editor = make_editor(architecture, tmp_path)
    settings = {"layers": (1,), "lambda_e": 0.0, "steps": 4, "site": "projection"}
    keys = averaged_keys(workspace(editor, "emmet", **settings).context_outputs(1, REQUESTS).keys)
    (out,) = bare_outputs(editor, editor.adapter.projection(1))
    targets = editor.targets(REQUESTS, editor.config("emmet", **settings))
    goal = torch.stack([t.vector for t in targets]).double()
    old = editor.adapter.weight(1).double().clone()
    editor.edit(REQUESTS, "emmet", **settings)
    moved = (editor.adapter.weight(1).double() - old) @ keys  # (d, B)
    assert (goal - out).norm() > 1e-2
    assert (moved - (goal - out).T).norm() <= 1e-4 * (goal - out).norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("keys", ["consistent", "mean"])
def test_rome_moves_its_key_to_the_target(architecture, keys, tmp_path):
    editor = make_editor(architecture, tmp_path)
    before = snapshot(editor.model)
    settings = {"layers": (1,), "steps": 4, "keys": keys}
    (target,) = editor.targets(REQUESTS[:1], editor.config("rome", **settings))
    edit = editor.edit(REQUESTS[:1], "rome", **settings)
    work = workspace(editor, "rome", **settings)
    outputs = work.context_outputs(1, REQUESTS[:1]).outputs
    # The layer is edited at its own output, so its keys are those of the unedited model.
    reached = averaged_keys(outputs)[:, 0] if keys == "consistent" else outputs[0].mean(0)
    assert (reached - target.vector.double()).norm() <= 1e-4 * target.vector.norm()
    assert len(work.contexts) == 21
    edit.undo()
    assert_unchanged(editor.model, before)


def what_the_block_makes_of(editor, layer, vectors):  # (B, d)
    """What the block puts out at the subjects of the bare prompts, its projection's output there replaced."""
    found = []
    for request, vector in zip(REQUESTS, vectors, strict=True):

        def put(_module, _args, out, vector=vector):
            out = out.clone()
            out[0, -1] = vector
            return out

        ids = torch.tensor([subject_row(editor.tokenizer, "", request).ids])
        with (
            torch.no_grad(),
            editor.adapter.projection(layer).register_forward_hook(put),
            editor.adapter.block(layer).register_forward_hook(lambda _m, _a, out: found.append(hidden_of(out)[0, -1])),
        ):
            editor.model(ids)
    return torch.stack(found).double()


@pytest.mark.parametrize(
    ("architecture", "site"), [("llama", "block"), ("gpt2", "block"), ("gptj", "block"), ("gemma3", "projection")]
)
def test_memit_equals_its_formula_written_out(architecture, site, tmp_path):
    editor = make_editor(architecture, tmp_path)
    settings = {"layers": (0, 1, 2), "weight": 20.0, "ridge": 0.01, "steps": 4, "site": site}
    before = snapshot(editor.model)
    config = editor.config("memit", **settings)
    goal = torch.stack([t.vector for t in editor.targets(REQUESTS, config)])
    goal = goal.double() if site == "block" else what_the_block_makes_of(editor, 2, goal)
    rows = [subject_row(editor.tokenizer, "", request).ids for request in REQUESTS]
    expected = {}
    work = workspace(editor, "memit", **settings)
    statistics = editor.store.covering(config.layers)
    for position, layer in enumerate(config.layers):
        keys = averaged_keys(work.context_outputs(layer, REQUESTS).keys)
        output, now = bare_outputs(editor, editor.adapter.projection(layer), editor.adapter.block(2))
        residual = editor.adapter.projection_residual(layer, output, (goal - now) / (3 - position), rows)
        moment = statistics.second_moment(editor.adapter.projection_name(layer)).double()
        change = literal.memit(literal.regularised(moment.numpy(), 20.0, 0.01), keys.numpy(), residual.T.numpy())
        expected[layer] = torch.tensor(change)
        weight = editor.adapter.weight(layer)
        with torch.no_grad():
            weight.copy_(weight.double() + expected[layer])
    for name, parameter in editor.model.named_parameters():
        with torch.no_grad():
            parameter.copy_(before[name])
    old = {layer: editor.adapter.weight(layer).double().clone() for layer in config.layers}
    edit = editor.edit(REQUESTS, "memit", **settings)
    for layer, change in expected.items():
        found = editor.adapter.weight(layer).double() - old[layer]
        assert (found - change).norm() <= 1e-4 * change.norm()
    edit.undo()
    assert_unchanged(editor.model, before)


def test_original_rome_differs_where_the_keys_differ(tmp_path):
    editor = make_editor("llama", tmp_path)
    settings = {"layers": (1,), "steps": 4}
    ours = editor.plan(REQUESTS[:1], "rome", keys="mean", **settings).delta
    original = editor.plan(REQUESTS[:1], "rome", keys="original", **settings).delta
    work = workspace(editor, "rome", **settings)
    read = work.context_outputs(1, REQUESTS[:1])
    keys, outputs = read.keys, read.outputs
    (target,) = editor.targets(REQUESTS[:1], editor.config("rome", **settings))
    moment = editor.store.covering([1]).second_moment(editor.adapter.projection_name(1)).double()
    mean, bare = keys[0].mean(0), keys[0, 0]
    for delta, key, now in ((ours, mean, outputs[0].mean(0)), (original, bare, outputs[0, 0])):
        ((left, right),) = delta.factors.values()
        change = (left @ right.T).double()
        expected = literal.rome(moment.numpy(), mean.numpy(), (target.vector - now).numpy(), key.numpy())
        assert (change - torch.tensor(expected)).norm() <= 1e-4 * change.norm()


def test_rome_writes_later_facts_on_top_of_earlier_ones(tmp_path):
    editor = make_editor("gpt2", tmp_path)
    settings = {"layers": (1,), "steps": 3}
    before = snapshot(editor.model)
    edit = editor.edit(REQUESTS, "rome", **settings)
    together = editor.adapter.weight(1).clone()
    edit.undo()
    contexts = editor.contexts("rome")
    for request in REQUESTS:
        editor.edit([request], "rome", **settings)
    assert editor.contexts("rome") == contexts
    assert torch.allclose(editor.adapter.weight(1), together, atol=1e-5)
    for edit in reversed(editor.edits):
        edit.undo()
    assert_unchanged(editor.model, before)


def test_an_error_half_way_leaves_the_weights(tmp_path, monkeypatch):
    editor = make_editor("llama", tmp_path)
    before = snapshot(editor.model)
    original, calls = solve.closed_form.memit, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            changed = editor.adapter.weight_name(0)
            assert not torch.equal(dict(editor.model.named_parameters())[changed], before[changed])
            raise FastmemitError("half way")
        return original(*args)

    monkeypatch.setattr(solve.closed_form, "memit", failing)
    with pytest.raises(FastmemitError, match="half way"):
        editor.edit(REQUESTS, "memit", layers=(0, 1, 2), steps=2)
    assert_unchanged(editor.model, before)
    assert editor.edits == ()


def test_duplicates_are_named_before_any_work(tmp_path):
    editor = make_editor("llama", tmp_path)
    twice = [*REQUESTS, EditRequest(REQUESTS[1].prompt, "danielle darrieux ", "Dutch")]
    with pytest.raises(BadRequest, match=r"1 and 3 .*English.*Dutch"):
        editor.plan(twice, "memit")


def test_a_norm_after_the_sum_is_carried(tmp_path):
    model = tiny_model("opt", do_layer_norm_before=False)
    editor = Editor(model, tiny_tokenizer("byte_bpe"), cache_dir=tmp_path)
    editor.precompute(corpus_from_texts("tiny", TEXTS), multiplier=2, layers=[0, 1])
    before = snapshot(model)
    settings = {"layers": (1,), "steps": 4, "lambda_e": 0.0, "site": "block"}
    targets = editor.targets(REQUESTS, editor.config("emmet", **settings))
    goal = torch.stack([t.vector for t in targets]).double()
    (block,) = bare_outputs(editor, editor.adapter.block(1))
    edit = editor.edit(REQUESTS, "emmet", **settings)
    (after,) = bare_outputs(editor, editor.adapter.block(1))
    wanted, moved = goal - block, after - block
    assert float((wanted * moved).sum() / wanted.square().sum()) > 0.5
    edit.undo()
    assert_unchanged(model, before)


@pytest.mark.parametrize("tokenizer", ["bpe_bos", "metaspace", "adds_eos"])
def test_any_tokenizer(tokenizer, tmp_path):
    editor = make_editor("llama", tmp_path, tokenizer)
    before = snapshot(editor.model)
    with editor.edit(REQUESTS, "memit", layers=(0, 1), steps=3):
        assert not torch.equal(editor.adapter.weight(0), before[editor.adapter.weight_name(0)])
    assert_unchanged(editor.model, before)


def test_bfloat16_weights(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    editor = Editor(model, tiny_tokenizer("byte_bpe"), cache_dir=tmp_path)
    editor.precompute(corpus_from_texts("tiny", TEXTS), multiplier=8, layers=[0, 1, 2])
    before = snapshot(model)
    edit = editor.edit(REQUESTS, "memit", layers=(0, 1), steps=3)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    edit.undo()
    assert_unchanged(model, before)


def test_rome_is_emmet_with_one_fact(tmp_path):
    editor = make_editor("qwen3", tmp_path)
    settings = {"layers": (1,), "steps": 3}
    (target,) = editor.targets(REQUESTS[:1], editor.config("rome", **settings))
    rome = editor.plan(REQUESTS[:1], "rome", **settings).delta
    work = workspace(editor, "rome", **settings)
    read = work.context_outputs(1, REQUESTS[:1])
    keys, outputs = read.keys, read.outputs
    key, now = averaged_keys(keys), averaged_keys(outputs)
    change = solve.closed_form.emmet(editor.store.factor(work.config, 1), key, target.vector.double()[:, None] - now)
    ((left, right),) = rome.factors.values()
    assert (left @ right.T - change.dense()).norm() <= 1e-5 * change.dense().norm()
