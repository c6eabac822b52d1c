"""What only a GPU can show of the Triton and CUDA kernels: the exact bits of eager CUDA, races, streams, graphs, determinism, more than 2^31 elements.

``python -m pytest -m gpu tests/gpu``; benchmarks/gpu.sh runs it first.
"""

import pytest
import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels.adaln import cuda as adaln_cuda
from fusewire.kernels.adaln import reference as adaln
from fusewire.kernels.attention import reference as attention
from fusewire.kernels.dispatch import forced
from fusewire.kernels.group_norm_silu import cuda as group_norm_cuda
from fusewire.kernels.library import CUDA
from fusewire.kernels.qk_norm_rope import cuda as qk_cuda
from fusewire.kernels.sampler_step import cuda as sampler_cuda
from tests import tolerance
from tests.kernels.conftest import cuda_machine  # noqa: F401  (a fixture)
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the rooms that have CUDA kernels (adaln, group_norm_silu, qk_norm_rope, sampler_step)
both = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA.loaded, reason=CUDA.reason or "-"))])
TABLE = ops.flow_euler_table(torch.linspace(1, 0, 6), 4.3)


def serving(backend):
    """Triton for everything; or the CUDA rows, with Triton for what has none."""
    return forced("triton" if backend == "triton" else None)


def assert_close(got, want, plain, context=""):
    """On the CPU: CUDA has no nextafter for float16, which the rule's rounding noise needs."""
    tolerance.assert_close(got.cpu(), want.cpu(), plain.cpu(), context)


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def elementwise_inputs(dtype, channels=1536, tokens=77, batch=2):
    x, y = rand(batch, tokens, channels, dtype=dtype), rand(batch, tokens, channels, dtype=dtype)
    return {"x": x, "y": y, "m": rand(batch, 6 * channels, dtype=dtype).chunk(6, -1),
            "q": rand(batch, tokens, 4, 64, dtype=dtype), "w": rand(64, dtype=dtype), "angle": rand(tokens, 32),
            "sample": rand(batch, 4, 16, 16), "output": rand(2 * batch, 4, 16, 16, dtype=dtype)}


def outputs(i, numerics, layout=lambda x: x) -> dict[str, torch.Tensor]:
    """Every output of the elementwise and row rooms on inputs ``i``."""
    x, y, q, w = (layout(i[name]) for name in "xyqw")
    m = [layout(t) for t in i["m"]]
    rope = i["angle"].cos(), i["angle"].sin()
    found = {"gate": ops.gate_residual(x, y, m[0], numerics=numerics)}
    for norm in ("layer", "rms"):
        found[f"modulate {norm}"] = ops.adaln_modulate(x, m[0], m[1], norm=norm, numerics=numerics)
        found[f"residual {norm}"], found[f"gated {norm}"] = ops.gate_residual_adaln(x, y, m[0], m[1], m[2], y2=x, gate2=m[3], norm=norm,
                                                                                     numerics=numerics)
    found["dual"], found["dual 2"] = ops.adaln_modulate_dual(x, *m[:4], numerics=numerics)
    for norm in ("rms", "torch_rms"):
        found[f"q {norm}"], found[f"k {norm}"] = ops.qk_norm_rope(q, q, w, w, rope=rope, norm=norm, numerics=numerics)
    found["euler"] = ops.sampler_step(layout(i["sample"]), layout(i["output"]), TABLE.cuda(), torch.tensor(2, device="cuda"), numerics=numerics)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 63, 1152, 1536, 3072])
@both
def test_values(dtype, channels, backend):
    inputs = elementwise_inputs(dtype, channels)
    with torch.no_grad():
        with forced(backend):
            exact, close = outputs(inputs, "exact"), outputs(inputs, "close")
        with forced("reference"):
            plain = outputs(inputs, "exact")
            wide = {name: [t.double() for t in value] if isinstance(value, tuple) else value if name == "angle" else value.double()
                    for name, value in inputs.items()}
            want = outputs(wide, "close")
    for name in plain:
        assert_exact(exact[name], plain[name], name)
        assert_close(close[name], want[name], plain[name], name)


def test_default_backend():
    """Nothing forced: the CUDA library serves what it was built for, PyTorch's fused attention its shapes, Triton the rest."""
    inputs = elementwise_inputs(torch.bfloat16)
    with torch.no_grad():
        outputs(inputs, "close")
        ops.attention(inputs["q"], inputs["q"], inputs["q"])
    stats = ops.stats()
    for name in ("adaln_modulate", "adaln_modulate_dual", "gate_residual", "gate_residual_adaln", "qk_norm_rope", "flow_euler_step", "attention"):
        kernels = "cuda" if (CUDA.loaded or name == "attention") and "cuda" in stats[name] else "triton"
        assert stats[name][kernels] and sum(stats[name].values()) == stats[name][kernels], name


@pytest.mark.parametrize("channels", [63, 1000, 1536])
@pytest.mark.parametrize("layout", [f for f in LAYOUTS if f.__name__ not in ("offset_by_one", "step_two", "packed_third")], ids=lambda f: f.__name__)
@both
def test_strided_input(layout, channels, backend):
    inputs = elementwise_inputs(torch.bfloat16, channels)
    with torch.no_grad(), forced(backend):
        plain, strided = outputs(inputs, "close"), outputs(inputs, "close", layout)
    for name in plain:
        assert_exact(strided[name], plain[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape, groups", [((2, 10, 7, 5), 5), ((2, 320, 64, 64), 32), ((1, 128, 300, 301), 32), ((1, 1920, 16, 16), 32)], ids=str)
@both
def test_group_norm_silu(dtype, memory_format, shape, groups, backend):
    """Values, a sample alone, and repeats."""
    x, w, b = rand(*shape, dtype=dtype).contiguous(memory_format=memory_format), rand(shape[1], dtype=dtype), rand(shape[1], dtype=dtype)
    shift, scale, add = rand(shape[0], 3 * shape[1], dtype=dtype).chunk(3, -1)
    with torch.no_grad():
        with forced(backend):
            got = ops.group_norm_silu(x, groups, w, b, shift=shift, scale=scale, add=add, numerics="close")
            for _ in range(10):
                assert torch.equal(ops.group_norm_silu(x, groups, w, b, shift=shift, scale=scale, add=add, numerics="close"), got)
            alone = ops.group_norm_silu(x[:1], groups, w, b, shift=shift[:1], scale=scale[:1], add=add[:1], numerics="close")
            assert_exact(got[:1], alone)
        with forced("reference"):
            plain = ops.group_norm_silu(x, groups, w, b, shift=shift, scale=scale, add=add)
            wide = [t.double() for t in (w, b, shift, scale, add)]
            want = ops.group_norm_silu(x.double(), groups, *wide[:2], shift=wide[2], scale=wide[3], add=wide[4], numerics="close")
    assert got.stride() == plain.stride()
    assert_close(got, want, plain)


@both
def test_misaligned_after_aligned(backend):
    x = rand(2, 5, 1536, dtype=torch.bfloat16)
    base = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
    base[1:] = x.reshape(-1)
    m = rand(2, 1536, dtype=torch.bfloat16)
    with torch.no_grad(), forced(backend):
        for numerics in ("close", "exact"):
            want = ops.adaln_modulate(x, m, m, numerics=numerics)
            assert_exact(ops.adaln_modulate(base[1:].view(x.shape), m, m, numerics=numerics), want)


@both
def test_batch_coupling(backend):
    inputs = elementwise_inputs(torch.bfloat16, batch=8)
    one = {name: value[5:6] if name in ("x", "y", "q", "sample") else value for name, value in inputs.items()}
    one["m"], one["output"] = [t[5:6] for t in inputs["m"]], inputs["output"][[5, 13]]
    with torch.no_grad(), forced(backend):
        together, alone = outputs(inputs, "close"), outputs(one, "close")
    with torch.no_grad(), forced("triton"):
        q = rand(8, 333, 4, 64, dtype=torch.bfloat16)
        assert_exact(ops.attention(q, q, q)[5:6], ops.attention(q[5:6], q[5:6], q[5:6]))
    for name in together:
        assert_exact(together[name][5:6], alone[name], name)


ATTENTION = [(1, 1, 2, 2, 64), (130, 333, 4, 2, 64), (77, 1178, 2, 2, 128), (33, 65, 2, 1, 40), (64, 100, 2, 2, 72), (50, 130, 1, 1, 160),
             (65, 65, 1, 1, 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ATTENTION, (40, 65, 1, 1, 512)])
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "additive"])
def test_attention(dtype, shape, kind):
    if dtype is torch.float32 and shape[-1] > 256:
        pytest.skip("float32 heads end at 256")
    tq, tk, heads, kv_heads, dim = shape
    q, k, v = rand(2, tq, heads, dim, dtype=dtype), rand(2, tk, kv_heads, dim, dtype=dtype), rand(2, tk, kv_heads, dim, dtype=dtype)
    mask = None
    if kind in ("bool", "additive"):
        mask = rand(2, 1, tq, tk) > -0.5
        mask[..., 0] = True
        mask = mask if kind == "bool" else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    with torch.no_grad(), forced("triton"):
        got = ops.attention(q, k, v, mask=mask, causal=kind == "causal")
    wide = mask if mask is None or mask.dtype is torch.bool else mask.double()
    want = attention.attend(q.double(), k.double(), v.double(), wide, kind == "causal", None)[0]
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=kind == "causal",
                                           enable_gqa=True).transpose(1, 2)
    assert_close(got, want, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_attention(dtype):
    q, q2 = rand(2, 1024, 4, 64, dtype=dtype), rand(2, 154, 4, 64, dtype=dtype)
    w = rand(64, dtype=dtype)
    with torch.no_grad(), forced("triton"):
        got = ops.joint_attention(q, q, q, q2, q2, q2, q_weight=w, k_weight=w, q2_weight=w, k2_weight=w)
    wide, wide2, w64 = q.double(), q2.double(), w.double()
    want = attention.joint_attention(wide, wide, wide, wide2, wide2, wide2, w64, w64, w64, w64, None, 1e-6)
    normed = torch.cat([attention.widen(x, w, 1e-6).to(dtype) for x in (q, q2)], 1).transpose(1, 2)
    plain = F.scaled_dot_product_attention(normed, normed, torch.cat([q, q2], 1).transpose(1, 2)).transpose(1, 2)
    assert_close(torch.cat(got, 1), torch.cat(want, 1), plain)


def test_masked_row_and_nan_under_mask():
    q, k, v = (rand(1, 70, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    short = k[:, :50].clone(), v[:, :50].clone()
    k[:, 50:], v[:, 50:] = torch.nan, torch.nan
    mask = (torch.arange(70, device="cuda") < 50).expand(1, 1, 70, 70).clone()
    mask[..., 3, :] = False
    with torch.no_grad(), forced("triton"):
        got = ops.attention(q, k, v, mask=mask)
        want = ops.attention(q, *short, mask=mask[..., :50])
    assert (got[:, 3] == 0).all()
    assert_exact(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_epilogues(dtype):
    x, w, b, g, r = rand(2, 77, 96, dtype=dtype), rand(80, 96, dtype=dtype) / 10, rand(80, dtype=dtype), rand(2, 80, dtype=dtype), rand(2, 77, 80, dtype=dtype)
    wide = [t.double() for t in (x, w, b, g, r)]
    with torch.no_grad():
        with forced("triton"):
            exact, close = (ops.linear(x, w, b, gate=g, residual=r, numerics=numerics) for numerics in ("exact", "close"))
            gelu = ops.linear(x, w, b, activation="gelu_tanh", numerics="close")
        if dtype is not torch.float32:
            with forced("cuda"):
                lt = ops.linear(x, w, b, activation="gelu_tanh", numerics="close")
        with forced("reference"):
            plain, plain_gelu = ops.linear(x, w, b, gate=g, residual=r), ops.linear(x, w, b, activation="gelu_tanh")
            want, want_gelu = ops.linear(*wide[:3], gate=wide[3], residual=wide[4]), ops.linear(*wide[:3], activation="gelu_tanh")
    assert_exact(exact, plain)
    assert_close(close, want, plain)
    assert_close(gelu, want_gelu, plain_gelu)
    if dtype is not torch.float32:
        assert_close(lt, want_gelu, plain_gelu)


@both
def test_determinism(backend):
    inputs = elementwise_inputs(torch.bfloat16)
    with torch.no_grad(), forced(backend):
        first = outputs(inputs, "close")
        for _ in range(50):
            again = outputs(inputs, "close")
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_nondeterminism_of_attention():
    q = rand(2, 1178, 8, 64, dtype=torch.bfloat16)
    with torch.no_grad(), forced("triton"):
        first = ops.attention(q, q, q)
        assert all(torch.equal(ops.attention(q, q, q), first) for _ in range(50))


@both
def test_stream(backend):
    """On a side stream, behind a long kernel that produces the input."""
    a = rand(8192, 8192)
    x, m = torch.zeros(1, 64, 1536, device="cuda"), rand(1, 1536)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.no_grad(), forced(backend), torch.cuda.stream(stream):
        for _ in range(20):
            a = a @ a * 1e-4
        x.fill_(1.0)
        got = ops.gate_residual(x, x, m, numerics="close")
    torch.cuda.synchronize()
    assert_close(got, (1 + m.double()[:, None]).expand_as(got), 1 + m[:, None].expand_as(got))


@both
def test_graph_capture(backend):
    inputs = elementwise_inputs(torch.bfloat16)
    table, counter = TABLE.cuda(), torch.tensor(0, device="cuda")
    q = inputs["q"]

    def step():
        counter.add_(1)
        return (ops.gate_residual_adaln(inputs["x"], inputs["y"], *inputs["m"][:3], numerics="close")[1], ops.attention(q, q, q),
                ops.sampler_step(inputs["sample"], inputs["output"], table, counter))

    with torch.no_grad(), serving(backend):
        step()  # compiles
        torch.cuda.synchronize()
        counter.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for replay in range(2):
            counter.fill_(replay)
            graph.replay()
            torch.cuda.synchronize()
            got = [t.clone() for t in captured]
            counter.fill_(replay)
            for one, want in zip(got, step()):
                assert_exact(one, want)


@both
def test_no_synchronisation(backend):
    inputs = elementwise_inputs(torch.bfloat16)
    table, counter = TABLE.cuda(), torch.tensor(1, device="cuda")
    with torch.no_grad(), serving(backend):
        def calls():
            ops.gate_residual_adaln(inputs["x"], inputs["y"], *inputs["m"][:3], numerics="close")
            ops.qk_norm_rope(inputs["q"], inputs["q"], numerics="close")
            ops.attention(inputs["q"], inputs["q"], inputs["q"])
            ops.sampler_step(inputs["sample"], inputs["output"], table, counter)
        calls()
        torch.cuda.set_sync_debug_mode("error")
        try:
            calls()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compile():
    inputs = elementwise_inputs(torch.bfloat16)

    def block(x, y, q):
        m = inputs["m"]
        r, n = ops.gate_residual_adaln(x, y, m[0], m[1], m[2], numerics="close")
        return r, n, ops.attention(q, q, q)

    with torch.no_grad():
        want = block(inputs["x"], inputs["y"], inputs["q"])
        got = torch.compile(block, fullgraph=True)(inputs["x"], inputs["y"], inputs["q"])
    for one, other in zip(got, want):
        assert_exact(one, other)


@both
def test_gradients(backend):
    x, y, m = rand(2, 5, 64), rand(2, 5, 64), rand(2, 64)
    grads = {}
    for side in (backend, "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, y, m, m, m)]
        with forced(side):
            ops.gate_residual_adaln(*leaves)[1].square().sum().backward()
        grads[side] = [leaf.grad for leaf in leaves]
    for got, want in zip(*grads.values()):
        assert_exact(got, want)


@pytest.mark.parametrize("rows", [65535, 65536, 2**17 + 1])
@both
def test_grid_limit(rows, backend):
    x, m = rand(rows, 1, 16), rand(rows, 16)
    with torch.no_grad(), serving(backend):
        assert_exact(ops.gate_residual(x, x, m), x + m[:, None] * x)
        q = rand(rows, 1, 1, 16, dtype=torch.bfloat16)
        assert torch.equal(ops.attention(q, q, q), q)


@pytest.mark.xdist_group("memory")  # one after the other: each takes tens of GiB
@both
def test_more_than_2_31_elements(backend):
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.ones(1, 2**21 + 3, 1024, dtype=torch.bfloat16, device="cuda")
    x[:, -1] = torch.arange(1024, device="cuda").bfloat16() / 1024
    m = torch.full((1, 1024), 0.5, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad(), serving(backend):
        out = ops.gate_residual(x, x, m)
        assert_exact(out[:, -1:], x[:, -1:] + m[:, None] * x[:, -1:])
        assert (out[:, :5] == 1.5).all()
        del out
        out = ops.adaln_modulate(x, m, m, numerics="close")
        assert_exact(out[:, -1:], ops.adaln_modulate(x[:, -1:].contiguous(), m, m, numerics="close"))


@pytest.mark.xdist_group("memory")  # one after the other: each takes tens of GiB
@both
def test_large_stride(backend):
    """Few elements, token stride times tokens beyond 2^31."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    base = torch.zeros(40, 2**26, dtype=torch.bfloat16, device="cuda")
    base[:, :256] = rand(40, 256, dtype=torch.bfloat16)
    x = base[:, :256].unsqueeze(0)
    q = base[:, :256].view(1, 40, 4, 64)
    m = rand(1, 256, dtype=torch.bfloat16)
    with torch.no_grad(), serving(backend):
        assert_exact(ops.adaln_modulate(x, m, m, numerics="close"), ops.adaln_modulate(x.contiguous(), m, m, numerics="close"))
        assert_exact(ops.attention(q, q, q), ops.attention(*[q.contiguous()] * 3))


@both
def test_device_guard(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    x, m = torch.randn(1, 4, 64, device="cuda:1"), torch.randn(1, 64, device="cuda:1")
    with torch.no_grad(), serving(backend), torch.cuda.device(0):
        assert_exact(ops.gate_residual(x, x, m), x + m[:, None] * x)


@both
def test_norm_against_float64(backend):
    """Mean 100, deviation 0.01."""
    x, zero = 100 + 0.01 * rand(1, 64, 1536), torch.zeros(1, 1536, device="cuda")
    with torch.no_grad(), serving(backend):
        got = ops.adaln_modulate(x, zero, zero, numerics="close")
    want = adaln.adaln_modulate(x.double(), zero.double(), zero.double(), None, None, 1e-6, False, False)
    assert_close(got, want, F.layer_norm(x, (1536,), eps=1e-6))


@pytest.mark.skipif(not CUDA.loaded, reason=CUDA.reason or "-")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [63, 1536, 8192])
def test_cuda_bits_are_those_of_the_cpu(cuda_machine, dtype, channels):
    """The CUDA kernels and the same source built for the CPU agree bit for bit, but for the exponential: what tests/kernels shows there holds here."""
    x, q, w, m = rand(2, 9, channels, dtype=dtype), rand(2, 9, 3, 72, dtype=dtype), rand(72, dtype=dtype), rand(2, 4 * channels, dtype=dtype).chunk(4, -1)
    rope, sample, output = rand(2, 9, 36).unbind(), rand(1, 4, 33, 17), rand(2, 4, 33, 17, dtype=dtype)
    picture = rand(2, 24, 37, 61, dtype=dtype)

    def results(x, q, w, m, rope, sample, output, picture, table):
        return (*adaln_cuda.gate_residual_adaln(x, x, m[0], x, m[1], m[2], m[3], None, None, 1e-6, False, False),
                adaln_cuda.adaln_modulate(x, m[0], m[1], None, None, 1e-6, True, False),
                *qk_cuda.qk_norm_rope(q, q, w, None, *rope, 1e-6, 0, False),
                sampler_cuda.flow_euler_step(sample, output, None, table, 2, None, False),
                *(group_norm_cuda.group_norm_silu(picture.contiguous(memory_format=memory_format), 3, None, None, 1e-5, None, None, None, False, False)
                  for memory_format in (torch.contiguous_format, torch.channels_last)))

    given = (x, q, w, m, rope, sample, output, picture, TABLE.cuda())
    here, there = results(*given), results(*(t.cpu() if isinstance(t, torch.Tensor) else [one.cpu() for one in t] for t in given))
    for got, want in zip(here, there, strict=True):
        assert_exact(got.cpu(), want)
