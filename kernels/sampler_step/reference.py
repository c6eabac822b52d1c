"""One step of a sampler over the latents, guidance included, in plain PyTorch: the meaning of the room's ops.

Flow-matching Euler: Lipman et al., "Flow Matching for Generative Modeling" (2022); Liu et al., "Flow Straight and Fast" (2022). Guidance: Ho and
Salimans, "Classifier-Free Diffusion Guidance" (2022).
"""

from __future__ import annotations

import torch

from fusewire.kernels.rounding import compute_dtype


def halves(model_output, uncond, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(conditional, unconditional or None) from one tensor, a batch [uncond; cond], or two tensors."""
    if uncond is None and model_output.shape[0] != batch:
        uncond, model_output = model_output.chunk(2)
    return model_output, uncond


def row_of(table, step: int, counter) -> torch.Tensor:
    """The scalars of this step: ``table[step]``, or ``table[counter]`` read on the device."""
    return table[step] if counter is None else table.index_select(0, counter.reshape(1))[0]


def flow_euler_step(sample, model_output, uncond, table, step: int, counter, exact: bool) -> torch.Tensor:
    """sample + dt * (uncond + guidance * (cond - uncond)), dt and guidance from the table's row; model_output's dtype."""
    row = row_of(table, step, counter)
    cond, uncond = halves(model_output, uncond, sample.shape[0])
    if not exact:
        wide = compute_dtype(torch.promote_types(sample.dtype, cond.dtype))
        velocity = cond.to(wide)
        if uncond is not None:
            uncond = uncond.to(wide)  # once: its gradient is summed before it is rounded
            velocity = uncond + row[1].to(wide) * (velocity - uncond)
        return (sample.to(wide) + row[0].to(wide) * velocity).to(cond.dtype).contiguous()
    if uncond is not None:
        difference = cond - uncond
        # Pipelines multiply by a Python number, which keeps float32 precision beside a 16-bit tensor
        scaled = difference.to(compute_dtype(cond.dtype)) * row[1].to(compute_dtype(cond.dtype))
        cond = uncond + scaled.to(cond.dtype)
    # FlowMatchEulerDiscreteScheduler.step: float32 sample, but dt is a 0-dim float32 tensor, and dt * output has the output's dtype
    return (sample.to(torch.float32) + row[0].to(torch.float32) * cond).to(cond.dtype).contiguous()
