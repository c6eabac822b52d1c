"""``ops.linear`` by the compiled library, its arguments and what they should give, and which tests of it are meant to run on the reference."""

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU, cpu_isa
from fusewire.kernels.linear import native, reference

BELOW_AVX2 = pytest.mark.on_reference(when=lambda **_: cpu_isa() == "base", reason="the library has no linear for processors without AVX2")
needs_native = pytest.mark.skipif(not CPU.loaded or cpu_isa() == "base", reason="the compiled library does not serve linear here")
FLOAT64 = pytest.mark.on_reference(when=lambda dtype, **_: dtype is torch.float64, reason="float64 has no kernel")


def close(x, weight, bias, **options):
    """Wherever the library can serve the call, also where the dispatcher would prefer PyTorch's own product; as dispatched elsewhere."""
    with forced("cpu"):
        why_not = native.why_not_cpu(x, weight, bias, options.get("activation") or "none", options.get("gate"), options.get("residual"), False)
    with forced(None if why_not or not CPU.loaded else "cpu"):  # without the library oneDNN serves some calls, but no kernel their gates
        return ops.linear(x, weight, bias, numerics="close", **options)


def linear(x, weight, bias, numerics: str, **options):
    """``close``, or ``exact``, which is always stock's."""
    return close(x, weight, bias, **options) if numerics == "close" else ops.linear(x, weight, bias, **options)


def layer(shape, n, dtype, bias=True):
    k = shape[-1]
    return torch.randn(shape).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype) if bias else None


def in_float64(x, weight, bias, activation="none", gate=None, residual=None):
    wide = [None if t is None else t.double() for t in (x, weight, bias, gate, residual)]
    return reference.linear(*wide[:3], activation, *wide[3:], True)


def stock(x, weight, bias, activation="none", gate=None, residual=None):
    return reference.linear(x, weight, bias, activation, gate, residual, True)
