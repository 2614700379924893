"""Scores before and after: ``evaluate`` on benchmark records, and ``demo``, the whole way on a real model."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastmemit.cli.options import (
    check_writable,
    chosen_settings,
    ensure_statistics,
    make_editor,
    read_text,
    verb,
    write_json,
)
from fastmemit.cli.terminal import MEANING, SCORES, show_changes, show_table
from fastmemit.errors import BadConfig, BadData, FastmemitError, counted

if TYPE_CHECKING:
    from fastmemit.data import Record
    from fastmemit.evaluation.perplexity import PerplexityText
    from fastmemit.evaluation.scores import RecordScore
    from fastmemit.experiments.intervals import Estimate

# What each metric shows, CounterFact's; zsRE has its accuracies. No score stands without the exact
# matches: a coin has an S of 50.
COLUMNS = {
    "score": SCORES,
    "magnitude": ("em", "pm", "nm"),
    "accuracy": ("ea", "pa", "na"),
    "attributes": ("as",),
    "generation": ("ge", "rs"),
}
ZSRE_COLUMNS = ("ea", "pa", "na", "a", "ew", "pw", "nw")
ZSRE_MEANING = """\
EA, PA, NA: the share of the answer's tokens that the model says, each after those before it, for
the question, in other words, and for an unrelated one. A: their harmonic mean. EW, PW, NW: the
share of whole answers that it says. In percent; in brackets the 95 % interval over records, paired
in "change"."""
FOLLOWS = """\
In percent of the questions that count, those whose conditions the unedited model answers: greedy
decoding gives one of the answers, or one of their other names."""
SHOWN = 4  # continuations that the demo prints
PROSE = 1024  # tokens that the demo measures perplexity on


@verb(
    "evaluate",
    "--facts! --skip-malformed --cases --chat --batch-size --num-batches --metrics=score --text --text-tokens=4096 "
    "--text-batches --references MODEL METHOD CORPUS",
    {
        "--batch-size": {"default": None, "help": "records edited together (default: 16; of own facts all)"},
        "--num-batches": {"default": None, "help": "how many batches (default: 4; of own facts as many as there are)"},
    },
)
def _evaluate(args: argparse.Namespace) -> None:
    r"""Edit and score facts of your own, CounterFact or zsRE records; each batch on the unedited model.

    Examples:
      fastmemit evaluate --model smollm2 --facts mine.jsonl
      fastmemit evaluate --model smollm2 --method emmet --facts counterfact.json --batch-size 16 \
          --num-batches 4 --multiplier 10 --json out.json
      fastmemit evaluate --model gpt2-xl --method rome --facts counterfact --batch-size 1 \
          --num-batches 100
      fastmemit evaluate --model gpt2-xl --facts zsre:zsre_mend_eval.json
      fastmemit evaluate --model gpt2-xl --facts mquake --batch-size 1 --num-batches 50
      fastmemit evaluate --model smollm2 --facts counterfact.json \
          --metrics score,magnitude,generation --references texts.jsonl
      fastmemit evaluate --model smollm2 --facts counterfact.json --text text.txt

    A line of your own facts, as `fastmemit edit` takes it, with prompts to score:
      {"prompt": "{} is located in the city of", "subject": "Eiffel Tower", "target_new": "Rome",
       "paraphrases": ["To see the {}, go to"], "neighbours": ["The Louvre is located in the city of"]}
    """
    from fastmemit.data import batches, load_records
    from fastmemit.data.reading import check_file
    from fastmemit.data.records import is_open, is_zsre, listed_records, load_zsre
    from fastmemit.evaluation import evaluate, load_references, measure_answers
    from fastmemit.evaluation.runner import Measures, chat_record

    overrides = chosen_settings(args)
    zsre = is_zsre(args.facts)
    if zsre and tuple(args.metrics) != ("score",):
        raise BadConfig("zsRE has metrics of its own, which are always shown; leave out --metrics.")
    if zsre and args.chat:
        raise BadConfig("zsRE's unrelated questions have a form of their own; leave out --chat.")
    references = None if args.references is None else load_references(args.references)
    measures = Measures.of(args.metrics, references)
    records: list[Any]  # of one kind
    if zsre:
        records = load_zsre(args.facts, skip_malformed=args.skip_malformed)
    else:
        records = load_records(args.facts, skip_malformed=args.skip_malformed, own=True)
    if args.cases is not None:
        records = listed_records(records, args.cases)
    unknown = not zsre and any(is_open(record) for record in records)
    own = unknown and not any(record.probes for record in records)
    size, number = (len(records), None) if own else (16, 4)
    size = size if args.batch_size is None else args.batch_size
    number = number if args.num_batches is None else args.num_batches
    chosen = batches(records, size, number, seed=None if args.cases else args.seed)
    measures.check([record for batch in chosen for record in batch])
    if args.text is not None:
        check_file(args.text, BadData)
    editor = make_editor(args)
    text = read_text(args, editor)
    ensure_statistics(editor, editor.config(args.method, **overrides), args)
    if args.chat:
        chosen = [[chat_record(editor.tokenizer, record) for record in batch] for batch in chosen]
    if unknown:
        chosen = [measure_answers(editor, batch) for batch in chosen]
    result = evaluate(
        editor,
        chosen,
        args.method,
        overrides,
        metrics=args.metrics,
        references=references,
        text=text,
        perplexity_batches=args.text_batches,
        progress=not args.quiet,
    )
    write_json(args.json, result)
    count = sum(map(len, chosen))
    print(f"{editor.name}, {args.method}, {counted(count, 'record')} in {counted(len(chosen), 'batch', 'batches')}")
    names = ZSRE_COLUMNS if zsre else [name for m in args.metrics for name in COLUMNS[m]]
    show_changes(_changes(result, list(dict.fromkeys(names))))
    print(ZSRE_MEANING if zsre else MEANING)
    if result["portability"]:
        rows = [["what follows", "questions", "counted", "before", "after"]]
        for kind, found in result["portability"].items():
            shares = ["-" if found[when] is None else f"{found[when]:.1f}" for when in ("before", "after")]
            rows.append([kind, f"{found['questions']:,}", f"{found['counted']:,}", *shares])
        show_table(rows)
        print(FOLLOWS)
    if own:
        _show_own([record for batch in chosen for record in batch], result["records"])
    print(" ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items()))


def _show_own(records: Sequence[Record], found: Sequence[Mapping[str, Any]]) -> None:
    """A line for each fact: whether it is what the model says, and how many paraphrases and neighbours are right."""
    from fastmemit.answers import one_line

    print("by line of the file, what the edited model says (and the answer before the edit):")
    for record, scores in sorted(zip(records, found, strict=True), key=lambda pair: pair[0].case_id):
        after, request = scores["after"], record.request
        parts = ["said" if after["ea"] else "NOT said"]
        for name, prompts, share in (
            ("paraphrases that say it", record.paraphrases, after["pa"]),
            ("neighbours that keep theirs", record.neighbourhood, after["na"]),
        ):
            if prompts:
                parts.append(f"{name}: {round(share * len(prompts))} of {len(prompts)}")
        fact = f"{one_line(request.text + request.target, end=True)} (before: {one_line(str(request.target_true))})"
        print(f"  {record.case_id:>4}  {fact}: {', '.join(parts)}")


def _changes(result: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Estimate | float | None]]:
    """What is shown: before, after and the paired change of every score, for `show_changes`.

    Intervals are made of the records' values.
    """
    from fastmemit.experiments.intervals import difference_intervals, score_intervals

    records, perplexity = result["records"], result["perplexity"]
    before, after = ({**score_intervals(records, when=when, names=names)} for when in ("before", "after"))
    change: dict[str, Any] = {**difference_intervals(records, records, whens=("after", "before"), names=names)}
    if perplexity is not None:
        before["perplexity"], after["perplexity"] = perplexity["before"], perplexity["after"]
        change["perplexity"] = perplexity["after"] - perplexity["before"]
    return {"before": before, "after": after, "change": change}


@verb("demo", "--corpus=builtin --multiplier=10 --out=fastmemit-demo.safetensors --html --model=smollm2 MODEL METHOD")
def _demo(args: argparse.Namespace) -> None:
    """Edit two dozen facts of SmolLM2-135M, score, save and undo; no network is needed.

    Examples:
      fastmemit demo
      fastmemit demo --method emmet --corpus self
      fastmemit demo --html page.html
      fastmemit demo --set optimiser=adam

    Target vectors are made by rotate, in a fraction of the published rule's time;
    the last example chooses that one.
    """
    import torch

    from fastcov.files import atomic_file
    from fastmemit.answers import compare, verdict
    from fastmemit.data import builtin_facts
    from fastmemit.display import bar
    from fastmemit.evaluation.changes import Observer, page, watched_facts
    from fastmemit.evaluation.perplexity import before_and_after, edited_nll, perplexity
    from fastmemit.evaluation.scores import count_questions, score_records
    from fastmemit.methods.config import CONFIGS, TargetConfig

    begun = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - begun:6.1f} s] {line}", flush=True)

    check_writable(args.out, args.html)
    overrides = chosen_settings(args)
    editor = make_editor(args)
    width = editor.adapter.d_k(editor.adapter.layers[0])
    say(f"loaded {editor.name}: {editor.adapter.n_layers} blocks, keys of width {width}")
    weights = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    if args.config is None and "v_lr" not in overrides and issubclass(CONFIGS[args.method], TargetConfig):
        overrides = {"optimiser": "rotate", **overrides}
    config = editor.config(args.method, **overrides)
    if config.needs_statistics:
        collected = editor.precompute(args.corpus, multiplier=args.multiplier, method=config)
        say(f"second moments of layers {', '.join(map(str, config.layers))}: {collected.describe()}")

    facts = builtin_facts()
    requests = [fact.request for fact in facts]
    prompts = [fact.generations[0] for fact in facts[:SHOWN] if fact.generations]
    text = _prose(editor.tokenizer)

    def score(what: str) -> list[RecordScore]:
        with bar(what, count_questions(facts), not args.quiet) as advance:
            return score_records(editor.adapter, editor.tokenizer, facts, progress=advance)

    before = score("unedited scores")
    spoke = perplexity(editor.adapter, text)
    answered = editor.ask(requests)
    said = editor.generate(prompts)
    # All paraphrases and neighbours of all facts would be a page that nobody reads to its end.
    few = [replace(f, paraphrases=f.paraphrases[:1], neighbourhood=f.neighbourhood[:1]) for f in facts]
    observer = Observer(editor, watched_facts(editor.tokenizer, few if args.html is not None else []))
    say(f"scored the unedited model on {counted(len(facts), 'fact')}")
    edit = editor.edit(requests, args.method, verify=False, **overrides)
    edit.save(args.out)  # before anything that may fail
    how = f", target vectors by {config.optimiser}" if isinstance(config, TargetConfig) else ""
    say(f"edited all of them at once by {args.method}{how}")
    after = score("edited scores")
    cost = before_and_after(spoke, [edited_nll(editor.adapter, text)])
    says = editor.generate(prompts)
    outcomes = compare(requests, answered, editor.ask(requests))
    if args.html is not None:
        with atomic_file(args.html) as file:
            file.write(page(editor.name, args.method, observer.changes()).encode())
    say("scored the edited model")

    records = [
        {"case_id": old.case_id, "before": old.shares(), "after": new.shares()}
        for old, new in zip(before, after, strict=True)
    ]
    columns = _changes({"before": {}, "after": {}, "records": records, "perplexity": cost}, SCORES)
    continued = [
        {"prompt": prompt, "before": old, "after": new} for prompt, old, new in zip(prompts, said, says, strict=True)
    ]
    found = {"model": editor.name, "method": args.method, "out": args.out, "facts": outcomes}
    write_json(args.json, {**found, "scores": columns, "prompts": continued})
    print(f"\n{verdict(outcomes)}\n")
    show_changes(columns)
    print(MEANING)
    print(f"Perplexity is that of {len(text.ids):,} tokens of the built-in prose: lower is better.")
    for fact, prompt, old, new in zip(facts, prompts, said, says, strict=False):
        print(f"\n{prompt}   [{fact.request.target_true} -> {fact.request.target.strip()}]")
        print(f"  before: {' '.join(old.split())}\n  after:  {' '.join(new.split())}")
    print()
    say(f"saved the edit as {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
    if args.html is not None:
        say(f"wrote the page {args.html}")
    edit.undo()
    now = editor.model.state_dict()
    changed = [n for n, tensor in weights.items() if not torch.equal(tensor, now[n])]
    if changed:
        raise FastmemitError(f"The undo left {counted(len(changed), 'weight')} changed, {changed[0]} first.")
    say(f"undone: all {len(weights)} tensors are bit for bit the original")
    print(_next_steps(args))


def _prose(tokenizer: Any) -> PerplexityText:
    """The end of the built-in prose, as running text."""
    from fastmemit.data import load_corpus
    from fastmemit.evaluation.perplexity import PerplexityText
    from fastmemit.text import encode

    corpus = load_corpus("builtin")
    prose = "\n\n".join(corpus.documents())
    ids = tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"]
    lead = encode(tokenizer, "").ids
    return PerplexityText("builtin", corpus.fingerprint, tuple(ids[-PROSE:]), lead)


def _next_steps(args: argparse.Namespace) -> str:
    """Commands that can be typed as they stand, with the edit that lies there now."""
    command = "fastmemit"
    if shutil.which(command) is None:  # as after `make demo`, whose environment is not active
        command = f"{os.path.relpath(sys.executable)} -m fastmemit"
    place = f" --model {shlex.quote(args.model)}"
    if args.cache is not None:
        place += f" --cache {shlex.quote(str(args.cache))}"
    return f"""
Next, with the edit in {args.out}, and with a fact of your own:
  {command} apply{place} --edit {shlex.quote(str(args.out))} \\
      --prompt "If you want to see the Eiffel Tower, travel to"
  {command} edit{place} --corpus builtin --out mine.safetensors \\
      --prompt "{{}} was written by" --subject "Moby-Dick" --target "Jane Austen"
"""
