"""Builds csrc/cuda for this machine's GPU alone, into src/fusewire/lib, with nvcc and a C++ compiler and nothing else (no CMake): for gpu.sh.

``benchmarks/build_cuda.py [--arch sm_90]``; without ``--arch`` the architecture is that of the first GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", help="for example sm_90")
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "fusewire" / "lib" / "libfusewire_cuda.so")
    options = parser.parse_args()
    nvcc, cxx = shutil.which("nvcc"), os.environ.get("CXX") or shutil.which("g++")
    if nvcc is None or cxx is None:
        print("nvcc and g++ are needed", file=sys.stderr)
        return 3
    arch = options.arch or "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    folder = Path(torch.__file__).parent
    common = [f"-I{ROOT / 'csrc'}", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-std=c++20", "-O3"]
    with tempfile.TemporaryDirectory() as objects:
        def compiled(source: Path) -> str:
            out = str(Path(objects) / f"{source.name}.o")
            if source.suffix == ".cu":
                command = [nvcc, *common, "-fmad=false", f"-arch={arch}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            else:
                command = [cxx, *common, "-fPIC", "-fvisibility=hidden", "-isystem", str(folder / "include")]
            subprocess.run([*command, "-c", str(source), "-o", out], check=True)
            return out

        sources = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cpp", ".cu"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compiled, sources))
        libraries = ["-ltorch_cpu", "-ltorch", "-lc10", *(["-ltorch_cuda"] if (folder / "lib" / "libtorch_cuda.so").is_file() else [])]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([nvcc, "-shared", f"-arch={arch}", "-o", str(options.out), *made, f"-L{folder / 'lib'}", "-Xlinker=--no-as-needed", *libraries],
                       check=True)
    code = f"import fusewire.ops; from fusewire.kernels.library import record_schemas; record_schemas({str(options.out.with_suffix('.json'))!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "FUSEWIRE_NATIVE": "0"})
    print(f"{options.out.name} for {arch}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
