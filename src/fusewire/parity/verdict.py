"""The project's rule, and the figures it is judged by.

``exact``: ``torch.equal`` to the stock module. ``close``: the largest error against float64 is at most twice that of the stock module in the
same dtype, the mean error at most 1.5 times, each plus what storing the true value in that dtype costs anyway; in float64, in which stock is
the truth, at most 1e-10 of the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MAX_FACTOR, MEAN_FACTOR = 2.0, 1.5
FLOAT64 = 1e-10  # of the largest value
PSNR_FLOOR = {torch.float64: 60.0, torch.float32: 60.0, torch.bfloat16: 35.0, torch.float16: 35.0}  # dB, decoded pictures, ``close``


@dataclass(frozen=True)
class Measure:
    """Errors against float64 of the fused and of the stock side, their difference, and the verdict. Absolute values, in the output's units."""

    max_error: float
    mean_error: float
    stock_max_error: float
    stock_mean_error: float
    max_difference: float  # fused against stock
    mean_difference: float
    mismatch: float  # share of elements that differ from stock's, 0 to 1
    equal: bool  # torch.equal, output by output
    holds: bool
    reason: str  # why it does not hold, or ""


def measure(got: Sequence[torch.Tensor], stock: Sequence[torch.Tensor], true: Sequence[torch.Tensor], exact: bool) -> Measure:
    """Judge the tensors ``got`` against ``stock`` (same dtype) and ``true`` (float64); one list entry per output of the op or module."""
    got, stock, true = list(got), list(stock), list(true)
    if _signature(got) != _signature(stock) or [t.shape for t in stock] != [t.shape for t in true]:
        return _broken(f"outputs are {_signature(got)}; stock's are {_signature(stock)}")
    if not got or not sum(t.numel() for t in got):
        return _broken("there is no output to compare")
    equal = all(torch.equal(a, b) for a, b in zip(got, stock))
    reasons = []
    for a, b, want in zip(got, stock, true):
        if bool((~torch.isfinite(a) & torch.isfinite(b)).any()):
            reasons.append("NaN or infinity where stock is finite")
        elif not exact and a.numel():
            reasons += _breaches(a, b, want)
    if exact and not equal:
        reasons.append("not torch.equal to stock")
    error, stock_error, difference = (_flat(x, y) for x, y in ((got, true), (stock, true), (got, stock)))
    differs = sum(((a != b) & ~(a.isnan() & b.isnan())).sum().item() for a, b in zip(got, stock)) / difference.numel()
    return Measure(error.max().item(), error.mean().item(), stock_error.max().item(), stock_error.mean().item(),
                   difference.max().item(), difference.mean().item(), differs, equal, not reasons, "; ".join(dict.fromkeys(reasons)))


def _signature(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)


def _broken(reason: str) -> Measure:
    return Measure(*[math.nan] * 6, 1.0, False, False, reason)


def _flat(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(a.to(torch.float64) - b.to(torch.float64)).abs().flatten() for a, b in zip(left, right)])


def _breaches(got: torch.Tensor, stock: torch.Tensor, true: torch.Tensor) -> list[str]:
    if got.dtype is torch.float64:  # the truth itself: stock's error is none
        error, bound = _flat([got], [true]).max().item(), FLOAT64 * max(1.0, true.abs().max().item())
        return [] if error <= bound else [f"maximum error {error:.3e} is over the bound {bound:.3e}"]
    noise = rounding_noise(true, got.dtype)
    error, stock_error = _flat([got], [true]), _flat([stock], [true])
    found = []
    for what, factor, reduce in (("maximum", MAX_FACTOR, torch.max), ("mean", MEAN_FACTOR, torch.mean)):
        bound = factor * reduce(stock_error).item() + reduce(noise).item()
        if not reduce(error).item() <= bound:
            found.append(f"{what} error {reduce(error).item():.3e} is over the bound {bound:.3e}")
    return found


def rounding_noise(true: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of each element of ``true`` in ``dtype``: what storing it costs."""
    stored = true.to(dtype).abs()
    above = torch.nextafter(stored, torch.full_like(stored, torch.inf))
    return (above.to(torch.float64) - stored.to(torch.float64)) / 2


def psnr(picture: torch.Tensor, stock: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two pictures with values in 0..1; infinite where they are equal."""
    mse = (picture.to(torch.float64) - stock.to(torch.float64)).square().mean().item()
    return math.inf if mse == 0 else -10 * math.log10(mse) if mse == mse else math.nan
