"""What can be seen in a compiled Triton kernel: registers, spills, shared memory, load widths, the order of its sums."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fusewire.kernels.tuning import Arch, cuda_arch, hip_arch

TARGETS: dict[str, Arch] = {"sm_80": cuda_arch(8, 0), "sm_90": cuda_arch(9, 0), "sm_100": cuda_arch(10, 0), "gfx942": hip_arch("gfx942")}


@dataclass
class Compiled:
    """One kernel compiled for one target. ``loads`` and ``stores``: bytes of each access to global memory -> how many such instructions."""

    case: str
    target: str
    triton: str  # its version
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
    aligned: bool = True  # pointers are multiples of 16 bytes, strides of 16 elements: accesses of 16 bytes are possible


class Offline:
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
    import triton

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
        case, target, triton.__version__, kernel.__name__, options["num_warps"], options["num_stages"], registers, spills,
        shared, arch.shared, _widths(code, arch.kind, "ld"), _widths(code, arch.kind, "st"), sorted({int(bits) for bits in offsets + scalars}),
        [f"{shape} {layouts.get(layout, layout)}" for shape, layout in reduced],
        {name: count for name in names if (count := code.count(name))})
