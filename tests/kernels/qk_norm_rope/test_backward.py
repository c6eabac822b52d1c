"""The fused backward of ``close``: gradients against float64, on the backend that should run, and the promises of every kernel."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.kernels.qk_norm_rope import reference
from tests.effort import examples
from tests.kernels.isa_levels import run_at
from tests.kernels.qk_norm_rope.cases import NAMES, gradients, inputs, plain, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def served() -> tuple[int, int]:
    counts = ops.stats()["qk_norm_rope_backward"]
    return counts["cpu"], counts["reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((2, 35, 3, 63), (1, 300, 1, 8), (2, 37, 17, 40), (1, 50, 24, 64), (1, 33, 5, 128), (1, 5, 2, 1027)), ids=str)
def test_gradients(shape, dtype, backend):
    """head-dim, tail, silent-off: the gradients of q, k and both weights keep the rule, with and without a rotation."""
    for rotated in (False, True)[:1 if shape[-1] % 2 else 2]:
        v = inputs(*shape, dtype, rotated)
        got, stock = gradients(v, backend), plain(v)
        for name, want in plain(wide(v)).items():
            if name in ("q", "k"):
                assert_close(got[name], want, stock[name], f"{name} rotated {rotated}")
            else:
                assert_within(got[name], want, 4, f"{name} rotated {rotated}")
    calls = 1 if shape[-1] % 2 else 2
    assert served() == ((calls, 0) if backend == "cpu" else (0, calls))


@settings(max_examples=examples(250), deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 20), st.integers(1, 8), st.integers(1, 100), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from(("rms", "torch_rms")), st.sampled_from(DTYPES), st.lists(st.sampled_from(LAYOUTS), min_size=6, max_size=6), st.integers(0, 2**31))
def test_gradients_property(batch, tokens, heads, k_heads, dim, rotated, no_q_weight, no_k_weight, norm, dtype, layouts, seed):
    """tail, strided-input, strided-grad: both norms, k with heads (and tokens) of its own, weights there or not; the same bits where each argument
    has a layout of its own. In float64 nothing hides behind rounding."""
    torch.manual_seed(seed)
    v = inputs(batch, tokens, heads, dim + (dim % 2 if rotated else 0), dtype, rotated, k_heads, 0 if rotated else tokens + seed % 3)
    v["q_weight"], v["k_weight"] = (None if no else weight for no, weight in ((no_q_weight, v["q_weight"]), (no_k_weight, v["k_weight"])))
    for name in ("q", "k"):
        v[name][..., 0] = 2  # no head whose norm is near 0
    got = gradients(v, norm=norm)
    double = {name: t if t is None or name == "rope" else t.double() for name, t in v.items()}
    laid = {**v, **{name: None if v[name] is None else layout(v[name]) for layout, name in zip(layouts, (*NAMES, "q_grad", "k_grad"))}}
    found = of_reference(double), of_reference(v), gradients(laid, norm=norm).values()
    for (name, mine), theirs, plain, again in zip(got.items(), *found, strict=True):
        assert_within(mine, theirs, 8, name, plain, None if name in ("q", "k") else weight_terms(double, name[0]))
        assert_exact(again, mine, f"{name} {' '.join(layout.__name__ for layout in layouts)}")


def of_reference(v: dict) -> tuple[torch.Tensor, ...]:
    """Autograd's gradients of the reference, for the arguments that are there."""
    these = [None if v[k] is None else v[k].detach().requires_grad_() for k in NAMES]
    outputs = reference.qk_norm_rope(*these, *(v["rope"] or (None, None)), 1e-6, 0, False)
    return torch.autograd.grad(outputs, [t for t in these if t is not None], [v["q_grad"], v["k_grad"]])


def weight_terms(v: dict, name: str) -> torch.Tensor:
    """What the gradient of a weight is a sum of, one row a head; of a turned pair either part, whichever counts."""
    x, grad = (t.flatten(0, -2) for t in (v[name], v[f"{name}_grad"]))
    if v["rope"] is not None:
        grad = grad.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, 2).flatten(-2)
    return grad * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("rotated", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input_and_strided_grad(dtype, layout, rotated):
    """strided-input, strided-grad, misaligned: the same values in any layout give the same bits, one argument at a time, gradients and tables too."""
    v = inputs(2, 7, 5, 24, dtype, rotated)
    for name in ("q", "k", "q_grad", "k_grad"):
        v[name][1] = v[name][0]  # so that an expanded layout exists
    want = gradients(v)
    for name in (*NAMES, "q_grad", "k_grad", *(("rope",) if rotated else ())):
        changed = tuple(map(layout, v["rope"])) if name == "rope" else layout(v[name])
        for other, got in gradients({**v, name: changed}).items():
            assert_exact(got, want[other], f"{other} where {name} is {layout.__name__}")


def test_strided_grad():
    """strided-grad: `.sum()`, whose gradient has stride 0 everywhere."""
    v = inputs(2, 7, 5, 24, rotated=True)
    ones = {"q_grad": torch.ones(()).expand(v["q"].shape), "k_grad": torch.ones(()).expand(v["k"].shape)}
    want = gradients({**v, **{k: t.contiguous() for k, t in ones.items()}})
    assert all(torch.equal(got, want[name]) for name, got in gradients({**v, **ones}).items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype):
    """batch-coupling: dq and dk of a sample alone are those among 8."""
    v = inputs(8, 9, 5, 64, dtype, True)
    whole, alone = gradients(v), gradients({k: t[5:6] if k not in ("q_weight", "k_weight", "rope") else t for k, t in v.items()})
    for name in ("q", "k"):
        assert_exact(alone[name], whole[name][5:6], name)


def test_nondeterminism():
    """nondeterminism: repeats and any number of threads give the same bits, the weights' gradients included."""
    v, threads = inputs(2, 150, 24, 64, rotated=True), torch.get_num_threads()
    want = gradients(v)
    try:
        for n in (*[threads] * 20, 1, 2, 5):
            torch.set_num_threads(n)
            assert all(torch.equal(got, want[name]) for name, got in gradients(v).items()), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (1, 0, 2, 8), (1, 3, 0, 8), (1, 3, 2, 0)), ids=str)
def test_empty(shape):
    """empty: a zero in each dimension; the weights' gradients are zero."""
    for name, grad in gradients(inputs(*shape)).items():
        assert not grad.any(), name


@pytest.mark.parametrize("names", (("q",), ("k",), ("q_weight",), ("k_weight",), ("k", "q_weight")), ids=str)
def test_some_gradients(names):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v = inputs(2, 9, 5, 40, rotated=True)
    want = gradients(v)
    for name, got in gradients(v, names=names).items():
        assert_exact(got, want[name], name)


def test_alias():
    """alias: inputs and gradients keep their bits; what is returned shares no storage."""
    v = inputs(2, 3, 2, 16)
    before = {k: t.clone() for k, t in v.items() if k != "rope"}
    found = [*gradients(v).values(), *(v[k] for k in before)]
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)
    assert all(torch.equal(v[k], t) for k, t in before.items())


@pytest.mark.parametrize("eps", (1e-6, 1e-2))
def test_eps(eps):
    """eps: inside the root; q ~ 1e-4, where it decides the result."""
    v = inputs(2, 9, 5, 40, torch.float64, True)
    v["q"] *= 1e-4
    got, want = gradients(v, eps=eps), plain(v, eps)
    for name in NAMES:
        assert_close(got[name] / want["q"].abs().max(), want[name] / want["q"].abs().max(), want[name], name)


def test_fp16_overflow():
    """fp16-overflow: values of +-1000, whose squares do not fit fp16."""
    v = inputs(1, 5, 3, 128, torch.float16, True)
    v["q"] = torch.where(torch.rand(1, 5, 3, 128) > 0.5, 1000.0, -1000.0).half()
    assert all(grad.isfinite().all() for grad in gradients(v).values())


@needs_library
def test_int32_stride():
    """int32-stride: three tokens 2^30 elements apart (memory that is never touched in between), in q, k and their gradients."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=torch.bfloat16), (1, 3, 2, 8), (1, 2**30, 8, 1))
    v = inputs(1, 3, 2, 8, torch.bfloat16, True)
    want = gradients(v)
    for name in ("q", "k", "q_grad", "k_grad"):
        far.copy_(v[name])
        assert all(torch.equal(got, want[other]) for other, got in gradients({**v, name: far}).items()), name


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_biased_cast(dtype):
    """biased-cast: over 2^20 elements of dq and dk the mean signed error is within 0.02 units in the last place."""
    v = inputs(1, 1024, 16, 64, dtype, True)
    got, want = gradients(v), plain(wide(v))
    for name in ("q", "k"):
        assert_unbiased(got[name], want[name], name)
    assert served() == (1, 0)


@pytest.mark.parametrize("rotated", (False, True))
def test_joint_buffer(rotated):
    """strided-grad, silent-off: what qk_norm_into writes into slices of one buffer has the same gradients, by the same kernel."""
    v = inputs(2, 7, 3, 24, rotated=rotated)
    want = gradients(v)
    leaves = [v[k].detach().requires_grad_() for k in NAMES]
    joint = torch.zeros(2, 14, 3, 24)
    ops.qk_norm_into(*leaves, joint[:, :7], joint[:, 7:], rope=v["rope"], numerics="close")
    found = torch.autograd.grad(joint, leaves, torch.cat([v["q_grad"], v["k_grad"]], 1))
    for name, got in zip(NAMES, found):
        assert_exact(got, want[name], name)
    assert sum(served()) == 2 and served()[bool(CPU.loaded)] == 0


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)  # diffusers turns float64 in float32, which ``plain`` does not
def test_exact_keeps_the_gradients_of_stock(dtype):
    """exact: bit for bit those of eager PyTorch, by no kernel."""
    v = inputs(2, 7, 3, 24, dtype, True)
    want = plain(v, turn=lambda x, *tables: apply_rotary_emb(x, tuple(table.repeat_interleave(2, -1) for table in tables), sequence_dim=1))
    for name, got in gradients(v, numerics="exact").items():
        assert_exact(got, want[name], name)
    assert served() == (0, 0)


@pytest.mark.on_reference(reason="its dtypes are mixed")
@pytest.mark.parametrize("autocast", (False, True))
def test_autocast(autocast):
    """autocast: a float32 weight beside 16-bit heads leaves the kernel to the recomputed reference, and each gradient has its argument's dtype."""
    v = inputs(2, 5, 2, 16, torch.bfloat16)
    v |= {k: v[k].float() for k in ("q_weight", "k_weight", "q_grad", "k_grad")}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert all(grad.dtype is v[k].dtype for k, grad in gradients(v).items()) and served() == (0, 0)


def test_a_table_has_a_gradient_too():
    """No kernel has it: the reference is recomputed where a table wants one."""
    v = inputs(1, 3, 2, 8)
    angle = torch.randn(3, 4, requires_grad=True)
    out = ops.qk_norm_rope(v["q"].requires_grad_(), v["k"], rope=(angle.cos(), angle.sin()), numerics="close")
    assert torch.autograd.grad(out[0].square().sum() + out[1].pow(3).sum(), angle)[0].abs().max() > 0 and served() == (0, 0)


@pytest.mark.parametrize("rotated", (False, True))
def test_gradcheck(rotated):
    """First and second derivatives in float64; the first by the kernel."""
    v = inputs(1, 3, 2, 6, torch.float64, rotated)
    wanted = [v[k].requires_grad_() for k in NAMES]
    run = lambda *t: ops.qk_norm_rope(*t, rope=v["rope"], numerics="close")  # noqa: E731
    assert torch.autograd.gradcheck(run, wanted)
    assert torch.autograd.gradgradcheck(run, wanted, atol=1e-4, fast_mode=True)
    assert not CPU.loaded or served()[0] > 0


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
@pytest.mark.parametrize("wanted", (15, 10, 5))
def test_fake_mismatch(wanted, permuted):
    """fake-mismatch: opcheck of the backward op, on contiguous and on permuted-dense inputs; kernel and reference mean the same."""
    v = inputs(2, 3, 2, 8, torch.float64, True)
    lay = (lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)) if permuted else torch.Tensor.contiguous
    heads = [lay(v[k]) for k in ("q_grad", "k_grad", "q", "k")]
    for rest in ((v["q_weight"], None, *v["rope"], 1e-6, wanted), (None, v["k_weight"], None, None, 1e-6, wanted)):
        opcheck(torch.ops.fusewire.qk_norm_rope_backward.default, (*heads, *rest))
        results = torch.ops.fusewire.qk_norm_rope_backward(*heads, *rest), reference.qk_norm_rope_backward(*heads, *rest)
        for got, want in zip(*results, strict=True):
            assert got.shape == want.shape and got.stride() == want.stride()
            assert_within(got, want, 1)


@needs_library
def test_compiled_training_step():
    """A training step compiles without a graph break, and gives the same gradients."""
    def step(q, k, weight, cos, sin):
        return sum(out.square().sum() for out in ops.qk_norm_rope(q, k, weight, weight, rope=(cos, sin), numerics="close"))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        v = inputs(2, tokens, 4, 16, rotated=True)
        leaves = [v[k].requires_grad_() for k in NAMES[:3]]
        for got, want in zip(*(torch.autograd.grad(f(*leaves, *v["rope"]), leaves) for f in (compiled, step)), strict=True):
            assert_exact(got, want)


@pytest.mark.parametrize("level", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))  # no level of this room is above AVX-512
@needs_library
def test_every_isa_level(level):
    run_at(level, __file__, "(test_gradients and not property) or (test_strided_input_and_strided_grad and transposed)")
