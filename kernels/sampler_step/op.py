"""A sampler's step over the latents: the public op, its registration and its backends."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.autograd import recomputing
from fusewire.kernels.cuda_rows import row as cuda_row
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.library import define
from fusewire.kernels.rounding import is_exact
from fusewire.kernels.sampler_step import cuda, native, reference, triton_limits
from fusewire.kernels.sampler_step.tables import COLUMNS, checked_row
from fusewire.kernels.triton_rows import row as triton_row


def _fake_flow_euler(sample, model_output, uncond, table, step, counter, exact):
    return sample.new_empty(sample.shape, dtype=model_output.dtype)


_backward, _setup = recomputing(reference.flow_euler_step)
_flow_euler_op = define("flow_euler_step(Tensor sample, Tensor model_output, Tensor? uncond, Tensor table, SymInt step, Tensor? counter, bool exact)"
                        " -> Tensor",
                        fallback=reference.flow_euler_step, fake=_fake_flow_euler, backward=_backward, setup_context=_setup)
native.compare_with_stock(_flow_euler_op)
_flow_euler = Table("flow_euler_step", [
    Backend("cpu", native.why_not_flow_euler, _flow_euler_op),
    cuda_row(_flow_euler_op, cuda.op, cuda.why_not_flow_euler, cuda.flow_euler_step),
    triton_row(_flow_euler_op, triton_limits.why_not_flow_euler, "sampler_step.flow_euler_step"),
    Backend("reference", always, reference.flow_euler_step),
])
_METHODS = {"flow_euler": _flow_euler}


def sampler_step(sample, model_output, table, step, *, uncond=None, method: str = "flow_euler", numerics: str = "exact") -> torch.Tensor:
    """Classifier-free guidance and one step of a sampler, in one pass over the latents.

    ``flow_euler``: ``sample + dt * v`` with ``v = uncond + guidance * (cond - uncond)``, or ``v = model_output`` where there is no guidance.

    Args:
        sample: [B, ...] latents, float32, bfloat16, float16 or float64, any strides.
        model_output: [B, ...] the (conditional) prediction, or [2B, ...] the batch [uncond; cond]; any strides.
        table: [S, K] float64, one row of scalars per step; for ``flow_euler`` made by ``flow_euler_table``: (dt, guidance).
        step: the row to use: an int, or a 0-dim int64 tensor on sample's device, read there without synchronising.
        uncond: [B, ...] the unconditional prediction, or None.
        method: ``"flow_euler"``.
        numerics: ``"exact"`` rounds as diffusers' pipeline and FlowMatchEulerDiscreteScheduler.step do, ``"close"`` once at the end.

    Returns: sample's shape, contiguous, in model_output's dtype.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``step``, ``method`` or ``numerics`` that is not as stated; RuntimeError or
        IndexError, where the kernel reads it, for a ``step`` in a tensor that lies outside the table.
    Source: Ho and Salimans (2022), "Classifier-Free Diffusion Guidance"; Liu et al. (2022), "Flow Straight and Fast".
    """
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; it should be one of {', '.join(map(repr, _METHODS))}")
    checks.floating("sample", sample)
    checks.floating("model_output", model_output)
    shape, got = sample.shape, model_output.shape
    if not sample.dim():
        raise ValueError("sample has no dimension; it should be [B, ...]")
    if got != shape and (uncond is not None or got != (2 * shape[0], *shape[1:])):
        wanted = f"{list(shape)}" if uncond is not None else f"{list(shape)}, or {[2 * shape[0], *shape[1:]]} for [uncond; cond]"
        raise ValueError(f"model_output has shape {list(got)}; it should be {wanted}")
    if uncond is not None:
        checks.floating("uncond", uncond)
        if uncond.dtype is not model_output.dtype:
            raise TypeError(f"uncond has dtype {uncond.dtype}; it should be {model_output.dtype}, as model_output has")
        if uncond.shape != shape:
            raise ValueError(f"uncond has shape {list(uncond.shape)}; it should be {list(shape)}")
    device = sample.device
    step, counter = checked_row(table, step, COLUMNS[method], device)
    for name, tensor in (("model_output", model_output), ("uncond", uncond)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; it should be on {device}, where sample is")
    return _METHODS[method](sample, model_output, uncond, table, step, counter, is_exact(numerics))
