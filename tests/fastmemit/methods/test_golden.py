"""Target vectors, losses and weight changes against what the released code computes.

`tests/golden/released.npz` holds values recorded by running the code of the paper (MEMIT, EMMET)
and of ROME on SmolLM2-135M cut to its first 8 blocks.  Their C is 1.2 million numbers a layer, of
which a change of weights depends on few: on X = A^-1 K, A = w C, for the keys K of the facts.  The
file has K and X, and the test's A is the smallest stand-in that maps the one to the other.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcov import factorize
from fastmemit import Editor, EditRequest
from fastmemit.statistics import Statistics
from fastmemit.targets import TargetSettings, optimise
from fastmemit.text import Contexts
from reference.literal_targets import literal_target

pytestmark = [pytest.mark.real, pytest.mark.slow]

CONTEXTS = (
    "",
    "The-the-key-to-the-secret. ",
    "Therefore-to-the-future, which is a. ",
    "Because-based approaches, where data analysis and modeling are. ",
    "I-th row, where the first row is the. ",
    "You, for example, when it comes to the impact. ",
)
REQUESTS = [
    EditRequest("{} is located in the city of", "The Eiffel Tower", " Rome"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", " English"),
]
SHARED = {"clamp": 0.75, "weight_decay": 0.5, "v_lr": 0.5, "kl_factor": 0.0625}
SHARED |= {"weight": 1536.0, "scale": "published"}  # cut to 8 blocks it has no preset
RUNS = {
    "memit": (REQUESTS, {**SHARED, "layers": (3, 4, 5), "steps": 8}),
    "emmet": (REQUESTS, {**SHARED, "layers": (5,), "steps": 3, "lambda_e": 0.1}),
    "rome": (REQUESTS[:1], {**SHARED, "layers": (5,), "steps": 3, "clamp": 4.0, "keys": "original"}),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[2] / "golden" / "released.npz") as file:
        return {name: torch.tensor(file[name]) for name in file.files}


@pytest.fixture
def editor(smollm2, tmp_path):
    """SmolLM2's first 8 blocks, its final norm and head."""
    model, tokenizer = smollm2
    blocks, depth = model.model.layers, model.config.num_hidden_layers
    model.model.layers = blocks[:8]
    model.config.num_hidden_layers = 8
    try:
        editor = Editor(model, tokenizer, cache_dir=tmp_path)
        written = {"words": CONTEXTS, "start": CONTEXTS[:4]}
        editor.workspace.contexts = Contexts(model, tokenizer, 0, written)
        yield editor
    finally:
        model.model.layers, model.config.num_hidden_layers = blocks, depth


def stand_in(K, X):
    """The A that maps X (d_k, n) to K, and all that is orthogonal to X to a multiple of itself."""
    basis = torch.linalg.qr(X).Q
    scale = torch.linalg.matrix_norm(K) / torch.linalg.matrix_norm(X)
    rest = torch.eye(len(X), dtype=X.dtype) - basis @ basis.T
    mapped = K @ torch.linalg.solve(X.T @ K, K.T)
    return scale * rest + (mapped + mapped.T) / 2


def test_equals_the_released_code(editor, golden, monkeypatch):
    factors = {n: factorize(stand_in(golden[f"A/{n}/k"], golden[f"A/{n}/x"])) for n in (3, 4, 5)}
    monkeypatch.setattr(editor.store, "factor", lambda _, layer: factors[layer])
    monkeypatch.setattr(editor.store, "covering", lambda *_, **__: Statistics({}, {}))
    monkeypatch.setattr(Statistics, "resolved", lambda _self, _adapter, config: config)
    # With the recorded C these agreed to 6e-7 on vectors, 4e-6 on losses, 2.5e-6 on the changes of
    # MEMIT and EMMET and 6.4e-6 on ROME's; processors round differently, hence the room.
    for method, (requests, settings) in RUNS.items():
        config = editor.config(method, **settings)
        targets = editor.targets(requests, config)
        if method != "rome":
            vectors = torch.stack([target.vector for target in targets])
            assert (vectors - golden[f"{method}/z"]).norm() <= 3e-6 * vectors.norm()
            losses = torch.tensor([target.losses for target in targets], dtype=torch.float64)
            torch.testing.assert_close(losses, golden[f"{method}/losses"], rtol=2e-5, atol=0)
        delta = editor.plan(requests, method, **settings).delta
        for layer in config.layers:
            left, right = delta.factors[editor.adapter.weight_name(layer)]
            change = left.double() @ right.double().T  # (d, d_k)
            expected = golden[f"{method}/dW/{layer}/left"].double() @ golden[f"{method}/dW/{layer}/right"].double().T
            assert (change - expected).norm() <= 2e-5 * expected.norm(), (method, layer)


def literal_start(editor, request, settings, site):
    """v0 of the literal computation in float64; the model's float32 weights come back bit for bit."""
    model, module = editor.model, editor.adapter.projection(5) if site == "projection" else None
    once = dataclasses.replace(settings, steps=1)
    model.double()
    try:
        return literal_target(model, editor.tokenizer, editor.adapter.block(5), request, CONTEXTS, once, module)[1]
    finally:
        model.float()


@pytest.mark.parametrize("site", ["block", "projection"])
def test_early_stop_and_clamp_equal_the_literal_computation(editor, site):
    # What the recorded runs do not reach: one fact whose loss falls below the limit on its way, and
    # vectors that are held at the norm limit.
    settings = TargetSettings(layer=5, site=site, steps=8, clamp=0.75, weight_decay=0.5)
    if site == "projection":
        settings = dataclasses.replace(settings, clamp=4.0)
    stopping = dataclasses.replace(settings, early_stop=16.5)
    held = dataclasses.replace(settings, clamp=settings.clamp / 8, steps=6)
    exact = [literal_start(editor, request, settings, site) for request in REQUESTS]
    for run in (stopping, held):
        targets = optimise(editor.adapter, editor.tokenizer, REQUESTS, CONTEXTS, run)
        for request, target, true_start in zip(REQUESTS, targets, exact, strict=True):
            module = editor.adapter.projection(5) if site == "projection" else None
            vector, start, losses = literal_target(
                editor.model, editor.tokenizer, editor.adapter.block(5), request, CONTEXTS, run, module
            )
            assert target.losses == pytest.approx(losses, rel=2e-5)
            # Both are float32, and how each is rounded is the processor's business (ours 2.8e-6 and the literal one
            # 1.5e-6 off with AVX-512), so both are held against float64.
            for found in (target.start, start):
                assert (found.double() - true_start).norm() <= 5e-6 * true_start.norm()
            assert (target.vector - vector).norm() <= 2e-5 * vector.norm()
        if run is stopping:
            assert [len(target.losses) < run.steps for target in targets].count(True) == 1
        else:
            moved = [(t.vector - t.start).norm() / t.start.norm() for t in targets]
            assert moved == pytest.approx([run.clamp] * 2, rel=1e-5)
