"""What csrc/cpu/sampler_step.cpp serves: the predicates of the room's CPU rows."""

from __future__ import annotations


def why_not_flow_euler(sample, model_output, uncond, table, step, counter, exact) -> str:
    return "not written yet"
