"""The suite collect: second moments of a model's layers in one pass, against a pass for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fastcov
from fastcov.bench import released
from fastcov.bench.models import SHAPES, build
from fastcov.bench.oracle import lower_error
from fastcov.bench.peak import gemm_probe
from fastcov.bench.schema import BadInput, Row
from fastcov.bench.settings import Settings
from fastcov.bench.timing import Case, Contender, Verdict, measure
from fastcov.throughput import Throughput

# Both procedures compute the same keys in batches of other shapes. In 16 bits a forward pass rounds
# them differently by more than any sum does, so there the comparison only finds wrong tokens.
_AGREE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_RELEASED = "released procedure"


def cases(settings: Settings) -> Iterator[tuple[Case, list[Contender]]]:
    """One for each model."""
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    if settings.load is not None:
        yield case(settings, settings.load_name, *_loaded(settings.load, settings.load_name))
    for name in settings.models:
        made = build(name, settings.device, dtype, settings.multiplier)
        layers = SHAPES[name].layers
        yield case(settings, f"{name} shape, layers {layers[0]}-{layers[-1]}", *made)


def run(settings: Settings) -> Iterator[list[Row]]:
    """The rows of each model."""
    for one, contenders in cases(settings):
        rows = measure(one, contenders, replace(settings.effort, least=3))
        yield [row if row.p50 is None else replace(row, tokens_per_second=one.n / row.p50) for row in rows]


def _loaded(load: Callable[[], Any], name: str) -> tuple[nn.Module, list[str], list[list[int]]]:
    given = load()
    if not (isinstance(given, tuple) and len(given) == 3 and isinstance(given[0], nn.Module)):
        raise BadInput(
            f"--load {name} must return (model, module paths, documents) but returned "
            f"{type(given).__name__}; see benchmarks/smollm2.py."
        )
    model, modules, documents = given
    return model.eval(), list(modules), documents


def case(
    settings: Settings, name: str, model: nn.Module, modules: Sequence[str], documents: Sequence[Sequence[int]]
) -> tuple[Case, list[Contender]]:
    """Ours and the released procedure on the same tokens.

    Args:
        settings: How and where.
        name: Of the model, as printed.
        model: On its device.
        modules: Paths of the edited projections.
        documents: Token ids, each document as long as the model takes.

    Raises:
        BadInput: There are fewer tokens than wanted.
    """
    last: Any = model.get_submodule(modules[-1])
    d_k = int(getattr(last, "in_features", last.weight.shape[0]))
    dtype, device = last.weight.dtype, last.weight.device
    budget = fastcov.budget(settings.multiplier, d_k)
    texts = [list(d) for d in fastcov.take(documents, budget, max(map(len, documents)))]
    kept = sum(map(len, texts))
    if kept < budget:
        raise BadInput(
            f"The documents of {name} have {kept} tokens and {budget} are wanted; pass more text "
            "or a smaller --multiplier."
        )
    counted: list[float] = []

    def ours(throughput: Throughput | None = None) -> dict[str, Tensor]:
        batches = fastcov.bucket(fastcov.take(texts, budget, max(map(len, texts))), settings.batch_tokens)
        moments = fastcov.collect_moments(model, modules, batches, budget, causal=True, throughput=throughput)
        return {path: moment.lower for path, moment in moments.items()}

    def theirs() -> dict[str, Tensor]:
        return released.covariances(model, modules, texts)

    once = functools.cache(theirs)  # for the checks of both

    def check_theirs() -> Verdict:
        """In float64, from the same keys: the released sums hold what they should."""
        return _agreement(once(), _float64(model, modules, texts), 1e-5)

    def check_ours() -> Verdict:
        throughput = Throughput(peak=1.0)  # it counts; the peak is measured beside the rounds
        sums = ours(throughput)
        counted.append(throughput.flops)
        return _agreement(sums, once(), _AGREE[dtype])

    contenders = [
        Contender("fastcov.collect_moments", "ours", check_ours, ours),
        Contender(
            _RELEASED,
            "released",
            check_theirs,
            theirs,
            # It takes many times as long as ours where its products in float32 are slow.
            rounds=1 if device.type == "cuda" else None,
        ),
    ]
    word = str(dtype).removeprefix("torch.")
    found = Case(
        suite="collect",
        name=f"{name}, {word}, {kept} keys a layer, d_k {d_k}",
        device=device,
        dtype=word,
        n=kept,
        d=d_k,
        flops=lambda: counted[-1],
        baseline=_RELEASED,
        probes={},
        fallback=gemm_probe(device, dtype, quick=settings.quick),
    )
    return found, contenders


def _float64(model: nn.Module, modules: Sequence[str], documents: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The same moments in float64, by plain products, one document at a time in one pass."""
    sums: dict[str, Tensor] = {}

    def add(path: str, x: Tensor) -> None:
        keys = x.reshape(-1, x.shape[-1]).double()  # (L, d_k): one document, no padding
        total = sums.setdefault(path, keys.new_zeros(keys.shape[1], keys.shape[1]))
        total.addmm_(keys.mT, keys)

    device = next(model.parameters()).device
    with fastcov.KeyHooks(model, modules, add) as hooks, torch.no_grad():
        for document in documents:
            ids = torch.tensor([list(document)], device=device)
            hooks.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return sums


def _agreement(found: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float) -> Verdict:
    """The worst layer."""
    pairs = [lower_error(found[path], wanted[path].double()) for path in wanted]
    error, bias = max(pairs, key=lambda pair: (pair[0] != pair[0], pair[0]))
    wrong = None if error <= allowed else f"relative error {error:.2g} is above {allowed:.0e}"
    return Verdict(error, bias, wrong)
