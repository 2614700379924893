"""`python -m fastcov.bench`: times the numerics against what others would run, in one process.

Every figure is checked against float64 before it is timed. `fastcov.bench.report` describes the files that ``--json``
writes; docs/results/performance.md has the recorded ones.
"""
