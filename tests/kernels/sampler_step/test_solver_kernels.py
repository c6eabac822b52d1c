"""solver_step's Triton kernel in the interpreter and its CUDA kernel with every thread on the CPU (where there is a GPU: both there): bits of the
reference, layouts, the step on the device."""

import pytest
import torch

from fusewire import ops
from tests.kernels.interpreted import DTYPES, in_triton, needs_interpreter, on_reference, unchanged
from tests.kernels.sampler_step.solver_cases import OPERANDS, STEPS, WIDTHS, in_float64, operands, table
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact


@pytest.fixture(params=[pytest.param("triton", marks=needs_interpreter), "cuda"])
def in_kernel(request):
    """``with in_kernel(op, calls):`` forces the backend, and checks that it served the calls."""
    return in_triton if request.param == "triton" else request.getfixturevalue("in_cuda")


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("names", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(in_kernel, dtype, names, widths):
    """tail: exact gives the reference's bits, close keeps the rule; what is read is not written; by an int and by a counter on the device."""
    for shape, wide, step, reciprocal in (((2, 3), False, 0, False), ((2, 3, 8, 33), True, torch.tensor(2), True)):
        given = operands(names, shape, dtype, wide)
        check = unchanged(*given.values())
        options = dict(table=table(limit=0.0 if reciprocal else 1.5), step=step, keep_slope=True, reciprocal=reciprocal, **widths)
        with in_kernel("solver_step", 2):
            exact, close = (ops.solver_step(**given, **options, numerics=numerics) for numerics in ("exact", "close"))
        plain = on_reference(lambda: ops.solver_step(**given, **options))
        want = on_reference(lambda: ops.solver_step(**in_float64(given), **options, numerics="close"))
        for name, mine, near, theirs, truth in zip(("out", "x0", "e"), exact, close, plain, want):
            assert_exact(mine, theirs, name)
            assert_close(near, truth, theirs, name)
        check()


@pytest.mark.parametrize("column", ["x0_x", "x0_m", "e_x", "e_m", "e_x0", "e_previous", "x", "x0", "e", "noise"])
def test_a_coefficient_of_zero_leaves_its_term_out(in_kernel, column):
    """Also where the tensor is infinite: what a solver does not use does not count."""
    given = operands(OPERANDS["second order"] + ("noise",), (2, 3, 33), torch.float32)
    unused = {"e_previous": "previous", "noise": "noise"}.get(column)
    if unused:
        given[unused] = torch.full_like(given[unused], torch.inf)
    options = dict(step=0, keep_slope=True, table=table(zeros=(column,)))
    with in_kernel("solver_step"):
        got = ops.solver_step(**given, **options)
    for mine, theirs in zip(got, on_reference(lambda: ops.solver_step(**given, **options))):
        assert_exact(mine, theirs)
        assert not unused or mine.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(in_kernel, layout):
    """strided-input, misaligned: the same bits for any layout; the results are contiguous."""
    for shape in ((1, 3, 4, 5), (2, 2, 8, 16)):
        given = operands(("uncond", "noise"), shape, torch.bfloat16)
        with in_kernel("solver_step", 2):
            plain = ops.solver_step(**given, table=table(), step=1)
            strided = ops.solver_step(**{name: layout(tensor) for name, tensor in given.items()}, table=layout(table()), step=1)
        for mine, theirs in zip(strided, plain):
            assert_exact(mine, theirs)
            assert mine.is_contiguous()


def test_guidance_from_one_tensor_and_from_two(in_kernel):
    given = operands(("uncond",), (2, 3, 5, 7), torch.bfloat16)
    with in_kernel("solver_step", 2):
        want = ops.solver_step(**given, table=table(), step=1)
        both = torch.cat([given.pop("uncond"), given.pop("model_output")])
        got = ops.solver_step(**given, model_output=both, table=table(), step=1)
    for mine, theirs in zip(got, want):
        assert_exact(mine, theirs)


def test_clamp_lets_nan_pass(in_kernel):
    given = operands((), (2, 33), torch.float32)
    given["model_output"][0, 5], given["model_output"][1, 7] = torch.nan, torch.inf
    with in_kernel("solver_step"):
        x0 = ops.solver_step(**given, table=table(limit=1.5), step=1)[1]
    assert x0.isnan().sum() == 1 and x0[0, 5].isnan() and x0[1, 7].abs() == 1.5 and x0.nan_to_num().abs().max() <= 1.5


def test_counter_outside_the_table(in_kernel):
    """NaN, not what lies beside the table."""
    given = operands(("uncond",), (1, 8), torch.float32)
    for step in (STEPS, -1):
        with in_kernel("solver_step"):
            assert ops.solver_step(**given, table=table(), step=torch.tensor(step))[0].isnan().all()


def test_batch_coupling_and_many_blocks(in_kernel):
    """batch-coupling: a sample alone has the bits that it has among 3; several blocks, the last of which is not full."""
    given = operands(OPERANDS["second order"], (3, 5001), torch.float16)
    with in_kernel("solver_step", 2):
        whole = ops.solver_step(**given, table=table(), step=2)
        alone = ops.solver_step(**{name: tensor[1:2] for name, tensor in given.items()}, table=table(), step=2)
    for mine, theirs in zip(alone[:2], whole):
        assert_exact(mine, theirs[1:2])


def test_empty(in_kernel):
    given = operands((), (0, 4, 2), torch.float32)
    with in_kernel("solver_step"):
        assert ops.solver_step(**given, table=table(), step=0)[0].shape == (0, 4, 2)
