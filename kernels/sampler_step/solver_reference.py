"""One step of a solver that is linear in its tensors, in plain PyTorch: the meaning of ``solver_step``.

Nearly every sampler is one of these (Song et al., 2020; Karras et al., 2022; Lu et al., 2022; Luo et al., 2023): with the model's output m,

    x0  = (x0_x * x / x_divisor + x0_m * m) / x0_divisor, clamped to +-x0_limit
    e   = ((e_x * x + e_m * m + e_x0 * x0) / e_divisor + e_previous * previous) * e_scale
    out = (x * base + x0 * x0 + e * e) * scale + noise * noise                          (left: the column of the table; right: the tensor)

and, where there is a mask, ``(1 - mask) * (known * known + known_noise * known_noise) + mask * out``.
"""

from __future__ import annotations

import torch

from fusewire.kernels.rounding import compute_dtype
from fusewire.kernels.sampler_step.reference import halves, row_of
from fusewire.kernels.sampler_step.tables import SOLVER


def empty_results(sample, wide_x0: bool, keep_slope: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What out, x0 and e are written to."""
    x0 = sample.new_empty(sample.shape, dtype=compute_dtype(sample.dtype) if wide_x0 else sample.dtype)
    return sample.new_empty(sample.shape), x0, torch.empty_like(x0) if keep_slope else x0.new_empty(0)


def contiguous_operands(sample, model_output, uncond, *others) -> list[torch.Tensor | None]:
    """[sample, conditional output, unconditional, *others] for a flat kernel: latents are small and nearly always contiguous, what is not is copied."""
    return [None if x is None else x.contiguous() for x in (sample, *halves(model_output, uncond, sample.shape[0]), *others)]


def solver_step(sample, model_output, uncond, previous, base, noise, mask, known, known_noise, table, step: int, counter, wide_x0: bool, wide_out: bool,
                keep_slope: bool, reciprocal: bool, exact: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, x0, e); e is empty unless ``keep_slope``. A coefficient of 0 leaves its term out, whatever the tensor holds.

    ``exact`` rounds after each operation: what comes from m alone to its dtype, x0 and e to that or (``wide_x0``) to float32, sums of ``out`` likewise
    (``wide_out``). ``reciprocal``: a division is a product with the float32 reciprocal, as PyTorch's CUDA kernels divide by a number.
    """
    cond, uncond = halves(model_output, uncond, sample.shape[0])
    dtype, wide = cond.dtype, compute_dtype(cond.dtype)
    c = dict(zip(SOLVER, row_of(table, step, counter).to(wide)))

    def rounding(narrow: bool):
        return (lambda v: v.to(dtype).to(wide)) if exact and narrow else (lambda v: v)

    def term(name, value, rounded):
        return torch.where(c[name] != 0, rounded(c[name] * value), 0)

    def divided(value, name):
        return value * (1 / c[name]) if reciprocal else value / c[name]

    of_m, of_x0, of_out = rounding(True), rounding(not wide_x0), rounding(not wide_out)
    x, m = sample.to(wide), cond.to(wide)
    if uncond is not None:
        u = uncond.to(wide)
        m = of_m(u + of_m(c["guidance"] * of_m(m - u)))

    x0 = of_x0(divided(of_x0(term("x0_x", x, of_x0)), "x_divisor"))
    x0 = of_x0(divided(of_x0(x0 + term("x0_m", m, of_m)), "x0_divisor"))
    x0 = torch.where(c["x0_limit"] > 0, x0.clamp(-c["x0_limit"], c["x0_limit"]), x0)

    e = of_x0(of_x0(term("e_x", x, of_x0) + term("e_m", m, of_m)) + term("e_x0", x0, of_x0))
    e = of_x0(divided(e, "e_divisor"))
    if previous is not None:
        e = of_x0(e + term("e_previous", previous.to(wide), of_x0))
    e = of_x0(e * c["e_scale"])

    out = term("x", x if base is None else base.to(wide), of_out)
    out = of_out(of_out(out + term("x0", x0, of_x0)) + term("e", e, of_x0))
    out = of_out(out * c["scale"])
    if noise is not None:
        out = of_out(out + term("noise", noise.to(wide), rounding(noise.dtype is dtype)))
    if mask is not None:
        mask, there = mask.to(wide), known.to(wide)
        if known_noise is not None:
            there = of_m(of_m(c["known"] * there) + of_m(c["known_noise"] * known_noise.to(wide)))
        out = of_m(of_m(of_m(1 - mask) * there) + of_m(mask * of_m(out)))
    stored = wide if wide_x0 else dtype
    return out.to(dtype).contiguous(), x0.to(stored).contiguous(), e.to(stored).contiguous() if keep_slope else e.new_empty(0, dtype=stored)
