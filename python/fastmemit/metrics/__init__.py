"""How good an edit is, as pure functions of what a model said.

`score`: CounterFact's success scores, magnitudes and exact-match accuracies; `accuracy`: zsRE's accuracies per token;
`generation`: the entropy of free text and its likeness to reference texts.
"""

from fastmemit.metrics.accuracy import Accuracies, RecordAccuracy, accuracy_record, summarise_accuracy
from fastmemit.metrics.generation import (
    Generation,
    RecordGeneration,
    TextLikeness,
    n_gram_entropy,
    summarise_generation,
)
from fastmemit.metrics.means import harmonic_mean
from fastmemit.metrics.score import Exact, NllPair, RecordScore, Scores, score_record, summarise

__all__ = [
    "Accuracies",
    "Exact",
    "Generation",
    "NllPair",
    "RecordAccuracy",
    "RecordGeneration",
    "RecordScore",
    "Scores",
    "TextLikeness",
    "accuracy_record",
    "harmonic_mean",
    "n_gram_entropy",
    "score_record",
    "summarise",
    "summarise_accuracy",
    "summarise_generation",
]
