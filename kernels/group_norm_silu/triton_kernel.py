"""GroupNorm with SiLU in Triton, in the rounding of ``close``: float32 inside, one rounding at the end.

A group is cut into parts by its own size alone. One kernel finds each part's count, mean and centred squares, a second puts them together and
applies the norm. The backward takes sums over each channel's pixels in parts, and PyTorch adds these up: no atomics, the same bits every time.
A group's elements are numbered along memory: [channels, pixels] of contiguous pictures, [pixels, channels] of channels-last ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.group_norm_silu.reference import over_pixels, suggest_memory_format
from fusewire.kernels.rounding import promoted
from fusewire.kernels.triton_base import fused, narrow, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import all_registers, cdiv, group_tile, power_of_2


@triton.jit
def _load(x, i_n, i_c, x_n, x_c, mask):
    """x[i_n, i_c] as float32, by 64-bit offsets."""
    return tl.load(x + (i_n.to(tl.int64) * x_n + i_c.to(tl.int64) * x_c), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _elements(o_e, i_n, i_g, x_n, per_group, pixels, channels, PLANES: tl.constexpr):
    """(channel, offset from the picture's start) of elements ``o_e`` of group i_g of sample i_n."""
    if PLANES:
        i_c = i_g * per_group + o_e // pixels
        offset = (i_g.to(tl.int64) * per_group) * pixels + o_e
    else:
        i_c = i_g * per_group + o_e % per_group
        offset = (o_e // per_group).to(tl.int64) * channels + i_c
    return i_c, i_n.to(tl.int64) * x_n + offset


@triton.jit
def _silu(x, grad, SLOPE: tl.constexpr):
    """silu(x), or grad * silu'(x)."""
    if SLOPE:
        gate = 1.0 / (1.0 + tl.exp(-x))
        return grad * gate * (1.0 + x * (1.0 - gate))
    return tl.div_rn(x, 1.0 + tl.exp(-x))  # `/` errs by up to two units


@triton.jit(do_not_specialize=["steps", "origin"])  # no recompilation for each picture size, but for whether it is a multiple of 16
def group_norm_parts_kernel(x, x_n, add, add_n, add_c, parts, groups, per_group, pixels, channels, part_count, steps, origin,
                            PLANES: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """parts [B * groups, part_count, 4]: count, pivot, mean - pivot and sum of centred squares of ``steps`` blocks each.

    The mean is kept in two floats, as it cannot be told to a fraction of the deviation in one where it is far above it.
    """
    i_part, i_group = tl.program_id(0) % part_count, tl.program_id(0) // part_count
    i_n, i_g = i_group // groups, i_group % groups
    size = per_group * pixels
    count, pivot, rest, squares = 0.0, 0.0, 0.0, 0.0
    for i_step in range(steps):
        o_e = (i_part * steps + i_step) * BLOCK + tl.arange(0, BLOCK)
        if not ALIGNED:
            o_e += origin  # one element an access: fusewire.kernels.tuning.aligned says why
        mask = o_e < size
        i_c, o_x = _elements(o_e, i_n, i_g, x_n, per_group, pixels, channels, PLANES)
        b_x = tl.load(x + o_x, mask=mask, other=0.0).to(tl.float32)
        if add is not None:
            b_x += _load(add, i_n, i_c, add_n, add_c, mask)
        block = tl.maximum(tl.minimum(size - (i_part * steps + i_step) * BLOCK, BLOCK), 0).to(tl.float32)
        divisor = tl.maximum(block, 1.0)
        block_pivot = tl.sum(tl.where(mask, b_x, 0.0), 0) / divisor
        b_x = tl.where(mask, b_x - block_pivot, 0.0)
        block_rest = tl.sum(b_x, 0) / divisor  # what the first sum lost beside a large mean
        b_x = tl.where(mask, b_x - block_rest, 0.0)
        # two sets of elements put together (Chan, Golub and LeVeque)
        pivot = tl.where(i_step == 0, block_pivot, pivot)
        total = tl.maximum(count + block, 1.0)
        delta = (block_pivot - pivot) + (block_rest - rest)
        rest += delta * (block / total)
        squares += tl.sum(b_x * b_x, 0) + delta * delta * (count * block / total)
        count += block
    o_part = tl.program_id(0).to(tl.int64) * 4
    tl.store(parts + o_part, count)
    tl.store(parts + (o_part + 1), pivot)
    tl.store(parts + (o_part + 2), rest)
    tl.store(parts + (o_part + 3), squares)


@triton.jit
def _moments(parts, i_group, part_count, size, eps, PARTS: tl.constexpr):
    """(center, offset, rstd) of a group, for xhat = (v - center) * rstd + offset; center is the first part's pivot."""
    o_p = tl.arange(0, PARTS)
    o_part = (i_group.to(tl.int64) * part_count + o_p) * 4
    mask = o_p < part_count
    b_count = tl.load(parts + o_part, mask=mask, other=0.0)
    b_pivot = tl.load(parts + (o_part + 1), mask=mask, other=0.0)
    b_squares = tl.load(parts + (o_part + 3), mask=mask, other=0.0)
    center = tl.sum(tl.where(o_p == 0, b_pivot, 0.0), 0)
    b_mean = tl.where(mask, (b_pivot - center) + tl.load(parts + (o_part + 2), mask=mask, other=0.0), 0.0)
    offset = tl.sum(b_count * b_mean, 0) / size
    b_mean -= offset
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_squares + b_count * b_mean * b_mean, 0) / size + eps))  # rsqrt errs by up to two units
    return center, -offset * rstd, rstd


@triton.jit
def _modulated(b_x, i_n, i_c, mask, weight, weight_c, bias, bias_c, shift, shift_n, shift_c, scale, scale_n, scale_c):
    if weight is not None:
        b_x *= _load(weight, i_n, i_c, 0, weight_c, mask)
    if bias is not None:
        b_x += _load(bias, i_n, i_c, 0, bias_c, mask)
    if scale is not None:
        b_x *= 1.0 + _load(scale, i_n, i_c, scale_n, scale_c, mask)
    if shift is not None:
        b_x += _load(shift, i_n, i_c, shift_n, shift_c, mask)
    return b_x


@triton.jit
def _block(x, x_n, add, add_n, add_c, parts, groups, per_group, pixels, channels, part_count, blocks, eps, PLANES: tl.constexpr, PARTS: tl.constexpr,
           BLOCK: tl.constexpr):
    """The program's block of a group: (xhat, 1 / standard deviation, the group, sample, group in it and channels, elements, which of them exist)."""
    i_block, i_group = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_n, i_g = i_group // groups, i_group % groups
    size = per_group * pixels
    center, offset, rstd = _moments(parts, i_group, part_count, size, eps, PARTS)
    o_e = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o_e < size
    i_c, o_x = _elements(o_e, i_n, i_g, x_n, per_group, pixels, channels, PLANES)
    b_x = tl.load(x + o_x, mask=mask, other=0.0).to(tl.float32)
    if add is not None:
        b_x += _load(add, i_n, i_c, add_n, add_c, mask)
    return fused(b_x - center, rstd, offset), rstd, i_group, i_n, i_g, i_c, o_e, mask


@triton.jit(do_not_specialize=["part_count", "blocks"])
def group_norm_apply_kernel(x, x_n, add, add_n, add_c, parts, weight, weight_c, bias, bias_c, shift, shift_n, shift_c, scale, scale_n, scale_c, out,
                            groups, per_group, pixels, channels, part_count, blocks, eps, SILU: tl.constexpr, PLANES: tl.constexpr,
                            PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One of the ``blocks`` blocks of each group. Nothing but the parts is summed: alignment decides about widths only."""
    b_xhat, rstd, i_group, i_n, i_g, i_c, o_e, mask = _block(
        x, x_n, add, add_n, add_c, parts, groups, per_group, pixels, channels, part_count, blocks, eps, PLANES, PARTS, BLOCK)
    b_y = _modulated(b_xhat, i_n, i_c, mask, weight, weight_c, bias, bias_c, shift, shift_n, shift_c, scale, scale_n, scale_c)
    if SILU:
        b_y = _silu(b_y, b_y, False)
    o_c, o_out = _elements(o_e, i_n, i_g, tl.cast(channels, tl.int64) * pixels, per_group, pixels, channels, PLANES)
    tl.store(out + o_out, narrow(b_y, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["part_count", "steps", "programs", "origin"])
def group_norm_sums_kernel(grad, grad_n, x, x_n, add, add_n, add_c, parts, weight, weight_c, bias, bias_c, shift, shift_n, shift_c, scale, scale_n,
                           scale_c, sums, groups, per_group, pixels, channels, part_count, steps, programs, eps, origin, SILU: tl.constexpr,
                           PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """sums [programs, B, C, 3]: over ``steps`` blocks of a channel's pixels, of dh = grad * silu', of dh * xhat and of xhat."""
    i_part, i_channel = tl.program_id(0) % programs, tl.program_id(0) // programs
    i_n, i_c = i_channel // channels, i_channel % channels
    center, offset, rstd = _moments(parts, i_n * groups + i_c // per_group, part_count, per_group * pixels, eps, PARTS)
    b_dh_sum, b_by_xhat, b_xhat_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i_step in range(steps):
        o_s = (i_part * steps + i_step) * BLOCK + tl.arange(0, BLOCK)
        if not ALIGNED:
            o_s += origin
        mask = o_s < pixels
        o_x = i_c.to(tl.int64) * pixels + o_s if PLANES else o_s.to(tl.int64) * channels + i_c
        b_x = tl.load(x + (i_n.to(tl.int64) * x_n + o_x), mask=mask, other=0.0).to(tl.float32)
        b_dh = tl.load(grad + (i_n.to(tl.int64) * grad_n + o_x), mask=mask, other=0.0).to(tl.float32)
        if add is not None:
            b_x += _load(add, i_n, i_c, add_n, add_c, i_c >= 0)
        b_xhat = tl.where(mask, fused(b_x - center, rstd, offset), 0.0)
        if SILU:
            b_h = _modulated(b_xhat, i_n, i_c, i_c >= 0, weight, weight_c, bias, bias_c, shift, shift_n, shift_c, scale, scale_n, scale_c)
            b_dh = _silu(b_h, b_dh, True)
        b_dh_sum += b_dh
        b_by_xhat += b_dh * b_xhat
        b_xhat_sum += b_xhat
    o_sums = (i_part.to(tl.int64) * (tl.num_programs(0) // programs) + i_channel) * 3
    tl.store(sums + o_sums, tl.sum(b_dh_sum, 0))
    tl.store(sums + (o_sums + 1), tl.sum(b_by_xhat, 0))
    tl.store(sums + (o_sums + 2), tl.sum(b_xhat_sum, 0))


@triton.jit(do_not_specialize=["part_count", "blocks"])
def group_norm_dx_kernel(grad, grad_n, x, x_n, add, add_n, add_c, parts, weight, weight_c, bias, bias_c, shift, shift_n, shift_c, scale, scale_n,
                         scale_c, means, dx, groups, per_group, pixels, channels, part_count, blocks, eps, SILU: tl.constexpr, PLANES: tl.constexpr,
                         PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """dx = rstd * (dh * factor - means[group, 0] - xhat * means[group, 1]), factor = weight * (1 + scale)"""
    b_xhat, rstd, i_group, i_n, i_g, i_c, o_e, mask = _block(
        x, x_n, add, add_n, add_c, parts, groups, per_group, pixels, channels, part_count, blocks, eps, PLANES, PARTS, BLOCK)
    g_c, o_grad = _elements(o_e, i_n, i_g, grad_n, per_group, pixels, channels, PLANES)
    b_dh = tl.load(grad + o_grad, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        b_h = _modulated(b_xhat, i_n, i_c, mask, weight, weight_c, bias, bias_c, shift, shift_n, shift_c, scale, scale_n, scale_c)
        b_dh = _silu(b_h, b_dh, True)
    b_dh = _modulated(b_dh, i_n, i_c, mask, weight, weight_c, None, 0, None, 0, 0, scale, scale_n, scale_c)
    o_means = i_group.to(tl.int64) * 2
    b_dx = rstd * (b_dh - tl.load(means + o_means) - b_xhat * tl.load(means + (o_means + 1)))
    o_c, o_out = _elements(o_e, i_n, i_g, tl.cast(channels, tl.int64) * pixels, per_group, pixels, channels, PLANES)
    tl.store(dx + o_out, narrow(b_dx, dx.dtype.element_ty), mask=mask)


def _dense(x: torch.Tensor, memory_format) -> torch.Tensor:
    """x, or a copy whose samples are dense in the memory format and start on 16 bytes: the order of the sums follows the width of the loads."""
    aligned = x.data_ptr() % 16 == 0 and (x.shape[0] == 1 or x.stride(0) % 16 == 0 or x.is_contiguous(memory_format=memory_format))
    if aligned and x[:1].is_contiguous(memory_format=memory_format):
        return x
    return x.clone(memory_format=memory_format)


class _Picture:
    """x and what the kernels take with it."""

    def __init__(self, x, groups: int, weight, bias, shift, scale, add):
        self.format = suggest_memory_format(x)
        self.planes = self.format is torch.contiguous_format
        self.x = _dense(x, self.format)
        self.batch, self.channels = x.shape[:2]
        self.groups, self.per_group = groups, x.shape[1] // groups
        self.pixels = x[0, 0].numel() if x.numel() else 0
        self.tile = group_tile(self.per_group * self.pixels, arch_of(x.device))
        self.part_count = cdiv(self.per_group * self.pixels, self.tile.block * self.tile.steps)
        self.add = self._parameter(add)
        self.modulation = (*strided(weight, 1), *strided(bias, 1), *self._parameter(shift), *self._parameter(scale))
        # x's own width decides, which no other layout of the same values changes
        self.aligned = (self.per_group * self.pixels if self.planes else self.per_group) % 16 == 0
        self.parts = x.new_empty((self.batch * groups, self.part_count, 4), dtype=torch.float32)
        self.sizes = (groups, self.per_group, self.pixels, self.channels, self.part_count)
        self.options = dict(PLANES=self.planes, num_warps=self.tile.warps, num_stages=1, enable_fp_fusion=False)
        launch(group_norm_parts_kernel, self.batch * groups * self.part_count, x, *self.sample(self.x), *self.add, self.parts, *self.sizes,
               self.tile.steps, 0, BLOCK=self.tile.block, ALIGNED=self.aligned, **self.options)

    @staticmethod
    def _parameter(tensor) -> tuple:
        return strided(tensor if tensor is None or tensor.dim() == 2 else tensor.flatten(1), 2)

    @staticmethod
    def sample(x) -> tuple:
        """A picture and its stride from sample to sample."""
        return strided(x, x.dim())[:2]

    def over_groups(self, kernel, eps: float, silu: bool, *args) -> None:
        """Launch ``kernel`` over every block of every group."""
        blocks = cdiv(self.per_group * self.pixels, self.tile.block)
        launch(kernel, self.batch * self.groups * blocks, self.x, *args, *self.sizes, blocks, eps, SILU=silu,
               PARTS=power_of_2(self.part_count), BLOCK=self.tile.block, **self.options)


def group_norm_silu(x, groups: int, weight, bias, eps: float, shift, scale, add, silu: bool, exact: bool) -> torch.Tensor:
    out = torch.empty_like(x, dtype=promoted(x.dtype, add, scale, shift), memory_format=suggest_memory_format(x))
    if out.numel():
        p = _Picture(x, groups, weight, bias, shift, scale, add)
        p.over_groups(group_norm_apply_kernel, eps, silu, *p.sample(p.x), *p.add, p.parts, *p.modulation, out)
    return out


def group_norm_silu_backward(grad, x, groups: int, weight, bias, eps: float, shift, scale, add, silu: bool, of_x: bool) -> tuple[torch.Tensor, ...]:
    parameters = (weight, bias, shift, scale, add)
    if not x.numel():
        dx = torch.empty_like(x, memory_format=suggest_memory_format(x)) if of_x else x.new_empty(0)
        return dx, *(x.new_empty(0) if t is None else t.new_zeros(x.shape[1:2] if t.dim() == 1 else x.shape[:2]) for t in parameters)
    p = _Picture(x, groups, weight, bias, shift, scale, add)
    grad = _dense(grad, p.format)
    given = (*p.sample(grad), *p.sample(p.x), *p.add, p.parts, *p.modulation)
    tile = group_tile(p.pixels, arch_of(x.device))
    programs = cdiv(p.pixels, tile.block * tile.steps)
    sums = x.new_empty((programs, p.batch, p.channels, 3), dtype=torch.float32)
    launch(group_norm_sums_kernel, programs * p.batch * p.channels, x, *given, sums, *p.sizes, tile.steps, programs, eps, 0, SILU=silu,
           PARTS=power_of_2(p.part_count), BLOCK=tile.block, ALIGNED=p.planes and p.pixels % 16 == 0,
           **(p.options | dict(num_warps=tile.warps)), **all_registers(tile.warps, arch_of(x.device)))
    of_h, of_factor, of_xhat = sums.sum(0).unbind(-1)  # [B, C] each
    one_scale = 1.0 if scale is None else 1.0 + over_pixels(scale, x).float().flatten(1)
    wide_weight = 1.0 if weight is None else weight.float()
    factor = wide_weight * one_scale
    size = p.per_group * p.pixels
    means = torch.stack([(part * factor).view(p.batch, groups, -1).sum(-1) / size for part in (of_h, of_factor)], -1)  # [B, groups, 2]
    dx = x.new_empty(0)
    if of_x:
        dx = torch.empty_like(x, memory_format=p.format)
        p.over_groups(group_norm_dx_kernel, eps, silu, *given, means, dx)
    dadd = None
    if add is not None:
        count, pivot, rest, squares = p.parts.view(p.batch, groups, -1, 4).unbind(-1)
        mean = (pivot - pivot[..., :1]) + rest
        away = mean - (count * mean).sum(-1, keepdim=True) / size
        rstd = torch.rsqrt((squares + count * away.square()).sum(-1) / size + eps)
        wide = lambda value: value.repeat_interleave(p.per_group, 1)  # noqa: E731
        dadd = wide(rstd) * (of_h * factor - p.pixels * wide(means[..., 0]) - of_xhat * wide(means[..., 1]))
    of_scale = of_factor * wide_weight + (0.0 if bias is None else of_h * bias.float())
    found = ((of_factor * one_scale).sum(0), (of_h * one_scale).sum(0), of_h, of_scale, dadd)
    return dx, *(x.new_empty(0) if t is None else gradient.to(t.dtype, copy=True) for t, gradient in zip(parameters, found))
