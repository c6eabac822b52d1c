"""One step of a solver over the latents: the public op, its registration and its backends."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.autograd import recomputing
from fusewire.kernels.cuda_rows import row as cuda_row
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.library import define
from fusewire.kernels.rounding import compute_dtype, is_exact
from fusewire.kernels.sampler_step import native, solver_cuda, solver_reference, triton_limits
from fusewire.kernels.sampler_step.tables import SOLVER, checked_row
from fusewire.kernels.triton_rows import row as triton_row


def _fake_solver(sample, model_output, uncond, previous, base, noise, mask, known, known_noise, table, step, counter, wide_x0, wide_out, keep_slope,
                 reciprocal, exact):
    return solver_reference.empty_results(sample, wide_x0, keep_slope)


_backward, _setup = recomputing(solver_reference.solver_step)
_solver_op = define("solver_step(Tensor sample, Tensor model_output, Tensor? uncond, Tensor? previous, Tensor? base, Tensor? noise, Tensor? mask, "
                    "Tensor? known, Tensor? known_noise, Tensor table, SymInt step, Tensor? counter, bool wide_x0, bool wide_out, bool keep_slope, "
                    "bool reciprocal, bool exact) -> (Tensor, Tensor, Tensor)",
                    fallback=solver_reference.solver_step, fake=_fake_solver, backward=_backward, setup_context=_setup)
_solver = Table("solver_step", [
    Backend("cpu", native.why_not_solver, _solver_op),
    cuda_row(_solver_op, solver_cuda.op, solver_cuda.why_not_solver, solver_cuda.solver_step),
    triton_row(_solver_op, triton_limits.why_not_solver, "sampler_step.solver_step"),
    Backend("reference", always, solver_reference.solver_step),
])


def solver_step(sample, model_output, table, step, *, uncond=None, previous=None, base=None, noise=None, mask=None, known=None, known_noise=None,
                wide_x0: bool = True, wide_out: bool = True, keep_slope: bool = False, reciprocal: bool = False,
                numerics: str = "exact") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Guidance, conversion of the prediction, clamp, update, noise and inpainting of nearly any sampler, in one pass over the latents.

    The formula is in ``solver_reference.py``; ``solver_table`` makes the table of its scalars. Noise is the caller's.

    Args:
        sample: [B, ...] latents x, float32, bfloat16, float16 or float64, any strides.
        model_output: [B, ...] the (conditional) prediction m, or [2B, ...] the batch [uncond; cond]; of sample's dtype.
        table: [S, 19] float64, one row of scalars per step.
        step: the row to use: an int, or a 0-dim int64 tensor on sample's device, read there without synchronising.
        uncond: [B, ...] the unconditional prediction, or None.
        previous: [B, ...] what an earlier step returned as x0 or e (solvers of order two), or None.
        base: [B, ...] the latents that ``out`` starts from, where these are not x (the second stage of Heun's method).
        noise: [B, ...] in sample's dtype, or float32.
        mask: broadcastable to [B, ...], 1 where the picture is made anew, 0 where ``known`` stays; None: all of it is made.
        known, known_noise: [B, ...] the picture that stays, and the noise to put on it, or None where ``known`` has it already.
        wide_x0, wide_out: which parts of the stock chain are float32 (``exact``), and the dtype that x0 and e are returned in.
        keep_slope: whether to return e.
        reciprocal: divisions are products with the float32 reciprocal, as PyTorch's CUDA kernels divide by a number.
        numerics: ``"exact"`` rounds after each operation, as a chain of PyTorch calls does; ``"close"`` once at the end.

    Returns: out, x0 and e (empty unless ``keep_slope``), contiguous.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``step`` or ``numerics`` that is not as stated; RuntimeError or IndexError, where
        the kernel reads it, for a ``step`` in a tensor that lies outside the table.
    Source: Song et al. (2020), "Denoising Diffusion Implicit Models"; Karras et al. (2022); Lu et al. (2022), "DPM-Solver++".
    """
    checks.floating("sample", sample)
    try:
        mask = _checked_mask(sample, model_output, uncond, previous, base, noise, mask, known, known_noise)
    except AttributeError:  # what is no tensor has no shape; to ask each beforehand would take a tenth of the call
        for name, value in (("model_output", model_output), ("uncond", uncond), ("previous", previous), ("base", base), ("noise", noise), ("mask", mask),
                            ("known", known), ("known_noise", known_noise)):
            if not isinstance(value, torch.Tensor) and (value is not None or name == "model_output"):
                raise TypeError(f"{name} is a {type(value).__name__}; it should be a torch.Tensor") from None
        raise
    step, counter = checked_row(table, step, SOLVER, sample.device)
    return _solver(sample, model_output, uncond, previous, base, noise, mask, known, known_noise, table, step, counter, wide_x0, wide_out, keep_slope,
                   reciprocal, is_exact(numerics))


def _checked_mask(sample, model_output, uncond, previous, base, noise, mask, known, known_noise) -> torch.Tensor | None:
    """The mask in sample's shape; all the tensors are as stated."""
    shape, dtype, device = sample.shape, sample.dtype, sample.device
    if not shape:
        raise ValueError("sample has no dimension; it should be [B, ...]")
    got = model_output.shape
    if got != shape and (uncond is not None or got != (2 * shape[0], *shape[1:])):
        wanted = f"{list(shape)}" if uncond is not None else f"{list(shape)}, or {[2 * shape[0], *shape[1:]]} for [uncond; cond]"
        raise ValueError(f"model_output has shape {list(got)}; it should be {wanted}")
    if mask is not None:
        if known is None:
            raise ValueError("known is None; a mask needs what stays where it is 0")
        mask = _expanded(mask, shape)
    if model_output.dtype is not dtype or model_output.device != device:
        _explain(sample, model_output, uncond, previous, base, noise, mask, known, known_noise)
    for tensor in (uncond, base, mask, known, known_noise):
        if tensor is not None and not (tensor.dtype is dtype and tensor.shape == shape and tensor.device == device):
            _explain(sample, model_output, uncond, previous, base, noise, mask, known, known_noise)
    for tensor in (previous, noise):
        if tensor is not None and not (tensor.dtype in (dtype, compute_dtype(dtype)) and tensor.shape == shape and tensor.device == device):
            _explain(sample, model_output, uncond, previous, base, noise, mask, known, known_noise)
    return mask


def _explain(sample, model_output, uncond, previous, base, noise, mask, known, known_noise) -> None:
    """Raise what is wrong with one of the tensors."""
    dtype, shape, device = sample.dtype, sample.shape, sample.device
    both = tuple(dict.fromkeys((dtype, compute_dtype(dtype))))
    for name, tensor, dtypes in (("model_output", model_output, (dtype,)), ("uncond", uncond, (dtype,)), ("previous", previous, both),
                                 ("base", base, (dtype,)), ("noise", noise, both), ("mask", mask, (dtype,)), ("known", known, (dtype,)),
                                 ("known_noise", known_noise, (dtype,))):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it should be {' or '.join(map(str, dtypes))}, as sample has {dtype}")
        if tensor.shape != shape and name != "model_output":
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it should be {list(shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; it should be on {device}, where sample is")


def _expanded(mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(f"mask has shape {list(mask.shape)}; it should be one that broadcasts to {list(shape)}") from None
