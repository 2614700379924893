"""Reference texts for `fastmemit evaluate --references`: paragraphs of a corpus that name each record's new answer.

    python benchmarks/references.py --data counterfact_1400.json --corpus articles.jsonl --out references.jsonl \
        --cases cases.txt

Of each answer the --each paragraphs of 40 to 300 words that name it most often for the root of their length. --cases
gets the first --records records, in the order of `fastmemit.data.batches(records, 1, seed=0)` from --start on, whose
answer has --least of them or more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    sys.path.insert(0, str(folder))

from fastmemit.data import batches, load_corpus, load_records  # noqa: E402


def about(answer: str, paragraphs: Sequence[str], each: int) -> list[str]:
    """The paragraphs that name an answer most often for the root of their length, at most so many."""
    named = re.compile(rf"\b{re.escape(answer)}\b")
    found = [(len(named.findall(text)) / len(text.split()) ** 0.5, text) for text in paragraphs]
    return [text for score, text in sorted(found, key=lambda pair: -pair[0])[:each] if score]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="CounterFact")
    parser.add_argument("--corpus", required=True, help="articles")
    parser.add_argument("--out", type=Path, required=True, help="the references, JSONL")
    parser.add_argument("--cases", type=Path, help="write the chosen records' case_ids here")
    parser.add_argument("--start", type=int, default=128)
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--each", type=int, default=5)
    parser.add_argument("--least", type=int, default=3)
    args = parser.parse_args()
    documents = load_corpus(args.corpus).documents(seed=0)
    paragraphs = [
        text for document in documents for text in re.split(r"\n+", document) if 40 <= len(text.split()) <= 300
    ]
    references: dict[tuple[str | None, str], list[str]] = {}
    cases = []
    for (record,) in batches(load_records(args.data), 1, seed=0)[args.start :]:
        key = (record.relation_id, record.request.target_new)
        if key not in references:
            references[key] = about(record.request.target_new, paragraphs, args.each)
        if len(references[key]) >= args.least:
            cases.append(record.case_id)
    with args.out.open("w", encoding="utf-8") as file:
        for (relation, answer), texts in references.items():
            for text in texts:
                file.write(json.dumps({"relation_id": relation, "target_new": answer, "text": text}) + "\n")
    if args.cases:
        args.cases.write_text("".join(f"{case}\n" for case in cases[: args.records]), encoding="utf-8")
    print(f"{sum(map(len, references.values()))} texts of {len(references)} answers; {len(cases)} records have enough")


if __name__ == "__main__":
    main()
