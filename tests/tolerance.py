"""The tolerances of the test suite, and the one rule behind those of ops. (A bound that belongs to one comparison, such as what float32 angles of some
thousand radians lose, stands beside it with its reason.)

``close``: the error against float64 is at most twice (mean: 1.5 times) that of plain PyTorch in the same dtype, plus the noise of rounding the
reference itself to that dtype (the flash-attention rule). ``exact``: ``torch.equal``. float64 against float64: 1e-10 relative to the
largest value. What is rounded is not biased: the mean signed error is at most 0.02 units in the last place.
"""

from __future__ import annotations

import torch

MAX_FACTOR, MEAN_FACTOR = 2.0, 1.5
FLOAT64 = 1e-10
BIAS, ENOUGH = 0.02, 2**14  # of so many elements the mean of unbiased errors is 0 within 0.0023 units, one standard deviation

# Whole models of random weights, whose values are of the order of 1: our model against the same one of another library, or swapped against stock.
MODEL_FLOAT64 = 1e-10
MODEL_FLOAT32 = 1e-5  # the same products and sums in another order, through a few blocks
GRADIENTS_FLOAT64 = 1e-9
PIPELINE_FLOAT32 = 1e-4  # several steps of a sampler, Inductor's code, or gradients: what MODEL_FLOAT32 becomes on the way
AUTOCAST = 0.1  # bfloat16's rounding, 2^-8, through a few blocks


def rounding_noise(want: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a tensor loses by being stored in ``dtype``: half a unit in the last place, element by element. (CUDA has no nextafter for float16.)"""
    stored = want.cpu().to(dtype)
    above = torch.nextafter(stored.abs(), torch.full_like(stored, torch.inf)) - stored.abs()
    return above.to(torch.float64) / 2


def errors(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """(maximum, mean) of |got - want| in float64."""
    difference = (got.to(torch.float64) - want.to(got.device, torch.float64)).abs()
    return (difference.max().item(), difference.mean().item()) if difference.numel() else (0.0, 0.0)


def assert_close(got: torch.Tensor, want: torch.Tensor, plain: torch.Tensor, context: str = "") -> None:
    """``got`` is no worse than the rule allows. ``want``: float64 result. ``plain``: eager PyTorch's result in got's dtype."""
    assert got.shape == want.shape, f"{context}: shape {list(got.shape)}, expected {list(want.shape)}"
    assert got.dtype == plain.dtype, f"{context}: dtype {got.dtype}, expected {plain.dtype}"
    assert torch.isfinite(got).all() or not torch.isfinite(want).all(), f"{context}: NaN or infinity where the reference is finite"
    if got.numel() == 0:
        return
    if got.dtype is torch.float64:
        bound = FLOAT64 * max(1.0, want.abs().max().item())
        assert errors(got, want)[0] <= bound, f"{context}: float64 error {errors(got, want)[0]:.3e} > {bound:.3e}"
        return
    noise = rounding_noise(want, got.dtype)
    (worst, mean), (plain_worst, plain_mean) = errors(got, want), errors(plain, want)
    worst_bound = MAX_FACTOR * plain_worst + noise.max().item()
    mean_bound = MEAN_FACTOR * plain_mean + noise.mean().item()
    assert worst <= worst_bound, f"{context}: maximum error {worst:.3e} > {worst_bound:.3e} (plain PyTorch: {plain_worst:.3e})"
    assert mean <= mean_bound, f"{context}: mean error {mean:.3e} > {mean_bound:.3e} (plain PyTorch: {plain_mean:.3e})"


def assert_exact(got: torch.Tensor, want: torch.Tensor, context: str = "") -> None:
    """Same dtype, shape and bits (NaN equal to NaN)."""
    assert got.dtype == want.dtype and got.shape == want.shape, f"{context}: {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan())
    assert same.all(), f"{context}: {(~same).sum().item()} of {same.numel()} elements differ, by at most {errors(got, want)[0]:.3e}"


def assert_within(got: torch.Tensor, want: torch.Tensor, units: float, context: str = "", plain: torch.Tensor | None = None,
                  terms: torch.Tensor | None = None) -> None:
    """For few elements, where the statistics of ``assert_close`` say little: each is within ``units`` machine epsilons of the largest value, or,
    where plain PyTorch's result is given and further off than that, within twice its error. ``terms``, of a sum of all of them: its rounding errors
    are in proportion to their magnitudes, of which little may be left in the sum (Higham, Accuracy and Stability, section 4.2)."""
    assert got.shape == want.shape, f"{context}: shape {list(got.shape)}, expected {list(want.shape)}"
    largest = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    if terms is not None:
        largest = max(largest, terms.abs().sum(0).max().item())
    bound = (FLOAT64 if got.dtype is torch.float64 else units * torch.finfo(got.dtype).eps) * largest
    if plain is not None and got.dtype is not torch.float64:
        bound = max(bound, MAX_FACTOR * errors(plain, want)[0])
    assert errors(got, want)[0] <= bound, f"{context}: error {errors(got, want)[0]:.3e} > {bound:.3e}"


def assert_unbiased(got: torch.Tensor, want: torch.Tensor, context: str = "", least: float = 0.0, unit: torch.dtype | None = None) -> None:
    """The mean signed error of ``got`` against the float64 result, in units of the last place of each element: away from zero (where truncation shows),
    and upwards (where rounding up or down shows). Ties that do not go to the even neighbour show where there are ties. Elements of less than ``least``
    times the mean magnitude are measured in the units of that: where terms are rounded before they are summed, as attention's weights in 16 bits are,
    a sum near zero has their errors, many of its own units. ``unit``: the dtype to which terms were rounded that are summed and stored in a wider one."""
    assert got.shape == want.shape, f"{context}: shape {list(got.shape)}, expected {list(want.shape)}"
    assert got.numel() >= ENOUGH, f"{context}: {got.numel()} elements are too few to tell a bias from chance"
    info, want = torch.finfo(unit or got.dtype), want.to(got.device, torch.float64)
    assert 4 * (want.to(got.dtype) != want).sum() >= got.numel(), f"{context}: results that {got.dtype} holds exactly are not rounded"
    mantissa, exponent = torch.frexp(want.abs().clamp_min(max(info.smallest_normal, least * want.abs().mean().item())))
    error = (got.to(torch.float64) - want) / torch.ldexp(torch.full_like(mantissa, info.eps), exponent - 1)
    for direction, bias in (("away from zero", (error * want.sign()).mean().item()), ("upwards", error.mean().item())):
        assert abs(bias) <= BIAS, f"{context}: errors are {bias:+.4f} units in the last place {direction} in the mean"
