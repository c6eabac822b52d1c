"""``fusewire doctor``: what it says is true, and a library that computes wrongly is found."""

import json
import re
from pathlib import Path

import pytest
import torch

from fusewire import doctor
from fusewire.kernels.library import CPU
from tests.cli.runner import run
from tests.spoil import spoil

ROOT = Path(__file__).parents[2]


def test_table_and_json():
    shown, data = run("doctor"), run("doctor", "--json")
    assert shown.exit_code == data.exit_code == 0
    found = json.loads(data.stdout)
    assert [row["backend"] for row in found["backends"]] == ["reference", "cpu", "triton", "cuda"]
    assert all(row["backend"] in shown.stdout for row in found["backends"])
    assert torch.__version__.startswith(found["machine"]["versions"]["torch"])


def test_every_backend_that_is_not_ready_says_why_and_what_would_help():
    for row in doctor.diagnose().backends:
        assert row.state and (row.ready or row.fix)


def test_the_cpu_library_is_reported_as_it_is():
    row = doctor.diagnose().backends[1]
    assert row.ready is CPU.loaded
    assert ("ISA level" in row.state) is CPU.loaded


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(CPU, "loaded", False)
    monkeypatch.setattr(CPU, "reason", "libfusewire_cpu.so was not built")
    found = doctor.diagnose()
    assert found.ok and not found.backends[1].ready and "make lib" in found.backends[1].fix


def test_a_library_that_computes_wrongly_is_broken(monkeypatch):
    spoil(monkeypatch, "adaln_modulate", lambda out: out + 1e-3)
    monkeypatch.setattr(CPU, "loaded", True)
    monkeypatch.setattr(doctor, "cpu_isa", lambda: "avx2")
    found = doctor.diagnose()
    assert not found.ok and found.backends[1].state.startswith("broken")
    assert run("doctor").exit_code == 1


@pytest.mark.parametrize("version, remark", [("2.9.1", "older than >=2.10"), ("2.10.0+cpu", ""), ("2.13.5", ""), ("2.14.0", "newer than tested"),
                                             ("", "not installed")])
def test_versions(monkeypatch, version, remark):
    monkeypatch.setattr(doctor, "version_of", lambda name: version)
    found = doctor._package("torch").remark
    assert found.startswith(remark) and bool(found) is bool(remark)


@pytest.mark.skipif(not (ROOT / "constraints.txt").is_file(), reason="not in a checkout")
def test_versions_are_those_of_the_project():
    pins = (ROOT / "constraints.txt").read_text()
    asked = (ROOT / "pyproject.toml").read_text()
    for name, (wanted, tested, _) in doctor.SUPPORTED.items():
        assert re.search(rf"^{name}=={re.escape(tested)}(;|$)", pins, re.M), name
        assert f'"{name}{wanted}"' in asked, name
