"""The forms of QK norm and rotary embedding: diffusers' modules bit for bit in ``exact``, against float64 in ``close``, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_hidream_image as hidream
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.kernels.isa_levels import run_at
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMERICS = ("exact", "close")
# diffusers' name (Attention's qk_norm): the op's keywords
STOCK = {
    "layer_norm": dict(norm="layer"),
    "fp32_layer_norm": dict(norm="float32_layer"),
    "layer_norm_across_heads": dict(norm="layer", across_heads=True),
    "rms_norm": dict(norm="rms"),
    "rms_norm_across_heads": dict(norm="rms", across_heads=True),
    "l2": dict(norm="l2"),
    "torch_rms": dict(norm="torch_rms"),
    "torch_rms_across_heads": dict(norm="torch_rms", across_heads=True),
}
# How a rotation is given: (complex, halves, of R of D dimensions, by sample)
ROPES = {
    "pairs": (False, False, 1.0, False),
    "halves": (False, True, 1.0, False),
    "complex": (True, False, 1.0, False),
    "complex by sample": (True, False, 1.0, True),
    "partial": (False, False, 0.5, False),
    "partial halves": (False, True, 0.5, False),
    "by sample": (False, False, 1.0, True),
    "partial halves by sample": (False, True, 0.5, True),
}


def heads(batch, tokens, count, dim, dtype=torch.float32):
    return torch.randn(batch, tokens, count * dim).to(dtype).view(batch, tokens, count, dim)


def stock_norms(form: str, q_heads: int, k_heads: int, dim: int, dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The norms that diffusers' Attention builds, with random weights; HiDream's torch.nn.RMSNorm."""
    if form.startswith("torch_rms"):
        norms = [torch.nn.RMSNorm(dim * (count if "across" in form else 1), 1e-6) for count in (q_heads, k_heads)]
    else:
        attention = Attention(query_dim=dim * q_heads, heads=q_heads, kv_heads=k_heads, dim_head=dim, qk_norm=form, eps=1e-6)
        norms = [attention.norm_q, attention.norm_k]
    for norm in norms:
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    return tuple(norm.to(dtype) for norm in norms)


def keywords_of(form: str, norms) -> dict:
    found = dict(STOCK[form], eps=1e-6)
    for name, norm in zip("qk", norms):
        for kind in ("weight", "bias"):
            if getattr(norm, kind, None) is not None:
                found[f"{name}_{kind}"] = getattr(norm, kind)
    return found


def stock_norm(norm, x, form: str):
    return norm(x.flatten(2)).view(x.shape) if "across" in form else norm(x)


def rope_of(kind: str, batch: int, tokens: int, dim: int):
    as_complex, _, share, by_sample = ROPES[kind]
    angle = torch.randn(*((batch,) if by_sample else ()), tokens, int(dim * share) // 2)
    return torch.polar(torch.ones_like(angle), angle) if as_complex else (angle.cos(), angle.sin())


def stock_rotate(kind: str, x, rope):
    """diffusers' apply_rotary_emb on [B, T, H, D], sample by sample where tables are."""
    as_complex, halves, _, by_sample = ROPES[kind]
    if as_complex:
        return apply_rotary_emb(x, rope, use_real=False) if by_sample else apply_rotary_emb_qwen(x, rope, use_real=False)
    if by_sample:
        whole = next(name for name, form in ROPES.items() if form == (*ROPES[kind][:3], False))
        return torch.cat([stock_rotate(whole, x[i:i + 1], [table[i] for table in rope]) for i in range(len(x))])
    width = 2 * rope[0].shape[-1]
    both = [torch.cat([table, table], -1) if halves else table.repeat_interleave(2, -1) for table in rope]
    y = apply_rotary_emb(x[..., :width], both, use_real_unbind_dim=-2 if halves else -1, sequence_dim=1)
    return torch.cat([y, x[..., width:]], -1)


def true_rotate(kind: str, x, rope):
    """In float64, by complex numbers."""
    as_complex, halves, _, by_sample = ROPES[kind]
    cos, sin = (rope.real, rope.imag) if as_complex else rope
    turn = torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    head, rest = x[..., :2 * cos.shape[-1]], x[..., 2 * cos.shape[-1]:]
    pairs = head.unflatten(-1, (2, -1)).mT if halves else head.unflatten(-1, (-1, 2))
    y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return torch.cat([(y.mT if halves else y).flatten(-2), rest], -1)


@pytest.mark.on_reference(when=lambda form, dtype: form == "fp32_layer_norm" and dtype is torch.float64,
                          reason="FP32LayerNorm computes float64 in float32")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", STOCK)
def test_exact_stock_norms(form, dtype):
    """tail, head-dim: the norms that diffusers' Attention builds, bit for bit, with their own number of heads for k; close keeps the rule."""
    for batch, tokens, q_heads, k_heads, dim in ((1, 70, 4, 2, 63), (2, 33, 4, 4, 72), (1, 65, 6, 3, 128)):
        q, k = heads(batch, tokens, q_heads, dim, dtype), heads(batch, tokens + 2, k_heads, dim, dtype)
        norms = stock_norms(form, q_heads, k_heads, dim, dtype)
        keywords = keywords_of(form, norms)
        with torch.no_grad():
            want = [stock_norm(norm, x, form) for norm, x in zip(norms, (q, k))]
            for got, expected in zip(ops.qk_norm_rope(q, k, **keywords), want, strict=True):
                assert_exact(got, expected, form)
                assert got.is_contiguous()
            if form == "fp32_layer_norm" and dtype is torch.float64:
                continue  # computes in float32, which is no yardstick
            for norm, plain, x, got in zip(norms, want, (q, k), ops.qk_norm_rope(q, k, **keywords, numerics="close"), strict=True):
                y = x.double().flatten(2) if "across" in form else x.double()
                y = y - y.mean(-1, keepdim=True) if "layer" in form else y
                y = F.normalize(y, dim=-1) if form == "l2" else y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
                for kind, apply in (("weight", torch.mul), ("bias", torch.add)):
                    y = y if getattr(norm, kind, None) is None else apply(y, getattr(norm, kind).double())
                assert_close(got, y.view(x.shape), plain, form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("form", ("rms_norm", "none", "layer_norm", "torch_rms_across_heads"))
def test_exact_stock_rotations(form, rope, dtype):
    """tail, silent-off: each way of giving a rotation, after norms and alone, is diffusers' apply_rotary_emb bit for bit; close keeps the rule."""
    for batch, tokens, q_heads, k_heads, dim in ((2, 65, 3, 1, 20), (2, 33, 4, 2, 64)):
        q, k, tables = heads(batch, tokens, q_heads, dim, dtype), heads(batch, tokens, k_heads, dim, dtype), rope_of(rope, batch, tokens, dim)
        norms = stock_norms(form, q_heads, k_heads, dim, dtype) if form != "none" else (torch.nn.Identity(),) * 2
        keywords = dict(keywords_of(form, norms) if form != "none" else {"norm": "none"}, rope=tables, halves=ROPES[rope][1])
        with torch.no_grad():
            normed = [stock_norm(norm, x, form) for norm, x in zip(norms, (q, k))]
            want = [stock_rotate(rope, y, tables) for y in normed]
            for got, expected in zip(ops.qk_norm_rope(q, k, **keywords), want, strict=True):
                assert_exact(got, expected, f"{form} {rope}")
                assert got.is_contiguous()
            wide = [norm.double() for norm in norms]
            for norm, x, plain, got in zip(wide, (q, k), want, ops.qk_norm_rope(q, k, **keywords_close(keywords, norms, dtype)), strict=True):
                assert_close(got, true_rotate(rope, stock_norm64(norm, x.double(), form), tables), plain, f"{form} {rope}")
    served = ops.stats()["qk_norm_rope"]
    by_pytorch = 2 if form == "none" and ROPES[rope][0] else 0
    assert not CPU.loaded or served["reference"] == by_pytorch and served["cpu"] >= 2


def keywords_close(keywords, norms, dtype) -> dict:
    """``norms`` were widened in place: their parameters again in the narrow dtype."""
    return {name: v.to(dtype) if isinstance(v, torch.nn.Parameter) else v for name, v in keywords.items()} | {"numerics": "close"}


def stock_norm64(norm, x, form: str):
    """diffusers' RMSNorm takes the root in float32 whatever the dtype; this does not."""
    if form == "rms_norm":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    return stock_norm(norm, x, form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_var(dtype):
    """VAR's q and k: F.normalize, and q times its learned scale, clamped at log 100; heads beyond the clamp, at it and below."""
    q, k = heads(2, 9, 4, 64, dtype), heads(2, 9, 4, 64, dtype)
    scale_mul = torch.tensor([1.386, 4.6, 4.7, 9.0]).view(1, 1, 4, 1).to(dtype)
    limit = torch.log(torch.tensor(100)).item()
    stock = [F.normalize(q, dim=-1).mul(scale_mul.clamp_max(limit).exp()), F.normalize(k, dim=-1)]
    wide = [F.normalize(q.double(), dim=-1).mul(scale_mul.double().clamp_max(limit).exp()), F.normalize(k.double(), dim=-1)]
    for numerics in NUMERICS:
        got = ops.qk_norm_rope(q, k, q_log_scale=scale_mul.flatten(), norm="l2", eps=1e-12, numerics=numerics)
        for mine, plain, want in zip(got, stock, wide, strict=True):
            assert_exact(mine, plain) if numerics == "exact" else assert_close(mine, want, plain)
    mixed = ops.qk_norm_rope(q, k, q_log_scale=scale_mul.flatten().float(), norm="l2", eps=1e-12)[0]
    assert_exact(mixed, F.normalize(q, dim=-1).mul(scale_mul.float().clamp_max(limit).exp()))


@pytest.mark.parametrize("share", (1, 2), ids=("whole", "half"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_hidream(dtype, share, monkeypatch):
    """What HiDream's processor hands to attention: torch.nn.RMSNorm over all heads, then a rotation of whole heads or of their first half."""
    attention = hidream.HiDreamAttention(query_dim=64, heads=4, dim_head=16, single=True, processor=hidream.HiDreamAttnProcessor())
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    attention.to(dtype)
    x, freqs = torch.randn(2, 6, 64).to(dtype), hidream.rope(torch.randn(2, 6), 16 // share, 10000).unsqueeze(2)
    handed = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: handed.extend((q, k)) or v)
    with torch.no_grad():
        attention(norm_hidden_states=x, image_rotary_emb=freqs)
        q, k = (linear(x).view(2, 6, 4, 16) for linear in (attention.to_q, attention.to_k))
        got = ops.qk_norm_rope(q, k, attention.q_rms_norm.weight, attention.k_rms_norm.weight, eps=1e-5, norm="torch_rms", across_heads=True,
                               rope=(freqs[:, :, 0, :, 0, 0], freqs[:, :, 0, :, 1, 0]))
    for mine, stock in zip(got, handed, strict=True):
        assert_exact(mine.transpose(1, 2), stock)


@pytest.mark.parametrize("form", ("rms_norm", "layer_norm", "torch_rms_across_heads", "none"))
@pytest.mark.parametrize("rope", ROPES)
def test_into_the_joint_buffer(rope, form):
    """Per stream, before the concatenation, straight into the joint buffer: what the joint sequence gives after it, and nothing else is touched."""
    norms = stock_norms(form, 3, 3, 24, torch.bfloat16) if form != "none" else (torch.nn.Identity(),) * 2
    keywords = dict(keywords_of(form, norms) if form != "none" else {"norm": "none"}, halves=ROPES[rope][1])
    q, k, tables = heads(2, 9, 3, 24, torch.bfloat16), heads(2, 9, 3, 24, torch.bfloat16), rope_of(rope, 2, 9, 24)
    for numerics in NUMERICS:
        with torch.no_grad():
            want = ops.qk_norm_rope(q, k, rope=tables, numerics=numerics, **keywords)
            buffers = [torch.full((2, 11, 3, 24), torch.nan, dtype=torch.bfloat16) for _ in "qk"]
            for part, to in ((slice(0, 4), slice(1, 5)), (slice(4, 9), slice(5, 10))):
                own = tables[..., part, :] if isinstance(tables, torch.Tensor) else tuple(table[..., part, :] for table in tables)
                versions = [buffer._version for buffer in buffers]
                given = dict(keywords)
                weights = given.pop("q_weight", None), given.pop("k_weight", None)
                ops.qk_norm_into(q[:, part], k[:, part], *weights, *(b[:, to] for b in buffers), rope=own, numerics=numerics, **given)
                assert all(buffer._version > version for buffer, version in zip(buffers, versions))
        for buffer, expected in zip(buffers, want, strict=True):
            assert_exact(buffer[:, 1:10], expected)
            assert buffer[:, 0].isnan().all() and buffer[:, 10].isnan().all()


@pytest.mark.parametrize("numerics", NUMERICS)
def test_in_place_in_packed_qkv(numerics):
    """The q and k of a packed [B, T, 3, H, D] projection, each form in place: v keeps its bits."""
    for keywords in (dict(), dict(norm="layer", halves=True), dict(norm="torch_rms", across_heads=True), dict(norm="none", halves=True),
                     dict(norm="l2")):
        packed, rope = torch.randn(2, 5, 3, 4, 32), rope_of("by sample", 2, 5, 32)
        q, k, v = packed.unbind(2)
        want, before = ops.qk_norm_rope(q, k, rope=rope, numerics=numerics, **keywords), v.clone()
        ops.qk_norm_into(q, k, None, None, q, k, rope=rope, numerics=numerics, **keywords)
        assert_exact(q, want[0])
        assert_exact(k, want[1])
        assert torch.equal(v, before)


FORMS = {
    "layer halves": (dict(norm="layer", halves=True), "halves"),
    "across partial": (dict(norm="torch_rms", across_heads=True), "partial"),
    "rms by sample": (dict(norm="rms"), "by sample"),
    "rms complex": (dict(norm="rms"), "complex"),
    "l2 partial halves": (dict(norm="l2", halves=True), "partial halves by sample"),
    "rotation": (dict(norm="none"), "pairs"),
}


def inputs(form: str, shape=(2, 5, 3, 24), dtype=torch.float32) -> dict:
    batch, tokens, count, dim = shape
    keywords, kind = FORMS[form]
    size = count * dim if keywords.get("across_heads") else dim
    v = {"q": torch.randn(shape).to(dtype), "k": torch.randn(shape).to(dtype)}
    if keywords["norm"] == "l2":
        v["q_log_scale"] = torch.randn(count).to(dtype)
    elif keywords["norm"] != "none":
        v["q_weight"], v["k_weight"] = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    if keywords["norm"] == "layer":
        v["q_bias"] = torch.randn(size).to(dtype)
        v["k_bias"] = torch.randn(size).to(dtype)
    return v | {"rope": rope_of(kind, batch, tokens, dim)}


def call(form: str, v: dict, **keywords):
    return ops.qk_norm_rope(**v, **FORMS[form][0], **keywords)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_strided_input(form, layout):
    """strided-input, misaligned: the same bits for any layout of each argument, tables included."""
    v = inputs(form)
    v["q"][1] = v["q"][0]
    for numerics in NUMERICS:
        want = call(form, v, numerics=numerics)
        for name, given in v.items():
            if name == "rope" and isinstance(given, torch.Tensor):
                continue  # a view of complex numbers has no halves to lay out
            moved = tuple(map(layout, given)) if name == "rope" else layout(given)
            for got, expected in zip(call(form, {**v, name: moved}, numerics=numerics), want, strict=True):
                assert_exact(got, expected, f"{name} {numerics}")


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    """strided-grad, alias: gradcheck in float64; expanded gradients; in exact those of the same calls of PyTorch; inputs keep their bits."""
    v = inputs(form, (1, 3, 2, 8), torch.float64)
    names = [name for name in v if name != "rope"]
    leaves, before = [v[name].requires_grad_() for name in names], [v[name].detach().clone() for name in names]

    def run(*tensors, numerics="close"):
        return call(form, {**v, **dict(zip(names, tensors))}, numerics=numerics)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    close = torch.autograd.grad(sum(y.sum() for y in run(*leaves)), leaves)
    exact = torch.autograd.grad(sum(y.sum() for y in run(*leaves, numerics="exact")), leaves)
    for mine, theirs in zip(close, exact, strict=True):
        assert_within(mine.float(), theirs, 20)  # exact rotates in float32
    assert all(map(torch.equal, before, (leaf.detach() for leaf in leaves)))


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("form", FORMS)
def test_batch_coupling(form, numerics):
    """batch-coupling, nondeterminism: a sample alone equals the sample in a batch of 4; repeats give the same bits."""
    v = inputs(form, (4, 5, 3, 24), torch.bfloat16)
    together = call(form, v, numerics=numerics)
    rope = v["rope"] if isinstance(v["rope"], torch.Tensor) else tuple(table[2:3] if table.dim() == 3 else table for table in v["rope"])
    alone = call(form, {**v, "q": v["q"][2:3], "k": v["k"][2:3], "rope": rope}, numerics=numerics)
    for got, want in zip(alone, together, strict=True):
        assert_exact(got, want[2:3])
    assert all(map(torch.equal, call(form, v, numerics=numerics), together))


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (1, 0, 2, 8), (1, 3, 0, 8)), ids=str)
def test_empty(shape, numerics):
    """empty: a zero in each dimension, forwards and backwards."""
    for form in FORMS:
        if form.startswith("across") and shape[2] == 0:
            continue  # no channels at all
        v = inputs(form, shape)
        v["q"].requires_grad_()
        got = call(form, v, numerics=numerics)
        assert got[0].shape == shape
        assert torch.autograd.grad(got[0].sum(), v["q"])[0].shape == shape


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
@pytest.mark.parametrize("norm", (2, 3), ids=("pairs", "halves"))
def test_fake_mismatch(norm, permuted):
    """fake-mismatch: opcheck of the rotation alone, on contiguous and on permuted-dense inputs."""
    q, k, (cos, sin) = heads(2, 3, 4, 8), heads(2, 3, 2, 8), rope_of("pairs", 2, 3, 8)
    if permuted:
        q, k = (x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in (q, k))
    out = torch.empty_like(q), torch.empty_like(k)
    torch.library.opcheck(torch.ops.fusewire.qk_norm_into.default, (q, k, None, None, *out, cos, sin, 1e-6, norm, True))
    for exact in (False, True):
        torch.library.opcheck(torch.ops.fusewire.qk_norm_rope.default, (q.detach().requires_grad_(), k, None, None, cos, sin, 1e-6, norm, exact))


def test_compile():
    """No graph break, and the same bits."""
    def run(v):
        return [y for form, given in v.items() for numerics in NUMERICS for y in call(form, given, numerics=numerics)]

    v = {form: inputs(form) for form in FORMS if form != "rms complex"}
    for got, want in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(v), run(v), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    """autocast: the ops promote as the modules do without it."""
    v = inputs(form, dtype=torch.bfloat16)
    for numerics in NUMERICS:
        want = call(form, v, numerics=numerics)
        with torch.autocast("cpu", torch.bfloat16):
            for got, expected in zip(call(form, v, numerics=numerics), want, strict=True):
                assert_exact(got, expected)


def test_fp16_overflow_and_eps():
    """fp16-overflow, eps: lengths that leave float16; vectors of zeros, and those as short as eps."""
    x = torch.full((1, 2, 3, 64), 1000.0, dtype=torch.float16)
    assert_within(ops.qk_norm_rope(x, x, norm="l2", eps=1e-12, numerics="close")[0], torch.full(x.shape, 0.125), 1)
    for numerics in NUMERICS:
        zeros = torch.zeros(1, 2, 3, 64)
        assert not ops.qk_norm_rope(zeros, zeros, norm="l2", numerics=numerics)[0].any()
        short = zeros.clone()
        short[..., 0] = 1e-3
        got = ops.qk_norm_rope(short, short, norm="l2", eps=1.0, numerics=numerics)[0]
        assert_within(got[..., 0], torch.full((1, 2, 3), 1e-3, dtype=torch.float64), 1)
    with forced("reference"):
        assert_exact(ops.qk_norm_rope(zeros, zeros, norm="l2", numerics="close")[0], zeros)


@pytest.mark.slow
@pytest.mark.parametrize("level", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))  # no level of these kernels is above it
@needs_library
def test_every_isa_level(level):
    """The rotation alone gives the same bits at every level, and close keeps its rule."""
    run_at(level, __file__, "test_exact_stock_rotations or test_in_place")


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_exact_gradients_of_a_rotation(dtype):
    """In 16 bits stock rounds the gradient of each of the rotation's two products before it adds them."""
    q, grad, angle = torch.randn(2, 56, 2, 16).to(dtype).requires_grad_(), torch.randn(2, 56, 2, 16).to(dtype), torch.randn(56, 8)
    norm = torch.nn.RMSNorm(16, eps=1e-6).to(dtype)
    stock = apply_rotary_emb(norm(q), tuple(t.repeat_interleave(2, 1) for t in (angle.cos(), angle.sin())), sequence_dim=1)
    ours, _ = ops.qk_norm_rope(q, q.detach(), norm.weight, norm.weight, rope=(angle.cos(), angle.sin()), eps=1e-6, norm="torch_rms")
    assert_exact(ours, stock)
    for got, want in zip(*(torch.autograd.grad(y, (q, norm.weight), grad) for y in (ours, stock))):
        assert_exact(got, want)


def test_l2_in_a_graph_of_any_size():
    q, k = torch.randn(2, 40, 2, 24), torch.randn(2, 40, 2, 24)
    call = torch.compile(lambda q, k: ops.qk_norm_rope(q, k, norm="l2", numerics="close"), backend="eager", fullgraph=True, dynamic=True)
    for got, want in zip(call(q, k), ops.qk_norm_rope(q, k, norm="l2", numerics="close")):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("norm", ("none", "rms"))
@pytest.mark.on_reference(when=lambda norm, **_: norm == "none", reason="exact keeps PyTorch's own product of complex numbers")
def test_complex_tables_of_any_layout(norm, dtype):
    """strided-input, misaligned: PyTorch's view of pairs as complex numbers wants them side by side, at an even place."""
    q, angle = torch.randn(2, 6, 2, 8).to(dtype), torch.rand(6, 4)
    rope = torch.polar(torch.ones_like(angle), angle)
    want = ops.qk_norm_rope(q, q, rope=rope, norm=norm)[0]
    odd_rows = torch.zeros(2, 6, 17, dtype=dtype)[..., :16].unflatten(-1, (2, 8))
    for laid in (torch.empty(q.numel() + 1, dtype=dtype)[1:].view(q.shape).copy_(q), q.mT.contiguous().mT, odd_rows.copy_(q)):
        assert_exact(ops.qk_norm_rope(laid, laid, rope=rope, norm=norm)[0], want)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("q_dtype, k_weight_dtype", [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("form", [dict(halves=True), dict(across_heads=True)], ids=str)
@torch.no_grad()
def test_a_norm_that_leaves_k_in_another_dtype(form, q_dtype, k_weight_dtype, numerics):
    """dtype-mix: the rotation behind it takes q and k of one dtype alone; of others it would read and write beyond k."""
    q, k = torch.randn(1, 31, 5, 40).to(q_dtype), torch.randn(1, 31, 5, 40).to(q_dtype)
    angle = torch.rand(31, 20)
    given = dict(rope=(angle.cos(), angle.sin()), numerics=numerics, norm="rms", **form)
    weights = None, torch.rand(200 if "across_heads" in form else 40).to(k_weight_dtype)
    got = ops.qk_norm_rope(q, k, *weights, **given)
    with forced("reference"):
        want = ops.qk_norm_rope(q, k, *weights, **given)
    assert [y.dtype for y in got] == [y.dtype for y in want] == [q_dtype, k_weight_dtype]
    for y, expected in zip(got, want):
        assert (y.double() - expected.double()).abs().max() <= 2 * torch.finfo(y.dtype).eps * expected.abs().max()
