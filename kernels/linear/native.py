"""What serves ``close`` on the CPU: csrc/cpu/linear.cpp, or oneDNN's linear as PyTorch ships it.

Measured with two cores, GFLOP/s at [1024, 1536] x [1536, 6144] and back (``F.linear``, oneDNN, here):

- Zen 4: float32 130, 200, 160-170; bfloat16 350-390, 350-390, 290-360; float16 20-35, -, 150.
- Zen 5: float32 155, 450, 410-440.
- Intel with AMX: float32 330, 320, 490; bfloat16 1690-1800, 1910-1940, 1840-1860, when weights were still transposed (a
  whole SD3.5 block, weights cold: 2-4 % less time than with oneDNN); float16 310-340, 320-340, 770-790.
- Intel with AVX512-BF16 and without AMX: float32 300-310, 295, 295; bfloat16 155-165, 165, 280-300 (vdpbf16ps has half the rate of float32's FMA, so that
  operands are widened here); float16 290-305, -, 240.

oneDNN's float32 sum in one chain errs up to four times as much as MKL's (``F.linear``) and so breaks the contract of ``close``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels.dispatch import forced_backend
from fusewire.kernels.library import CPU, cpu_is_intel, cpu_isa

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_BFLOAT16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
FLOAT16_PRODUCTS = ONEDNN and hasattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported") and torch.ops.mkldnn._is_mkldnn_fp16_supported()
POST_OPS = {"none": ("none", ""), "gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "silu": ("swish", "")}
MAX_DIMS = 9
# Fixed for the process; read once, so that torch.compile sees constants.
ISA, INTEL = cpu_isa(), cpu_is_intel()
# Without instructions for it PyTorch multiplies float16 at a fifth of float32's rate, and convolves contiguous pictures at less than a hundredth
# (benchmarks/results/zen4/test_linear.json, convolutions-float16.json).
SLOW_FLOAT16 = CPU.loaded and ISA != "base" and not FLOAT16_PRODUCTS
PYTORCHS = "PyTorch's own product is faster here"
FEW_TOKENS = 32
MANY_TOKENS = 1024  # what a graph is taken to have
FEW_ROWS = 64  # of x [B, K], as csrc/cpu/linear.h has it: one pass over the weight takes 0.5 of PyTorch's time at one row, 0.3 at two, 0.7 at 64 (Zen 5)
AMX_TOKENS, AMX_OUTPUTS = 48, 192  # below either, packing the operands takes longer than what the product saves
AMX_INPUTS_FLOAT32 = 512  # 0.7 to 0.85 of MKL's rate with 320, 1.0 to 1.5 with 640 and more
# In bfloat16 oneDNN reads x as it lies, ours packs it, which counts where neither the outputs nor the weights are many. With weights that are not in the
# cache, as in a model, ours has 1.1 to 2.0 times oneDNN's rate from 32 tokens and 768 inputs on, and 0.5 to 1.1 with fewer inputs.
AMX_TOKENS_BFLOAT16, AMX_INPUTS_BFLOAT16, AMX_WEIGHTS_BFLOAT16 = 32, 768, 2_000_000
AMX_ROWS_BFLOAT16 = 256  # of the weights' gradient
WIDENED = INTEL and ISA == "avx512"  # bfloat16 is multiplied as float32, from as many tokens on: with fewer widening the weights takes longer
WIDENED_TOKENS, WIDENED_INPUTS = 64, 1024  # inputs: of a gradient of the weights


def why_not_cpu(x, weight, bias, activation, gate, residual, exact) -> str:
    """The limits of both: why neither serves the call."""
    if exact:
        return "numerics='exact' keeps the stock matrix product"
    if not x.is_cpu:
        return "x is on a GPU" if x.is_cuda else f"x is on {x.device}"
    if x.dtype is torch.float64:
        return "x has dtype torch.float64"
    for tensor in (weight, bias, gate, residual):
        if tensor is not None and tensor.dtype is not x.dtype:
            return "the tensors differ in dtype"
    if _known_empty(x) or weight.numel() == 0:
        return "a tensor is empty"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if onednn_serves(x, weight, activation, gate, residual):
        return ""
    if not CPU.loaded:
        return CPU.reason
    if ISA == "base":
        return "the processor has no AVX2"
    if x.dim() > MAX_DIMS:
        return f"x has {x.dim()} dimensions; at most {MAX_DIMS} are served"
    if activation != "none" or sums_gated(x, gate, residual):  # a pass of ours, behind any product
        return ""
    return product_is_pytorchs(x, weight)


def _known_empty(x) -> bool:
    """Whether x has no element; False for a number of tokens that only the call will tell (an unbacked size of torch.compile)."""
    if not torch.compiler.is_compiling():
        return x.numel() == 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes long to import

    return guard_or_false(x.numel() == 0)


def product_is_pytorchs(x, weight) -> str:
    """Why PyTorch's own product is preferred to csrc/cpu's, or ``""``."""
    if forced_backend() == "cpu":
        return ""
    if x.dtype is torch.float32:
        # By tokens, not by rows: whether a sample is in a batch must not change its result.
        # A graph serves any number of tokens, and its first number must not become a guard: there, as many as it takes are supposed.
        tokens = 1 if x.dim() <= 2 else MANY_TOKENS if torch.compiler.is_compiling() else x.shape[-2]
        if x.dim() == 2 and not INTEL and x.shape[0] <= FEW_ROWS:
            return ""
        if tokens < FEW_TOKENS:
            return "for so few rows of a sample PyTorch's product is as fast, and sums in shorter chains"
        if INTEL and not (ISA == "amx" and tokens >= AMX_TOKENS and weight.shape[0] >= AMX_OUTPUTS and weight.shape[1] >= AMX_INPUTS_FLOAT32):
            return PYTORCHS
    if x.dtype is torch.float16 and WIDENED and FLOAT16_PRODUCTS:
        return PYTORCHS
    return ""


def onednn_serves(x, weight, activation, gate, residual) -> bool:
    """oneDNN is faster in bfloat16, but for most of a model on AMX. Gate and residual take a pass of their own, where ``gate_residual`` takes them."""
    if x.dtype is not torch.bfloat16 or not ONEDNN_BFLOAT16 or not torch.backends.mkldnn.enabled:
        return False
    outputs, inputs = weight.shape
    if ISA == "amx" and x.dim() > 2 and outputs >= AMX_OUTPUTS and inputs >= AMX_INPUTS_BFLOAT16:
        if torch.compiler.is_compiling():
            return False
        if x.shape[-2] >= AMX_TOKENS_BFLOAT16 and (weight.numel() >= AMX_WEIGHTS_BFLOAT16 or x.shape[-2] <= 2 * outputs):
            return False
    if WIDENED and x.dim() > 2 and (torch.compiler.is_compiling() or x.shape[-2] >= WIDENED_TOKENS):
        return False
    return residual is None or gate is None or sums_gated(x, gate, residual)


def sums_gated(x, gate, residual) -> bool:
    """Whether ``gate_residual`` takes the gate and the residual."""
    return residual is not None and gate is not None and x.dim() == 3 == residual.dim() and _per_sample(gate, residual)


def _per_sample(gate, residual) -> bool:
    """gate [B, N] or [B, 1, N] for residual [B, T, N]: what ``gate_residual`` takes."""
    return (gate.dim() == 2 or gate.dim() == 3 and gate.shape[1] == 1) and gate.shape[0] == residual.shape[0] and gate.shape[-1] == residual.shape[-1]


def apart(residual, gate) -> bool:
    """Whether gate and residual have a pass, and gradients, of their own where autograd records: none, or a gate that ``gate_residual`` takes."""
    if residual is None or gate is None:
        return residual is not None
    return residual.dim() == 3 and (_per_sample(gate, residual) or gate.shape == residual.shape)


def onednn(x, weight, bias, activation: str) -> torch.Tensor:
    """act(x @ weight.T + bias): the activation is applied to the float32 sum, before the one rounding."""
    attr, algorithm = POST_OPS[activation]
    weight = weight.contiguous()  # one product for every layout
    if bias is not None and bias.stride(0) != 1:  # mkldnn::_linear_pointwise reads a bias as if it were contiguous
        bias = bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)


def recorded(*tensors) -> bool:
    """Whether autograd records a call with these arguments."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def product(x, weight) -> torch.Tensor:
    """x @ weight.T, by what serves a linear without bias."""
    if onednn_serves(x, weight, "none", None, None):
        return onednn(x, weight, None, "none")
    return F.linear(x, weight) if product_is_pytorchs(x, weight) else _ours(x, weight)


def products_backward(dy, x, weight, of_x: bool, of_weight: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dy @ weight [..., K] and dy.T @ x [N, K], for the gradient dy [..., N] of x @ weight.T; None for one that is not wanted.

    Ours takes the transposed operands as they lie. Measured at [2048, 1536] x [1536, 6144] and back with two cores of an Intel with AMX, GFLOP/s
    (PyTorch's, ours): dx float32 320-330, 440-510; float16 300, 680-750; bfloat16 1810-1910, 1480-1600; dweight float32 310, 430-510;
    float16 300, 640-750; bfloat16 910-940, 1400-1590. Without AMX PyTorch's are faster, but for
    bfloat16 on Intel's: 163, 295 (dx), 163, 215 (dweight).
    """
    outputs, inputs = weight.shape
    dx = dweight = None
    if of_x:  # by tokens, not by rows: the batch must not choose
        dx = _ours(dy, weight.t()) if _ours_is_faster(dy, dy.shape[-2] if dy.dim() > 2 else 1, inputs, False) else dy @ weight
    if of_weight:
        rows, x_rows = dy.reshape(-1, outputs).t(), x.reshape(-1, inputs)
        dweight = _ours(rows, x_rows.t()) if _ours_is_faster(dy, min(rows.shape), inputs, True) else rows @ x_rows
    return dx, dweight


def _ours(x, weight) -> torch.Tensor:
    return torch.ops.fusewire.linear(x, weight, None, "none", None, None, False)


def _ours_is_faster(x, rows: int, outputs: int, of_weight: bool) -> bool:
    if WIDENED and x.is_cpu and x.dtype is torch.bfloat16 and 0 not in x.shape:
        return rows >= WIDENED_INPUTS <= outputs if of_weight else rows >= WIDENED_TOKENS
    if ISA != "amx" or not x.is_cpu or outputs < AMX_OUTPUTS or 0 in x.shape:
        return False
    if x.dtype is torch.bfloat16:
        return of_weight and rows >= AMX_ROWS_BFLOAT16
    return x.dtype in (torch.float32, torch.float16) and rows >= AMX_TOKENS


def why_not_bias_activation(y, bias, activation) -> str:
    return why_not_bias_activation_backward(y, y, bias, activation, True)


def why_not_bias_activation_backward(grad, y, bias, activation, of_bias) -> str:
    if not CPU.loaded:
        return CPU.reason
    if not y.is_cpu:
        return "y is on a GPU" if y.is_cuda else f"y is on {y.device}"
    return next((f"{name} has dtype {t.dtype}, y has {y.dtype}" for name, t in (("grad", grad), ("bias", bias)) if t is not None and t.dtype is not y.dtype), "")
