"""ops.solver_step: the compiled kernel has the reference's bits in exact and keeps the rule of close, for every operand, dtype and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from fusewire.kernels.sampler_step import solver_reference
from tests.effort import examples
from tests.kernels.isa_levels import run_at
from tests.kernels.sampler_step.solver_cases import OPERANDS, STEPS, WIDTHS, in_float64, operands, table
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
SOLVER_TERMS = ("x0_x", "x0_m", "e_x", "e_m", "e_x0", "e_previous", "x", "x0", "e", "noise")
SHAPES = ((1, 1), (2, 3, 5, 7), (1, 4, 40, 33))  # a tail alone, tails of every lane count, whole vectors


def on_cpu(**given):
    with forced("cpu"):
        return ops.solver_step(**given)


def on_reference(**given):
    with forced("reference"):
        return ops.solver_step(**given)


def same(got, want, context=""):
    for name, a, b in zip(("out", "x0", "e"), got, want, strict=True):
        assert_exact(a, b, f"{context} {name}")


@needs_library
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("names", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_has_the_bits_of_the_reference(dtype, names, widths):
    for shape in SHAPES:
        for wide in (False, True):
            given = operands(names, shape, dtype, wide)
            before = {name: tensor.clone() for name, tensor in given.items()}
            for step, reciprocal in ((0, False), (torch.tensor(2), True)):
                options = dict(table=table(), step=step, reciprocal=reciprocal, keep_slope=step == 0, **widths)
                same(on_cpu(**given, **options), on_reference(**given, **options), f"{shape} {wide} {reciprocal}")
            assert all(torch.equal(given[name], tensor) for name, tensor in before.items())


@needs_library
@settings(max_examples=examples(200), deadline=None)
@drawn(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from(DTYPES), st.sets(st.sampled_from(("uncond", "previous", "base", "noise", "mask"))),
       st.sets(st.sampled_from(SOLVER_TERMS)), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(LAYOUTS), st.integers(0, 2**31))
def test_property(shape, dtype, names, zeros, wide_x0, wide_out, reciprocal, layout, seed):
    """strided-input: any operands, absent terms and layout: the reference's bits."""
    given = operands((*sorted(names), *(("known", "known_noise") if "mask" in names else ())), tuple(shape) if len(shape) > 1 else (1, *shape), dtype)
    options = dict(table=table(tuple(sorted(zeros))), step=seed % STEPS, wide_x0=wide_x0, wide_out=wide_out, reciprocal=reciprocal)
    laid = {name: x if name == "mask" else layout(x) for name, x in given.items()}
    if all(torch.equal(laid[name], given[name]) for name in given):  # an expanded layout exists for equal values alone
        same(on_cpu(**laid, **options), on_reference(**given, **options))
    same(on_cpu(**given, **options), on_reference(**given, **options))


@needs_library
@pytest.mark.parametrize("names", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_is_as_good_as_a_chain_of_calls(dtype, names):
    given = operands(names, (2, 9, 40, 33), dtype)
    options = dict(table=table(limit=0.0), step=1, keep_slope=True, wide_x0=False, wide_out=False)
    got, plain = on_cpu(**given, **options, numerics="close"), on_reference(**given, **options)
    want = on_reference(**in_float64(given), **options, numerics="close")
    for name, mine, theirs, truth in zip(("out", "x0", "e"), got, plain, want):
        assert_close(mine, truth, theirs, name)


@needs_library
@pytest.mark.parametrize("names", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_biased_cast(dtype, names):
    """biased-cast: over 2^20 elements of each result the mean signed error is within 0.02 units in the last place."""
    given = operands(names, (2, 4, 256, 512), dtype)
    options = dict(table=table(limit=0.0), step=1, keep_slope=True, wide_x0=False, wide_out=False, numerics="close")
    for name, got, want in zip(("out", "x0", "e"), on_cpu(**given, **options), on_reference(**in_float64(given), **options), strict=True):
        assert_unbiased(got, want, name)


@needs_library
@pytest.mark.parametrize("column", ["x0_x", "x0_m", "e_x", "e_m", "e_x0", "e_previous", "x", "x0", "e", "noise"])
def test_a_coefficient_of_zero_leaves_its_term_out(column):
    """Also where the tensor is infinite: what a solver does not use does not count."""
    given = operands(OPERANDS["second order"] + ("noise",), (2, 3, 33), torch.float32)
    options = dict(step=0, keep_slope=True)
    want = on_cpu(**given, **options, table=table())
    got = on_cpu(**given, **options, table=table((column,)))
    same(got, on_reference(**given, **options, table=table((column,))))
    assert not torch.equal(got[0], want[0])
    unused = {"e_previous": "previous", "noise": "noise"}.get(column)
    if unused:
        for run in (on_cpu, on_reference):
            same(run(**given | {unused: torch.full_like(given[unused], torch.inf)}, **options, table=table((column,))), got)


@needs_library
def test_guidance_from_one_tensor_and_from_two():
    given = operands(("uncond",), (2, 3, 5, 7), torch.bfloat16)
    want = on_cpu(**given, table=table(), step=1)
    both = torch.cat([given.pop("uncond"), given.pop("model_output")])
    same(on_cpu(**given, model_output=both, table=table(), step=1), want)


@needs_library
@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout, numerics):
    given = operands(OPERANDS["all"], (2, 3, 4, 33), torch.bfloat16)
    options = dict(step=1, keep_slope=True, numerics=numerics)
    want = on_cpu(**given, table=table(), **options)
    for name in given:
        if name != "mask":
            got = on_cpu(**given | {name: layout(given[name])}, table=layout(table()), **options)
            same(got, want, name)
            assert all(tensor.is_contiguous() for tensor in got)


@needs_library
def test_mask_broadcasts_and_clamp_lets_nan_pass():
    given = operands(("mask", "known"), (2, 3, 4, 6), torch.float32)
    given["sample"][0, 0, 0, 0] = torch.nan
    full = given | {"mask": given["mask"].expand(2, 3, 4, 6).contiguous()}
    got = on_cpu(**given, table=table(), step=0)
    same(got, on_cpu(**full, table=table(), step=0))
    assert got[1].isnan().sum() == 1 and got[1].nan_to_num().abs().max() <= 1.5
    stays = given["mask"][0, 0, 0] == 0
    assert stays.any() and torch.equal(got[0][1][..., stays], given["known"][1][..., stays])


@needs_library
def test_batch_coupling_threads_and_repeats():
    given = operands(OPERANDS["all"], (4, 3, 128, 65), torch.float16)
    want, threads = on_cpu(**given, table=table(), step=0), torch.get_num_threads()
    one = {name: tensor if name == "mask" else tensor[2:3] for name, tensor in given.items()}
    for mine, theirs in zip(on_cpu(**one, table=table(), step=0)[:2], want):
        assert_exact(mine, theirs[2:3])
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            same(on_cpu(**given, table=table(), step=0), want, f"{n} threads")
    finally:
        torch.set_num_threads(threads)


@needs_library
def test_empty_and_steps_outside_the_table():
    given = operands(("noise",), (0, 4, 2), torch.float32)
    assert on_cpu(**given, table=table(), step=0)[0].shape == (0, 4, 2)
    given = operands((), (1, 4), torch.float32)
    for step in (STEPS, -1):
        with pytest.raises((RuntimeError, IndexError)):
            on_cpu(**given, table=table(), step=torch.tensor(step))
        with pytest.raises(ValueError, match=f"^step is {step}"):
            ops.solver_step(**given, table=table(), step=step)


@needs_library
def test_gradients():
    """Those of the reference, bit for bit, and right ones."""
    given = operands(OPERANDS["all"], (2, 3, 5), torch.float64)
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items() if name != "mask"}
    options = dict(mask=given["mask"], table=table(limit=0.0), step=0, keep_slope=True, numerics="close")
    assert torch.autograd.gradcheck(lambda *tensors: ops.solver_step(**dict(zip(leaves, tensors)), **options), tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(  # the step itself is linear
        lambda *tensors: [part.square() for part in ops.solver_step(**dict(zip(leaves, (t * t.sum() for t in tensors))), **options)],
        tuple(leaves.values()), atol=1e-4, fast_mode=True)
    mine, theirs = (torch.autograd.grad(call(**leaves, **options)[0].sum(), list(leaves.values())) for call in (ops.solver_step, on_reference))
    for a, b in zip(mine, theirs):
        assert_exact(a, b)


@needs_library
@pytest.mark.on_reference(reason="registration alone")
@pytest.mark.parametrize("keep_slope", [False, True])
def test_registration(keep_slope):
    given = operands(OPERANDS["all"], (2, 3, 4, 6), torch.bfloat16)
    given["mask"] = given["mask"].expand(2, 3, 4, 6)
    for sample in (given["sample"], given["sample"].transpose(2, 3).contiguous().transpose(2, 3)):
        rest = [given[name] for name in ("model_output", "uncond", "previous", "base", "noise", "mask", "known", "known_noise")]
        torch.library.opcheck(torch.ops.fusewire.solver_step.default, (sample, *rest, table(), 0, torch.tensor(1), True, True, keep_slope, False, True))


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_compile_fullgraph(numerics):
    """One graph for the steps of a schedule, by number and by a counter in a tensor."""
    given = operands(OPERANDS["all"], (2, 3, 5), torch.float32)
    step = torch.compile(ops.solver_step, fullgraph=True, backend="aot_eager")
    for at in (0, 1, 2, torch.tensor(2)):
        rest = dict(table=table(), step=at, keep_slope=True, numerics=numerics)
        same(step(**given, **rest), ops.solver_step(**given, **rest), f"step {at}")


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype, numerics):
    """autocast: sums and products of latents are none of its concern, here as in stock; forward and backward."""
    given = operands(OPERANDS["all"], (2, 3, 5), dtype)
    given["sample"].requires_grad_()
    rest = dict(table=table(limit=0.0), step=1, keep_slope=True, numerics=numerics)
    plain = ops.solver_step(**given, **rest)
    with torch.autocast("cpu", torch.bfloat16):
        under = ops.solver_step(**given, **rest)
        if numerics == "exact":
            same(under, on_reference(**given, **rest), "reference")
    same(under, plain)
    (gradient,) = torch.autograd.grad(sum(part.sum() for part in under), given["sample"])
    assert gradient.dtype is dtype and gradient.any()


@pytest.mark.on_reference(reason="nothing runs")
@pytest.mark.parametrize("change, error, message", [
    (dict(model_output=torch.ones(3, 4)), ValueError, "model_output has shape"), (dict(noise=torch.ones(2, 5)), ValueError, "noise has shape"),
    (dict(uncond=torch.ones(2, 4).half()), TypeError, "uncond has dtype"), (dict(previous=torch.ones(2, 4).half()), TypeError, "previous has dtype"),
    (dict(mask=torch.ones(2, 4)), ValueError, "known is None"), (dict(mask=torch.ones(3), known=torch.ones(2, 4)), ValueError, "mask has shape"),
    (dict(table=torch.ones(3, 19)), TypeError, "table is a"), (dict(table=torch.ones(3, 2).double()), ValueError, "table has shape"),
    (dict(step=torch.tensor(1.0)), TypeError, "step is a"), (dict(numerics="near"), ValueError, "numerics is"),
    (dict(sample=torch.ones(2, 4).long()), TypeError, "sample has dtype"), (dict(sample=torch.ones(())), ValueError, "sample has no dimension"),
    (dict(noise=torch.ones(2, 4, device="meta")), ValueError, "noise is on meta"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_errors(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ops.solver_step(**dict(sample=torch.ones(2, 4), model_output=torch.ones(2, 4), table=table(), step=0) | change)


def test_table():
    made = ops.solver_table(2, x=[1, 2], noise=0.5)
    assert made.dtype is torch.float64 and made.shape == (2, 19) and made.sum() == 3 + 1 + 2 * 7  # x, noise; guidance, divisors, scales and known are 1
    with pytest.raises(ValueError, match="^sigma is no column"):
        ops.solver_table(2, sigma=1.0)
    with pytest.raises(ValueError, match="^x has shape"):
        ops.solver_table(2, x=[1.0, 2.0, 3.0])


def test_reference_is_the_formula():
    """In float64, against the formula written out."""
    given, t = operands(OPERANDS["all"], (2, 3, 4), torch.float64), table(limit=0.0)
    c = dict(zip(solver_reference.SOLVER, t[1].tolist()))
    x, u, m = given["sample"], given["uncond"], given["model_output"]
    m = u + c["guidance"] * (m - u)
    x0 = (c["x0_x"] * x / c["x_divisor"] + c["x0_m"] * m) / c["x0_divisor"]
    e = ((c["e_x"] * x + c["e_m"] * m + c["e_x0"] * x0) / c["e_divisor"] + c["e_previous"] * given["previous"]) * c["e_scale"]
    out = (c["x"] * given["base"] + c["x0"] * x0 + c["e"] * e) * c["scale"] + c["noise"] * given["noise"]
    known = c["known"] * given["known"] + c["known_noise"] * given["known_noise"]
    out = (1 - given["mask"]) * known + given["mask"] * out
    for mine, want in zip(ops.solver_step(**given, table=t, step=1, keep_slope=True), (out, x0, e)):
        assert torch.allclose(mine, want, rtol=1e-13, atol=1e-13)


@pytest.mark.on_reference(reason="a process of its own runs the tests")
@pytest.mark.parametrize("level", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))  # no level of these kernels is above it
def test_isa_levels(level):
    """Of the flow-matching step too, whose tests are in a file of their own."""
    run_at(level, __file__, "bits_of_the_reference or chain_of_calls or leaves_its_term_out or equals_diffusers or as_good_as_eager", "test_sampler_step.py")
