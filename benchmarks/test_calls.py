"""Calls of fused ops as swapped models make them at full width, in pytest-benchmark's tables: for comparing one checkout with another.

``pytest benchmarks/test_calls.py [-k OP] --benchmark-autosave`` keeps a run, ``... --benchmark-compare --benchmark-compare-fail=median:10%`` sets the
next beside it, and fails where a call has become slower by more. The figures in docs/ are from the other benchmarks, which take their sides in turn.
"""

from __future__ import annotations

import functools

import pytest
import torch

from fusewire import parity, presets
from fusewire.parity import ops as calls_of

OPS = {  # preset -> ops that one block of it calls
    "sd3.5-medium": ("adaln_modulate_dual", "gate_residual_adaln", "joint_attention", "linear"),
    "dit-xl-2": ("adaln_modulate", "attention"),
}
SIDES = ("eager", "exact", "close")
ONLY_CLOSE = ("attention", "joint_attention", "linear")


@functools.cache
def recorded(preset: str, dtype: torch.dtype, numerics: str) -> list[calls_of.Call]:
    model, inputs, _, _ = presets.build(preset, dtype, 1, None, 0)
    copies, _ = parity.swap_copies(model, (numerics,))
    with torch.inference_mode(), calls_of.recording() as calls:
        copies[numerics](**inputs)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("preset, op", [(preset, op) for preset, ops in OPS.items() for op in ops])
def test_call(benchmark, preset, op, side, dtype):
    """The largest call of the op."""
    if side == "exact" and op in ONLY_CLOSE:
        pytest.skip(f"{op} is close alone")
    numerics = "exact" if side == "exact" else "close"
    call = max((call for call in recorded(preset, dtype, numerics) if call.op == op), key=lambda call: call.args[0].numel())
    assert call.backend.name == "cpu" or not torch.get_default_device().type == "cpu", f"served by {call.backend.name}"
    run = call.backend.run
    args = call.args
    if side == "eager":
        run, args = calls_of.reference_of(op), calls_of.with_rounding(op, args, True)
    benchmark.group = f"{preset} {op} {list(call.args[0].shape)} {dtype}".replace("torch.", "")
    with torch.inference_mode():
        benchmark.pedantic(run, args, rounds=9, iterations=1, warmup_rounds=2)
