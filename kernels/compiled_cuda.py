"""Compiles csrc/cuda/*_kernels.cu with nvcc where there is no GPU, and reports what can be seen in the code: registers, spills, load widths.

``python -m fusewire.kernels.compiled_cuda`` in a checkout. compiled.py does the same for Triton; ``--write FILE`` puts the table behind its own in
docs/kernels-compiled.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TARGETS = ("sm_80", "sm_90", "sm_100")
NVCC = shutil.which("nvcc")
MISSING = "nvcc was not found" if NVCC is None else "" if (CSRC / "cuda").is_dir() else "csrc is not here: this is no checkout"
FLAGS = ("-std=c++20", "-O3", "-fmad=false")  # as CMakeLists.txt has them


def _disassembler() -> str | None:
    """cuobjdump: the toolkit's, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    brought = [Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in (triton.submodule_search_locations if triton else ())]
    return shutil.which("cuobjdump") or next((str(path) for path in brought if path.is_file()), None)


CUOBJDUMP = _disassembler()


@dataclass
class CudaKernel:
    """One kernel for one target. ``loads`` and ``stores``: bytes of each access to global memory -> how many such instructions in the PTX."""

    room: str
    target: str
    kernel: str
    threads: int  # of a block, at most
    registers: int
    spills: int  # bytes spilled, and of local arrays
    shared: int
    loads: dict[str, int]
    stores: dict[str, int]
    atomics: int
    misread: int  # bounds whose predicate ptxas takes for another's; 0 where there is no cuobjdump, too


def rooms() -> list[str]:
    return sorted(path.name.removesuffix("_kernels.cu") for path in (CSRC / "cuda").glob("*_kernels.cu"))


def _widths(ptx: str, what: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for vector, bits in re.findall(rf"\b{what}\.global(?:\.[a-z_]\w*)*?(?:\.v(\d))?\.[bfus](\d+)", ptx):
        size = str(int(vector or 1) * int(bits) // 8)
        found[size] = found.get(size, 0) + 1
    return found


def _readable(names: list[str]) -> list[str]:
    """``adaln_kernel<__half, 4>`` for each mangled name."""
    said = subprocess.run([shutil.which("cu++filt") or "c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |fusewire::cuda::|\(\w+\)(?=[\w-])", "", line).rpartition("(")[0] for line in said.splitlines()]


def misread_bounds(cubin: Path) -> dict[str, int]:
    """Of each kernel, the instructions VIMNMX.RELU (max(min(x, n), 0) in one) with a predicate. ptxas 13.0 answers ``bounded == n`` by it, but it holds for
    x < 0 too: threads beyond the end of a row took themselves for whole ones, and stored. Seen on an H200; csrc/cuda/device.h avoids the pattern."""
    if CUOBJDUMP is None:
        return {}
    code = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {name: len(re.findall(r"\bVIMNMX\S*\.RELU\S* R\w+, P\d", body)) for name, body in re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", code, re.DOTALL)}


def compile_room(room: str, target: str, source: Path | None = None) -> list[CudaKernel]:
    """Every kernel of ``<room>_kernels.cu`` (or ``source``), compiled for the target."""
    source = source or CSRC / "cuda" / f"{room}_kernels.cu"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([NVCC, *FLAGS, f"-I{CSRC}", f"-arch={target}", "-cubin", "--keep", "--keep-dir", folder, "-Xptxas", "-v",
                               "-o", f"{folder}/out.cubin", str(source)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {target}:\n{done.stderr}")
        ptx, misread = (Path(folder) / f"{source.stem}.ptx").read_text(), misread_bounds(Path(folder) / "out.cubin")
    codes = {name: body for name, body in re.findall(r"\.entry (\w+)\((.*?)\n\}", ptx, re.DOTALL)}
    said = re.findall(r"Compiling entry function '(\w+)' for '\w+'(.*?)Used (\d+) registers([^\n]*)", done.stderr, re.DOTALL)
    found = []
    for (name, frame, registers, rest), kernel in zip(said, _readable([one[0] for one in said])):
        code = codes[name]
        threads = re.search(r"\.maxntid (\d+)", code)
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(CudaKernel(
            room, target, kernel, int(threads.group(1)) if threads else 1024, int(registers),
            sum(int(size) for size in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", frame)),
            int(shared.group(1)) if shared else 0, _widths(code, "ld"), _widths(code, "st"), len(re.findall(r"\b(?:atom|red)\.", code)),
            misread.get(name, 0)))
    return sorted(found, key=lambda one: one.kernel)


def compile_all(names=None, targets=TARGETS, processes: int = 2) -> list[CudaKernel]:
    """The rooms on the targets, compiled in ``processes`` processes at a time."""
    pairs = [(room, target) for room in names or rooms() for target in targets]
    with ThreadPoolExecutor(processes) as pool:
        return [one for found in pool.map(lambda pair: compile_room(*pair), pairs) for one in found]


def faults(one: CudaKernel) -> list[str]:
    """What must not be: a spill, no access of 16 bytes, an atomic, a bound that ptxas misreads."""
    found = []
    if one.spills:
        found.append(f"{one.spills} bytes spilled")
    if "16" not in one.loads and "_stats_" not in one.kernel:  # which reads what the parts came to, no picture
        found.append("no 16-byte load")
    if "16" not in one.stores and "_stats_" not in one.kernel and "_parts_" not in one.kernel:  # which write a few sums
        found.append("no 16-byte store")
    if one.atomics:
        found.append("atomics")
    if one.misread:
        found.append(f"{one.misread} bounds whose predicate ptxas takes for another's (VIMNMX.RELU)")
    return found


def table(reports: list[CudaKernel]) -> list[str]:
    """The lines of the page: a row for each kernel, its targets side by side where they differ."""
    version = re.search(r"release ([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout).group(1)
    targets = list(dict.fromkeys(one.target for one in reports))
    kernels: dict[tuple[str, str], list[CudaKernel]] = {}
    for one in reports:
        kernels.setdefault((one.room, one.kernel), []).append(one)

    def cell(values) -> str:
        values = [str(value) for value in values]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    def widths(found: dict[str, int]) -> str:
        return ", ".join(f"{count} x {size}" for size, count in sorted(found.items(), key=lambda item: -int(item[0])))

    lines = [
        "## The CUDA kernels", "",
        f"nvcc {version}, {' / '.join(targets)} (one figure where they agree). A kernel serves every layout: of the accesses below, aligned rows take "
        "those of 16 bytes, the others take one element each. Spills and local arrays: none may be.", "",
        "| room | kernel | threads | registers | spills | shared bytes | loads | stores |", "|---|---|---|---|---|---|---|---|"]
    for (room, kernel), ones in kernels.items():
        lines.append(f"| {room} | {kernel} | {cell(o.threads for o in ones)} | {cell(o.registers for o in ones)} | {cell(o.spills for o in ones)} | "
                     f"{cell(o.shared for o in ones)} | {cell(widths(o.loads) for o in ones)} | {cell(widths(o.stores) for o in ones)} |")
    return lines


def explained(reports: list[CudaKernel]) -> list[str]:
    return [f"{one.kernel} on {one.target}: {fault}" for one in reports for fault in faults(one)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fusewire.kernels.compiled_cuda", description=__doc__.split("\n\n")[0])
    parser.add_argument("--room", action="append", help="only this room (may be repeated)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table at the end of this page, in the place of an older one")
    options = parser.parse_args()
    if MISSING:
        print(MISSING, file=sys.stderr)
        return 3
    reports = compile_all(options.room, options.target or TARGETS)
    lines = table(reports)
    if options.write:
        before = options.write.read_text().partition(lines[0])[0].rstrip("\n")
        options.write.write_text("\n".join([before, "", *lines]) + "\n")
    else:
        print(json.dumps([asdict(one) for one in reports]) if options.json else "\n".join(lines))
    bad = explained(reports)
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
