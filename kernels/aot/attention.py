"""Cases of attention's kernels, forwards and backwards."""

from __future__ import annotations

import torch

from fusewire.kernels.aot.register import TWO, cases, meta
from fusewire.kernels.attention import hopper
from fusewire.kernels.attention import triton_backward as attention_backward
from fusewire.kernels.attention import triton_kernel as attention
from fusewire.kernels.attention.triton_limits import MAX_DIM, MAX_DIM_BACKWARD

WHOLE = (16, 32, 64, 128, 256, 512)  # a power of two: no part of a block of channels is empty
PADDED = (40, 72, 160, 384)
UNALIGNED = {torch.bfloat16: (20, 100), torch.float32: (50,)}  # rows that start anywhere


def served(limit: int, name: str, dims):
    """``cases`` of the head dimensions that are served: up to ``limit`` in 16 bits, half of it in float32."""
    most = {torch.bfloat16: limit, torch.float32: limit // 2}

    def add(run):
        for dtype in TWO:
            cases(name, [dim for dim in dims if dim <= most[dtype]], (dtype,), most[dtype])(run)
        return run
    return add


MASKS = {"": lambda q: None, " bool": lambda q: meta(q.shape[0], 1, q.shape[1], q.shape[1], dtype=torch.bool),
         " additive": lambda q: meta(q.shape[0], 1, 1, q.shape[1], dtype=torch.float32), " causal": lambda q: None}
for _mask in MASKS:
    def _attention(dim, dtype, mask=_mask):
        q = meta(2, 1024, 24, dim, dtype=dtype)
        attention.attention(q, q, q, MASKS[mask](q), None, None, mask == " causal", None, 1e-6)

    def _backward(dim, dtype, mask=_mask):
        q, row = meta(2, 1024, 24, dim, dtype=dtype), meta(2, 24, 1024, dtype=torch.float64)
        attention_backward.attention_backward(q, None, q, q, q, q, row, row, MASKS[mask](q), mask == " causal", None)

    served(MAX_DIM, f"attention {{}} {{}}{_mask}", (*WHOLE, *PADDED))(_attention)
    served(MAX_DIM_BACKWARD, f"attention_backward {{}} {{}}{_mask}", (*WHOLE, *PADDED))(_backward)
    if not _mask:
        for _dtype, _dims in UNALIGNED.items():
            cases("attention {} {}", _dims, (_dtype,))(_attention)
            cases("attention_backward {} {}", _dims, (_dtype,))(_backward)
        cases("attention {} {}", (64, 128), (torch.float16,))(_attention)
        cases("attention_backward {} {}", (64, 128), (torch.float16,))(_backward)


@served(MAX_DIM, "attention_varlen {} {}", (*WHOLE, 72, 160))
def _(dim, dtype):
    q, cu_seqlens = meta(2048, 24, dim, dtype=dtype), meta(9, dtype=torch.int32)
    attention.attention_varlen(q, q, q, cu_seqlens, cu_seqlens, False, None)


@cases("attention_varlen {} {} causal", (64, 128))
def _(dim, dtype):
    q, cu_seqlens = meta(2048, 24, dim, dtype=dtype), meta(9, dtype=torch.int32)
    attention.attention_varlen_softmax(q, q, q, cu_seqlens, cu_seqlens, True, None)


@served(MAX_DIM, "attention {} {} pattern", WHOLE)
def _(dim, dtype):
    q, blocks, words = meta(2, 1024, 24, dim, dtype=dtype), meta(1, 24, 32, 32, dtype=torch.int32), meta(300, 32, dtype=torch.int32)
    attention.attention(q, q, q, None, None, None, False, None, 1e-6, blocks, words)


@cases("attention {} {} softmax", (64, 128, 256))
def _(dim, dtype):
    q = meta(2, 1024, 24, dim, dtype=dtype)
    attention.attention_softmax(q, q, q, None, False, None)


@served(MAX_DIM, "joint_attention {} {}", (*WHOLE, 72, 160))
def _(dim, dtype):
    q, q2, w = meta(2, 1024, 24, dim, dtype=dtype), meta(2, 154, 24, dim, dtype=dtype), meta(dim, dtype=dtype)
    attention.joint_attention(q, q, q, q2, q2, q2, w, None, w, None, None, 1e-6)


@cases("joint_attention normalised {} {}", (64, 128))
def _(dim, dtype):
    q, q2, w = meta(2, 1024, 24, dim, dtype=dtype), meta(2, 154, 24, dim, dtype=dtype), meta(dim, dtype=dtype)
    attention.joint_attention(q, q, q, q2, q2, q2, w, w, w, w, None, 1e-6)


for _causal in ("", " causal"):
    @cases(f"attention hopper {{}} {{}}{_causal}", (64, 128), (torch.bfloat16,))
    def _(dim, dtype, causal=bool(_causal)):
        q = meta(2, 1024, 24, dim, dtype=dtype)
        hopper.attention(q, q, q, causal)


@cases("joint_attention hopper {} {}", (64, 128), (torch.bfloat16,))
def _(dim, dtype):
    q, q2 = meta(2, 1024, 24, dim, dtype=dtype), meta(2, 154, 24, dim, dtype=dtype)
    hopper.joint_attention(q, q, q, q2, q2, q2)


@served(MAX_DIM_BACKWARD, "attention_backward {} {} pattern", (*WHOLE, *PADDED))
def _(dim, dtype):
    q, row = meta(2, 1024, 24, dim, dtype=dtype), meta(2, 24, 1024, dtype=torch.float64)
    blocks, words = meta(1, 24, 32, 32, dtype=torch.int32), meta(300, 32, dtype=torch.int32)
    attention_backward.attention_backward(q, None, q, q, q, q, row, row, None, False, None, blocks, words)


for _causal in ("", " causal"):
    @served(MAX_DIM_BACKWARD, f"attention_varlen_backward {{}} {{}}{_causal}", (*WHOLE, 72))
    def _(dim, dtype, causal=bool(_causal)):
        q, row, cu_seqlens = meta(2048, 24, dim, dtype=dtype), meta(24, 2048, dtype=torch.float64), meta(9, dtype=torch.int32)
        attention_backward.attention_varlen_backward(q, row, q, q, q, q, row, row, cu_seqlens, cu_seqlens, causal, None)


@cases("attention {0} tokens pattern 64 {1}", (8192, 65536), (torch.bfloat16,))
def _(tokens, dtype):
    q, blocks, words = meta(1, tokens, 1, 64, dtype=dtype), meta(1, 1, tokens // 32, tokens // 32, dtype=torch.int32), meta(300, 32, dtype=torch.int32)
    attention.attention(q, q, q, None, None, None, False, None, 1e-6, blocks, words)
