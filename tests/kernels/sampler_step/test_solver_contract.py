"""ops.solver_step, what every op promises: gradients of any layout, far strides, the same bits again, arguments that stay, the backend that is meant."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.kernels.sampler_step.solver_cases import OPERANDS, operands, table
from tests.tolerance import assert_close, assert_exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
every_numerics = pytest.mark.parametrize("numerics", ("exact", "close"))


def same(got, want, context=""):
    for name, a, b in zip(("out", "x0", "e"), got, want, strict=True):
        assert_exact(a, b, f"{context} {name}")


def test_strided_grad():
    """Expanded and transposed gradients give what contiguous ones of the same values do, and what the reference does."""
    given = {name: tensor if name == "mask" else tensor.requires_grad_() for name, tensor in operands(OPERANDS["all"], (2, 3, 5), torch.float32).items()}
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    out = ops.solver_step(**given, table=table(), step=1)[0]
    with forced("reference"):
        plain = ops.solver_step(**given, table=table(), step=1)[0]
    for grad in (torch.ones(()).expand(2, 3, 5), torch.randn(5, 3, 2).permute(2, 1, 0)):
        mine, dense, theirs = (torch.autograd.grad(x, leaves, g, retain_graph=True) for x, g in ((out, grad), (out, grad.contiguous()), (plain, grad)))
        for got, again, want in zip(mine, dense, theirs, strict=True):
            assert_exact(got, again)
            assert_exact(got, want)
        assert any(got.any() for got in mine)


@needs_library
@every_numerics
def test_int32_stride(numerics):
    """Three rows 2^30 elements apart (memory that is never touched in between), of each operand."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=torch.bfloat16), (3, 40), (2**30, 1))
    given = operands(OPERANDS["all"], (3, 40), torch.bfloat16)
    options = dict(table=table(), step=0, numerics=numerics)
    want = ops.solver_step(**given, **options)
    for name, near in given.items():
        far.copy_(near)
        same(ops.solver_step(**given | {name: far}, **options), want, name)
    assert ops.stats()["solver_step"]["cpu"] == 1 + len(given)


@needs_library
def test_fp16_overflow():
    """Guidance makes 1.8e5 of a difference of 4e4, the step's 0.3 of that is a float16 again; exact has the reference's infinity."""
    cond, uncond, sample = (torch.full((1, 33), value, dtype=torch.float16) for value in (2e4, -2e4, 1e4))
    given = dict(sample=sample, model_output=cond, uncond=uncond, step=0, keep_slope=True,
                 table=ops.solver_table(1, x=1.0, e=-0.3, e_m=1.0, guidance=4.5).to(sample.device))
    out, _, e = ops.solver_step(**given, numerics="close")
    want = -2e4 + 4.5 * 4e4
    assert_close(out, torch.full((1, 33), 1e4 - 0.3 * want, dtype=torch.float64), torch.full_like(out, 1e4 - 0.3 * want))
    assert_exact(e, torch.full((1, 33), want))
    with forced("reference"):
        theirs = ops.solver_step(**given)
    ours = ops.solver_step(**given)
    assert ours[0].isinf().all()
    same(ours, theirs)
    assert ops.stats()["solver_step"] == {**dict.fromkeys(ops.stats()["solver_step"], 0), "cpu": 2, "reference": 1}


@every_numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nondeterminism(dtype, numerics):
    """20 repeats."""
    given = operands(OPERANDS["all"], (2, 4, 64, 65), dtype)
    want = ops.solver_step(**given, table=table(), step=1, keep_slope=True, numerics=numerics)
    for _ in range(20):
        same(ops.solver_step(**given, table=table(), step=1, keep_slope=True, numerics=numerics), want)


@every_numerics
@pytest.mark.parametrize("names", OPERANDS.values(), ids=OPERANDS)
def test_alias(names, numerics):
    """alias, silent-off: what is read keeps its bits; results have memory of their own; nothing forced, the library serves every operand and dtype."""
    for dtype in DTYPES:
        given = operands(names, (2, 3, 4, 5), dtype) | {"table": table()}
        copies = {name: tensor.clone() for name, tensor in given.items()}
        out = ops.solver_step(**given, step=1, keep_slope=True, numerics=numerics)
        assert all(torch.equal(given[name], copy) for name, copy in copies.items())
        assert len({tensor.untyped_storage().data_ptr() for tensor in (*given.values(), *out)}) == len(given) + len(out)
    assert ops.stats()["solver_step"]["cpu" if CPU.loaded else "reference"] == len(DTYPES) == sum(ops.stats()["solver_step"].values())


@every_numerics
def test_mask_ignored(numerics):
    """mask-ignored: where the mask is 0 the known picture comes back, where it is 1 what comes without a mask; between, neither."""
    given = operands(OPERANDS["all"], (2, 3, 4, 6), torch.float32)
    options = dict(table=table(), step=0, numerics=numerics)
    given["mask"] = torch.tensor([0.0, 1.0, 0.5]).repeat(2).expand(1, 1, 1, 6)
    free = ops.solver_step(**{name: tensor for name, tensor in given.items() if name not in ("mask", "known", "known_noise")}, **options)[0]
    known = ops.solver_step(**given | {"mask": torch.zeros(1, 1, 1, 6)}, **options)[0]
    out = ops.solver_step(**given, **options)[0]
    assert_exact(out[..., 0::3], known[..., 0::3])
    assert_exact(out[..., 1::3], free[..., 1::3])
    assert (out[..., 2::3] != free[..., 2::3]).any() and (out[..., 2::3] != known[..., 2::3]).any() and not torch.equal(free, known)
