"""``torch.utils.flop_counter`` counts of a swapped model what it counts of the stock one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fusewire
from fusewire import ops
from fusewire.kernels import flops
from fusewire.kernels.library import CPU
from tests.compat.families import FAMILIES, SMALLEST, call

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")  # without it the CPU's attention is PyTorch's
flops.register()


def counted(run) -> dict[str, int]:
    """The name of each op -> its operations."""
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


def stock_attention() -> sdpa_kernel:
    """PyTorch has no formula for its own fused attention on the CPU; that of single products is counted by them."""
    return sdpa_kernel(SDPBackend.MATH)


@pytest.mark.parametrize("family", FAMILIES)
@needs_library
@torch.no_grad()
def test_a_whole_model(family):
    model, inputs = FAMILIES[family].model(torch.float32, **SMALLEST[family]), FAMILIES[family].inputs(2, False, torch.float32)
    with stock_attention():
        stock = counted(lambda: call(model, inputs))
    fusewire.swap(model, numerics="close")
    ours = counted(lambda: call(model, inputs))
    assert sum(ours.values()) == sum(stock.values()) > 0
    assert any(name.startswith(("fusewire.attention", "fusewire.joint_attention")) for name in ours), ours


@pytest.mark.parametrize("activation", (None, "gelu_tanh", "gelu"))
def test_a_linear_in_both_directions(activation):
    """Sizes that are ours on every processor that has a kernel of its own for them."""
    x, weight = torch.randn(2, 64, 1024, dtype=torch.bfloat16, requires_grad=True), torch.randn(512, 1024, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        assert sum(counted(lambda: ops.linear(x, weight, activation=activation, numerics="close")).values()) == 2 * 128 * 1024 * 512
    assert not CPU.loaded or ops.stats()["linear"]["cpu"]
    both = counted(lambda: ops.linear(x, weight, activation=activation, numerics="close").sum().backward())
    assert sum(both.values()) == sum(counted(lambda: F.linear(x, weight).sum().backward()).values()) == 3 * 2 * 128 * 1024 * 512


@needs_library
def test_attention_in_both_directions():
    """Backwards five products for two, as PyTorch counts its own on GPUs; fewer heads of keys count as if there were all."""
    q, k = torch.randn(2, 40, 4, 32, requires_grad=True), torch.randn(2, 24, 2, 32, requires_grad=True)
    forward = 2 * 2 * 2 * 4 * 40 * 24 * 32
    with torch.no_grad():
        assert sum(counted(lambda: ops.attention(q, k, k)).values()) == forward
    assert sum(counted(lambda: ops.attention(q, k, k).sum().backward()).values()) == forward + forward * 5 // 2


@needs_library
def test_sequences_of_different_lengths_count_as_they_are():
    q, begins = torch.randn(100, 4, 32, requires_grad=True), torch.tensor([0, 60, 100], dtype=torch.int32)
    forward = 2 * 2 * 4 * 32 * (60 * 60 + 40 * 40)
    run = lambda: ops.attention_varlen(q, q, q, begins, begins)  # noqa: E731
    with torch.no_grad():
        assert sum(counted(run).values()) == forward
    assert sum(counted(lambda: run().sum().backward()).values()) == forward + forward * 5 // 2


def test_every_op_that_multiplies_has_a_formula():
    """A new op with "attention", "linear" or "conv" in its name has to be thought of."""
    from fusewire.kernels.library import _DEFINED

    without = {"conv_patches"}  # gathers only
    named = {name for name in _DEFINED if name.startswith(("attention", "joint_attention", "linear", "conv"))
             and not name.endswith(("_cuda", "_triton", "_cpu"))}
    assert named - without == set(flops.FORMULAS)
