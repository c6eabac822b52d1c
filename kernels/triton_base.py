"""What the rooms' Triton kernels share: views as kernels take them, and the casts that keep the rounding contract.

Imported by the triton_kernel.py files only, which are imported when the first call is served.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.triton_rows import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def strided(tensor: torch.Tensor | None, dims: int) -> tuple:
    """The tensor and its strides, as kernels take them; (None, 0, ..., 0) for None. A stride over a single element is 0, as it could be anything."""
    if tensor is None:
        return (None,) + (0,) * dims
    shape, strides = tensor.shape, tensor.stride()
    return (tensor, *strides) if 1 not in shape else (tensor, *[0 if size == 1 else stride for size, stride in zip(shape, strides)])


def over_tokens(tensor: torch.Tensor | None) -> tuple:
    """``strided`` of a modulation [B, C], [B, 1, C] or [B, T, C], as one of [B, T, C] whose token stride may be 0."""
    return strided(tensor.unsqueeze(1) if tensor is not None and tensor.dim() == 2 else tensor, 3)


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """x [..., C] as [B, T, C]: a view, unless it has more than three dimensions whose strides do not merge."""
    if x.dim() == 3:
        return x
    return x.flatten(0, -3) if x.dim() > 3 else x[(None,) * (3 - x.dim())]


def inner_contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, or a contiguous copy of one whose last stride is not 1: for kernels that sum over the last dimension.

    Triton 3.6 turns the threads of the whole kernel round for such a load, and sums in another order: equal values would give other bits.
    """
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def vector_aligned(tensor: torch.Tensor) -> bool:
    """Whether rows of ``tensor`` can be stored 16 bytes at a time, as Triton sees it: strides are multiples of 16 elements, the last one is 1."""
    *outer, inner = strided(tensor, tensor.dim())[1:]
    return inner == 1 and tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in outer)


def elementwise(out: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[list[int], list[tuple]]:
    """Four sizes that serve an elementwise kernel over tensors of ``out``'s shape, and each tensor with its four strides (None with zeros).

    Dimensions are sorted by out's strides, those of one element dropped, and neighbours merged where every tensor's strides allow: dense
    tensors of one layout become one run. ``out`` has at most four dimensions.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    order = sorted((i for i, size in enumerate(out.shape) if size != 1), key=lambda i: -out.stride(i))
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in given]
    for i in order:
        size = out.shape[i]
        if sizes and all(mine[-1] == tensor.stride(i) * size for mine, tensor in zip(strides, given)):
            sizes[-1] *= size
            for mine, tensor in zip(strides, given):
                mine[-1] = tensor.stride(i)
        else:
            sizes.append(size)
            for mine, tensor in zip(strides, given):
                mine.append(tensor.stride(i))
    padding = [1] * (4 - len(sizes))
    found = iter(strides)
    return padding + sizes, [(tensor, *(([0] * len(padding) + next(found)) if tensor is not None else [0] * 4)) for tensor in tensors]


@triton.jit
def element_block(n_1, n_2, n_3, blocks, BLOCK: tl.constexpr):
    """A program's place among the sizes that ``elementwise`` gives, ``blocks`` programs to a run of n_3: (i_0, i_1, i_2, numbers in the run, which exist)."""
    program = tl.program_id(0)
    i_outer, i_block = program // blocks, program % blocks
    o = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (i_outer // (n_1 * n_2)).to(tl.int64), (i_outer // n_2 % n_1).to(tl.int64), (i_outer % n_2).to(tl.int64), o, o < n_3


@triton.jit
def load_elements(x, x_0, x_1, x_2, x_3, i_0, i_1, i_2, o, mask):
    """Those elements of a tensor with its four strides, as float32."""
    return tl.load(x + i_0 * x_0 + i_1 * x_1 + i_2 * x_2 + o * x_3, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 ``x`` rounded to nearest even in ``dtype``. (The interpreter's cast to bfloat16 truncates: there the rounding is done on the bits.)"""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@triton.jit
def load_rows(x, i_b, i_t, o_c, x_b, x_t, x_c, mask):
    """x[i_b, i_t, o_c] as float32 [ROWS, BLOCK], by 64-bit offsets."""
    p_x = x + (i_b.to(tl.int64) * x_b + i_t.to(tl.int64) * x_t)[:, None] + o_c.to(tl.int64)[None, :] * x_c
    return tl.load(p_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 ``x`` with the rounding that storing it in ``dtype`` would cause; still float32, so it costs registers only."""
    return narrow(x, dtype).to(tl.float32)


@triton.jit
def fused(x, y, z):
    """x * y + z with one rounding, for float32 tensors of one shape. (The interpreter rounds twice: there it is done in float64.)"""
    if INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, y, z)
