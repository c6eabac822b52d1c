"""``ops.linear`` by the compiled library, and which tests of it are meant to run on the reference."""

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU, cpu_isa
from fusewire.kernels.linear import native

BELOW_AVX2 = pytest.mark.on_reference(when=lambda **_: cpu_isa() == "base", reason="the library has no linear for processors without AVX2")
FLOAT64 = pytest.mark.on_reference(when=lambda dtype, **_: dtype is torch.float64, reason="float64 has no kernel")


def _erf_form(dtype, activation, **_) -> bool:
    return activation == "gelu" and not (dtype is torch.bfloat16 and native.ONEDNN_BFLOAT16)


ERF_FORM = pytest.mark.on_reference(when=_erf_form, reason="the erf form of GELU has no kernel but oneDNN's, where no gradient is recorded")


def close(x, weight, bias, **options):
    """Wherever the library can serve the call, also where the dispatcher would prefer PyTorch's own product; as dispatched elsewhere."""
    with forced("cpu"):
        why_not = native.why_not_cpu(x, weight, bias, options.get("activation") or "none", options.get("gate"), options.get("residual"), False)
    with forced(None if why_not or not CPU.loaded else "cpu"):  # without the library oneDNN serves some calls, but no kernel their gates
        return ops.linear(x, weight, bias, numerics="close", **options)


def linear(x, weight, bias, numerics: str, **options):
    """``close``, or ``exact``, which is always stock's."""
    return close(x, weight, bias, **options) if numerics == "close" else ops.linear(x, weight, bias, **options)
