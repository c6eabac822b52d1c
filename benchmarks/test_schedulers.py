"""The steps of diffusers' schedulers, stock and swapped: what a picture's loop pays beside the model.

``python benchmarks/test_schedulers.py [--case WORDS] [--rounds N] [--json FILE]``
"""

from __future__ import annotations

import torch
from diffusers import (DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler,
                       EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
                       FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler, LCMScheduler,
                       LMSDiscreteScheduler, PNDMScheduler, TCDScheduler, UniPCMultistepScheduler)

import fusewire
from alternating import main, measure, served
from fusewire import ops
from registry import case_option, chosen

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
NO_CLIP = dict(SD, clip_sample=False)  # as Stable Diffusion's pipelines have them
SCHEDULERS = {  # name: (class, configuration, what its steps are given)
    "DDIM": (DDIMScheduler, NO_CLIP, {}), "DDPM": (DDPMScheduler, NO_CLIP, {}), "Euler": (EulerDiscreteScheduler, SD, {}), "LCM": (LCMScheduler, {}, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, SD, {}), "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, SD, {}),
    "DPM-Solver++ 2M SDE": (DPMSolverMultistepScheduler, dict(SD, algorithm_type="sde-dpmsolver++"), {}), "Heun": (HeunDiscreteScheduler, SD, {}),
    "Euler with churn": (EulerDiscreteScheduler, SD, dict(s_churn=3.0)), "LMS": (LMSDiscreteScheduler, SD, {}),
    "PNDM": (PNDMScheduler, dict(SD, skip_prk_steps=True, steps_offset=1), {}), "UniPC": (UniPCMultistepScheduler, SD, {}),
    "DPM-Solver++ 2S": (DPMSolverSinglestepScheduler, SD, {}), "DEIS": (DEISMultistepScheduler, SD, {}),
    "flow matching's Heun": (FlowMatchHeunDiscreteScheduler, dict(shift=3.0), {}), "EDM's Euler": (EDMEulerScheduler, {}, {}),
    "EDM's DPM-Solver++ 2M": (EDMDPMSolverMultistepScheduler, {}, {}), "TCD": (TCDScheduler, {}, {}), "KDPM2": (KDPM2DiscreteScheduler, SD, {}),
    "KDPM2 ancestral": (KDPM2AncestralDiscreteScheduler, SD, {}), "DDIM backwards": (DDIMInverseScheduler, NO_CLIP, {}),
}
STEPS, AT = 20, 7


def step_of(cls, config: dict, options: dict, numerics: str | None, sample: torch.Tensor, output: torch.Tensor):
    """One step in the middle of a schedule, again and again."""
    scheduler = cls(**config)
    if numerics:
        fusewire.swap(scheduler, numerics=numerics)
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps[:AT]:  # so that a solver of a higher order has a past
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        scheduler.step(output, timestep, sample, **options)
    timestep = scheduler.timesteps[AT]
    state = {name: value for name, value in vars(scheduler).items() if name[0] != "_" or name in ("_step_index", "_fusewire_slope")}
    pasts = {name: value for name, value in state.items() if isinstance(value, list)}  # which stock writes to

    def step():
        vars(scheduler).update(state, **{name: list(past) for name, past in pasts.items()})
        return scheduler.step(output, timestep, sample, return_dict=False, **options)[0]

    return step


def rows(arguments):
    for (name, (cls, config, options)), case in ((one, other) for one in SCHEDULERS.items() for other in chosen("solver_step", arguments)):
        for dtype in (torch.float32, torch.bfloat16):
            sample, output = torch.randn(case.shape).to(dtype), torch.randn(case.shape).to(dtype)
            sides = {side: step_of(cls, config, options, numerics, sample, output) for side, numerics in
                     (("exact", "exact"), ("close", "close"), ("diffusers", None))}
            results = []
            for side in ("diffusers", "exact"):
                torch.manual_seed(1)
                results.append(sides[side]())
            assert torch.equal(*results)
            ops.reset_stats()
            times = measure(sides | {"clone": lambda: sample.clone()}, arguments.rounds, inner=20)
            yield {"scheduler": name, "shape": case.what, "size": list(case.shape), "dtype": str(dtype).removeprefix("torch."), "backend": served("solver_step"),
                   **times, "diffusers/exact": round(times["diffusers"] / times["exact"], 2)}


if __name__ == "__main__":
    main(__doc__, rows, options=case_option)
