"""ops.qk_norm_rope against diffusers' RMSNorm, torch's RMSNorm and diffusers' rotary embedding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU, ISA_LEVELS, cpu_isa
from fusewire.kernels.qk_norm_rope import native
from fusewire.kernels.rounding import differs_from_stock
from tests.layouts import LAYOUTS, one_at_a_time
from tests.tolerance import assert_close, assert_exact, assert_unbiased

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")), "reference"]

# (B, T, H, D). D: torch sums 4 vectors of 8 side by side, then single vectors, then the tail; blocks are 16 heads.
SHAPES = [
    (2, 7, 3, 63),     # tail: 7 vectors and 7 elements
    (1, 1, 1, 5),      # shorter than a vector, one row
    (1, 17, 1, 8),     # one vector; a block of rows and one more
    (2, 3, 17, 40),    # heads over a block
    (1, 5, 24, 64),    # SD3's heads
    (3, 2, 5, 72),
    (1, 3, 24, 128),   # Flux's heads
    (1, 2, 2, 256),
    (1, 2, 1, 1027),   # 32 groups of vectors: the cascade, a vector and a tail
]


def heads(batch, tokens, count, dim, dtype):
    """A projection [B, T, H * D], viewed as [B, T, H, D]."""
    return torch.randn(batch, tokens, count * dim).to(dtype).view(batch, tokens, count, dim)


def tables(tokens, dim):
    angle = torch.randn(tokens, dim // 2)
    return angle.cos(), angle.sin()


def diffusers_norm(x, weight, eps):
    module = RMSNorm(x.shape[-1], eps, elementwise_affine=weight is not None)
    if weight is not None:
        module.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        return module(x.transpose(1, 2)).transpose(1, 2)  # as SD3's joint attention calls it: [B, H, T, D]


def diffusers_rotate(x, rope):
    return apply_rotary_emb(x, tuple(table.repeat_interleave(2, dim=-1) for table in rope), sequence_dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_equals_stock_modules(shape, dtype, backend):
    q, k = heads(*shape, dtype), heads(*shape, dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    stock = {"rms": lambda x, w: diffusers_norm(x, w, 1e-6), "torch_rms": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)}
    for norm, module in stock.items():
        for rope in (None, tables(shape[1], shape[-1]))[:1 if shape[-1] % 2 else 2]:
            turned = (lambda x: x) if rope is None else (lambda x: diffusers_rotate(x, rope))
            with forced(backend):
                got = ops.qk_norm_rope(q, k, weight, None, rope=rope, norm=norm)
            for x, w, out in ((q, weight, got[0]), (k, None, got[1])):
                assert_exact(out, turned(module(x, w)), f"{norm}, rope {rope is not None}, weight {w is not None}")
                assert out.is_contiguous()
    assert set(ops.stats()["qk_norm_rope"].items()) >= {(backend, 2 if shape[-1] % 2 else 4)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", (False, True))
def test_close_is_as_good_as_eager(dtype, rotated, backend):
    q, weight, rope = heads(2, 9, 5, 72, dtype), torch.randn(72).to(dtype), tables(9, 72) if rotated else None
    with forced(backend):
        got, _ = ops.qk_norm_rope(q, q, weight, None, rope=rope, numerics="close")
    plain, wide = diffusers_norm(q, weight, 1e-6), q.to(torch.float64)
    want = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.to(torch.float64)
    if rotated:
        plain = diffusers_rotate(plain, rope)
        cos, sin = (table.to(torch.float64)[None, :, None] for table in rope)
        want = torch.view_as_real(torch.view_as_complex(want.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)).flatten(-2)
    assert_close(got, want, plain)


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype, layout, numerics):
    """strided-input: the same bits for eight layouts of each tensor argument, and of each output."""
    given = {"q": heads(2, 3, 5, 40, dtype), "k": heads(2, 3, 2, 40, dtype), "q_weight": torch.randn(40).to(dtype), "k_weight": torch.randn(40).to(dtype)}
    given |= dict(zip(("cos", "sin"), tables(3, 40)))

    def run(q, k, q_weight, k_weight, cos, sin, *out):
        call = ops.qk_norm_into if out else ops.qk_norm_rope
        return call(q, k, q_weight, k_weight, *out, rope=(cos, sin), numerics=numerics)

    for name, laid, plain in one_at_a_time(given, layout):
        want = run(**plain)
        for got, expected in zip(run(**laid), want, strict=True):
            assert_exact(got, expected, name)
        out = [torch.full_like(x, torch.nan) for x in want]
        run(*laid.values(), *out)
        assert all(torch.equal(got, expected) for got, expected in zip(out, want)), name
    want = run(**given)
    for strided in range(2):
        out = [torch.full_like(x, torch.nan) for x in want]
        out[strided] = layout(out[strided])
        run(*given.values(), *out)
        assert_exact(out[0], want[0], f"output {strided}")
        assert_exact(out[1], want[1], f"output {strided}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_slices_of_a_joint_buffer(dtype, backend):
    joint_q, joint_k = (torch.full((2, 3 + 4 + 2, 5, 64), torch.nan, dtype=dtype) for _ in range(2))
    q, k, weight = heads(2, 4, 5, 64, dtype), heads(2, 4, 5, 64, dtype), torch.randn(64).to(dtype)
    before = joint_q._version, joint_k._version
    with forced(backend):
        ops.qk_norm_into(q, k, weight, None, joint_q[:, 3:7], joint_k[:, 3:7], eps=1e-5)
    assert joint_q._version > before[0] and joint_k._version > before[1]
    assert_exact(joint_q[:, 3:7], diffusers_norm(q, weight, 1e-5))
    assert_exact(joint_k[:, 3:7], diffusers_norm(k, None, 1e-5))
    for joint in (joint_q, joint_k):
        assert joint[:, :3].isnan().all() and joint[:, 7:].isnan().all()
    assert ops.stats()["qk_norm_into"][backend] == 1
    want = diffusers_norm(q, weight, 1e-6), diffusers_norm(k, weight, 1e-6)
    with forced(backend):
        ops.qk_norm_into(q, k, weight, weight, q, k)  # in place
    assert_exact(q, want[0])
    assert_exact(k, want[1])


def test_alias_inputs_stay_and_outputs_are_new():
    q, k, weight = heads(1, 4, 2, 40, torch.float32), heads(1, 4, 2, 40, torch.float32), torch.randn(40)
    copies = q.clone(), k.clone(), weight.clone()
    out = ops.qk_norm_rope(q, k, weight, weight)
    assert all(torch.equal(x, y) for x, y in zip((q, k, weight), copies))
    assert len({x.untyped_storage().data_ptr() for x in (q, k, weight, *out)}) == 5


def test_batch_coupling():
    q, weight = heads(8, 3, 5, 64, torch.bfloat16), torch.randn(64).to(torch.bfloat16)
    together, _ = ops.qk_norm_rope(q, q, weight, weight)
    for i in range(8):
        assert_exact(ops.qk_norm_rope(q[i:i + 1], q[i:i + 1], weight, weight)[0], together[i:i + 1])


@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (1, 0, 2, 8), (1, 3, 0, 8)), ids=str)
def test_empty(shape):
    q = torch.randn(shape, requires_grad=True)
    out = ops.qk_norm_rope(q, q, torch.ones(8), None)
    assert out[0].shape == shape
    (out[0].sum() + out[1].sum()).backward()
    assert q.grad.shape == shape


@pytest.mark.parametrize("numerics", ("exact", "close"))
def test_fp16_overflow(numerics):
    q = torch.where(torch.arange(64) % 2 == 0, 1000.0, -1000.0).to(torch.float16).expand(1, 2, 3, 64)
    out, _ = ops.qk_norm_rope(q, q, None, None, numerics=numerics)
    assert_exact(out, q.sign())


@pytest.mark.parametrize("eps", (1e-5, 1e-6))
def test_eps_decides_for_small_inputs(eps):
    q = heads(1, 2, 3, 64, torch.float32) * 1e-4
    assert_exact(ops.qk_norm_rope(q, q, eps=eps)[0], diffusers_norm(q, None, eps))


def test_int32_stride():
    base = torch.empty(2**31 + 4096, dtype=torch.bfloat16)  # never touched but for two rows
    q = base.as_strided((1, 2, 1, 64), (2**31, 2**31, 64, 1))
    q.copy_(heads(1, 2, 1, 64, torch.bfloat16))
    assert_exact(ops.qk_norm_rope(q, q)[0], ops.qk_norm_rope(q.contiguous(), q)[0])


@pytest.mark.parametrize("rotated", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_biased_cast(dtype, rotated):
    """biased-cast: over 2^20 elements the mean signed error is within 0.02 units in the last place."""
    q, k = heads(64, 64, 4, 64, dtype), heads(64, 64, 4, 64, dtype)
    weight, rope = torch.randn(64).to(dtype), tables(64, 64) if rotated else None
    with forced("reference"):
        want = ops.qk_norm_rope(q.double(), k.double(), weight.double(), None, rope=rope, numerics="close")
    for one, true in zip(ops.qk_norm_rope(q, k, weight, None, rope=rope, numerics="close"), want, strict=True):
        assert_unbiased(one, true)
    assert not CPU.loaded or ops.stats()["qk_norm_rope"]["cpu"] == 1


def test_autocast_and_mixed_weight_dtypes_follow_stock():
    for dtype in DTYPES:
        for weight_dtype in DTYPES:
            q, weight = heads(1, 2, 3, 40, dtype), torch.randn(40).to(weight_dtype)
            for enabled in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    assert_exact(ops.qk_norm_rope(q, q, weight)[0], diffusers_norm(q, weight, 1e-6), f"{dtype} {weight_dtype} {enabled}")
            assert_exact(ops.qk_norm_rope(q, q, weight, norm="torch_rms")[0], F.rms_norm(q, (40,), weight, 1e-6))


def test_nondeterminism():
    q, weight = heads(2, 33, 24, 64, torch.bfloat16), torch.randn(64).to(torch.bfloat16)
    first = ops.qk_norm_rope(q, q, weight, weight)[0]
    assert all(torch.equal(first, ops.qk_norm_rope(q, q, weight, weight)[0]) for _ in range(20))


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
@pytest.mark.parametrize("level", ("base", "avx2", *(pytest.param(level, marks=pytest.mark.slow) for level in ("avx512", "avx512_bf16"))))  # as in this process
def test_every_isa_level_is_exact(level):
    """Each level compiles its own loops: the probes at import compare them with the installed torch over shapes and dtypes."""
    if ISA_LEVELS.index(level) > ISA_LEVELS.index(cpu_isa()):
        pytest.skip(f"this processor runs {cpu_isa()}")
    code = ("import fusewire.ops; from fusewire.kernels.library import cpu_isa; from fusewire.kernels.qk_norm_rope import native as a; "
            "from fusewire.kernels.sampler_step import native as b; print(cpu_isa(), a.differs, [b._differs])")
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "FUSEWIRE_CPU_ISA": level, "PYTHONPATH": str(root / "src")})
    assert done.stdout.split(maxsplit=1) == [level, "['', ''] ['']\n"]


def test_exact_stands_down_where_torch_differs(monkeypatch):
    q = heads(1, 2, 3, 40, torch.float32)
    assert "another order" in differs_from_stock(lambda x: x, lambda x: x + 1, [(q,)])
    assert differs_from_stock(lambda x: (x, x), lambda x: (x, x), [(q,)]) == ""
    monkeypatch.setattr(native, "differs", ["torch differs", ""])
    ops.qk_norm_rope(q, q)
    assert ops.stats()["qk_norm_rope"]["reference"] == 1
    if CPU.loaded:
        ops.qk_norm_rope(q, q, norm="torch_rms")
        ops.qk_norm_rope(q, q, numerics="close")
        assert ops.stats()["qk_norm_rope"]["cpu"] == 2
