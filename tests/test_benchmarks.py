"""Every script in benchmarks/ says what it does, whatever is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each script printed and how it ended; each in a fork of one process that has torch."""
    out = tmp_path_factory.mktemp("helps")
    program = (
        "import os, runpy, sys, torch\n"
        "out, *scripts = sys.argv[1:]\n"
        "for script in scripts:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        name = os.path.basename(script)\n"
        "        both = os.open(os.path.join(out, name), os.O_WRONLY | os.O_CREAT)\n"
        "        os.dup2(both, 1); os.dup2(both, 2)\n"
        "        sys.argv, sys.path[0] = [script, '--help'], os.path.dirname(script)\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "        os._exit(99)  # --help has ended no script\n"
        "    with open(os.path.join(out, os.path.basename(script)) + '.code', 'w') as file:\n"
        "        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))\n"
    )
    subprocess.run([sys.executable, "-c", program, out, *SCRIPTS], check=True, timeout=600)
    return out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process cannot be forked here")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_shows_its_help(helps: Path, script: Path) -> None:
    said = (helps / script.name).read_text()
    assert (helps / f"{script.name}.code").read_text() == "0", said
    assert said.startswith("usage: ") and script.name in said.partition("\n")[0]
