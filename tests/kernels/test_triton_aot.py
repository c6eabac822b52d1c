"""What the Triton kernels compile to, without a GPU: no spills, shared memory within limits, 16-byte loads, 64-bit offsets, one order of summation.

They are compiled in a process of their own: here Triton may be the interpreter.
"""

import dataclasses
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusewire.kernels.aot.limits import WAIVERS, faults, unused_waivers
from fusewire.kernels.aot.page import page
from fusewire.kernels.aot.report import Compiled
from fusewire.kernels.dispatch import TABLES
from tests.effort import EFFORT
from tests.kernels.test_backends import CALLS

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
OLDEST = ROOT / "build" / "triton-oldest"  # by `make kernels-compiled`
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Of the ops of which the quick cases have none
OTHERS = ("adaln_modulate_dual 1536 bf16", "attention_varlen 64 bf16", "global_response_norm 320 bf16", "group_norm_silu 320 bf16", "layer_norm_2d 320 bf16",
          "qk_norm_rope 64 bf16", "quick_gelu bias 5120 bf16", "rms_norm 1536 bf16", "solver_step guided bf16", "swiglu gate first bias 5120 bf16")
LAYOUTS = ("plain", "unaligned", "transposed", "reversed", "step two", "sliced")
ORDERED = ("adaln 1536", "norm_backward 1536", "qk_norm 64", "qk_norm_backward 64")
GROUP_NORM = ("group_norm_silu 320 bf16", "group_norm_silu_backward 320 bf16")
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
def hopper(tmp_path_factory):
    """On sm_90 alone, by one command."""
    cases = {*OTHERS, *GROUP_NORM, *(f"layout of {group}: {layout}" for group in ORDERED for layout in LAYOUTS)}
    return once(tmp_path_factory, "hopper", "--target=sm_90", *(f"--case={case}" for case in sorted(cases)))


def test_within_limits(quick):
    for one in quick:
        assert one["spills"] == 0 and one["shared"] <= one["shared_limit"], one
        assert one["offsets"] == ([] if "hopper" in one["case"] else [64]), one  # bug classes int32-numel, int32-stride


@pytest.mark.parametrize("op", WITH_TRITON)
def test_every_op(quick, hopper, op):
    """autotune, int32-numel, int32-stride, misaligned: the configurations that are chosen without a measurement compile, within the machine's limits;
    no offset of 32 bits; 16 bytes at a time."""
    found = [one for one in quick + [one for one in hopper if one["case"] in OTHERS] if one["case"].split()[0].removesuffix("_backward") == CALLS[op][2]]
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


def one_order(reports: list[dict]) -> None:
    orders: dict[str, list] = {}
    for one in reports:
        assert one["reductions"], one
        orders.setdefault(one["case"], []).append(one["reductions"])
    assert len(orders) == len(LAYOUTS)
    assert len({json.dumps(order) for order in orders.values()}) == 1, orders


@pytest.mark.parametrize("group", ORDERED)
def test_one_order_of_summation(hopper, group):
    """Bug class strided-input, for the order of the sums: the layouts that are reduced over do not depend on the inputs' strides and alignment."""
    one_order([one for one in hopper if one["case"].startswith(f"layout of {group}:")])


@pytest.mark.slow
def test_one_order_of_more_sums():
    one_order(compiled("--target=sm_90", *(f"--case=layout of adaln_backward 1536: {layout}" for layout in LAYOUTS)))


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


def test_group_norm(hopper):
    """The picture is read and written 16 bytes at a time; a channel's parameters are read one by one."""
    found = [one for one in hopper if one["case"] in GROUP_NORM]
    assert {one["case"] for one in found} == set(GROUP_NORM)
    for one in found:
        assert one["loads"].get("16"), one
        assert "16" in one["stores"] or one["kernel"] in ("group_norm_parts_kernel", "group_norm_sums_kernel"), one


def test_cache_race(tmp_path):
    """cache-race: two commands of two processes each (`make test-all`: of four) compile one kernel into one empty cache at once; then it is taken from there.
    Always the same code."""
    each = 2 if EFFORT == 1 else 4
    given = ("--target=sm_90", *["--case=gate_residual exact 1536 bf16"] * each), dict(TRITON_CACHE_DIR=str(tmp_path))
    found = [one for running in [start(*given[0], **given[1]) for _ in range(2)] for one in reports_of(running)]
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")}
    assert len(found) == 2 * each and len(kept) == 1
    found += compiled(*given[0], **given[1])
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")} == kept
    assert all(one == found[0] for one in found), found


def test_oldest():
    """The oldest Triton that pyproject.toml allows compiles these, too, without a fault."""
    if not OLDEST.is_dir():
        pytest.skip("the oldest supported Triton is not in build/triton-oldest, where `make kernels-compiled` puts it")
    lowest = re.search(r'"triton>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    cases = ("gate_residual_adaln two gates 1536 bf16", "attention 64 bf16", "attention_backward 64 bf16", "attention hopper 128 bf16", "layer_norm 1536 bf16")
    path = os.pathsep.join(filter(None, (str(OLDEST), os.environ.get("PYTHONPATH"))))
    found = compiled("--target=sm_90", *(f"--case={case}" for case in cases), PYTHONPATH=path)
    assert {one["triton"] for one in found} == {lowest} and {one["case"] for one in found} == set(cases)


@pytest.mark.slow
def test_every_case():
    """Of both versions, where the oldest is there; goes on where `make kernels-compiled` was."""
    oldest = (f"--oldest={OLDEST}",) if OLDEST.is_dir() else ()
    assert compiled(f"--keep={ROOT / 'build' / 'compiled'}", *oldest)


GOOD = dict(case="attention 64 bf16", target="sm_90", triton="3.6.0", kernel="attention_kernel", warps=8, stages=3, registers=128, spills=0, shared=1024,
            shared_limit=4096, loads={"16": 4, "8": 1}, stores={"16": 2}, offsets=[64], reductions=[], instructions={})


@pytest.mark.parametrize("change, fault", [
    ({}, None), (dict(spills=8), "8 bytes spilled"), (dict(shared=5000), "5000 bytes of shared memory, more than 4096"),
    (dict(offsets=[32, 64]), "offsets of [32, 64] bits"), (dict(instructions={" atom.": 1}), "atomics"), (dict(loads={"8": 4}), "no 16-byte load"),
    (dict(loads={"8": 4}, aligned=False), None), (dict(kernel="gated_kernel"), "loads of 8 bytes"), (dict(kernel="gated_kernel", target="gfx942"), None),
    (dict(stores={"16": 1, "4": 1}), "stores of 4 bytes"), (dict(case="attention 64 f32", spills=8), None),
    (dict(case="attention 64 f32", spills=100000), "100000 bytes spilled"), (dict(case="attention_backward 128 bf16", spills=16), None),
    (dict(case="attention_backward 128 bf16", spills=16, triton="3.7.1"), "16 bytes spilled"),
    (dict(case="attention_backward 128 bf16", spills=16, target="sm_100"), "16 bytes spilled")])
def test_faults(change, fault):
    assert faults(Compiled(**GOOD | change)) == ([] if fault is None else [fault])


def test_waivers_are_needed():
    """One that allows more than there is shows, as one does that nothing needs."""
    needed = [Compiled(**GOOD | dict(case="attention_backward 128 bf16", spills=spills)) for spills in (8, 16)]
    waiver, = (waiver for waiver in WAIVERS if waiver.holds(needed[0]))
    assert waiver.most == 16
    for reports, most in ((needed, None), (needed[:1], 8), ([], 0)):
        found = [line for line in unused_waivers(reports) if waiver.cases in line]
        assert found == ([] if most is None else [f"the waiver of {waiver.cases} allows 16 bytes; the most is {most}"])


def test_page():
    """Of two versions: targets side by side, and of the oldest what differs."""
    new = [Compiled(**GOOD | dict(triton="3.10.0", target=target, registers=registers)) for target, registers in zip(TARGETS, (100, 120, 120, 120))]
    old = [dataclasses.replace(one, triton="3.6.0", registers=one.registers + 9) for one in new]
    old[3] = dataclasses.replace(old[3], spills=16, loads={"8": 2})
    lines = page(new + old)
    assert "with Triton 3.10.0 and, the oldest that is supported, 3.6.0," in lines[2]
    assert lines.count("| attention 64 bf16 | attention_kernel | 8 | 3 | 100 / 120 / 120 / 120 | 0 | 1 | 4 x 16, 1 x 8 | 2 x 16 |  |") == 1
    assert lines[-1] == "| attention 64 bf16 | attention_kernel | gfx942: 16 bytes spilled, not 0; loads 2 x 8, not 4 x 16, 1 x 8 |"
    assert "| with a fault | 0 | 1 |" in lines and lines[-2].startswith("|---") and "(1 kernels), in registers by more than a tenth (0)" in lines[-5]
