"""Global response normalisation in Triton, in the rounding of ``close``, both directions and any strides: no transposed copy.

A first kernel sums over parts of each picture, a block of channels a program; a second, one program a sample, adds the parts up and takes the mean over the
channels; a third has one tile of pixels a program and writes the result, or the gradient of x. How many parts there are follows from a picture's size and
channels, never from the batch; sums go by halves: no atomics, the same bits every time and in any layout of equal values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.norm.triton_picture import merged, picture, pixel_offsets
from fusewire.kernels.rounding import promoted
from fusewire.kernels.triton_base import narrow, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import all_registers, cdiv, parts_tile, response_tile

AT_ONCE = 16  # samples that a program of the sums over the batch adds up in one step


@triton.jit
def _load(x, o_pixels, o_c, x_c, mask):
    """[ROWS, BLOCK] of a picture in float32; ``o_pixels``: the pixels' offsets."""
    return tl.load(x + (o_pixels[:, None] + o_c.to(tl.int64)[None, :] * x_c), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _vector(x, o_c, x_c, channels):
    return tl.load(x + o_c.to(tl.int64) * x_c, mask=o_c < channels, other=0.0).to(tl.float32)


@triton.jit
def _kept(totals, i_row, o_c, channels):
    return tl.load(totals + (i_row * channels + o_c), mask=o_c < channels, other=0.0)


@triton.jit
def _sum_of_rows(b, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """[2**LEVELS, BLOCK] -> [BLOCK], the first half of the rows and the second, again and again: one order of summation whatever the layout in registers.
    (A thread has rows that are far apart: what is left for shared memory is small.)"""
    for _ in tl.static_range(LEVELS):
        b = tl.sum(tl.reshape(b, [2, b.shape[0] // 2, BLOCK]), 0)
    return tl.sum(b, 0)


@triton.jit
def _sum_of_all(b, LEVELS: tl.constexpr):
    """[2**LEVELS] -> a number, in such an order."""
    for _ in tl.static_range(LEVELS):
        b = tl.sum(tl.reshape(b, [2, b.shape[0] // 2]), 0)
    return tl.sum(b, 0)


@triton.jit(do_not_specialize=["width", "parts", "blocks", "steps"])
def response_sums_kernel(x, x_b, x_c, x_h, x_w, grad, g_b, g_c, g_h, g_w, sums, pixels, width, channels, parts, blocks, steps, MERGED: tl.constexpr,
                         GRAD_MERGED: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """sums [kinds, B, parts, C] over ``steps`` tiles of pixels: of x^2, and where there is a gradient of grad * x and of grad."""
    i_block, i_part, i_b = tl.program_id(0) % blocks, tl.program_id(0) // blocks % parts, tl.program_id(0) // blocks // parts
    o_c = i_block * BLOCK + tl.arange(0, BLOCK)
    b_squares = tl.zeros([ROWS, BLOCK], tl.float32)
    if grad is not None:
        b_products, b_grads = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for i_step in range(steps):
        i_pixel = (i_part * steps + i_step) * ROWS + tl.arange(0, ROWS)
        mask = (i_pixel < pixels)[:, None] & (o_c < channels)[None, :]
        b_x = _load(x, pixel_offsets(i_b, i_pixel, width, x_b, x_h, x_w, MERGED), o_c, x_c, mask)
        b_squares += b_x * b_x
        if grad is not None:
            b_g = _load(grad, pixel_offsets(i_b, i_pixel, width, g_b, g_h, g_w, GRAD_MERGED), o_c, g_c, mask)
            b_products += b_g * b_x
            b_grads += b_g
    kind = (tl.num_programs(0) // blocks).to(tl.int64) * channels
    o_sums = (tl.program_id(0) // blocks).to(tl.int64) * channels + o_c
    tl.store(sums + o_sums, _sum_of_rows(b_squares, LEVELS, BLOCK), mask=o_c < channels)
    if grad is not None:
        tl.store(sums + (kind + o_sums), _sum_of_rows(b_products, LEVELS, BLOCK), mask=o_c < channels)
        tl.store(sums + (2 * kind + o_sums), _sum_of_rows(b_grads, LEVELS, BLOCK), mask=o_c < channels)


@triton.jit
def _over_parts(sums, i_row, parts, o_c, channels, ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK]: the sum over the parts of one sample and kind, the ``i_row``-th of them."""
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_first in range(0, parts, ROWS):
        i_part = i_first + tl.arange(0, ROWS)
        o_sums = ((i_row * parts + i_part) * channels)[:, None] + o_c[None, :]
        b_sum += tl.load(sums + o_sums, mask=(i_part < parts)[:, None] & (o_c < channels)[None, :], other=0.0)
    return _sum_of_rows(b_sum, LEVELS, BLOCK)


@triton.jit(do_not_specialize=["parts"])
def response_means_kernel(sums, weight, weight_c, totals, means, parts, channels, eps, ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
                          BLOCK_LEVELS: tl.constexpr):
    """One sample. totals [kinds, B, C]: its channels' norms; where there is a weight, which the gradient needs, their sums of grad * x and of grad too.
    means [2, B]: scale = 1 / (mean(norm) + eps), and scale * mean(weight * product * norm)."""
    i_b, samples = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    b_norms, b_through = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i_first in range(0, channels, BLOCK):
        o_c = i_first + tl.arange(0, BLOCK)
        o_total = i_b * channels + o_c
        b_norm = tl.sqrt_rn(_over_parts(sums, i_b, parts, o_c, channels, ROWS, LEVELS, BLOCK))
        tl.store(totals + o_total, b_norm, mask=o_c < channels)
        b_norms += b_norm
        if weight is not None:
            b_product = _over_parts(sums, samples + i_b, parts, o_c, channels, ROWS, LEVELS, BLOCK)
            b_grad = _over_parts(sums, 2 * samples + i_b, parts, o_c, channels, ROWS, LEVELS, BLOCK)
            tl.store(totals + (samples * channels + o_total), b_product, mask=o_c < channels)
            tl.store(totals + (2 * samples * channels + o_total), b_grad, mask=o_c < channels)
            b_through += _vector(weight, o_c, weight_c, channels) * b_product * b_norm
    # `/` errs by up to two units, which all of the sample would have
    scale = tl.div_rn(1.0, tl.div_rn(_sum_of_all(b_norms, BLOCK_LEVELS), channels * 1.0) + eps)
    tl.store(means + i_b, scale)
    if weight is not None:
        tl.store(means + (samples + i_b), tl.div_rn(_sum_of_all(b_through, BLOCK_LEVELS), channels * 1.0) * scale)


@triton.jit(do_not_specialize=["width", "samples", "tiles", "blocks"])
def response_apply_kernel(x, x_b, x_c, x_h, x_w, grad, g_b, g_c, g_h, g_w, weight, weight_c, bias, bias_c, totals, means, out, pixels, width, channels,
                          samples, tiles, blocks, MERGED: tl.constexpr, GRAD_MERGED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out [B, pixels, C]: the result; where there is a gradient, that of x."""
    i_block, i_tile, i_b = tl.program_id(0) % blocks, tl.program_id(0) // blocks % tiles, (tl.program_id(0) // blocks // tiles).to(tl.int64)
    o_c, i_pixel = i_block * BLOCK + tl.arange(0, BLOCK), i_tile * ROWS + tl.arange(0, ROWS)
    mask = (i_pixel < pixels)[:, None] & (o_c < channels)[None, :]
    b_x = _load(x, pixel_offsets(i_b, i_pixel, width, x_b, x_h, x_w, MERGED), o_c, x_c, mask)
    b_norm, scale = _kept(totals, i_b, o_c, channels), tl.load(means + i_b)
    b_weight = _vector(weight, o_c, weight_c, channels)
    b_factor = 1.0 + b_weight * (b_norm * scale)
    if grad is None:
        b_y = b_x * b_factor[None, :] + _vector(bias, o_c, bias_c, channels)[None, :]
    else:
        # With S the sum of grad * x: what x gets by way of its norm is its share x / norm, of a norm of zero none, of
        # (weight * S - scale * mean(weight * S * norm)) * scale
        b_product = _kept(totals, samples.to(tl.int64) + i_b, o_c, channels)
        b_of_norm = (b_weight * b_product - tl.load(means + (samples.to(tl.int64) + i_b))) * scale
        b_share = tl.where(b_norm == 0, 0.0, tl.div_rn(b_of_norm, tl.where(b_norm == 0, 1.0, b_norm)))
        b_g = _load(grad, pixel_offsets(i_b, i_pixel, width, g_b, g_h, g_w, GRAD_MERGED), o_c, g_c, mask)
        b_y = b_g * b_factor[None, :] + b_x * b_share[None, :]
    o_out = ((i_b * pixels + i_pixel) * channels)[:, None] + o_c[None, :]
    tl.store(out + o_out, narrow(b_y, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples"])
def response_affine_kernel(totals, means, dweight, dbias, samples, channels, ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of weight, norm * scale * product, and of bias, summed over the samples."""
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_weight, b_bias = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    kind = samples.to(tl.int64) * channels
    for i_first in range(0, samples, ROWS):
        i_b = (i_first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (i_b < samples)[:, None] & (o_c < channels)[None, :]
        o_total = (i_b * channels)[:, None] + o_c[None, :]
        b_norm, b_scale = tl.load(totals + o_total, mask=mask, other=0.0), tl.load(means + i_b, mask=i_b < samples, other=0.0)
        b_weight += b_norm * b_scale[:, None] * tl.load(totals + (kind + o_total), mask=mask, other=0.0)
        b_bias += tl.load(totals + (2 * kind + o_total), mask=mask, other=0.0)
    o_out = o_c.to(tl.int64)
    tl.store(dweight + o_out, narrow(_sum_of_rows(b_weight, LEVELS, BLOCK), dweight.dtype.element_ty), mask=o_c < channels)
    tl.store(dbias + o_out, narrow(_sum_of_rows(b_bias, LEVELS, BLOCK), dbias.dtype.element_ty), mask=o_c < channels)


def _pixels(x: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """x [B, H, W, C]: pixels of a picture, its width, and the same as [B, C, H, W]."""
    return x.shape[1] * x.shape[2], x.shape[2], x.permute(0, 3, 1, 2)


def _totals(grad: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``response_means_kernel``'s totals and means; of forwards alone where there is neither a gradient nor a weight."""
    batch, channels = x.shape[0], x.shape[3]
    pixels, width, seen = _pixels(x)
    of_grad = None if grad is None else _pixels(grad)[2]
    kinds = 1 if grad is None else 3
    arch = arch_of(x.device)
    tile = response_tile(pixels, channels, arch)
    parts, blocks = cdiv(pixels, tile.pixels * tile.steps), cdiv(channels, tile.channels)
    sums = x.new_empty((kinds, batch, parts, channels), dtype=torch.float32)
    launch(response_sums_kernel, batch * parts * blocks, x, *picture(seen), *(strided(None, 4) if grad is None else picture(of_grad)), sums, pixels, width,
           channels, parts, blocks, tile.steps, MERGED=merged(seen), GRAD_MERGED=grad is None or merged(of_grad), ROWS=tile.pixels,
           LEVELS=tile.pixels.bit_length() - 1, BLOCK=tile.channels, num_warps=tile.warps, num_stages=1, enable_fp_fusion=False, **all_registers(tile.warps, arch))
    at_once = parts_tile(parts, channels, arch)
    totals, means = x.new_empty((kinds, batch, channels), dtype=torch.float32), x.new_empty((2, batch), dtype=torch.float32)
    launch(response_means_kernel, batch if channels else 0, x, sums, *strided(weight, 1), totals, means, parts, channels, eps, ROWS=at_once.parts,
           LEVELS=at_once.parts.bit_length() - 1, BLOCK=at_once.channels, BLOCK_LEVELS=at_once.channels.bit_length() - 1, num_warps=at_once.warps,
           num_stages=1, enable_fp_fusion=False, **all_registers(at_once.warps, arch))
    return totals, means


def _apply(grad: torch.Tensor | None, x, weight, bias, totals, means, out: torch.Tensor) -> torch.Tensor:
    batch, channels = x.shape[0], x.shape[3]
    pixels, width, seen = _pixels(x)
    of_grad = None if grad is None else _pixels(grad)[2]
    tile = response_tile(pixels, channels, arch_of(x.device))
    tiles, blocks = cdiv(pixels, tile.pixels), cdiv(channels, tile.channels)
    launch(response_apply_kernel, batch * tiles * blocks, x, *picture(seen), *(strided(None, 4) if grad is None else picture(of_grad)),
           *strided(weight, 1), *strided(bias, 1), totals, means, out, pixels, width, channels, batch, tiles, blocks, MERGED=merged(seen),
           GRAD_MERGED=grad is None or merged(of_grad), ROWS=tile.pixels, BLOCK=tile.channels, num_warps=2 * tile.warps, num_stages=1,
           enable_fp_fusion=False)
    return out


def global_response_norm(x, weight, bias, eps: float) -> torch.Tensor:
    totals, means = _totals(None, x, None, eps)
    return _apply(None, x, weight, bias, totals, means, x.new_empty(x.shape, dtype=promoted(x.dtype, weight, bias)))


def global_response_norm_backward(grad, x, weight, eps: float, of_x: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, channels = x.shape[0], x.shape[3]
    totals, means = _totals(grad, x, weight, eps)
    dx = _apply(grad, x, weight, None, totals, means, x.new_empty(x.shape)) if of_x else x.new_empty(0)
    dweight, dbias = x.new_empty(channels), x.new_empty(channels)
    launch(response_affine_kernel, cdiv(channels, 64), x, totals, means, dweight, dbias, batch, channels, ROWS=AT_ONCE, LEVELS=AT_ONCE.bit_length() - 1,
           BLOCK=64, num_warps=4, num_stages=1, enable_fp_fusion=False)
    return dx, dweight, dbias
