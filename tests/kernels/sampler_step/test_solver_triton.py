"""solver_step's Triton kernel in the interpreter: bits of the reference, layouts, the step counter on the device."""

import pytest
import torch

from fusewire import ops
from tests.kernels.interpreted import DTYPES, in_triton, needs_interpreter, on_reference, unchanged
from tests.kernels.sampler_step.solver_cases import OPERANDS, STEPS, WIDTHS, in_float64, operands, table
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

pytestmark = needs_interpreter


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("names", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, names, widths):
    """tail: exact gives the reference's bits, close keeps the rule; what is read is not written."""
    for shape, wide, step, reciprocal in (((2, 3), False, 0, False), ((2, 3, 8, 33), True, torch.tensor(2), True)):
        given = operands(names, shape, dtype, wide)
        check = unchanged(*given.values())
        options = dict(table=table(limit=0.0 if reciprocal else 1.5), step=step, keep_slope=True, reciprocal=reciprocal, **widths)
        with in_triton("solver_step", 2):
            exact, close = (ops.solver_step(**given, **options, numerics=numerics) for numerics in ("exact", "close"))
        plain = on_reference(lambda: ops.solver_step(**given, **options))
        want = on_reference(lambda: ops.solver_step(**in_float64(given), **options, numerics="close"))
        for name, mine, near, theirs, truth in zip(("out", "x0", "e"), exact, close, plain, want):
            assert_exact(mine, theirs, name)
            assert_close(near, truth, theirs, name)
        check()


def test_nan_passes_the_clamp():
    given = operands((), (2, 33), torch.float32)
    given["model_output"][0, 5], given["model_output"][1, 7] = torch.nan, torch.inf
    with in_triton("solver_step"):
        _, x0, _ = ops.solver_step(**given, table=table(limit=1.5), step=1)
    assert x0.isnan().sum() == 1 and x0[0, 5].isnan() and x0[1, 7].abs() == 1.5


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    given = operands(("uncond", "noise"), (1, 3, 4, 5), torch.bfloat16)
    with in_triton("solver_step", 2):
        plain = ops.solver_step(**given, table=table(), step=1)
        strided = ops.solver_step(**{name: layout(tensor) for name, tensor in given.items()}, table=layout(table()), step=1)
    for mine, theirs in zip(strided, plain):
        assert_exact(mine, theirs)
        assert mine.is_contiguous()


def test_counter_outside_the_table():
    given = operands((), (1, 8), torch.float32)
    for step in (STEPS, -1):
        with in_triton("solver_step"):
            assert ops.solver_step(**given, table=table(), step=torch.tensor(step))[0].isnan().all()


def test_empty():
    given = operands((), (0, 4, 2), torch.float32)
    with in_triton("solver_step"):
        assert ops.solver_step(**given, table=table(), step=0)[0].shape == (0, 4, 2)
