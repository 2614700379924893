"""A thousand facts: batch upon batch into one model, each batch kept as a file.

A batch preserves the keys of the batches before it. A run that was killed finds its files, applies them and goes on;
facts are scored at the end, all of them, with paraphrases and neighbours.

    python examples/thousand_edits.py --facts counterfact.json --count 1000 --batch-size 100
    python examples/thousand_edits.py --model EleutherAI/gpt-j-6b --facts counterfact --corpus wikipedia

Applied files bring no keys: after a restart the batches that were read from files are in the weights, but the later
ones do not preserve their keys.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from fastmemit import Editor
from fastmemit.data import batches, builtin_facts, load_records
from fastmemit.evaluation import score_records
from fastmemit.evaluation.scores import summarise
from fastmemit.methods import PreservedKeys


def main() -> None:
    """Edit in batches, then score everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a hub name, a folder, or smollm2")
    parser.add_argument("--facts", help="a CounterFact file, or counterfact (default: 24 of ours)")
    parser.add_argument("--count", type=int, default=1000, help="facts, as far as there are any")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--corpus", default="builtin", help="builtin, self, wikipedia or a file")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--out", type=Path, default=Path("thousand-edits"), help="of the files")
    args = parser.parse_args()

    records = load_records(args.facts) if args.facts else builtin_facts()
    chosen = batches(records, args.batch_size, seed=0)  # one record per subject, in a fixed order
    chosen = chosen[: -(-args.count // args.batch_size)]

    editor = Editor.from_pretrained(args.model, progress=True)
    print(editor.precompute(args.corpus, multiplier=10).describe())
    facts = [record for batch in chosen for record in batch]
    unedited = score_records(editor.adapter, editor.tokenizer, facts)

    editor.contexts(args.method)  # the unedited model writes them, so before a file is applied
    preserved = PreservedKeys()
    for number, batch in enumerate(chosen):
        requests = [record.request for record in batch]
        path = args.out / f"batch-{number:04}.safetensors"
        if path.exists():
            edit = editor.load(path)
            if edit.delta.requests != [asdict(request) for request in requests]:
                raise SystemExit(f"{path} holds other facts than this run's; name another --out.")
            edit.apply()
            print(f"batch {number + 1} of {len(chosen)}: read from {path}")
            continue
        edit = editor.edit(requests, args.method, preserved=preserved, verify=False)
        edit.save(path)
        print(f"batch {number + 1} of {len(chosen)}: {len(batch)} facts written, kept in {path}")

    edited = score_records(editor.adapter, editor.tokenizer, facts)
    for name, scores in (("before", unedited), ("after", edited)):
        shown = summarise(scores)
        found = {k.upper(): shown[k] for k in ("es", "ps", "ns", "s") if shown[k] is not None}
        print(f"{name}: {'  '.join(f'{k} {value:.1f}' for k, value in found.items())}")


if __name__ == "__main__":
    main()
