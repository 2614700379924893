"""The entry of `python -m fastcov.bench`."""

from fastcov.bench.command import main

if __name__ == "__main__":
    raise SystemExit(main())
