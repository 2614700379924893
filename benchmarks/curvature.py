"""Whether the curvature on the output's side helps: MEMIT and AlphaEdit with G, the second moment of output gradients.

    python benchmarks/curvature.py --model smollm2 --data counterfact_1400.json --corpus articles.jsonl \
        --text wikitext2_test.txt --cells memit memit,weighed=1 alphaedit memit,confined=0.3 --out lines.jsonl
    python benchmarks/curvature.py --report lines.jsonl.xz

What an edit Delta costs other text is about tr(G Delta C Delta^T): C, which all methods here have, is the second moment
of the projection's inputs, G that of the gradients of the loss with respect to its outputs (K-FAC). Two ways to use it:

    weighed=p     MEMIT with G^p in its penalty: ||Delta K - R||^2 + w tr(G^p Delta C Delta^T), G^p of mean eigenvalue 1
    confined=s    AlphaEdit's ridge in the directions of output and input whose eigenvalues' product is small: together
                  they have a share s of the sum of all products (CrispEdit's projection, arXiv 2602.15823, on a closed
                  form; theirs is for gradient steps)

Records are those of `fastmemit.data.batches(records, 1, seed=0)` from --start on, in --batches of --size, one upon the
other; all share their target vectors, of the unedited model. A line is one record at the end. Keys of earlier batches
are preserved beside C.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python", ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from what_c_is_worth import by_cell, common_options, read_lines  # noqa: E402

from fastcov import CholeskyFactor, LowRank, SecondMoment  # noqa: E402
from fastcov.machine import this_machine  # noqa: E402
from fastmemit import Editor  # noqa: E402
from fastmemit.data import batches, load_corpus, load_records  # noqa: E402
from fastmemit.evaluation.perplexity import edited_nll, read_text  # noqa: E402
from fastmemit.evaluation.scores import score_records  # noqa: E402
from fastmemit.experiments.intervals import difference_intervals, score_intervals  # noqa: E402
from fastmemit.methods import PreservedKeys  # noqa: E402
from fastmemit.methods.base import REGISTRY, Draft, Method  # noqa: E402
from fastmemit.methods.solve import residuals  # noqa: E402
from fastmemit.request import EditRequest  # noqa: E402
from fastmemit.statistics import versions  # noqa: E402

SHOWN = ("ps", "ns", "ea", "pa", "na", "pm")
#: The weight of the change's squared norm, as in AlphaEdit.
L2 = 10.0

Eigen = tuple[Tensor, Tensor]  # eigenvalues, ascending, and eigenvectors as columns


def output_moments(editor: Editor, corpus: str, layers: Iterable[int], tokens: int) -> dict[int, SecondMoment]:
    """G of each layer: of the gradients of the loss of answers that the model itself draws (the true Fisher)."""
    model, tokenizer = editor.model, editor.tokenizer
    found: dict[int, SecondMoment] = {}
    embed, seen = model.get_input_embeddings(), 0
    draw = torch.Generator().manual_seed(0)

    def collect(layer: int, module: nn.Module) -> Any:
        width = module.weight.shape[0]  # (d, d_k)
        found[layer] = SecondMoment(width, dtype=torch.float64)

        def hook(_module: nn.Module, _inputs: Any, outputs: tuple[Tensor, ...]) -> None:
            found[layer].update(outputs[0].detach().reshape(-1, width))

        return module.register_full_backward_hook(hook)

    handles = [collect(layer, editor.adapter.projection(layer)) for layer in layers]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for document in load_corpus(corpus).documents(seed=0):
            ids = tokenizer(document, truncation=True, max_length=256, return_tensors="pt")["input_ids"]
            hidden = embed(ids).detach().requires_grad_(True)
            logits = model(inputs_embeds=hidden).logits[0]
            answers = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
            nn.functional.cross_entropy(logits, answers, reduction="sum").backward()
            seen += ids.shape[1]
            if seen >= tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
        for parameter, was in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(was)
    return found


def weighed(A: CholeskyFactor, K: Tensor, R: Tensor, G: Eigen, power: float) -> LowRank:
    """Minimise ``||Delta K - R||^2 + tr(G^p Delta A Delta^T)``, with G^p scaled to a mean eigenvalue of 1.

    In G's eigenvectors each row is MEMIT with a weight of its own, ``r_i (g_i I + K^T A^-1 K)^-1 K^T A^-1``, and one
    eigenproblem of the (B, B) matrix serves all of them.
    """
    g, U = G
    g = g**power / (g**power).mean()
    X, S = A.solve_and_gram(K)  # (d_k, B), (B, B)
    s, Q = torch.linalg.eigh(S)
    rows = (U.T @ R @ Q) / (g[:, None] + s.clamp_min(0))  # (d, B)
    return LowRank((U @ rows @ Q.T).contiguous(), X)


def limit_of(share: float, C: Eigen, G: Eigen) -> float:
    """The product of eigenvalues up to which all products together have this share of their sum."""
    products = (G[0][:, None] * C[0].clamp_min(0)).flatten().sort().values
    sums = products.cumsum(0)
    return float(products[min(int((sums < share * sums[-1]).sum()), len(products) - 1)])


def confined(
    C: Eigen, G: Eigen, K: Tensor, R: Tensor, limit: float, l2: float = L2, earlier: Tensor | None = None
) -> LowRank:
    """Minimise ``||Delta K - R||^2 + ||Delta K_p||^2 + l2 ||Delta||^2`` over what has no product above the limit.

    Row i in G's eigenvectors may use the eigenvectors of C whose eigenvalue is below limit / g_i: the first n_i, fewer
    the larger g_i is.
    """
    (a, V), (g, U) = C, G
    B = K.shape[1]
    J = V.T @ (K if earlier is None else torch.cat([K, earlier], 1))  # (d_k, B + m)
    asked = torch.cat([U.T @ R, torch.zeros(len(g), J.shape[1] - B, dtype=R.dtype)], 1)  # (d, B + m)
    change = torch.zeros(len(g), len(a), dtype=R.dtype)
    gram, upto = l2 * torch.eye(J.shape[1], dtype=R.dtype), 0
    for row in reversed(range(len(g))):
        allowed = int((a.clamp_min(0) * g[row] < limit).sum())
        gram, upto = gram + J[upto:allowed].T @ J[upto:allowed], allowed
        change[row, :allowed] = J[:allowed] @ torch.linalg.solve(gram, asked[row])
    left, singular, right = torch.linalg.svd(U @ change @ V.T, full_matrices=False)
    rank = int((singular > 1e-10 * singular[0]).sum())
    return LowRank((left[:, :rank] * singular[:rank]).contiguous(), right[:rank].T.contiguous())


@contextmanager
def writing(rule: str, C: dict[int, Eigen], G: dict[int, Eigen]) -> Iterator[None]:
    """Have MEMIT write by a rule of this page; as it is without one."""
    name, _, value = rule.partition("=")

    def write(draft: Draft[Any], requests: list[EditRequest], goal: Tensor) -> None:
        for layer, K, R in residuals(draft, requests, goal):
            if name == "weighed":
                A = draft.preserving(layer, draft.work.statistics.factor(draft.config, layer))
                change = weighed(A, K, R, G[layer], float(value))
            else:
                earlier = draft.earlier_keys(layer)
                limit = limit_of(float(value), C[layer], G[layer])
                joined = torch.cat(earlier, 1) if earlier else None
                change = confined(C[layer], G[layer], K, R, limit, earlier=joined)
            draft.write(layer, change, K)

    before = REGISTRY["memit"]
    try:
        if rule:
            REGISTRY["memit"] = Method(write)
        yield
    finally:
        REGISTRY["memit"] = before


def main() -> None:
    """Run what is not in the file yet, or print the tables of one that is there."""
    args = arguments()
    if args.report:
        report([line for path in args.report for line in read_lines(path)])
        return
    editor = Editor.from_pretrained(args.model, device="cpu", dtype="float32", cache_dir=args.cache)
    every = [one[0] for one in batches(load_records(args.data), 1, seed=0)]
    chosen = every[args.start : args.start + args.size * args.batches]
    parts = [chosen[start : start + args.size] for start in range(0, len(chosen), args.size)]
    layers = editor.config("memit").layers
    collected = editor.precompute(args.corpus, multiplier=10, layers=layers)
    names = {layer: editor.adapter.projection_name(layer) for layer in layers}
    C = {layer: torch.linalg.eigh(collected.second_moment(names[layer]).double()) for layer in layers}
    G: dict[int, Eigen] = {}
    for layer, moment in output_moments(editor, args.corpus, layers, args.tokens).items():
        g, U = torch.linalg.eigh(moment.second_moment)
        G[layer] = g.clamp_min(0) / g.mean(), U
        least, middle, most = (float(G[layer][0][place]) for place in (0, len(g) // 2, -1))
        print(f"layer {layer}: G's eigenvalues {least:.2f}, {middle:.2f}, {most:.2f} of their mean", file=sys.stderr)
    text = read_text(args.text, editor.tokenizer, tokens=2048)
    shape = f"{args.batches}x{args.size}"
    there = {line["cell"] for line in (read_lines(args.out) if args.out.is_file() else []) if "nll" in line}
    with open(args.out, "a", encoding="utf-8") as out:
        for cell in args.cells:
            if f"{cell}/{shape}" in there:
                continue
            begun = time.process_time()
            method, _, rule = cell.partition(",")
            config = editor.config(method, optimiser="rotate")
            requests = [one.request for one in chosen]
            targets = dict(zip(requests, editor.targets(requests, config), strict=True))
            preserved, edits = PreservedKeys(), []
            with writing(rule, C, G):
                for part in parts:
                    batch = [one.request for one in part]
                    edits.append(editor.edit(batch, config, verify=False, preserved=preserved, targets=targets))
            for score in score_records(editor.adapter, editor.tokenizer, chosen):
                after = {name: None if value is None else round(value, 4) for name, value in score.shares().items()}
                out.write(json.dumps({"cell": f"{cell}/{shape}", "case_id": score.case_id, "after": after}) + "\n")
            about = {
                "nll": edited_nll(editor.adapter, text),
                "cpu_seconds": round(time.process_time() - begun, 1),
                "cpu": this_machine(torch.device("cpu")).cpu,
                "versions": versions(),
            }
            for edit in reversed(edits):
                edit.undo()
            out.write(json.dumps({"cell": f"{cell}/{shape}", **about}) + "\n")
            out.flush()
            print(cell, shape, f"perplexity {math.exp(about['nll']):.2f}", file=sys.stderr)


def report(lines: Iterable[dict[str, Any]]) -> None:
    """Print a table; differences are to MEMIT as it is in the same batches, paired by record."""
    cells, about = by_cell(lines)
    upper = [name.upper() for name in SHOWN]
    heads = ["batches", "cell", *upper, "perplexity", *(f"{name}, to MEMIT" for name in upper)]
    print("|", " | ".join(heads), "|\n| --- | --- |" + " ---: |" * (len(heads) - 2))
    for cell, found in cells.items():
        rule, _, shape = cell.rpartition("/")
        scores = score_intervals(found, names=SHOWN)
        row = [f"{score.value:.1f}" if score else "-" for score in scores.values()]
        row.append(f"{math.exp(about[cell]['nll']):.2f}")
        base = cells.get(f"memit/{shape}", found)
        gaps = difference_intervals(found, base, names=SHOWN) if base is not found else dict.fromkeys(SHOWN)
        row += [f"{gap.value:+.1f} ({gap.low:.1f}, {gap.high:.1f})" if gap else "" for gap in gaps.values()]
        print(f"| {shape.replace('x', ' of ')} | `{rule}` |", " | ".join(row), "|")


def arguments() -> argparse.Namespace:
    """The options."""
    parser = common_options(__doc__)
    about = "memit or alphaedit, with a rule of the list above or as it is"
    parser.add_argument("--cells", nargs="+", default=["memit", "memit,weighed=1"], metavar="METHOD[,RULE]", help=about)
    parser.add_argument("--size", type=int, default=256, help="records in a batch")
    parser.add_argument("--batches", type=int, default=1, help="how many, one upon the other")
    parser.add_argument("--tokens", type=int, default=8000, help="of text that G is made of")
    return parser.parse_args()


if __name__ == "__main__":
    main()
