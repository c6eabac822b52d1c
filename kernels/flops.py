"""What ``torch.utils.flop_counter`` counts for our products: twice the multiplications, as its formulas for PyTorch's own calls do.

Masks and patterns take nothing off, as with PyTorch's attention; sequences of different lengths are counted as they are.
"""

from __future__ import annotations

import functools
import math

import torch

from fusewire.kernels.attention import varlen  # noqa: F401  this import and the next declare the ops
from fusewire.kernels.dispatch import NAMES
from fusewire.kernels.linear import rows  # noqa: F401


def _linear(x, weight, *rest, **keywords) -> int:
    return 2 * math.prod(x) * weight[0]


def _convolution(x, weight, *rest, out_shape, **keywords) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _attention(q, k, *rest, **keywords) -> int:
    """Two products: of queries and keys, of weights and values."""
    return 4 * math.prod(q) * k[1]


def _joint(q, k, v, q2, k2, *rest, **keywords) -> int:
    batch, _, heads, channels = q
    return 4 * batch * heads * channels * (q[1] + q2[1]) * (k[1] + k2[1])


def _attention_backward(grad, lse_grad, q, k, *rest, **keywords) -> int:
    """Five: the logits anew, and the gradients of weights, values, queries and keys."""
    return 5 * _attention(q, k) // 2


def _pairs(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> int:
    """(query, key) pairs of all sequences."""
    return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())


def _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest, **keywords) -> int:
    return 4 * math.prod(q.shape[1:]) * _pairs(cu_seqlens_q, cu_seqlens_k)


def _varlen_backward(grad, lse_grad, q, k, v, out, highest, total, cu_seqlens_q, cu_seqlens_k, *rest, **keywords) -> int:
    return 5 * _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k) // 2


# By the name of the op: (formula, whether it takes the tensors themselves rather than their shapes)
FORMULAS = {
    "linear": (_linear, False), "linear_activated": (_linear, False), "linear_onednn": (_linear, False), "conv_rows": (_convolution, False),
    "attention": (_attention, False), "attention_softmax": (_attention, False), "attention_backward": (_attention_backward, False),
    "joint_attention": (_joint, False), "attention_varlen": (_varlen, True), "attention_varlen_softmax": (_varlen, True),
    "attention_varlen_backward": (_varlen_backward, True),
}


@functools.cache
def register() -> None:
    """Tell ``torch.utils.flop_counter`` the formulas, those of an op's other backends too. Later calls do nothing."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, (formula, raw) in FORMULAS.items():
        for suffix in ("", *(f"_{backend}" for backend in NAMES)):
            packet = getattr(torch.ops.fusewire, name + suffix, None)
            if packet is not None and packet not in flop_registry:
                register_flop_formula(packet, get_raw=raw)(formula)
