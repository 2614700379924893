"""How good an edit is: efficacy, paraphrase and neighbourhood success, and their harmonic mean."""

from fastmemit.metrics.score import NllPair, RecordScore, Scores, score_record, summarise

__all__ = ["NllPair", "RecordScore", "Scores", "score_record", "summarise"]
