"""What a benchmark writes says how it came about, and holds no path of the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def alternating(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import alternating

    return alternating


def test_result_file(tmp_path):
    pytest.importorskip("diffusers")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("FUSEWIRE_", "ONEDNN_"))}  # these would stand in the command
    subprocess.run([sys.executable, ROOT / "benchmarks" / "test_sampler_step.py", "--rounds", "1", "--json", tmp_path / "new" / "step.json"],
                   env=plain | {"PYTHONPATH": path}, check=True, capture_output=True, timeout=200)
    text = (tmp_path / "new" / "step.json").read_text()
    found = json.loads(text)
    assert found["command"] == "python benchmarks/test_sampler_step.py --rounds 1 --json step.json" and str(tmp_path) not in text
    assert torch.__version__.startswith(found["machine"]["versions"]["torch"]) and "diffusers" in found["machine"]["versions"]
    assert found["machine"]["processor"] and found["machine"]["threads"] >= 1 and found["machine"]["python"] and "fusewire_isa" in found["machine"]
    assert len(found["date"]) == 10 and found["unit"] == "microseconds"
    assert len(found["rows"]) == 6 and all(row["exact"] > 0 and row["backend"] in ("cpu", "reference") for row in found["rows"])


@pytest.mark.slow  # three processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_each_side_in_a_process_of_its_own(tmp_path):
    """Counted and resident memory are of one kind: a tiny model's call needs next to none of either beside what the process keeps."""
    pytest.importorskip("diffusers")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, ROOT / "benchmarks" / "memory.py", "--target", "dit-tiny:bfloat16:1", "--processes", "1", "--json", tmp_path / "memory.json"],
                   env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True, timeout=400)
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["unit"] == "MiB" and [row["side"] for row in found["rows"]] == ["eager", "exact", "close"]
    for row in found["rows"]:
        assert len(row["tensors"]) == 2 and row["tensors"][0] == row["tensors"][1] > 0 and len(row["resident in a call"]) == 3
        assert max(row["resident in a call"]) < 2 and row["kept tensors, bytes"] < 1000
        assert row["peak"] == pytest.approx(row["weights"] + row["tensors"][0] + row["scratch"], abs=0.01)


def test_turns(alternating):
    order = []
    times = alternating.samples({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=20, inner=2, warm=1)
    rounds = ["".join(order[i:i + 4]) for i in range(0, len(order), 4)]
    assert len(rounds) == 21 and set(rounds) == {"aabb", "bbaa"} and all(len(taken) == 20 for taken in times.values())


def test_a_row_is_about_one_backend(alternating):
    from fusewire import ops
    from fusewire.kernels.dispatch import forced

    x = torch.randn(1, 4, 8)
    with pytest.raises(RuntimeError, match="gate_residual was served by no backend"):
        alternating.served("gate_residual")
    with forced("reference"):
        ops.gate_residual(x, x, x)
    assert alternating.served("gate_residual") == "reference"


def test_command_names_the_checkout_s_files_from_its_root(alternating, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/sd3_block.py", "--json", str(ROOT / "benchmarks" / "results" / "a b.json"), "--sides", "eager"])
    for name in alternating.ISA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert alternating.command() == "python benchmarks/sd3_block.py --json 'benchmarks/results/a b.json' --sides eager"
    monkeypatch.setenv("FUSEWIRE_CPU_ISA", "avx2")
    assert alternating.command().startswith("FUSEWIRE_CPU_ISA=avx2 python benchmarks/sd3_block.py")
