"""The fused backward of ``close``, its values: every gradient against float64 and against autograd's, on the backend that should run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.adaln.cases import DTYPES, NAMES, NORMED, affine_stock, call, gradients, inputs, op_name, served, stock, upstream, used, wide, with_affine
from tests.kernels.isa_levels import run_at
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]
KINDS = ("chunk", "one", "token")


def check(name: str, v: dict, plain_of=stock, backend: str | None = None, **keywords) -> None:
    """Every gradient keeps the rule of close against eager PyTorch's."""
    grads = upstream(v, name)
    got, plain = gradients(call, name, v, grads, backend, numerics="close", **keywords), gradients(plain_of, name, v, grads)
    for argument, want in gradients(plain_of, name, wide(v), [grad.double() for grad in grads]).items():
        assert_close(got[argument], want, plain[argument], f"{name} {argument}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", (7, 65, 300, 1536))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, width, kind, backend):
    """tail, silent-off: every gradient keeps the rule; 35 tokens are three groups, one cut short, whose last rows do not fill a block."""
    v = inputs(2 if width > 100 else 2000 // width, 35, width, dtype, kind)
    for name in NAMES:
        check(name, v, backend=backend)
        assert served(f"{op_name(name)}_backward")[backend == "reference"] == (2 if name == "two_gates" else 1)
    assert all(not served(f"{op_name(name)}_backward")[backend == "cpu"] for name in NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine(dtype, norm, backend):
    """tail: with a weight and a bias, whose gradients are sums over all samples. Few elements of theirs: enough channels make up for it."""
    v = with_affine(inputs(3, 35, 1101, dtype))
    for name in ("adaln_modulate", "adaln_modulate_dual", "gate_residual_adaln"):
        check(name, v, affine_stock(norm), backend, norm=norm)
        assert served(f"{name}_backward") == ((0, 1) if backend == "reference" else (1, 0))


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("affine", ((), ("weight",), ("bias",), ("weight", "bias")), ids=str)
def test_gradcheck_affine(affine, norm):
    """First and second derivatives in float64: each of weight and bias, both and neither."""
    v = with_affine(inputs(2, 3, 5, torch.float64))
    for name in ("adaln_modulate", "adaln_modulate_dual", "two_gates"):
        names = (*used(name), *affine)

        def run(*tensors):
            these = dict(zip(names, tensors))
            return call(name, these, norm=norm, numerics="close", **{k: these[k] for k in affine})

        wanted = [v[k].detach().requires_grad_() for k in names]
        assert torch.autograd.gradcheck(run, wanted)
        if affine != ("bias",) or norm == "rms":  # torch.nn.functional.layer_norm's own second derivative forgets a bias without a weight
            assert torch.autograd.gradgradcheck(run, wanted, atol=1e-4, fast_mode=True)
        assert not CPU.loaded or served(f"{op_name(name)}_backward")[0] > 0


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 90), st.integers(1, 200), st.sampled_from(KINDS), st.sampled_from(KINDS),
       st.booleans(), st.sampled_from(("layer", "rms")), st.sampled_from(DTYPES), st.lists(st.sampled_from(LAYOUTS), min_size=11, max_size=11),
       st.integers(0, 2**31))
def test_gradients_property(name, batch, tokens, width, kind, second, affine, norm, dtype, layouts, seed):
    """tail: in float64, where nothing hides behind rounding: the kernel's gradients are autograd's of the reference, for any mix of modulations.
    strided-input, strided-grad: in every dtype they have the same bits where each argument and upstream gradient has a layout of its own."""
    torch.manual_seed(seed)
    v, other = inputs(batch, tokens, width, torch.float64, kind), inputs(batch, tokens, width, torch.float64, second)
    v |= {k: other[k] for k in ("gate2", "scale", "shift2")}
    options = {"norm": norm} if name != "gate_residual" else {}
    v = with_affine(v) if affine and options else v
    grads = upstream(v, name)
    got = gradients(call, name, v, grads, numerics="close", **options)
    with forced("reference"):
        want = gradients(call, name, v, grads, numerics="exact", **options)
    for argument in want:
        assert_within(got[argument], want[argument], 1, argument)
    v, grads = {k: t.to(dtype) for k, t in v.items()}, [grad.to(dtype) for grad in grads]
    got = gradients(call, name, v, grads, numerics="close", **options)
    laid, laid_grads = {k: layout(t) for layout, (k, t) in zip(layouts, v.items())}, [layout(grad) for layout, grad in zip(layouts[::-1], grads)]
    for argument, again in gradients(call, name, laid, laid_grads, numerics="close", **options).items():
        assert_exact(again, got[argument], f"{argument} {' '.join(layout.__name__ for layout in layouts)}")


@pytest.mark.parametrize("name", NAMES)
def test_some_gradients(name):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v = inputs(2, 35, 40)
    want = gradients(call, name, v, numerics="close")
    for argument in used(name):
        assert_exact(gradients(call, name, v, wanted=(argument,), numerics="close")[argument], want[argument], argument)
    pair = used(name)[-2:]
    for argument, got in gradients(call, name, v, wanted=pair, numerics="close").items():
        assert_exact(got, want[argument], argument)


@pytest.mark.parametrize("name", ("adaln_modulate_dual", "gate_residual_adaln", "two_gates"))
@pytest.mark.parametrize("unused", (0, 1))
def test_an_output_that_is_not_used(unused, name):
    """Its gradient counts as zeros."""
    v = inputs(2, 5, 33, torch.float64)
    found = []
    for run, keywords in ((call, {"numerics": "close"}), (stock, {})):
        leaves = {k: t.detach().requires_grad_() for k, t in v.items()}
        found.append(torch.autograd.grad(run(name, leaves, **keywords)[1 - unused].square().sum(), [leaves[k] for k in used(name)], allow_unused=True))
    for argument, got, want in zip(used(name), *found, strict=True):
        assert_within(torch.zeros_like(v[argument]) if got is None else got, torch.zeros_like(v[argument]) if want is None else want, 1, argument)


@pytest.mark.parametrize("outlier", (False, True), ids=("plain", "outlier"))
@needs_library
def test_cancellation(outlier):
    """cancellation: mean 100, standard deviation 0.01; and rows whose first elements lie far from the rest."""
    v, zero = {"x": 100 + 0.01 * torch.randn(1, 64, 1536)}, torch.zeros(1, 1536)
    if outlier:
        v["x"][..., :16] = 101
    v, grad = {**v, "shift": zero, "scale": zero}, torch.randn(1, 64, 1536)
    got = gradients(call, "adaln_modulate", v, [grad], eps=1e-12, numerics="close")
    want = gradients(stock, "adaln_modulate", wide(v), [grad.double()], eps=1e-12)
    for argument in ("x", "scale"):
        assert ((got[argument] - want[argument]).abs().amax(-1) / want[argument].abs().amax(-1)).max() <= 1e-5, argument


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_fp16_overflow(norm, name):
    """fp16-overflow: x = +-1000, whose squares and sums do not fit fp16."""
    v = inputs(1, 5, 1536, torch.float16)
    v["x"] = torch.where(torch.rand(1, 5, 1536) > 0.5, 1000.0, -1000.0).half()
    assert all(torch.isfinite(grad).all() for grad in gradients(call, name, v, numerics="close", norm=norm).values())


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("eps", (1e-5, 1e-2))
def test_eps(eps, name):
    """eps: inside the root; x ~ 1e-4, where it decides the result."""
    v = inputs(2, 35, 100)
    v["x"] *= 1e-4
    v["y"] *= 1e-4
    grads = upstream(v, name)
    got, plain = gradients(call, name, v, grads, eps=eps, numerics="close"), gradients(stock, name, v, grads, eps=eps)
    for argument, want in gradients(stock, name, wide(v), [grad.double() for grad in grads], eps=eps).items():
        assert_close(got[argument], want, plain[argument], argument)


@needs_library
def test_sums_over_many_tokens():
    """The sums over 70,000 tokens keep float32's precision: a running sum in order would be off by its length."""
    v = inputs(1, 70000, 8)
    grads = [torch.rand_like(v["x"])]
    got, want = gradients(call, "adaln_modulate", v, grads, numerics="close"), gradients(stock, "adaln_modulate", wide(v), [grads[0].double()])
    assert ((got["shift"] - want["shift"]).abs() / want["shift"]).max() <= 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_biased_cast(dtype, name):
    """biased-cast: over 2^20 elements of each gradient the mean signed error is within 0.02 units in the last place."""
    v = inputs(1, 1024, 1024, dtype, "token")
    grads = upstream(v, name)
    got, want = gradients(call, name, v, grads, numerics="close"), gradients(stock, name, wide(v), [grad.double() for grad in grads])
    handed_on = ("x",) if name == "gate_residual" else ("shift", "shift2")  # an upstream gradient itself, which nothing rounds
    for argument in set(used(name)).difference(handed_on):
        assert_unbiased(got[argument], want[argument], f"{name} {argument}")
    assert served(f"{op_name(name)}_backward")[1] == 0


@pytest.mark.parametrize("level", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))  # no level of this room is above AVX-512
@needs_library
def test_every_isa_level(level):
    selection = "(test_gradients and 300 and chunk and not property) or test_affine or test_some_gradients or (test_strided_input and transposed)"
    run_at(level, str(Path(__file__).parent), f"test_backward and ({selection})")
