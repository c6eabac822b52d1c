"""The gradients of GroupNorm with SiLU on a GPU, by Triton and by CUDA: values on real sizes, repeats, a sample alone, graphs; CUDA's own source built
for the CPU has the same bits.

``python -m pytest -m gpu tests/gpu``; benchmarks/gpu.sh runs it first.
"""

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.group_norm_silu import cuda_backward
from fusewire.kernels.library import CUDA
from tests import tolerance
from tests.kernels.conftest import cuda_machine  # noqa: F401  (a fixture)
from tests.tolerance import assert_exact, assert_within

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
needs_cuda_library = pytest.mark.skipif(not CUDA.loaded, reason=CUDA.reason or "-")
both = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=needs_cuda_library)])
NAMES = ("x", "weight", "bias", "shift", "scale", "add")
DEVICE = "cuda"


def arguments(shape, dtype=torch.float32, memory_format=torch.contiguous_format) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, weight, bias, shift, scale and add; the gradient of the result."""
    def rand(*sizes):
        return torch.randn(sizes, device=DEVICE).to(dtype)

    batch, channels = shape[:2]
    return [rand(*shape).contiguous(memory_format=memory_format), rand(channels), rand(channels), *rand(batch, 3 * channels).chunk(3, 1)], rand(*shape)


def gradients(tensors, groups: int, grad, backend: str, numerics: str = "close") -> dict[str, torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with forced(backend):
        out = ops.group_norm_silu(leaves[0], groups, *leaves[1:3], shift=leaves[3], scale=leaves[4], add=leaves[5], numerics=numerics)
        return dict(zip(NAMES, torch.autograd.grad(out, leaves, grad)))


# Channels of 35 pixels; a U-Net's level, and its deepest one at 832 x 1216, whose channels are not aligned but whose groups are; several parts a channel
@pytest.mark.parametrize("shape, groups", [((2, 10, 7, 5), 5), ((2, 320, 64, 64), 32), ((2, 1280, 26, 38), 32), ((1, 128, 300, 301), 32)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both
def test_gradients(dtype, memory_format, shape, groups, backend):
    tensors, grad = arguments(shape, dtype, memory_format)
    got = gradients(tensors, groups, grad, backend)
    for _ in range(10):
        assert all(torch.equal(again, got[name]) for name, again in gradients(tensors, groups, grad, backend).items())
    alone = gradients([t if t.dim() == 1 else t[:1] for t in tensors], groups, grad[:1], backend)
    for name in ("x", "shift", "scale", "add"):
        assert_exact(alone[name], got[name][:1], name)
    plain = gradients(tensors, groups, grad, "reference", "exact")
    for name, want in gradients([t.double() for t in tensors], groups, grad.double(), "reference").items():
        if name == "x":
            tolerance.assert_close(got[name].cpu(), want.cpu(), plain[name].cpu(), name)  # CUDA has no nextafter for float16, which the rule needs
            assert got[name].stride() == tensors[0].stride()
        else:
            assert_within(got[name], want, 16, name, plain[name])


@both
def test_graph_capture(backend):
    """The whole backward, its room included, in a graph that is replayed on other values."""
    tensors, grad = arguments((2, 64, 32, 32), torch.bfloat16)
    gradients(tensors, 8, grad, backend)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(tensors, 8, grad, backend)
    for seed in range(2):
        torch.manual_seed(seed)
        grad.copy_(torch.randn(grad.shape))
        graph.replay()
        want = gradients(tensors, 8, grad, backend)
        for name in NAMES:
            assert_exact(captured[name], want[name], name)


@needs_cuda_library
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_bits_are_those_of_the_cpu(cuda_machine, dtype, memory_format):
    """Bit for bit, but for the exponential: what tests/kernels shows there holds here."""
    (x, *parameters), grad = arguments((2, 24, 37, 61), dtype, memory_format)

    def results(grad, x, weight, bias, shift, scale, add):
        return cuda_backward.group_norm_silu_backward(grad, x, 3, weight, bias, 1e-5, shift, scale, add, False, True)

    here, there = results(grad, x, *parameters), results(grad.cpu(), x.cpu(), *(p.cpu() for p in parameters))
    for name, got, want in zip(NAMES, here, there, strict=True):
        assert_exact(got.cpu(), want, name)
