"""Kernels that tests offer in place of the real ones."""

from __future__ import annotations

from fastcov import ops


def offer(monkeypatch, *kernels, devices=("cpu", "meta")):
    """These kernels in their order, and behind them the reference, are all that there are on these devices."""
    offered = {kernel.name: kernel for kernel in (*kernels, ops.KERNELS["reference"])}
    monkeypatch.setattr(ops, "KERNELS", offered)
    monkeypatch.setattr(ops, "ORDER", dict.fromkeys(devices, tuple(offered)))
    monkeypatch.setattr(ops, "_chosen", {})
