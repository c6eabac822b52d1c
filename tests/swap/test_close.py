"""``numerics="close"``: the error against float64 is within the project's rule of stock's own, and the fused ops ran."""

from __future__ import annotations

import copy

import pytest
import torch

import fusewire
from fusewire import ops
from tests.models.stock_sd3 import VARIANTS, in_float64
from tests.swap.tiny import generate, inputs, run, stock_model, tiny_pipeline
from tests.tolerance import AUTOCAST, MODEL_FLOAT32, PIPELINE_FLOAT32, assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformer(variant, dtype):
    model = stock_model(variant, dtype)
    wide = in_float64(copy.deepcopy(model))
    for batch, height, width, tokens in ((1, 16, 12, 37), (3, 8, 6, 5), (1, 16, 12, 37)):
        data = inputs(batch, height, width, tokens, dtype)
        plain = run(model, data)
        with fusewire.swapped(model, "close"):
            ops.reset_stats()
            got = run(model, data)
        counts = {op: sum(served.values()) for op, served in ops.stats().items()}
        assert counts["linear"] and counts["joint_attention"] and counts["gate_residual_adaln"]
        assert_close(got, run(wide, {name: value.double() for name, value in data.items()}), plain, f"{variant} {dtype} batch {batch}")
        assert torch.equal(run(model, data), plain)


def test_one_sample_does_not_depend_on_its_batch():
    model = stock_model("sd3.5")
    data = inputs(3, 16, 12, 7)
    with fusewire.swapped(model, "close"):
        together = run(model, data)
        alone = torch.cat([run(model, {name: value[i:i + 1] for name, value in data.items()}) for i in range(3)])
    assert (together - alone).abs().max() <= MODEL_FLOAT32


def test_pipeline():
    pipe = tiny_pipeline()
    want = generate(pipe, batch=2)
    with fusewire.swapped(pipe, "close"):
        got = generate(pipe, batch=2)
        assert torch.equal(generate(pipe, batch=2), got)
    assert not torch.equal(got, want) and (got - want).abs().max() <= PIPELINE_FLOAT32 * want.abs().max()


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_autocast(numerics):
    model = stock_model("sd3.5")
    data = inputs(2, 16, 16, 40)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, data)
        with fusewire.swapped(model, numerics):
            got = run(model, data)
    assert got.dtype is want.dtype
    assert torch.equal(got, want) if numerics == "exact" else (got.float() - want.float()).abs().max() <= AUTOCAST
