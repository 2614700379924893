"""`make gpu-check` by its file name; see fastcov/bench/gpu_check.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcov.bench.gpu_check import main

if __name__ == "__main__":
    raise SystemExit(main())
