"""Compiles the Triton kernels where there is no GPU, and reports what can be seen in the code: registers, spills, shared memory, load widths.

``python -m fusewire.kernels.compiled`` runs the rooms' own launchers on meta tensors: what is compiled is what they would launch, with Triton's
own specialisation. The cases are in compiled_cases.py. ``--write FILE`` makes docs/kernels-compiled.md.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from fusewire.kernels.tuning import Arch, cuda_arch, hip_arch

TARGETS: dict[str, Arch] = {"sm_80": cuda_arch(8, 0), "sm_90": cuda_arch(9, 0), "sm_100": cuda_arch(10, 0), "gfx942": hip_arch("gfx942")}


@dataclass
class Compiled:
    """One kernel compiled for one target. ``loads`` and ``stores``: bytes of each access to global memory -> how many such instructions."""

    case: str
    target: str
    kernel: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    shared_limit: int
    loads: dict[str, int]
    stores: dict[str, int]
    offsets: list[int]  # bits of the offsets added to pointers to blocks of elements
    reductions: list[str]  # layouts of what is reduced over: the order of the sums
    instructions: dict[str, int]


class _Offline:
    """Stands in for Triton's driver: it has a target and no device."""

    def __init__(self, arch: Arch):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(arch.kind, int(arch.name.removeprefix("sm_")) if arch.kind == "cuda" else arch.name, arch.warp)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # Triton keeps compiled kernels by device

    def get_current_stream(self, device):
        return 0


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, bytes of stack, static shared memory) of a kernel's machine code. Triton kernels have no local arrays: what is on the stack was spilled."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", said).group(1)) for name in ("REG", "STACK", "SHARED"))


PTX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async.cg", "cvt.rn.bf16", "fma.rn.f32", " atom.", " red.", "\tatom.", "\tred.")
AMD_INSTRUCTIONS = ("v_mfma", "v_fma_f32", "v_fmac_f32", "global_atomic", "buffer_atomic")


def _widths(asm: str, kind: str, what: str) -> dict[str, int]:
    """Bytes per access to global memory -> count."""
    found: dict[str, int] = {}
    if kind == "cuda":
        for vector, bits in re.findall(what + r"\.global(?:\.[a-z_0-9:]+)*?(?:\.v(\d))?\.[bfus](\d+)", asm):
            size = str(int(vector or 1) * int(bits) // 8)
            found[size] = found.get(size, 0) + 1
        if what == "ld":
            for size in re.findall(r"cp\.async\.c[ag]\.shared\.global(?:\.[A-Za-z0-9:_]+)* \[[^]]+\], \[[^]]+\], (?:0x)?(\w+)", asm):
                size = str(int(size, 16))
                found[size] = found.get(size, 0) + 1
        return found
    names = {"ubyte": 1, "ushort": 2, "short_d16": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "byte": 1}
    for name in re.findall(r"(?:global|buffer)_" + {"ld": "load", "st": "store"}[what] + r"_([a-z0-9_]+)", asm):
        size = str(names.get(name.removesuffix("_d16_hi").removesuffix("_d16"), 2 if "short" in name else 1))
        found[size] = found.get(size, 0) + 1
    return found


def written_in_gluon(case: str) -> bool:
    """Such kernels compute no offset: what they read and write is addressed by TMA. They have no form that Triton optimises."""
    return " hopper " in case


def report(case: str, target: str, kernel, options: dict, compiled) -> Compiled:
    arch, asm = TARGETS[target], compiled.asm
    shared = compiled.metadata.shared
    if arch.kind == "cuda":
        code, names = asm["ptx"], PTX_INSTRUCTIONS
        registers, spills, static = _resources(asm["cubin"])
        shared = max(shared, static)
    else:
        code, names = asm["amdgcn"], AMD_INSTRUCTIONS
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code).group(1))
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code).group(1))  # scalar registers spill into lanes of vector ones, not to memory
    ir = asm["ttgir" if written_in_gluon(case) else "ttir"]
    # A pointer to one element is advanced by scalars; to a block, by a tensor of offsets
    offsets = re.findall(r"tt\.addptr [^:]*: tensor<[^!]*!tt\.ptr<[^>]*>[^>]*>, tensor<[0-9x]*xi(\d+)>", ir)
    scalars = re.findall(r"tt\.addptr [^:]*: !tt\.ptr<[^>]*>, i(\d+)", ir)
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", asm["ttgir"], re.MULTILINE))
    reduced = re.findall(r"\}\) : \(tensor<([0-9x]+x\w+), (#\w+)[^)]*\) -> ", asm["ttgir"])
    return Compiled(
        case, target, kernel.__name__, options["num_warps"], options["num_stages"], registers, spills, shared, arch.shared,
        _widths(code, arch.kind, "ld"), _widths(code, arch.kind, "st"), sorted({int(bits) for bits in offsets + scalars}),
        [f"{shape} {layouts.get(layout, layout)}" for shape, layout in reduced],
        {name: count for name in names if (count := code.count(name))})


def compile_case(name: str, target: str) -> list[Compiled]:
    """Every kernel that the launcher of the case would launch on the target."""
    from triton.runtime import driver

    from fusewire.kernels.compiled_cases import CASES
    from fusewire.kernels.triton_launch import launches_go_to

    found: list[Compiled] = []

    def receive(kernel, programs, args, options):
        found.append(report(name, target, kernel, options, kernel.run(*args, grid=(programs,), warmup=True, **options)))

    driver.set_active(_Offline(TARGETS[target]))
    with launches_go_to(TARGETS[target], receive):
        CASES[name]()
    return found


def compile_all(names, targets, processes: int = 2) -> Iterator[Compiled]:
    """The cases on the targets that they are for, compiled in ``processes`` processes."""
    pairs = [(name, target) for name in names for target in targets if target == "sm_90" or not written_in_gluon(name)]
    with ProcessPoolExecutor(processes) as pool:
        for found in pool.map(compile_case, *zip(*pairs)):
            yield from found


def may_spill(case: str, target: str) -> bool:
    """float32 attention: three TF32 products keep both halves of a block of queries in registers (fusewire.kernels.tuning has the smallest tiles); and
    gradients of 128 channels on sm_90, 24 bytes by Triton 3.6, none by 3.7: the tile without a spill is a tenth slower."""
    gradients = target == "sm_90" and case in ("attention_backward 128 bf16", "attention_varlen_backward 128 bf16")
    return "attention" in case and (" f32" in case or gradients)


def faults(one: Compiled) -> list[str]:
    """What must not be: a spill, too much shared memory, a 32-bit offset, an atomic."""
    found = []
    if one.spills and not may_spill(one.case, one.target):
        found.append(f"{one.spills} bytes spilled")
    if one.shared > one.shared_limit:
        found.append(f"{one.shared} bytes of shared memory, more than {one.shared_limit}")
    if one.offsets != ([] if written_in_gluon(one.case) else [64]):
        found.append(f"offsets of {one.offsets} bits")
    if any(name in one.instructions for name in (" atom.", " red.", "\tatom.", "\tred.", "global_atomic", "buffer_atomic")):
        found.append("atomics")
    return found


def table(reports: list[Compiled]) -> str:
    """The page docs/kernels-compiled.md."""
    import triton

    lines = [
        "# What the Triton kernels compile to", "",
        f"Made by `make kernels-compiled` with Triton {triton.__version__}; no GPU was used. Registers and spilled bytes: from the machine code. Loads and stores: instructions by width in bytes, asynchronous copies included. "
        "Only float32 attention may spill: three TF32 products keep both halves of a block of queries in registers. "
        "The tests hold a few of these cases to accesses of 16 bytes on the NVIDIA targets, but for what is narrow by nature: "
        "the scalars of a sampler's step; a mask, whose values lie as the matrix instructions want them; and the stores of column_sums_kernel "
        "(2 bytes in bfloat16, 4 in float32), which reads the partial sums of 64 columns 16 bytes at a time and has one value to write for each column; so has a program of qk_norm_rope_backward at its end. "
        "What TMA moves, which is all that hopper_attention_kernel reads and writes, is not counted.", "",
        "| case | target | kernel | warps | stages | registers | spills | shared KiB (limit) | loads | stores | matrix instructions |",
        "|---|---|---|---|---|---|---|---|---|---|---|"]
    for one in reports:
        width = lambda found: ", ".join(f"{count} x {size}" for size, count in sorted(found.items(), key=lambda item: -int(item[0])))  # noqa: E731
        matrix = ", ".join(f"{count} {name}" for name, count in one.instructions.items() if "mma" in name or "mfma" in name)
        lines.append(f"| {one.case} | {one.target} | {one.kernel} | {one.warps} | {one.stages} | {one.registers} | {one.spills} | "
                     f"{one.shared / 1024:.1f} ({one.shared_limit // 1024}) | {width(one.loads)} | {width(one.stores)} | {matrix} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    from fusewire.kernels.compiled_cases import CASES, DOCUMENTED, QUICK

    parser = argparse.ArgumentParser(prog="python -m fusewire.kernels.compiled", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the few cases that the default test run checks")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this case (may be repeated)")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this target (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table of the documented cases as Markdown")
    options = parser.parse_args()
    reports = list(compile_all(options.case or (QUICK if options.quick else DOCUMENTED if options.write else CASES), options.target or TARGETS))
    if options.json:
        print(json.dumps([asdict(one) for one in reports]))
    elif options.write:
        options.write.write_text(table(reports))
    else:
        print(table(reports))
    bad = [f"{one.case} on {one.target}: {fault}" for one in reports for fault in faults(one)]
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
