"""The scalars of each step of a schedule, computed once: float64 tables [S, K] whose rows the sampler step reads on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusewire.kernels import checks

COLUMNS = {"flow_euler": ("dt", "guidance")}
# solver_step's columns and what they are where nothing is said: the term is absent (0), or nothing is scaled or divided (1).
SOLVER = {
    "guidance": 1.0,
    "x0_x": 0.0, "x_divisor": 1.0, "x0_m": 0.0, "x0_divisor": 1.0, "x0_limit": 0.0,
    "e_x": 0.0, "e_m": 0.0, "e_x0": 0.0, "e_divisor": 1.0, "e_previous": 0.0, "e_scale": 1.0,
    "x": 0.0, "x0": 0.0, "e": 0.0, "scale": 1.0, "noise": 0.0,
    "known": 1.0, "known_noise": 0.0,
}
PLACE = {name: i for i, name in enumerate(SOLVER)}


def checked_row(table, step, columns, device: torch.device) -> tuple[int, torch.Tensor | None]:
    """``step`` as a number and None, or as 0 and the counter; TypeError or ValueError where it or ``table`` is not what the public ops state."""
    if not isinstance(table, torch.Tensor) or table.dtype is not torch.float64:
        raise TypeError(f"table is a {getattr(table, 'dtype', type(table).__name__)}; it should be a float64 tensor")
    if table.dim() != 2 or table.shape[1] != len(columns):
        raise ValueError(f"table has shape {list(table.shape)}; it should be [S, {len(columns)}]: {', '.join(columns)}")
    counter = None
    if isinstance(step, torch.Tensor):
        if step.dtype is not torch.int64 or step.dim():
            raise TypeError(f"step is a {step.dtype} tensor of shape {list(step.shape)}; it should be an int or a 0-dim int64 tensor")
        counter, step = step, 0
    elif not isinstance(step, (int, torch.SymInt)):
        raise TypeError(f"step is {step!r}; it should be an int or a 0-dim int64 tensor")
    elif not 0 <= step < table.shape[0]:
        raise ValueError(f"step is {step}; it should be from 0 to {table.shape[0] - 1}")
    if table.device != device or (counter is not None and counter.device != device):
        name, tensor = ("table", table) if table.device != device else ("step", counter)
        raise ValueError(f"{name} is on {tensor.device}; it should be on {device}, where sample is")
    return step, counter


def flow_euler_table(sigmas: torch.Tensor, guidance_scale: float | Sequence[float] = 1.0) -> torch.Tensor:
    """The table of flow-matching Euler: row i holds ``sigmas[i + 1] - sigmas[i]`` and the guidance scale of step i.

    Args:
        sigmas: [S + 1], the noise levels with the final 0, as a scheduler holds them. Differences are taken in their own dtype, as schedulers do.
        guidance_scale: one number for all steps, or S of them (guidance in an interval: 1 outside it).

    Returns: [S, 2] float64 on sigmas' device.
    Raises: TypeError for sigmas that are no floating tensor, ValueError for sigmas of another rank, or fewer than two, or a number of guidance scales that is not S.
    """
    checks.floating("sigmas", sigmas)
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas has shape {list(sigmas.shape)}; it should be [S + 1] with S of at least 1")
    steps = len(sigmas) - 1
    scales = torch.as_tensor(guidance_scale, dtype=torch.float64, device=sigmas.device)
    if scales.shape not in ((), (steps,)):
        raise ValueError(f"guidance_scale has shape {list(scales.shape)}; it should be a number or {steps} numbers")
    return torch.stack(((sigmas[1:] - sigmas[:-1]).to(torch.float64), scales.expand(steps)), dim=1)


def solver_table(steps: int, **columns: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
    """The table of ``solver_step``: its columns by name, each one number for all steps or ``steps`` of them; the others have their defaults.

    Returns: [steps, 19] float64, on the CPU.
    Raises: ValueError for an unknown column, or one with another number of values.
    """
    if unknown := columns.keys() - SOLVER.keys():
        raise ValueError(f"{min(unknown)} is no column; the columns are {', '.join(SOLVER)}")
    table = torch.tensor(list(SOLVER.values()), dtype=torch.float64, device="cpu").repeat(steps, 1)
    for name, values in columns.items():
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        if values.shape not in ((), (steps,)):
            raise ValueError(f"{name} has shape {list(values.shape)}; it should be a number or {steps} numbers")
        table[:, PLACE[name]] = values
    return table
