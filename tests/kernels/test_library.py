"""A compiled library that is older than the sources, cut short, or no library at all: said once, never counted as ``cpu``, never an ImportError."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusewire.kernels import dispatch, library
from fusewire.kernels.library import CPU

ROOT = Path(__file__).parents[2]
needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
HERE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from fusewire import doctor, ops
    from fusewire.kernels.library import CPU
ours = [str(w.message) for w in caught if "library" in str(w.message) and "fusewire" in str(w.message)]
x, row = torch.randn(1, 5, 64), torch.randn(1, 64)
step = ops.sampler_step(x, x, ops.flow_euler_table(torch.tensor([1.0, 0.5, 0.0])), 0)
gated = torch.ops.fusewire.gate_residual(x, x, row[:, None], True)
ops.adaln_modulate(x, row, row), ops.gate_residual(x, x, row)
assert torch.equal(step, x - 0.5 * x) and torch.equal(gated, x + row[:, None] * x)
found = doctor.diagnose()
print(json.dumps(dict(warnings=ours, loaded=CPU.loaded, stale=CPU.stale, stats=ops.stats(), ok=found.ok, cpu=vars(found.backends[1]))))
"""


def started(folder) -> dict:
    """What a fresh process says that takes its compiled library from ``folder``."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", HERE], env=os.environ | {"FUSEWIRE_LIB": str(folder), "PYTHONPATH": path, "FUSEWIRE_NATIVE": "1"},
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def served(found: dict, op: str) -> list[str]:
    return [backend for backend, calls in found["stats"][op].items() if calls]


def copied(folder: Path, change=lambda binary: binary, schemas=None) -> Path:
    (folder / CPU.path.name).write_bytes(change(CPU.path.read_bytes()))
    if schemas is not None:
        (folder / CPU.path.with_suffix(".json").name).write_text(json.dumps(schemas))
    return folder


@needs_library
def test_an_op_is_lacking(tmp_path):
    """The name under which the library registers one kernel is made another, as in a library from before that op."""
    def older(binary):
        assert binary.count(b"\0flow_euler_step\0") == 1
        return binary.replace(b"\0flow_euler_step\0", b"\0flow_euler_olds\0")

    found = started(copied(tmp_path, older))
    reason = "the compiled library lacks fusewire::flow_euler_step: it is older than these sources; run `make lib`"
    assert found["loaded"] and found["stale"] == {"flow_euler_step": reason}
    assert len(found["warnings"]) == 1 and found["warnings"][0].startswith(reason)
    assert served(found, "flow_euler_step") == ["reference"] and served(found, "adaln_modulate") == ["cpu"]
    assert not found["ok"] and not found["cpu"]["ready"] and reason in found["cpu"]["state"]
    with_kernels = sum(any(row.name == "cpu" for row in table.rows) for table in dispatch.TABLES.values())
    assert found["cpu"]["ops"] == f"{with_kernels - 1} of {len(dispatch.TABLES)}"


@needs_library
def test_a_schema_has_changed(tmp_path):
    """Not even ``torch.ops`` reaches a kernel that was compiled for other arguments."""
    schemas = {"gate_residual": "gate_residual(Tensor x, Tensor gate) -> Tensor", "adaln_modulate": library._DEFINED["adaln_modulate"][0]}
    found = started(copied(tmp_path, schemas=schemas))
    assert list(found["stale"]) == ["gate_residual"] and "has another schema for fusewire::gate_residual" in found["warnings"][0]
    assert len(found["warnings"]) == 1
    assert served(found, "gate_residual") == ["reference"] and served(found, "adaln_modulate") == ["cpu"]
    assert "another schema" in found["cpu"]["state"]


@needs_library
@pytest.mark.parametrize("kind", ["lacking", "changed"])
def test_what_the_rooms_ask_at_import_is_not_there(tmp_path, kind):
    if kind == "lacking":
        copied(tmp_path, lambda binary: binary.replace(b"\0cpu_layer_norm_order\0", b"\0cpu_layer_norm_other\0"))
    else:
        copied(tmp_path, schemas={"cpu_layer_norm_order": "cpu_layer_norm_order(Tensor x) -> ()"})
    found = started(tmp_path)
    assert not found["loaded"] and len(found["warnings"]) == 1 and "fusewire::cpu_layer_norm_order" in found["warnings"][0]
    assert served(found, "flow_euler_step") == served(found, "adaln_modulate") == ["reference"]
    assert not found["ok"] and "make" in found["cpu"]["fix"]


@pytest.mark.parametrize("kind", ["text", "empty", "cut", pytest.param("half", marks=needs_library), pytest.param("record", marks=needs_library)])
def test_no_library_at_all(tmp_path, kind):
    """A file that is not one, or half of one, gives a warning and the reference path."""
    if kind in ("half", "record"):
        copied(tmp_path, lambda binary: binary[:len(binary) // 2] if kind == "half" else binary)
        (tmp_path / "libfusewire_cpu.json").write_text("{" if kind == "record" else "{}")
    else:
        content = {"text": b"not a library\n", "empty": b"", "cut": b"\x7fELF\x02\x01\x01"}[kind]
        (tmp_path / "libfusewire_cpu.so").write_bytes(content)
    found = started(tmp_path)
    assert not found["loaded"] and len(found["warnings"]) == 1 and "libfusewire_cpu.so does not load into torch" in found["warnings"][0]
    assert str(tmp_path) not in found["warnings"][0]
    assert served(found, "adaln_modulate") == ["reference"]
    assert not found["ok"] and found["cpu"]["state"].startswith("broken: libfusewire_cpu.so does not load") and found["cpu"]["fix"] == "make clean lib"


def test_a_folder_without_a_library_is_no_fault(tmp_path):
    found = started(tmp_path)
    assert not found["loaded"] and not found["warnings"] and found["ok"]


@needs_library
def test_the_library_of_this_installation_is_as_new_as_its_sources():
    assert not CPU.stale
    assert all(CPU.has(op) for op, table in dispatch.TABLES.items() if any(row.name == "cpu" for row in table.rows))


@needs_library
@pytest.mark.parametrize("asked", ("", "base", "avx2", "avx512", "avx512_bf16"))
def test_the_level_that_runs(asked):
    """The fastest that the processor has, which of an Intel with AVX512-BF16 and without AMX is not the highest; or the one that is asked for, if it has it."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "avx512_bf16" not in flags:
        pytest.skip("needs a processor with AVX512-BF16")
    code = "from fusewire.kernels.library import cpu_isa, cpu_is_intel; print(cpu_isa(), cpu_is_intel())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"FUSEWIRE_CPU_ISA": asked, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True)
    level, intel = done.stdout.split()
    if asked:
        assert level == asked
    elif level != "amx":
        assert level == ("avx512" if intel == "True" else "avx512_bf16")


@pytest.mark.parametrize("variable, value, message", [
    ("FUSEWIRE_CPU_ISA", "AVX2", "it should be one of base, avx2, avx512, avx512_bf16, amx"), ("FUSEWIRE_NATIVE", "false", "it should be one of 1, 0")])
def test_a_variable_that_means_nothing(variable, value, message):
    environment = {name: text for name, text in os.environ.items() if not name.startswith("FUSEWIRE_")} | {variable: value, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", "import fusewire.ops"], env=environment, capture_output=True, text=True)
    assert done.returncode and message in done.stderr, done.stderr


def test_the_record_holds_what_is_declared(tmp_path):
    library.record_schemas(str(tmp_path / "record.json"))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["gate_residual"] == "gate_residual(Tensor x, Tensor y, Tensor gate, bool exact) -> Tensor"
    assert set(dispatch.TABLES) < set(record) and {"cpu_isa", "cpu_layer_norm_moments", "cpu_layer_norm_order"} < set(record)
