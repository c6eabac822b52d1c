"""The family of schedulers. Here ``FlowMatchEulerDiscreteScheduler``, its step in one pass, without the look-up that makes the first step wait for the
device; the others are in schedulers/."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap.families import Candidate, Family
from fusewire.swap.fused import MAKERS, fused_class, stock_of, unknown_forward
from fusewire.swap.schedulers import consistency, ddim, deis, dpm, dpm2, euler, flow_heun, inverse, lms, pndm, singlestep, unipc  # noqa: F401: they fill KNOWN
from fusewire.swap.schedulers.common import KNOWN, Known, Scalars, kept, prepared, stamp, uploaded, usable
from fusewire.swap.schedulers.ddim import NOISE
from fusewire.swap.schedulers.layout import laid
from fusewire.swap.schedulers.noise import of_sigmas

Stock = FlowMatchEulerDiscreteScheduler
# As diffusers 0.40 to 0.42 has them.
STEP = {Stock.step: ("9c0061a109be",), Stock._init_step_index: ("e9dd7f7f1a8b",), Stock.index_for_timestep: ("3a28dbd8a5b6",),
        Stock.set_timesteps: ("19a2a6044f7b", "1dc788ed5307")}


def _maker(how: How) -> dict:
    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0, generator=None, per_token_timesteps=None,
             return_dict=True):
        index = _index(self, timestep)
        sigmas = self.sigmas
        stochastic = self.config.stochastic_sampling
        if (index is None or per_token_timesteps is not None or not 0 <= index < len(sigmas) - 1 or sigmas.dtype is not torch.float32
                or not (usable if stochastic else _same)(model_output, sample)):
            return Stock.step(self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, per_token_timesteps, return_dict)
        if stochastic:
            table = prepared(self, (), (sigmas,), sample, how.numerics == "exact", lambda scalars: _stochastic_columns(scalars, sigmas))
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            previous, _, _ = ops.solver_step(sample, model_output, table.rows, index, noise=noise, numerics=how.numerics)
        else:
            previous = ops.sampler_step(sample, model_output, _table(self, sigmas, sample.device), index, numerics=how.numerics)
        previous = laid(previous, (sample, model_output), how.numerics)
        self._step_index = index + 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        # Made on the CPU, so that whether all timesteps differ is known without asking the device, and then moved: the same bits.
        Stock.set_timesteps(self, num_inference_steps, None, sigmas, mu, timesteps)
        values = self.timesteps.tolist()
        distinct = len(set(values)) == len(values) and all(map(math.isfinite, values))
        if device is not None:
            self.sigmas, self.timesteps = self.sigmas.to(device), self.timesteps.to(device)
        self._fusewire_distinct = (self.timesteps, stamp(self.timesteps)) if distinct else None

    def scale_model_input(self, sample, timestep=None):
        """Bria's pipeline asks it of every scheduler whose class is not the stock one."""
        return sample

    return {"step": step, "set_timesteps": set_timesteps, "scale_model_input": scale_model_input,
            **of_sigmas(Stock, "scale_noise", ("f2e3cdf77941",), lambda scheduler, sample, noise, sigma: sigma * noise + (1.0 - sigma) * sample)}


def _stochastic_columns(scalars: Scalars, sigmas: torch.Tensor) -> dict:
    """x0, noised anew to the next level."""
    return dict(x0_x=1.0, x0_m=-scalars.left(sigmas[:-1]), x0=1.0 - sigmas[1:], noise=sigmas[1:])


def _index(scheduler, timestep) -> int | None:
    """The index of this step; None where only stock's own look-up (or its error) can tell."""
    if not isinstance(timestep, torch.Tensor) or timestep.dim() or not timestep.is_floating_point():
        return None
    if scheduler._step_index is not None:
        return scheduler._step_index
    if scheduler._begin_index is not None:
        return scheduler._begin_index
    # Pipelines pass elements of scheduler.timesteps; where all differ, the place in memory is the index, and no value has to be fetched.
    table = scheduler.timesteps
    known, version = scheduler.__dict__.get("_fusewire_distinct") or (None, None)
    if known is table and version == stamp(table) and timestep.dtype is table.dtype and timestep.device == table.device:
        offset, rest = divmod(timestep.data_ptr() - table.data_ptr(), table.element_size())
        if rest == 0 and 0 <= offset < len(table):
            return offset
    return None


def _same(model_output, sample) -> bool:
    return (isinstance(model_output, torch.Tensor) and isinstance(sample, torch.Tensor) and model_output.shape == sample.shape and sample.dim() > 0
            and model_output.device == sample.device and model_output.is_floating_point() and sample.is_floating_point())


def _table(scheduler, sigmas: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The step's scalars, made again when sigmas were set or changed, or the latents live elsewhere."""
    cached = scheduler.__dict__.get("_fusewire_table")
    if cached is None or cached[0] is not sigmas or cached[1] != stamp(sigmas) or cached[2].device != device:
        with kept():
            cached = scheduler.__dict__["_fusewire_table"] = (sigmas, stamp(sigmas), uploaded(ops.flow_euler_table(sigmas), device))
    return cached[2]


MAKERS[Stock] = _maker
KNOWN[Stock] = Known(STEP, lambda scheduler: unknown_forward(NOISE) if scheduler.config.stochastic_sampling else "")


def _unless_replaced(stock: type, maker: Callable) -> Callable:
    """``maker``, whose step is stock's where a method that it stands for was replaced on the instance since the swap."""
    names = [method.__name__ for method in KNOWN[stock].verified]

    def make(how: How) -> dict:
        namespace = maker(how)
        step, verified = namespace["step"], stock.step

        @functools.wraps(step)
        def asked(self, *args, **kwargs):
            # torch.compile makes of stock's arithmetic what it makes of a model's; ours asks what a graph cannot be told
            ours = not torch.compiler.is_compiling() and stock.step is verified and vars(self).keys().isdisjoint(names)
            return (step if ours else stock.step)(self, *args, **kwargs)

        return namespace | dict(step=asked)

    return make


for _stock in KNOWN:
    MAKERS[_stock] = _unless_replaced(_stock, MAKERS[_stock])


def candidates(name: str, instance, how: How) -> Iterator[Candidate]:
    stock = stock_of(instance) or type(instance)
    if stock in KNOWN:
        own = next((f.__name__ for f in KNOWN[stock].verified if f.__name__ in vars(instance)), None)
        reason = f"its {own} was replaced on the instance" if own else unknown_forward(KNOWN[stock].verified) or KNOWN[stock].why_not(instance)
        op = "sampler_step" if stock is Stock and not instance.config.stochastic_sampling else "solver_step"
        yield Candidate(name, instance, (op,), None if reason else fused_class(stock, how), reason)
    elif hasattr(instance, "set_timesteps"):
        yield Candidate(name, instance, ("sampler_step",), None, f"{type(instance).__name__} has no fused step")


FAMILY = Family("schedulers", ("sampler_step", "solver_step"), candidates)
