from __future__ import annotations

import importlib.metadata
import types

import torch

from fastcov import machine as module
from fastcov.machine import this_machine, versions


def test_the_machine_names_its_processor_and_no_gpu_on_a_cpu():
    found = this_machine(torch.device("cpu"))
    assert found.cpu and found.cores >= 1
    assert (found.gpu, found.driver, found.capability) == (None, None, None)


def test_flags_and_name_are_read_from_what_linux_says(monkeypatch, tmp_path):
    text = "processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: sse avx2 fma avx512f\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(module, "Path", lambda name: tmp_path / "cpuinfo")
    found = this_machine(torch.device("cpu"))
    assert (found.cpu, found.isa) == ("Some CPU @ 2 GHz", ("avx2", "fma", "avx512f"))


def test_a_gpu_is_named_with_its_driver_and_capability(monkeypatch):
    properties = types.SimpleNamespace(name="GPU X", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(module, "_driver", lambda: "570.1")
    found = this_machine(torch.device("cuda"))
    assert (found.gpu, found.driver, found.capability, found.gpu_memory_gib) == ("GPU X", "570.1", "9.0", 80.0)


def test_the_native_module_tells_how_it_was_built(monkeypatch):
    native = types.SimpleNamespace(build=lambda: {"compiler": "gcc 12", "cuda": None})
    monkeypatch.setattr(module, "native", lambda: native)
    assert versions()["native"] == "compiler gcc 12, cuda None"
    monkeypatch.setattr(module, "native", lambda: None)
    assert versions()["native"] == "absent"


def test_where_the_package_is_not_installed_its_version_is_that_of_the_source(monkeypatch):
    installed = versions()["fastmemit"]

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert module._own() == installed and module.version("triton") == "absent"
