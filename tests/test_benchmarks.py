"""Every script in benchmarks/ says what it does, whatever is installed."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastcov

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


def script(name: str) -> Any:
    """The module of a script in benchmarks/."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each script printed and how it ended; each in a fork of one process that has torch."""
    out = tmp_path_factory.mktemp("helps")
    program = (
        "import os, runpy, sys, torch\n"
        "out, *scripts = sys.argv[1:]\n"
        "for script in scripts:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        name = os.path.basename(script)\n"
        "        both = os.open(os.path.join(out, name), os.O_WRONLY | os.O_CREAT)\n"
        "        os.dup2(both, 1); os.dup2(both, 2)\n"
        "        sys.argv, sys.path[0] = [script, '--help'], os.path.dirname(script)\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "        os._exit(99)  # --help has ended no script\n"
        "    with open(os.path.join(out, os.path.basename(script)) + '.code', 'w') as file:\n"
        "        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))\n"
    )
    subprocess.run([sys.executable, "-c", program, out, *SCRIPTS], check=True, timeout=600)
    return out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process cannot be forked here")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_shows_its_help(helps: Path, script: Path) -> None:
    said = (helps / script.name).read_text()
    assert (helps / f"{script.name}.code").read_text() == "0", said
    assert said.startswith("usage: ") and script.name in said.partition("\n")[0]


def test_a_figure_of_kernels_is_a_table_of_panels_whose_labels_stand_before_the_peak() -> None:
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.draw import draw, load
    finally:
        sys.path.remove(str(ROOT))
    run = load(ROOT / "benchmarks" / "results" / "rank_k-2core-xeon-amx.json")
    figure = draw(run, "rank_k")
    assert len(figure.axes) == 4 * 3 and figure.get_figheight() < 14
    first, beside = figure.axes[:2]
    assert (
        first.get_title(loc="left").endswith("float32 keys, n 4096, d 1536")
        and beside.get_title(loc="left") == "d 3072"
    )
    assert [label.get_text() for label in beside.get_yticklabels()] == [""] * 10
    assert [text.get_text() for text in first.texts][-1] == "peak 1,148, off the scale" and not first.lines
    (line,) = figure.axes[9].lines  # float64, whose peak is near
    *labels, peak = figure.axes[9].texts
    assert peak.get_text() == "peak 226" and all(label.get_bbox_patch() is not None for label in labels)
    assert line.get_zorder() < min(label.get_zorder() for label in labels)


def test_what_c_is_worth_with_other_settings_is_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    report = script("what_c_is_worth").report
    shares = dict.fromkeys(("es", "ps", "ns", "ea", "pa", "na"), 0.5)
    lines = []
    for settings, value in (([], 0.25), (["optimiser=rotate"], 0.75)):
        one = {
            "model": "tiny",
            "method": "memit",
            "batch": 1,
            "C": "10",
            "cell": ["tiny", "memit", 1, 1, "10", *settings],
        }
        lines += [{**one, "case_id": 0, "before": shares, "after": {**shares, "ea": value}}, {**one, "nll": []}]
    report(lines)
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert tables[::2] == [
        "tiny, memit, batches of 1, 1 records",
        "tiny, memit, optimiser=rotate, batches of 1, 1 records",
    ]
    assert ["| 25.0 |" in tables[1], "| 75.0 |" in tables[3]] == [True, True]


def test_how_a_ridge_fits_and_what_an_edit_disturbs() -> None:
    ridge = script("ridge")
    disturbed, fit, rows = ridge.disturbed, ridge.fit, ridge.rows
    draw = torch.Generator().manual_seed(0)
    d, X = 12, torch.randn(60, 12, generator=draw, dtype=torch.float64)
    A = X.T @ X / 60 + 0.3 * torch.eye(d, dtype=torch.float64)
    fresh = torch.randn(40, d, generator=draw, dtype=torch.float64)
    R = torch.linalg.cholesky(A)
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(d, dtype=torch.float64), A)
    constant = math.log(2 * math.pi) / 2
    assert fit(R, fresh.T @ fresh / 40) == pytest.approx(float(gaussian.log_prob(fresh).mean()) / d + constant)
    # The exact edit with residuals I, one batch after the other: Delta = (K^T A^-1 K)^-1 K^T A^-1.
    F, K = fresh.T @ fresh / 40, torch.randn(2, d, 3, generator=draw, dtype=torch.float64)
    edits = [torch.linalg.inv(k.T @ torch.linalg.inv(A) @ k) @ k.T @ torch.linalg.inv(A) for k in K]
    assert disturbed(R, F, K) == pytest.approx(sum(float((delta @ F @ delta.T).trace()) for delta in edits))
    # No ridge can do better than all keys themselves, and with as many keys as dimensions one is needed.
    keys = torch.randn(600, d, generator=draw)
    moments = {m: fastcov.SecondMoment(d).update(keys[: int(m * d)]) for m in (1.0, 4.0, 50.0)}
    found = rows(moments)
    assert all(row["excess"][1] >= 1 for row in found)
    assert {row["d_m"] for row in found if row["ridge"] == 0} == {4.0}
    best = max((row for row in found if row["d_m"] == 1), key=lambda row: row["likelihood"])
    assert best["ridge"] >= 0.1


def test_hooks_of_older_code_see_a_block_put_out_a_tuple_and_the_model_does_not() -> None:
    show_tuples = script("released").show_tuples

    class Trace:
        """As in their nethook: what a hook gives back is what the module puts out."""

        def __init__(self, module: nn.Module, layer: str) -> None:
            self.output: Any = None

            def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                (output[0] if isinstance(output, tuple) else output).add_(1)
                self.output = output
                return output

            self.registered_hook = module.get_submodule(layer).register_forward_hook(hook)

    show_tuples(Trace)
    model = nn.Sequential(nn.Sequential(nn.Identity()), nn.Identity())
    block, inner = Trace(model, "0.0"), Trace(nn.ModuleDict({"mlp": model}), "mlp")
    out = model(torch.zeros(2, 3))
    assert isinstance(block.output, tuple) and torch.equal(block.output[0], torch.full((2, 3), 2.0))
    assert torch.equal(out, torch.full((2, 3), 2.0)) and inner.output is out


def test_edits_that_know_the_outputs_curvature_are_the_minima_that_they_are_said_to_be() -> None:
    curvature = script("curvature")
    confined, limit_of, weighed = curvature.confined, curvature.limit_of, curvature.weighed
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    d, d_k, B = 4, 6, 3
    K, R, earlier, X, Y = random(d_k, B), random(d, B), random(d_k, 2), random(20, d_k), random(20, d)
    A, G = X.T @ X / 20, Y.T @ Y / 20
    g, U = torch.linalg.eigh(G)
    a, V = torch.linalg.eigh(A)

    # The gradient of ||D K - R||^2 + tr(G^p D A D^T) is zero there.
    for power in (0.5, 1.0):
        root = U @ torch.diag(g**power / (g**power).mean()) @ U.T
        D = weighed(fastcov.factorize(A.clone(), jitters=(0.0,)), K, R, (g, U), power).dense()
        assert torch.allclose((D @ K - R) @ K.T + root @ D @ A, torch.zeros(d, d_k, dtype=torch.float64), atol=1e-10)
    flat = weighed(fastcov.factorize(A.clone(), jitters=(0.0,)), K, R, (torch.ones(d), U), 1.0).dense()
    assert torch.allclose(flat, fastcov.closed_form.memit(fastcov.factorize(A.clone()), K, R).dense(), atol=1e-8)

    # Confined: nothing where a product is above the limit, and of the rest the least squares, written out.
    limit = limit_of(0.4, (a, V), (g, U))
    mask = g[:, None] * a < limit
    assert 0 < int(mask.sum()) < d * d_k
    kept = float((g[:, None] * a)[mask].sum() / (g[:, None] * a).sum())
    assert kept < 0.4 <= kept + limit / float((g[:, None] * a).sum())
    D = confined((a, V), (g, U), K, R, limit, 0.1, earlier).dense()
    turned = U.T @ D @ V
    assert float(turned[~mask].abs().max()) < 1e-12
    J, asked = V.T @ torch.cat([K, earlier], 1), torch.cat([U.T @ R, torch.zeros(d, 2, dtype=torch.float64)], 1)
    for row in range(d):
        own = J[mask[row]]
        rows = own @ own.T + 0.1 * torch.eye(len(own), dtype=torch.float64)
        assert torch.allclose(turned[row, mask[row]], torch.linalg.solve(rows, own @ asked[row]), atol=1e-10)
