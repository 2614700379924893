"""A first edit: one fact, its answer before and after, the edit as a file, and undone.

Run it on the small model, or on another with text from the hub:

    python examples/first_edit.py
    python examples/first_edit.py --model gpt2-xl --corpus wikipedia

The edit goes into tower.safetensors; --out names another file.
"""

from __future__ import annotations

import argparse

from fastmemit import Editor, EditRequest


def main() -> None:
    """Edit, ask, save, undo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a hub name, a folder, or smollm2")
    parser.add_argument("--corpus", default="builtin", help="builtin, self, wikipedia or a file")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--out", default="tower.safetensors", help="the edit's file")
    args = parser.parse_args()

    editor = Editor.from_pretrained(args.model, progress=True)
    # The second moment of the keys, of all layers that the methods edit: once per model, then kept.
    print(editor.precompute(args.corpus, multiplier=10).describe())

    fact = EditRequest("{} is located in the city of", "The Eiffel Tower", " Rome")
    # The fact itself, the same in other words, and one that must stay as it is.
    prompts = [fact.text, "To see the Eiffel Tower, you have to go to", "The Louvre is in"]
    before = editor.generate(prompts, new_tokens=8)
    edit = editor.edit([fact], args.method)
    after = editor.generate(prompts, new_tokens=8)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"{prompt}\n  before: {' '.join(old.split())}\n  after:  {' '.join(new.split())}")

    edit.save(args.out)
    edit.undo()  # the weights have their bits back
    print(f"undone; the edit is kept in {args.out}")

    editor.load(args.out).apply()  # later, or elsewhere
    print(f"applied again from the file: {editor.generate([fact.text], new_tokens=8)[0]!r}")


if __name__ == "__main__":
    main()
