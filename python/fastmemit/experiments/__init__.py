"""The paper's experiments: sweeps over multipliers, methods and batch sizes, and their report."""
