"""An edit beside its model: exported as a LoRA adapter, loaded by PEFT, on and off.

Needs peft (pip install '.[lora]'):

    python examples/serve_as_adapter.py
    python examples/serve_as_adapter.py --model EleutherAI/gpt-j-6b --corpus wikipedia --out tower-adapter

The adapter goes into tower-adapter/, which must not exist; --out names another folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fastmemit import Editor, EditRequest
from fastmemit.sharing import load_adapter


def main() -> None:
    """Plan an edit, export it, and let PEFT serve it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a hub name, a folder, or smollm2")
    parser.add_argument("--corpus", default="builtin", help="builtin, self, wikipedia or a file")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--out", default="tower-adapter", help="the adapter's folder")
    args = parser.parse_args()
    if Path(args.out).exists():
        parser.error(f"{args.out} exists already; name another folder by --out")
    from peft import PeftModel

    editor = Editor.from_pretrained(args.model, progress=True)
    print(editor.precompute(args.corpus, multiplier=10).describe())
    fact = EditRequest("{} is located in the city of", "The Eiffel Tower", " Rome")
    edit = editor.plan(fact, args.method)  # nothing is applied
    edit.save_adapter(args.out)

    # From here on only PEFT: a server needs the base model and this folder.
    model = PeftModel.from_pretrained(editor.model, args.out).eval()
    print(f"on:  {_answer(model, editor.tokenizer, fact)}")
    with model.disable_adapter():
        print(f"off: {_answer(model, editor.tokenizer, fact)}")

    same = load_adapter(args.out, model.unload()).digest() == edit.delta.digest()
    print(f"read back, it is {'the same edit' if same else 'another edit'}")


def _answer(model: Any, tokenizer: Any, fact: EditRequest) -> str:
    """What a model says next, and how probable the new answer's first token is to it."""
    inputs = tokenizer(fact.text, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = tokenizer(fact.target, add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        probability = model(**inputs).logits[0, -1].softmax(-1)[new].item()
    said = " ".join(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]).split())
    return f"{said!r}, P({fact.target.strip()}) = {probability:.6g}"


if __name__ == "__main__":
    main()
