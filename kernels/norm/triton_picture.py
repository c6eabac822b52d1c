"""LayerNorm over the channels of pictures in Triton, in the rounding of ``close``, both directions and any strides: no transposed copy.

A program has some pixels of one picture and walks over their channels several times: for the mean, for what rounding left of it and the squares, (in the
backward: for the means of the gradient,) and for the result. All but the first time they come from a cache. Sums go by pairs: equal values in
another layout have the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.norm.reference import picture_layout
from fusewire.kernels.triton_base import narrow, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.triton_sums import add_up, sum_of_rows
from fusewire.kernels.tuning import PictureTile, all_registers, cdiv, picture_tile


@triton.jit
def _load(x, o_c, x_c, o_pixels, mask):
    """[ROWS, PIXELS] of a picture in float32; ``o_pixels``: the pixels' offsets."""
    return tl.load(x + o_c.to(tl.int64)[:, None] * x_c + o_pixels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def pixel_offsets(i_b, i_pixel, width, x_b, x_h, x_w, MERGED: tl.constexpr):
    """Of pixels of one picture. MERGED: its rows follow one another."""
    if MERGED:
        o = i_pixel.to(tl.int64) * x_w
    else:
        o = (i_pixel // width).to(tl.int64) * x_h + (i_pixel % width).to(tl.int64) * x_w
    return i_b.to(tl.int64) * x_b + o


@triton.jit
def _vector(x, o_c, x_c, channels):
    return tl.load(x + o_c.to(tl.int64) * x_c, mask=o_c < channels, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _statistics(x, x_c, o_pixels, m_pixel, channels, eps, ROWS: tl.constexpr, LEVELS: tl.constexpr, PIXELS: tl.constexpr):
    """(mean, what rounding left of it, 1 / standard deviation) of each pixel."""
    b_sum = tl.zeros([ROWS, PIXELS], tl.float32)
    for i_first in range(0, channels, ROWS):
        o_c = i_first + tl.arange(0, ROWS)
        b_sum += _load(x, o_c, x_c, o_pixels, (o_c < channels)[:, None] & m_pixel[None, :])
    b_mean = sum_of_rows(b_sum, LEVELS, PIXELS) / channels
    b_sum, b_squares = tl.zeros([ROWS, PIXELS], tl.float32), tl.zeros([ROWS, PIXELS], tl.float32)
    for i_first in range(0, channels, ROWS):
        o_c = i_first + tl.arange(0, ROWS)
        mask = (o_c < channels)[:, None] & m_pixel[None, :]
        b_x = tl.where(mask, _load(x, o_c, x_c, o_pixels, mask) - b_mean[None, :], 0.0)
        b_sum += b_x
        b_squares += b_x * b_x
    b_rest = sum_of_rows(b_sum, LEVELS, PIXELS) / channels
    b_variance = tl.maximum(sum_of_rows(b_squares, LEVELS, PIXELS) / channels - b_rest * b_rest, 0.0)  # (NaN comes back with the mean)
    return b_mean, b_rest, tl.rsqrt(b_variance + eps)


# Of the sizes that change with the resolution only the pixels are specialised on, as multiples of 16 are moved in vectors
@triton.jit(do_not_specialize=["width", "tiles"])
def layer_norm_2d_kernel(x, x_b, x_c, x_h, x_w, weight, weight_c, bias, bias_c, out, out_b, out_c, out_w, pixels, width, tiles, channels, eps,
                         MERGED: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, PIXELS: tl.constexpr):
    i_b, i_pixel = tl.program_id(0) // tiles, tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    m_pixel = i_pixel < pixels
    o_x, o_out = pixel_offsets(i_b, i_pixel, width, x_b, x_h, x_w, MERGED), pixel_offsets(i_b, i_pixel, width, out_b, 0, out_w, True)
    b_mean, b_rest, b_rstd = _statistics(x, x_c, o_x, m_pixel, channels, eps, ROWS, LEVELS, PIXELS)
    for i_first in range(0, channels, ROWS):
        o_c = i_first + tl.arange(0, ROWS)
        mask = (o_c < channels)[:, None] & m_pixel[None, :]
        b_y = (_load(x, o_c, x_c, o_x, mask) - b_mean[None, :] - b_rest[None, :]) * b_rstd[None, :]
        if weight is not None:
            b_y *= _vector(weight, o_c, weight_c, channels)
        if bias is not None:
            b_y += _vector(bias, o_c, bias_c, channels)
        tl.store(out + o_c.to(tl.int64)[:, None] * out_c + o_out[None, :], narrow(b_y, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["width", "tiles"])
def layer_norm_2d_backward_kernel(grad, g_b, g_c, g_h, g_w, x, x_b, x_c, x_h, x_w, weight, weight_c, dx, dx_b, dx_c, dx_w, sums, pixels, width, tiles,
                                  channels, eps, MERGED: tl.constexpr, GRAD_MERGED: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr,
                                  PIXELS: tl.constexpr, PIXEL_LEVELS: tl.constexpr):
    """sums [programs, 2, C]: of grad * xhat and of grad."""
    i_program = tl.program_id(0)
    i_b, i_pixel = i_program // tiles, i_program % tiles * PIXELS + tl.arange(0, PIXELS)
    m_pixel = i_pixel < pixels
    o_x, o_grad = pixel_offsets(i_b, i_pixel, width, x_b, x_h, x_w, MERGED), pixel_offsets(i_b, i_pixel, width, g_b, g_h, g_w, GRAD_MERGED)
    b_mean, b_rest, b_rstd = _statistics(x, x_c, o_x, m_pixel, channels, eps, ROWS, LEVELS, PIXELS)
    b_plain, b_by_xhat = tl.zeros([ROWS, PIXELS], tl.float32), tl.zeros([ROWS, PIXELS], tl.float32)
    for i_first in range(0, channels, ROWS):
        o_c = i_first + tl.arange(0, ROWS)
        mask = (o_c < channels)[:, None] & m_pixel[None, :]
        b_xhat = tl.where(mask, (_load(x, o_c, x_c, o_x, mask) - b_mean[None, :] - b_rest[None, :]) * b_rstd[None, :], 0.0)
        b_g = _load(grad, o_c, g_c, o_grad, mask)
        if sums is not None:
            o_sums = i_program.to(tl.int64) * 2 * channels + o_c
            tl.store(sums + o_sums, sum_of_rows(tl.trans(b_g * b_xhat), PIXEL_LEVELS, ROWS), mask=o_c < channels)
            tl.store(sums + (o_sums + channels), sum_of_rows(tl.trans(b_g), PIXEL_LEVELS, ROWS), mask=o_c < channels)
        if weight is not None:
            b_g *= _vector(weight, o_c, weight_c, channels)
        b_plain += b_g
        b_by_xhat += b_g * b_xhat
    if dx is not None:
        # dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd, g = grad * weight
        o_dx = pixel_offsets(i_b, i_pixel, width, dx_b, 0, dx_w, True)
        b_of_g, b_of_product = sum_of_rows(b_plain, LEVELS, PIXELS) / channels, sum_of_rows(b_by_xhat, LEVELS, PIXELS) / channels
        for i_first in range(0, channels, ROWS):
            o_c = i_first + tl.arange(0, ROWS)
            mask = (o_c < channels)[:, None] & m_pixel[None, :]
            b_xhat = (_load(x, o_c, x_c, o_x, mask) - b_mean[None, :] - b_rest[None, :]) * b_rstd[None, :]
            b_g = _load(grad, o_c, g_c, o_grad, mask)
            if weight is not None:
                b_g *= _vector(weight, o_c, weight_c, channels)
            b_dx = (b_g - b_of_g[None, :] - b_xhat * b_of_product[None, :]) * b_rstd[None, :]
            tl.store(dx + o_c.to(tl.int64)[:, None] * dx_c + o_dx[None, :], narrow(b_dx, dx.dtype.element_ty), mask=mask)


def merged(x: torch.Tensor) -> bool:
    """Whether the rows of each picture of x [B, C, H, W] follow one another, so that its pixels are one run."""
    return x.shape[2] == 1 or x.shape[3] == 1 or x.stride(2) == x.shape[3] * x.stride(3)


def picture(x: torch.Tensor) -> tuple:
    """x and its strides over samples, channels, rows and pixels; of merged ones the last is that over all pixels."""
    x, b, c, h, w = strided(x, 4)
    return x, b, c, h, h if x.shape[3] == 1 else w


def _result(out: torch.Tensor | None) -> tuple:
    """``out`` is dense, contiguous or channels last: its pixels are one run."""
    if out is None:
        return None, 0, 0, 0
    x, b, c, _, w = picture(out)
    return x, b, c, w


def _tile(x: torch.Tensor, backward: bool) -> PictureTile:
    _, channels, height, width = x.shape
    run = channels if picture_layout(x) is torch.channels_last else height * width
    return picture_tile(height * width, run, x.dtype.itemsize, backward, arch_of(x.device))


def layer_norm_2d(x, weight, bias, eps: float, exact: bool) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=picture_layout(x))
    batch, channels, height, width = x.shape
    rows, pixels, warps = _tile(x, False)
    tiles = cdiv(height * width, pixels)
    launch(layer_norm_2d_kernel, batch * tiles if channels else 0, x, *picture(x), *strided(weight, 1), *strided(bias, 1), *_result(out), height * width,
           width, tiles, channels, eps, MERGED=merged(x), ROWS=rows, LEVELS=rows.bit_length() - 1, PIXELS=pixels, num_warps=warps, num_stages=1,
           enable_fp_fusion=False)
    return out


def layer_norm_2d_backward(grad, x, weight, eps: float, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=picture_layout(x)) if of_x else None
    batch, channels, height, width = x.shape
    rows, pixels, warps = _tile(x, True)
    tiles = cdiv(height * width, pixels)
    sums = x.new_empty((1, batch * tiles, 2 * channels), dtype=torch.float32) if of_weight or of_bias else None
    launch(layer_norm_2d_backward_kernel, batch * tiles if channels else 0, x, *picture(grad), *picture(x), *strided(weight, 1), *_result(dx), sums,
           height * width, width, tiles, channels, eps, MERGED=merged(x), GRAD_MERGED=merged(grad), ROWS=rows, LEVELS=rows.bit_length() - 1,
           PIXELS=pixels, PIXEL_LEVELS=pixels.bit_length() - 1, num_warps=warps, num_stages=1, enable_fp_fusion=False,
           **(all_registers(warps, arch_of(x.device)) if warps == 16 else {}))
    dx = x.new_empty(0) if dx is None else dx
    if sums is None:
        return dx, x.new_empty(0), x.new_empty(0)
    total = x.new_empty((1, 2 * channels))
    add_up([(sums, total)])
    return dx, total[0, :channels].clone() if of_weight else x.new_empty(0), total[0, channels:].clone() if of_bias else x.new_empty(0)
