"""csrc/cuda built for the CPU: the op files as they are, the kernels as plain C++ (cuda_on_cpu.h), into one library that torch loads.

What runs in the tests is then everything but the GPU: the public op, its CUDA row, the op of csrc/cuda with its tensors, and every thread of the kernel.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-Wall", "-Werror",
         "-Wno-unknown-pragmas", "-DFUSEWIRE_CUDA_ON_CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def build(folder: Path, name: str, sources: list[Path]) -> Path:
    """Compile and link ``sources`` and the machine itself into ``folder/name``."""
    torch_folder = Path(torch.__file__).parent
    include = (f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-isystem", str(torch_folder / "include"))

    def compiled(source: Path) -> str:
        out = folder / f"{source.stem}{source.suffix[1:]}.o"
        done = subprocess.run([COMPILER, *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(out)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(out)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sources, HERE / "cuda_on_cpu.cpp"]))
    library = folder / name
    subprocess.run([COMPILER, "-shared", "-o", str(library), *objects, f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-lc10"],
                   check=True, capture_output=True)
    return library


class Machine:
    """The loaded library; ``reverse`` makes threads, warps and blocks run in the opposite order."""

    def __init__(self, library: Path):
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))

    def reverse(self, on: bool) -> None:
        self._library.cuda_on_cpu_reverse(int(on))


def room_sources() -> list[Path]:
    return sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cpp", ".cu"))
