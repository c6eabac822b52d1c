"""ops.sampler_step against diffusers' flow-matching Euler scheduler and the guidance of its pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from fusewire.kernels.sampler_step import native
from tests.layouts import LAYOUTS, one_at_a_time
from tests.tolerance import assert_close, assert_exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")), "reference"]
OP = torch.ops.fusewire.flow_euler_step.default


def schedule(steps=5, guidance=4.3):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler, ops.flow_euler_table(scheduler.sigmas, guidance)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((2, 3, 5, 7), (1, 1), (1, 63, 64), (2, 4, 16, 16)), ids=str)
def test_exact_trajectory_equals_diffusers(shape, dtype, backend):
    scheduler, table = schedule()
    mine = theirs = draw(*shape, dtype=dtype)
    counter = torch.zeros((), dtype=torch.int64)
    for i, timestep in enumerate(scheduler.timesteps):
        output = draw(2 * shape[0], *shape[1:], dtype=dtype)
        uncond, cond = output.chunk(2)
        theirs = scheduler.step(uncond + 4.3 * (cond - uncond), timestep, theirs, return_dict=False)[0]
        with forced(backend):
            again = ops.sampler_step(mine, cond, table, i, uncond=uncond)
            mine = ops.sampler_step(mine, output, table, counter)
        assert_exact(mine, theirs, f"step {i}")
        assert_exact(again, theirs, f"step {i}, two tensors")
        counter += 1
    assert ops.stats()["flow_euler_step"][backend] == 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_without_guidance(dtype, backend):
    scheduler, table = schedule()
    sample, output = draw(3, 5, 7, dtype=dtype), draw(3, 5, 7, dtype=dtype)
    with forced(backend):
        got = ops.sampler_step(sample, output, table, 0)
    assert_exact(got, scheduler.step(output, scheduler.timesteps[0], sample, return_dict=False)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_is_as_good_as_eager(dtype, backend):
    scheduler, table = schedule()
    sample, output = draw(2, 9, 40, dtype=dtype), draw(4, 9, 40, dtype=dtype)
    (uncond, cond), (dt, guidance) = output.chunk(2), table[2]
    with forced(backend):
        got = ops.sampler_step(sample, output, table, 2, numerics="close")
    wide = uncond.double(), cond.double()
    want = sample.double() + dt * (wide[0] + guidance * (wide[1] - wide[0]))
    plain = (sample.float() + dt.float() * (uncond + guidance.item() * (cond - uncond))).to(dtype)
    assert_close(got, want, plain)


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype, layout, numerics):
    """strided-input: the same bits for eight layouts of each tensor argument; guidance from two tensors and from one."""
    one = {"sample": draw(2, 3, 33, dtype=dtype), "model_output": draw(4, 3, 33, dtype=dtype), "table": schedule()[1]}
    two = one | {"model_output": draw(2, 3, 33, dtype=dtype), "uncond": draw(2, 3, 33, dtype=dtype)}
    for given in (one, two):
        for name, laid, plain in one_at_a_time(given, layout):
            assert_exact(ops.sampler_step(**laid, step=1, numerics=numerics), ops.sampler_step(**plain, step=1, numerics=numerics), name)
    assert_exact(ops.sampler_step(**two | dict(uncond=None, model_output=layout(torch.cat([two["uncond"], two["model_output"]]))), step=1, numerics=numerics),
                 ops.sampler_step(**two, step=1, numerics=numerics))


def test_long_strided_rows_are_gathered_in_blocks():
    _, table = schedule()
    sample, output = draw(1, 1030), draw(1, 2060)[:, ::2]
    assert_exact(ops.sampler_step(sample, output, table, 1), ops.sampler_step(sample, output.contiguous(), table, 1))
    many = draw(2, 3, 20000)  # more than one thread's share: the ranges start inside a row
    assert_exact(ops.sampler_step(many, many.flip(0), table, 1)[1, 2], ops.sampler_step(many[1, 2][None], many[0, 2][None], table, 1)[0])


def test_guidance_per_step():
    scheduler, _ = schedule(3)
    table = ops.flow_euler_table(scheduler.sigmas, [1.0, 5.0, 1.0])
    sample, output = draw(1, 4, 4), draw(2, 4, 4)
    for i, scale in enumerate((1.0, 5.0, 1.0)):
        assert_exact(ops.sampler_step(sample, output, table, i), ops.sampler_step(sample, output, ops.flow_euler_table(scheduler.sigmas, scale), i))
    assert table.dtype is torch.float64 and torch.equal(table[:, 0].float(), scheduler.sigmas[1:] - scheduler.sigmas[:-1])


def test_alias_empty_and_batch():
    _, table = schedule()
    sample, output = draw(8, 3, 5), draw(16, 3, 5)
    copies = sample.clone(), output.clone(), table.clone()
    together = ops.sampler_step(sample, output, table, 1)
    assert all(torch.equal(x, y) for x, y in zip((sample, output, table), copies))
    for i in range(8):
        assert_exact(ops.sampler_step(sample[i:i + 1], output[8 + i:9 + i], table, 1, uncond=output[i:i + 1]), together[i:i + 1])
    for shape in ((0, 3), (2, 0)):
        assert ops.sampler_step(draw(*shape), draw(*shape), table, 0).shape == shape


@pytest.mark.on_reference
def test_mixed_dtypes_fall_to_the_reference():
    scheduler, table = schedule()
    sample, output = draw(1, 40), draw(1, 40, dtype=torch.bfloat16)
    assert_exact(ops.sampler_step(sample, output, table, 0), scheduler.step(output, scheduler.timesteps[0], sample, return_dict=False)[0])
    assert ops.stats()["flow_euler_step"]["reference"] == 1


@pytest.mark.on_reference
def test_exact_stands_down_where_torch_differs(monkeypatch):
    _, table = schedule()
    monkeypatch.setattr(native, "_differs", "torch differs")
    ops.sampler_step(draw(1, 4), draw(1, 4), table, 0)
    assert ops.stats()["flow_euler_step"]["reference"] == 1


def test_gradcheck():
    _, table = schedule()
    sample, output = draw(1, 5, dtype=torch.float64).requires_grad_(), draw(2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, m: ops.sampler_step(x, m, table, 1, numerics="close"), (sample, output))
    curved = lambda x, m: ops.sampler_step(x.square(), m * x.sum(), table, 1, numerics="close").square()  # noqa: E731  (the step itself is linear)
    assert torch.autograd.gradgradcheck(curved, (sample, output))


@pytest.mark.parametrize("permuted", (False, True))
def test_opcheck(permuted):
    _, table = schedule()
    sample, output = draw(2, 3, 5), draw(4, 3, 5)
    if permuted:
        sample, output = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (sample, output))
    torch.library.opcheck(OP, (sample.requires_grad_(), output, None, table, 1, None, True))
    torch.library.opcheck(OP, (sample.detach(), output[:2], output[2:], table, 0, torch.tensor(2), False))


def test_compile_fullgraph():
    _, table = schedule()
    sample, output = draw(1, 3, 5), draw(2, 3, 5)
    step = torch.compile(ops.sampler_step, fullgraph=True, backend="aot_eager")
    for at in (0, 1, 3, torch.tensor(2)):
        assert torch.equal(step(sample, output, table, at), ops.sampler_step(sample, output, table, at))


BAD = {
    "sample integer": (TypeError, "sample has dtype torch.int64", lambda a: {**a, "sample": a["sample"].long()}),
    "sample rank": (ValueError, "sample has no dimension", lambda a: {**a, "sample": a["sample"].sum(), "model_output": a["sample"].sum()}),
    "output shape": (ValueError, r"model_output has shape \[3, 4\]; it should be \[1, 4\], or \[2, 4\]", lambda a: {**a, "model_output": torch.ones(3, 4)}),
    "output beside uncond": (ValueError, r"model_output has shape \[2, 4\]; it should be \[1, 4\]$", lambda a: {**a, "uncond": a["sample"]}),
    "uncond dtype": (TypeError, "uncond has dtype", lambda a: {**a, "model_output": a["sample"], "uncond": a["sample"].double()}),
    "table dtype": (TypeError, "table is a torch.float32", lambda a: {**a, "table": a["table"].float()}),
    "table columns": (ValueError, r"table has shape \[5, 1\]; it should be \[S, 2\]: dt, guidance", lambda a: {**a, "table": a["table"][:, :1]}),
    "step": (ValueError, "step is 5; it should be from 0 to 4", lambda a: {**a, "step": 5}),
    "step tensor": (TypeError, "step is a torch.float32 tensor", lambda a: {**a, "step": torch.tensor(1.0)}),
    "device": (ValueError, "table is on meta", lambda a: {**a, "table": a["table"].to("meta")}),
    "method": (ValueError, "method is 'magic'", lambda a: {**a, "method": "magic"}),
    "numerics": (ValueError, "numerics is 'fast'", lambda a: {**a, "numerics": "fast"}),
    "counter": ((RuntimeError, IndexError), "step is 5|out of range", lambda a: {**a, "step": torch.tensor(5)}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, change = BAD[case]
    with pytest.raises(error, match=message):
        ops.sampler_step(**change({"sample": draw(1, 4), "model_output": draw(2, 4), "table": schedule()[1], "step": 0}))


def test_bad_tables():
    with pytest.raises(ValueError, match=r"sigmas has shape \[1\]"):
        ops.flow_euler_table(torch.ones(1))
    with pytest.raises(ValueError, match=r"guidance_scale has shape \[2\]"):
        ops.flow_euler_table(torch.ones(4), [1.0, 2.0])
