"""Free text about a record's subject, from the model as it is now, many openings at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastmemit.data import Record
from fastmemit.errors import BadConfig, BadData
from fastmemit.evaluation.references import References
from fastmemit.metrics.generation import RecordGeneration, n_gram_entropy
from fastmemit.metrics.means import mean
from fastmemit.sampling import continue_texts

NEW_TOKENS = 100
TOP_K = 5


def generate_records(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    references: References | None = None,
    new_tokens: int = NEW_TOKENS,
    top_k: int | None = TOP_K,
    seed: int = 0,
    batch_rows: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[RecordGeneration]:
    """Continue every record's openings and measure the texts.

    Openings of like lengths run together. Sampled, an opening that a record has twice gives two texts; greedy, equal
    openings of all records run once. The same seed gives the same texts for the same records in the same order; among
    other records the draws are others.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: The records; each needs an opening.
        references: Texts to compare with, for the reference score.
        new_tokens: Tokens added to each opening, exactly.
        top_k: Sample among the k most probable tokens; None takes the most probable (greedy).
        seed: Of the sampling.
        batch_rows: Openings continued at once.
        progress: Called with the number of openings done since the last call.

    Raises:
        BadConfig: A number is below 1.
        BadData: A record has no opening, or no reference text.
    """
    for name, number in (("new_tokens", new_tokens), ("batch_rows", batch_rows), ("top_k", top_k)):
        if number is not None and number < 1:
            raise BadConfig(f"{name} is {number}; it must be 1 or more.")
    check_generations(records, references)
    openings = [text for record in records for text in record.generations]
    continued = _continued(model, tokenizer, openings, new_tokens, top_k, seed, batch_rows, progress or _quiet)
    texts = iter(continued)
    return [_measured(record, [next(texts) for _ in record.generations], references)
            for record in records]  # fmt: skip


def check_generations(records: Sequence[Record], references: References | None = None) -> None:
    """See that every record has an opening, and a reference text if there are any.

    Raises:
        BadData: One has not.
    """
    for record in records:
        if not record.generations:
            raise BadData(
                f"Record {record.case_id} has no generation_prompts to continue; add one, or leave "
                "out the metric generation."
            )
    if references is not None:
        references.check(records)


def _continued(
    model: Any,
    tokenizer: Any,
    openings: Sequence[str],
    new_tokens: int,
    top_k: int | None,
    seed: int,
    batch_rows: int,
    progress: Callable[[int], None],
) -> list[str]:
    """Each opening with its continuation."""
    where: dict[Any, list[int]] = {}  # what runs once -> the openings that it answers
    for index, text in enumerate(openings):
        where.setdefault(text if top_k is None else (text, index), []).append(index)
    rows = sorted(where.values(), key=lambda found: len(openings[found[0]]))
    texts = [""] * len(openings)
    for start in range(0, len(rows), batch_rows):
        chunk = rows[start : start + batch_rows]
        begun = [openings[found[0]] for found in chunk]
        # A seed of its own for each batch, or equal openings of two batches would go on alike.
        drawn = (seed * 1_000_003 + start) % 2**63
        new = continue_texts(model, tokenizer, begun, new_tokens, top_k=top_k, seed=drawn)
        for found, begin, rest in zip(chunk, begun, new, strict=True):
            for index in found:
                texts[index] = begin + rest
        progress(sum(map(len, chunk)))
    return texts


def _measured(record: Record, texts: list[str], references: References | None) -> RecordGeneration:
    entropy = mean([n_gram_entropy(text) for text in texts])
    assert entropy is not None  # check_generations
    score = None if references is None else references.score(record, texts)
    return RecordGeneration(record.case_id, entropy, score, tuple(texts))


def _quiet(_done: int) -> None:
    """No progress is shown."""
