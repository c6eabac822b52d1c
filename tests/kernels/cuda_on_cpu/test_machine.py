"""The machine that the CUDA kernels' tests run on finds what a GPU would punish: it can fail."""

import ctypes

import pytest
import torch

from tests.kernels.cuda_on_cpu import build

NEIGHBOURS, NO_BARRIER, SOME_LANES, WARP_ENDS, SHUFFLES, UNALIGNED, SUMS, BAD_BLOCK, OTHER_STREAM, NO_DEVICE = range(10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if build.COMPILER is None:
        pytest.skip("no C++ compiler")
    library = ctypes.CDLL(str(build.build(tmp_path_factory.mktemp("broken"), "libbroken.so", [build.HERE / "broken_kernels.cu"])))
    library.run_broken.restype = ctypes.c_char_p

    def call(kernel: int, reverse: bool = False):
        library.cuda_on_cpu_reverse(int(reverse))
        data = torch.zeros(64)
        error = library.run_broken(kernel, ctypes.c_void_p(data.data_ptr()))
        return data, error and error.decode()

    return call


def test_barrier(run):
    """A missing barrier gives other values, in one order of the threads or in both."""
    want = (torch.arange(64) + 33) % 64 + 1.0
    assert all(torch.equal(run(NEIGHBOURS, reverse)[0], want) for reverse in (False, True))
    assert not any(torch.equal(run(NO_BARRIER, reverse)[0], want) for reverse in (False, True))


@pytest.mark.parametrize("kernel, error", [(SOME_LANES, "the lanes of a warp wait at different places"), (SHUFFLES, "the lanes of a warp wait"),
                                           (WARP_ENDS, "some warps wait for others that have ended"), (UNALIGNED, "a vector access that is not aligned"),
                                           (BAD_BLOCK, "the grid or the block"), (OTHER_STREAM, "not on the current stream"),
                                           (NO_DEVICE, "not on the current stream")])
def test_faults(run, kernel, error):
    assert run(kernel)[1].startswith(error)
    assert run(NEIGHBOURS)[1] is None  # and the machine still works


def test_sums(run):
    data, error = run(SUMS)
    lanes = torch.arange(64) % 32
    assert error is None and torch.equal(data, 63 * 32 + 10000.0 * (lanes // 8 * 64 + 28))
