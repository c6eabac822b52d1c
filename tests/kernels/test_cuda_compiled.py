"""What csrc/cuda compiles to, without a GPU: no spills, no atomics, 16-byte loads and stores. Compiling takes seconds: one room for one target here."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusewire.kernels import compiled_cuda

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(bool(compiled_cuda.MISSING), reason=compiled_cuda.MISSING or "-")


@needs_nvcc
def test_one_room():
    found = compiled_cuda.compile_room("adaln", "sm_90")
    tiles = ("1, 128, true", "1, 128, false", "2, 128, true", "2, 128, false", "4, 256, true", "4, 256, false")  # chunks, threads, whole chunks only
    longest = {"float": "4, 1024, false", "__half": "4, 512, false", "__nv_bfloat16": "4, 512, false"}
    assert {one.kernel for one in found} == {f"adaln_kernel<{scalar}, {tile}>" for scalar, last in longest.items() for tile in (*tiles, last)}
    for one in found:
        assert not compiled_cuda.faults(one), one
        assert one.registers * one.threads <= 65536 and one.shared <= 1024, one


@needs_nvcc
@pytest.mark.slow
def test_every_room():
    assert not compiled_cuda.explained(compiled_cuda.compile_all())


@needs_nvcc
@pytest.mark.slow
def test_the_library_links(tmp_path):
    """Built where torch has no CUDA it lacks one symbol, which torch with CUDA has; PyTorch's stable ABI has the others."""
    if shutil.which("cmake") is None or shutil.which("nm") is None:
        pytest.skip("needs cmake and nm")
    import torch

    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
                 f"-DFUSEWIRE_LIB_DIR={tmp_path}", "-DFUSEWIRE_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path, "--target", "fusewire_cuda", "--parallel", "2"], check=True, capture_output=True)

    def symbols(library, kind):
        said = subprocess.run(["nm", "-D", kind, library], check=True, capture_output=True, text=True).stdout
        return set(re.findall(r"\b(?:aoti_torch|torch)_\w+", said))

    missing = symbols(tmp_path / "libfusewire_cuda.so", "--undefined-only") - symbols(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "--defined-only")
    assert missing == {"aoti_torch_get_current_cuda_stream"}


CLAMPED = """
struct Task { const int* x; int4* out; int channels; };
__global__ void kernel(const __grid_constant__ Task k) {
  const int rest = k.channels - 4 * static_cast<int>(threadIdx.x), count = rest < 0 ? 0 : rest < 4 ? rest : 4;
  const int x = k.x[threadIdx.x];
  if (count == 4) {
    k.out[threadIdx.x] = int4{x, x, x, x};
  } else {
    for (int i = 0; i < count; ++i) reinterpret_cast<int*>(k.out + threadIdx.x)[i] = x;
  }
}
"""


@needs_nvcc
@pytest.mark.skipif(compiled_cuda.CUOBJDUMP is None, reason="no cuobjdump here")
def test_misread_bounds_are_found(tmp_path):
    """tail: ptxas 13.0 let threads beyond a row's end store whole chunks; adaLN's gradients and the sums over columns were wrong on an H200 for it."""
    release = subprocess.run([compiled_cuda.NVCC, "--version"], capture_output=True, text=True).stdout
    if "release 13.0" not in release:
        pytest.skip("the code that nvcc 13.0 makes is known")
    (tmp_path / "clamped_kernels.cu").write_text(CLAMPED)
    kernel, = compiled_cuda.compile_room("clamped", "sm_90", tmp_path / "clamped_kernels.cu")
    assert kernel.misread and any("VIMNMX" in fault for fault in compiled_cuda.faults(kernel))


def test_faults():
    good = compiled_cuda.CudaKernel("room", "sm_90", "kernel<float>", 256, 40, 0, 0, {"16": 2, "4": 8}, {"16": 1}, 0, 0)
    assert not compiled_cuda.faults(good)
    for change, fault in (({"spills": 8}, "8 bytes spilled"), ({"loads": {"4": 8}}, "no 16-byte load"), ({"stores": {"4": 8}}, "no 16-byte store"),
                          ({"atomics": 1}, "atomics"), ({"misread": 2}, "2 bounds whose predicate ptxas takes for another's (VIMNMX.RELU)")):
        assert compiled_cuda.faults(dataclasses.replace(good, **change)) == [fault]
