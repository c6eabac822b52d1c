"""What the Triton kernels compile to, without a GPU: no spills, shared memory within limits, 16-byte loads, 64-bit offsets, one order of summation.

They are compiled in a process of their own: here Triton may be the interpreter.
"""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from fusewire.kernels.dispatch import TABLES
from tests.kernels.test_backends import CALLS

pytest.importorskip("triton")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Of the ops of which the quick cases have none
OTHERS = ("adaln_modulate_dual 1536 bf16", "attention_varlen 64 bf16", "global_response_norm 320 bf16", "group_norm_silu 320 bf16", "layer_norm_2d 320 bf16",
          "qk_norm_rope 64 bf16", "quick_gelu bias 5120 bf16", "rms_norm 1536 bf16", "solver_step guided bf16", "swiglu gate first bias 5120 bf16")
WITH_TRITON = [name for name, (*_, counted) in CALLS.items() if any(row.name == "triton" for row in TABLES[counted].rows)]


def start(*arguments: str, **more: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
    return subprocess.Popen([sys.executable, "-m", "fusewire.kernels.compiled", "--json", *arguments], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def reports_of(running: subprocess.Popen) -> list[dict]:
    said, errors = running.communicate()
    assert said, errors
    assert running.returncode == 0, errors  # 1: a spill, too much shared memory, a 32-bit offset or an atomic
    return json.loads(said)


def compiled(*arguments: str, **environment: str) -> list[dict]:
    return reports_of(start(*arguments, **environment))


def once(tmp_path_factory, name: str, *arguments: str) -> list[dict]:
    """``compiled``, once for all processes of a test run."""
    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"compiled-{name}.json"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            file.write_text(json.dumps(compiled(*arguments)))
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    reports = once(tmp_path_factory, "quick", "--quick")
    assert {one["target"] for one in reports} == set(TARGETS)
    return reports


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return once(tmp_path_factory, "others", "--target=sm_90", *(f"--case={case}" for case in OTHERS))


def test_within_limits(quick):
    for one in quick:
        assert one["spills"] == 0 and one["shared"] <= one["shared_limit"], one
        assert one["offsets"] == ([] if "hopper" in one["case"] else [64]), one  # bug classes int32-numel, int32-stride


@pytest.mark.parametrize("op", WITH_TRITON)
def test_every_op(quick, others, op):
    """autotune, int32-numel, int32-stride, misaligned: the configurations that are chosen without a measurement compile, within the machine's limits;
    no offset of 32 bits; 16 bytes at a time."""
    found = [one for one in quick + others if one["case"].split()[0].removesuffix("_backward") == CALLS[op][2]]
    assert found
    for one in found:
        assert one["spills"] == 0 and one["shared"] <= one["shared_limit"], one
        assert one["offsets"] == ([] if "hopper" in one["case"] else [64]), one
        assert {"16", "32"} & {*one["loads"], *one["stores"]} or "hopper" in one["case"] or one["target"] == "gfx942", one


def test_16_byte_loads(quick):
    for one in quick:
        if one["target"] == "gfx942" or "flow_euler" in one["case"]:
            continue  # (a step's scalars are loaded by themselves)
        mask = {"1", "8"} if "bool" in one["case"] else set()  # a mask's bytes lie as the matrix instructions want them
        # In the tile of heads of 128 on sm_90 so do a norm's weights, two loads of 210 (there the kernel for Hopper serves the op)
        weights = {"2"} if (one["case"], one["target"]) == ("joint_attention 128 bf16", "sm_90") else set()
        assert set(one["loads"]) - mask - weights <= {"16", "32"}, one
        if one["kernel"] != "column_sums_kernel":  # (one value for each column: the loads are what counts)
            sums = {"4"} if "qk_norm_rope_backward" in one["case"] else set()  # one row for a program, of a head's channels
            assert set(one["stores"]) - sums <= {"16", "32"}, one


def test_exact_does_not_fuse(quick):
    """Multiplications and additions that eager PyTorch rounds one by one."""
    for one in quick:
        if "exact" in one["case"]:
            assert "fma.rn.f32" not in one["instructions"], one


def test_matrix_instructions(quick):
    wanted = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    for one in quick:
        if one["kernel"].endswith("attention_kernel"):
            assert one["instructions"].get(wanted[one["target"]]), one


@pytest.mark.parametrize("group", ["adaln 1536", "norm_backward 1536", "qk_norm 64", "qk_norm_backward 64", pytest.param("adaln_backward 1536", marks=pytest.mark.slow)])
def test_one_order_of_summation(group):
    """Bug class strided-input, for the order of the sums: the layouts that are reduced over do not depend on the inputs' strides and alignment."""
    names = ("plain", "unaligned", "transposed", "reversed", "step two", "sliced")
    orders: dict[str, list] = {}
    for one in compiled("--target", "sm_90", *(f"--case=layout of {group}: {name}" for name in names)):
        assert one["reductions"], one
        orders.setdefault(one["case"], []).append(one["reductions"])
    assert len(orders) == len(names)
    assert all(order == orders[f"layout of {group}: plain"] for order in orders.values()), orders


def test_attention_backward():
    """Within limits (a spill or an atomic would have ended the command); heads are read and written 16 bytes at a time, a query's numbers one by one."""
    wanted = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}
    found = compiled(*(f"--target={target}" for target in wanted), "--case=attention_backward 64 bf16", "--case=attention_backward 128 bf16 causal")
    assert {one["kernel"] for one in found} == {"delta_kernel", "dq_kernel", "dkdv_kernel"}
    for one in found:
        assert one["spills"] == 0 and one["shared"] <= one["shared_limit"] and one["offsets"] == [64], one
        if one["kernel"] != "delta_kernel":
            assert one["instructions"].get(wanted[one["target"]]), one
            if one["target"] != "gfx942":
                assert set(one["loads"]) == {"16", "4"} and set(one["stores"]) == {"16"}, one


def test_group_norm():
    """The picture is read and written 16 bytes at a time; a channel's parameters are read one by one."""
    for one in compiled("--target", "sm_90", "--case=group_norm_silu 320 bf16", "--case=group_norm_silu_backward 320 bf16"):
        assert one["loads"].get("16"), one
        assert "16" in one["stores"] or one["kernel"] in ("group_norm_parts_kernel", "group_norm_sums_kernel"), one


def test_cache_race(tmp_path):
    """cache-race: two commands of two processes each compile one kernel into one empty cache at once; then it is taken from there. Always the same code."""
    given = ("--target=sm_90", *["--case=gate_residual exact 1536 bf16"] * 2), dict(TRITON_CACHE_DIR=str(tmp_path))
    found = [one for running in [start(*given[0], **given[1]) for _ in range(2)] for one in reports_of(running)]
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")}
    assert len(found) == 4 and len(kept) == 1
    found += compiled(*given[0], **given[1])
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")} == kept
    assert all(one == found[0] for one in found), found


@pytest.mark.slow
def test_every_case():
    assert compiled()
