"""Guidance and a flow-matching Euler step against diffusers' sequence, and a clone of the latents.

``python benchmarks/test_sampler_step.py [--case WORDS] [--rounds N] [--json FILE]``
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from alternating import main, measure, served
from fusewire import ops
from registry import case_option, chosen


def rows(arguments):
    for case in chosen("sampler_step", arguments):
        for name in case.dtypes:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            scheduler.set_timesteps(28)
            table = ops.flow_euler_table(scheduler.sigmas, 4.0)
            sample, output = (torch.randn(batch, *case.shape[1:]).to(getattr(torch, name)) for batch in (case.shape[0], 2 * case.shape[0]))
            timestep = scheduler.timesteps[3]

            def stock():
                scheduler._step_index = 3
                uncond, cond = output.chunk(2)
                return scheduler.step(uncond + 4.0 * (cond - uncond), timestep, sample, return_dict=False)[0]

            assert torch.equal(stock(), ops.sampler_step(sample, output, table, 3))
            ops.reset_stats()
            times = measure({
                "exact": lambda: ops.sampler_step(sample, output, table, 3),
                "close": lambda: ops.sampler_step(sample, output, table, 3, numerics="close"),
                "diffusers": stock,
                "clone": lambda: sample.clone(),
            }, arguments.rounds, inner=20)
            yield {"shape": case.what, "size": list(case.shape), "dtype": name, "backend": served("flow_euler_step"), **times,
                   "diffusers/exact": round(times["diffusers"] / times["exact"], 2), "exact - clone": round(times["exact"] - times["clone"], 2)}


if __name__ == "__main__":
    main(__doc__, rows, options=case_option)
