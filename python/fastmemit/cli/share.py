"""Edits and statistics that travel: ``adapter export|import`` and ``hub push|pull``."""

from __future__ import annotations

import argparse

from fastmemit.cli.options import (
    check_free,
    check_writable,
    make_editor,
    quiet_libraries,
    statistics_found,
    verb,
    write_json,
)
from fastmemit.errors import BadConfig, counted

#: The ranks of adapters that vLLM can be started for; the first is its default.
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)


@verb(
    "adapter export",
    "--edit! --out! --model --base-model --trust-remote-code --own-ranks --rank",
    {
        "--edit": {"action": "store", "help": "a saved edit"},
        "--model": {"help": "whose configuration is read (default: the one on record)"},
    },
)
def _export(args: argparse.Namespace) -> None:
    r"""Write a saved edit as a LoRA adapter, to serve beside its model and to switch off.

    Examples:
      fastmemit adapter export --edit edit.safetensors --out adapter/
      fastmemit adapter export --edit edit.safetensors --model ./my-model --base-model me/my-model \
          --out adapter/
      fastmemit adapter export --edit edit.safetensors --rank 16 --out adapter/

    Then, in Python: peft.PeftModel.from_pretrained(model, "adapter/")
    """
    from fastmemit.delta import Delta
    from fastmemit.models import load_skeleton
    from fastmemit.sharing import compressed, save_adapter

    check_free(args.out)
    delta = Delta.load(args.edit)
    name = args.model or delta.provenance.get("model_name")
    if not isinstance(name, str):
        raise BadConfig(f"The edit {str(args.edit)!r} does not name its model; pass --model.")
    model = load_skeleton(name, trust_remote_code=args.trust_remote_code)
    if args.rank is not None:
        delta = compressed(delta, rank=args.rank)
    save_adapter(delta, model, args.out, base_model=args.base_model, pad=not args.own_ranks)
    rank = max(left.shape[1] for left, _ in delta.factors.values())
    lost = delta.provenance.get("compression") or {} if args.rank is not None else {}
    found = {"model": name, "out": args.out, "rank": rank, "weights": list(delta.factors), "compression": lost}
    write_json(args.json, found)
    print(f"adapter of rank {rank} on {len(delta.factors)} modules saved to {args.out}")
    for weight, done in lost.items():
        print(f"  {weight}: rank {done['from']} -> {done['to']}, {done['relative_error']:.1%} of the change lost")
    if rank > VLLM_RANKS[0]:
        enough = next((each for each in VLLM_RANKS if each >= rank), None)
        more = f"start it with --max-lora-rank {enough}, or " if enough is not None else ""
        print(f"vLLM refuses ranks above {VLLM_RANKS[0]} as it is: {more}export with --rank {VLLM_RANKS[0]}, with loss")


@verb("adapter import", "--adapter! --out! MODEL")
def _import(args: argparse.Namespace) -> None:
    """Write a LoRA adapter, our own or another's, as an edit file for apply and compose.

    Examples:
      fastmemit adapter import --model gpt2-xl --adapter adapter/ --out edit.safetensors
    """
    from fastmemit.sharing import load_adapter

    check_writable(args.out)
    editor = make_editor(args)
    delta = load_adapter(args.adapter, editor.model)
    delta.save(args.out)
    write_json(args.json, {"model": editor.name, "out": args.out, "weights": list(delta.factors)})
    print(f"adapter on {counted(len(delta.factors), 'weight')} of {editor.name} saved as {args.out}")


@verb(
    "hub push",
    "--repo! --edit --adapter --statistics --license --base-model --private --dry-run",
    {"--edit": {"action": "store", "help": "a saved edit"}},
)
def _push(args: argparse.Namespace) -> None:
    """Put a saved edit, an adapter or second moments on the hub, with a card that says what they are.

    Examples:
      fastmemit hub push --repo me/rome-edit --edit edit.safetensors --license apache-2.0
      fastmemit hub push --repo me/rome-edit --edit edit.safetensors --dry-run look/
      fastmemit hub push --repo me/rome-adapter --adapter adapter/ --base-model gpt2-xl
      fastmemit hub push --repo me/gpt2-xl-moments --statistics DIR --private

    --statistics takes the folder of the files that `fastmemit precompute` lists. --dry-run needs no
    network: it writes what would be pushed. Everything on record goes with an edit, its facts too.
    """
    from fastmemit.delta import Delta
    from fastmemit.sharing import push_adapter, push_edit, push_statistics

    given = [each for each in (args.edit, args.adapter, args.statistics) if each is not None]
    if len(given) != 1:
        raise BadConfig("Name what to push by one of --edit FILE, --adapter DIR and --statistics DIR.")
    check_free(args.dry_run)
    quiet_libraries()
    options = {"license": args.license, "base_model": args.base_model, "private": args.private, "dry_run": args.dry_run}
    if args.edit is not None:
        place = push_edit(Delta.load(args.edit), args.repo, **options)
    elif args.adapter is not None:
        place = push_adapter(args.adapter, args.repo, **options)
    else:
        place = push_statistics(args.statistics, args.repo, **options)
    what = given[0]
    write_json(args.json, {"what": what, "repo": args.repo, "pushed": args.dry_run is None, "place": str(place)})
    done = "pushed to" if args.dry_run is None else "would be pushed; it is in"
    print(f"{what} {done} {place}")


@verb("hub pull", "--repo! --revision --out --model= MODEL")
def _pull(args: argparse.Namespace) -> None:
    """Fetch an edit or second moments from the hub, verified.

    Examples:
      fastmemit hub pull --repo me/rome-edit --out edit.safetensors
      fastmemit hub pull --repo me/rome-edit --revision v1 --model gpt2-xl --out edit.safetensors
      fastmemit hub pull --repo me/gpt2-xl-moments

    With --out an edit is fetched, without it second moments, which go where edits of their model find
    them. With --model they are refused if they are not of this very model.
    """
    from fastmemit.models import tokenizer_fingerprint
    from fastmemit.sharing import pull_edit, pull_statistics

    check_writable(args.out)
    quiet_libraries()
    editor = make_editor(args) if args.model else None
    model = editor.fingerprint if editor is not None else None
    if args.out is not None:
        delta = pull_edit(args.repo, revision=args.revision, model=model)
        if editor is not None:
            delta.check(editor.model)
        delta.save(args.out)
        write_json(args.json, {"repo": args.repo, "out": args.out, "facts": delta.requests})
        print(f"edit with {counted(len(delta.requests), 'fact')} of {args.repo} saved to {args.out}")
        return
    tokenizer = tokenizer_fingerprint(editor.tokenizer) if editor is not None else None
    found = pull_statistics(args.repo, revision=args.revision, model=model, tokenizer=tokenizer, cache=args.cache)
    write_json(args.json, statistics_found(found, repo=args.repo))
    print(f"second moments of {counted(len(found.paths), 'layer')}: {found.describe()}")
    print(*(f"  {path}" for path in found.paths.values()), sep="\n")
