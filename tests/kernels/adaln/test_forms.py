"""Modulation by frames, without a shift, and through tanh: against the stock arithmetic, forwards and backwards, on the kernels that should run."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.kernels.adaln.cases import DTYPES, NAMES, call, gradients, inputs, op_name, served, stock, upstream, used, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_within

MODULATIONS = ("gate", "gate2", "shift", "scale", "shift2", "scale2")
NUMERICS = ("exact", "close")
GATED = ("gate_residual", "gate_residual_adaln", "two_gates")
SHIFTED = ("adaln_modulate", "gate_residual_adaln", "two_gates")


def of_frames(batch: int, frames: int, tokens: int, channels: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Tokens of ``frames`` frames of ``tokens`` each; modulations [B, F, C], chunks of one projection."""
    v = inputs(batch, frames * tokens, channels, dtype)
    return v | {name: t for name, t in inputs(batch, frames, channels, dtype, "token").items() if name in MODULATIONS}


def over_tokens(v: dict) -> dict:
    """The same with a row for each token, as stock's broadcasting makes them."""
    repeats = v["x"].shape[1] // v["scale"].shape[1]
    return {name: t.repeat_interleave(repeats, 1) if name in MODULATIONS else t for name, t in v.items()}


def tanh_stock(name: str, v: dict, **keywords) -> tuple[torch.Tensor, ...]:
    return stock(name, {k: t.tanh() if k.startswith("gate") else t for k, t in v.items()}, **keywords)


def unshifted(v: dict) -> dict:
    return v | {"shift": None}


def unshifted_stock(name: str, v: dict) -> tuple[torch.Tensor, ...]:
    """Of ``v`` without a shift: the last addition is not made."""
    r = stock("gate_residual" if name == "gate_residual_adaln" else name, v)[:1] if name != "adaln_modulate" else ()
    norm = torch.nn.functional.layer_norm(r[0] if r else v["x"], v["x"].shape[-1:], eps=1e-6)
    return (*r, norm * (1 + (v["scale"] if v["scale"].dim() == 3 else v["scale"][:, None])))


def hold_rule(name: str, v: dict, plain_of, **keywords) -> None:
    """Outputs and gradients of close keep its rule against eager PyTorch."""
    outputs = call(name, v, numerics="close", **keywords), plain_of(name, v), plain_of(name, wide(v))
    for got, plain, want in zip(*outputs, strict=True):
        assert_close(got, want, plain, name)
    grads = [torch.randn_like(v["x"]) for _ in outputs[0]]
    got, plain = gradients(call, name, v, grads, numerics="close", **keywords), gradients(plain_of, name, v, grads)
    for argument, want in gradients(plain_of, name, wide(v), [grad.double() for grad in grads]).items():
        assert_close(got[argument], want, plain[argument], f"{name} {argument}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_by_frames(name, dtype):
    """tail, silent-off: a row for each of five frames; exact is stock's bit for bit, close keeps its rule, forwards and backwards."""
    v = of_frames(2, 5, 9, 300, dtype)
    for got, want in zip(call(name, v), stock(name, over_tokens(v)), strict=True):
        assert_exact(got, want, name)
        assert got.is_contiguous()
    hold_rule(name, v, lambda name, v: stock(name, over_tokens(v)))
    assert not CPU.loaded or served(op_name(name))[1] == 0 and served(f"{op_name(name)}_backward") == (1, 0)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("name", NAMES)
def test_frames_beside_other_modulations(name, numerics):
    """One argument by frames, the others for each sample or each token."""
    frames = of_frames(2, 4, 6, 40, torch.float64)
    for kind in ("chunk", "one", "token"):
        others = frames | {k: t for k, t in inputs(2, 24, 40, torch.float64, kind).items() if k in MODULATIONS}
        for argument in set(used(name)) & set(MODULATIONS):
            v = others | {argument: frames[argument]}
            plain = others | {argument: over_tokens(frames)[argument]}
            for got, want in zip(call(name, v, numerics=numerics), stock(name, plain), strict=True):
                assert_within(got, want, 1, argument)
            grads = upstream(v, name)
            want = gradients(stock, name, plain, grads)
            for other, got in gradients(call, name, v, grads, numerics=numerics).items():
                assert_within(got, want[other].unflatten(1, (4, 6)).sum(2) if other == argument else want[other], 1, f"{other} beside {argument}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_strided_input(numerics, layout):
    """strided-input, misaligned: the same bits for any layout of tokens and of rows by frames; a slice of longer sequences, too, whose frames are copied."""
    v = of_frames(2, 3, 4, 35)
    for tensor in v.values():
        tensor[1] = tensor[0]  # so that an expanded layout exists
    longer = torch.cat([torch.full((2, 5, 35), torch.nan), v["x"], torch.full((2, 1, 35), torch.nan)], 1)
    for name in NAMES:
        want = call(name, v, numerics=numerics)
        for argument in used(name):
            for got, expected in zip(call(name, {**v, argument: layout(v[argument])}, numerics=numerics), want, strict=True):
                assert_exact(got, expected, f"{name} {argument}")
        for got, expected in zip(call(name, {**v, "x": longer[:, 5:-1]}, numerics=numerics), want, strict=True):
            assert_exact(got, expected, name)


def test_batch_coupling():
    """batch-coupling: a sample alone equals the sample in a batch of 4, and a frame alone the frame among 5."""
    v = of_frames(4, 5, 6, 130)
    for name in NAMES:
        for numerics in NUMERICS:
            whole = call(name, v, numerics=numerics)
            sample = call(name, {k: t[2:3] for k, t in v.items()}, numerics=numerics)
            frame = call(name, {k: t[:, 3:4] if k in MODULATIONS else t[:, 18:24] for k, t in v.items()}, numerics=numerics)
            for together, alone, one in zip(whole, sample, frame, strict=True):
                assert_exact(alone, together[2:3], name)
                assert_exact(one, together[:, 18:24], name)


@pytest.mark.parametrize("kind", ("chunk", "token", "frames"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GATED)
def test_gate_through_tanh(name, dtype, kind):
    """silent-off: exact is stock's bit for bit, close keeps its rule, forwards and backwards; the gates beyond +-1 and saturated ones."""
    batch = 20  # enough elements of a gate's gradient for the rule's maximum to mean something
    v = of_frames(batch, 5, 9, 300, dtype) if kind == "frames" else inputs(batch, 45, 300, dtype, kind)
    v |= {k: 3 * v[k] for k in ("gate", "gate2")}
    plain_of = (lambda name, v: tanh_stock(name, over_tokens(v))) if kind == "frames" else tanh_stock
    for got, want in zip(call(name, v, gate_tanh=True), plain_of(name, v), strict=True):
        assert_exact(got, want, name)
    hold_rule(name, v, plain_of, gate_tanh=True)
    assert not CPU.loaded or served(op_name(name))[1] == 0 and served(f"{op_name(name)}_backward") == (1, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("chunk", "one", "token"))
def test_without_shift(kind, dtype):
    """silent-off: exact equals the chain without the addition, close keeps its rule; what the other arguments' gradients are stays."""
    v = inputs(2, 35, 300, dtype, kind)
    for name in ("adaln_modulate", "gate_residual_adaln"):
        for got, want in zip(call(name, unshifted(v)), unshifted_stock(name, v), strict=True):
            assert_exact(got, want, name)
        outputs = call(name, unshifted(v), numerics="close"), unshifted_stock(name, v), unshifted_stock(name, wide(v))
        for got, plain, want in zip(*outputs, strict=True):
            assert_close(got, want, plain, name)
        leaves = {k: t.detach().requires_grad_() for k, t in v.items()}
        with_zeros = {**leaves, "shift": torch.zeros_like(v["shift"])}
        names = [k for k in used(name) if k != "shift"]
        found = (torch.autograd.grad([out.square().sum() for out in call(name, these, numerics="close")], [leaves[k] for k in names])
                 for these in (unshifted(leaves), with_zeros))
        for got, want, argument in zip(*found, names, strict=True):
            assert_exact(got, want, f"{name} {argument}")
    assert not CPU.loaded or served("adaln_modulate")[1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_z_image_block(dtype):
    """As Z-Image's block has it: RMSNorm with a weight, scale alone, and a residual gated through tanh; bit for bit in exact."""
    x, y, weight = torch.randn(2, 33, 256).to(dtype), torch.randn(2, 33, 256).to(dtype), torch.rand(256).to(dtype)
    scale, gate = torch.randn(2, 512).to(dtype).unsqueeze(1).chunk(2, dim=2)
    variance = x.to(torch.promote_types(dtype, torch.float32)).pow(2).mean(-1, keepdim=True)
    norm = (x * torch.rsqrt(variance + 1e-5)).to(dtype) * weight
    assert_exact(ops.adaln_modulate(x, None, scale, norm="rms", weight=weight, eps=1e-5), norm * (1.0 + scale))
    assert_exact(ops.gate_residual(x, y, gate, gate_tanh=True), x + gate.tanh() * y)


@pytest.mark.parametrize("name", NAMES)
def test_triton(name):
    """The Triton row gets by frames, tanh and no shift what it gets otherwise (in the interpreter, unless there is a GPU)."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    v = of_frames(1, 2, 3, 40)
    options = {"gate_tanh": True} if name in GATED else {}
    v = unshifted(v) if name in SHIFTED else v
    with forced("triton"):
        outputs = call(name, v, numerics="close", **options)
    assert ops.stats()[op_name(name)]["triton"] == 1
    for got, want in zip(outputs, call(name, v, numerics="close", **options), strict=True):
        assert_within(got, want, 8, name)


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name):
    """By frames, through tanh, without a shift: no graph break, the same bits."""
    v = of_frames(2, 3, 4, 32)
    v = unshifted(v) if name in SHIFTED else v
    options = {"gate_tanh": True} if name in GATED else {}
    compiled = torch.compile(lambda v: call(name, v, **options), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(v), call(name, v, **options), strict=True):
        assert_exact(got, want, name)


@pytest.mark.parametrize("tokens, frames", ((0, 3), (6, 0)))
def test_empty(tokens, frames):
    """empty: no tokens in any frame give nothing; no frames for some tokens are an error."""
    x, scale = torch.randn(2, tokens, 8), torch.randn(2, frames, 8)
    if not frames:
        with pytest.raises(ValueError, match=r"scale has shape \[2, 0, 8\]"):
            ops.adaln_modulate(x, None, scale)
    else:
        assert ops.adaln_modulate(x, None, scale).shape == x.shape and ops.gate_residual(x, x, scale, gate_tanh=True).shape == x.shape


@pytest.mark.parametrize("numerics", NUMERICS)
def test_dual_without_shifts(numerics):
    """silent-off: each of two modulations of one norm with a shift or without: what ``adaln_modulate`` gives for it alone, bit for bit, by frames too."""
    weight = torch.randn(40)
    for v in (inputs(2, 6, 40), of_frames(2, 3, 4, 40)):
        for shift, shift2 in ((None, None), (v["shift"], None), (None, v["shift2"])):
            for norm in ("layer", "rms"):
                options = dict(norm=norm, weight=weight, numerics=numerics)
                got = ops.adaln_modulate_dual(v["x"], shift, v["scale"], shift2, v["scale2"], **options)
                for one, (h, s) in zip(got, ((shift, v["scale"]), (shift2, v["scale2"])), strict=True):
                    assert_exact(one, ops.adaln_modulate(v["x"], h, s, **options), norm)
    assert not CPU.loaded or served("adaln_modulate_dual") == (12, 0)


def test_alias():
    """alias: inputs keep their bits, and results share no memory with them."""
    v = of_frames(1, 3, 4, 32)
    before = {k: t.clone() for k, t in v.items()}
    for name in NAMES:
        outputs = call(name, v, **({"gate_tanh": True} if name in GATED else {}))
        assert not {t.untyped_storage().data_ptr() for t in outputs} & {t.untyped_storage().data_ptr() for t in v.values()}
    assert all(torch.equal(v[k], t) for k, t in before.items())


def test_bad_frames():
    v = of_frames(2, 5, 9, 8)
    with pytest.raises(ValueError, match=r"shift has shape \[2, 4, 8\].*divisor F of 45"):
        ops.adaln_modulate(v["x"], v["shift"][:, :4], v["scale"])
    with pytest.raises(ValueError, match=r"scale has shape \[2, 3, 8\], for 3 frames; it should be for 5"):
        ops.adaln_modulate(v["x"], v["shift"], v["scale"][:, :3])
    with pytest.raises(ValueError, match=r"gate2 has shape \[2, 3, 8\], for 3 frames; it should be for 5"):
        ops.gate_residual_adaln(v["x"], v["y"], v["gate"], v["shift"], v["scale"], y2=v["y2"], gate2=v["gate2"][:, :3])
    with pytest.raises(TypeError, match="scale is a NoneType"):
        ops.adaln_modulate(v["x"], None, None)
