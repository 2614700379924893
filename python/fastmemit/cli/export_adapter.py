"""``fastmemit export-adapter``: a saved edit as a LoRA adapter that PEFT loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmemit.cli.options import check_free
from fastmemit.errors import BadConfig

HELP = "Write a saved edit as a LoRA adapter, to serve beside its model and to switch off."
EPILOG = """examples:
  fastmemit export-adapter --edit edit.safetensors --out adapter/
  fastmemit export-adapter --edit edit.safetensors --model ./my-model --base-model me/my-model \\
      --out adapter/

Then, in Python: peft.PeftModel.from_pretrained(model, "adapter/")
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    verb.add_argument("--edit", type=Path, required=True, metavar="FILE", help="a saved edit")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    verb.add_argument(
        "--model",
        help="the model that it is of, as a name on the hub or a folder; only its configuration is "
        "read (default: the model's name in the edit)",
    )
    verb.add_argument(
        "--base-model",
        metavar="NAME",
        help="what the adapter calls its base model (default: the model's name in the edit)",
    )
    verb.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    verb.add_argument(
        "--own-ranks", action="store_true", help="give each module its own rank by PEFT's patterns, and pad none"
    )


def run(args: argparse.Namespace) -> None:
    """Write the adapter's two files."""
    from fastmemit.delta import Delta
    from fastmemit.models import load_skeleton
    from fastmemit.sharing import save_adapter

    check_free(args.out)
    delta = Delta.load(args.edit)
    name = args.model or delta.provenance.get("model_name")
    if not isinstance(name, str):
        raise BadConfig(f"The edit {str(args.edit)!r} does not name its model; pass --model.")
    model = load_skeleton(name, trust_remote_code=args.trust_remote_code)
    save_adapter(delta, model, args.out, base_model=args.base_model, pad=not args.own_ranks)
    rank = max(left.shape[1] for left, _ in delta.factors.values())
    print(f"adapter of rank {rank} on {len(delta.factors)} modules saved to {args.out}")
