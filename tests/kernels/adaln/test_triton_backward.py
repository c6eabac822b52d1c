"""The Triton backward of adaLN in the interpreter: values against float64, sums over tokens, masks, layouts. (Races and speed: tests/gpu.)

Every kind of modulation, width and dtype is in the default run once; the rest of their product is slow.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels import dispatch
from fusewire.kernels.adaln import reference, triton_backward, triton_limits
from tests.kernels.adaln.cases import NAMES, affine_stock, call, gradients, inputs, op_name, stock, upstream, used, wide, with_affine
from tests.kernels.interpreted import DTYPES, needs_interpreter, unchanged
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

pytestmark = needs_interpreter
KINDS = ("chunk", "one", "token")


def backward(name: str, v: dict, grads=None, **keywords) -> dict[str, torch.Tensor]:
    """The gradients, which Triton must have computed."""
    counts = ops.stats()[f"{op_name(name)}_backward"]
    found = gradients(call, name, v, grads, "triton", numerics="close", **keywords)
    after = ops.stats()[f"{op_name(name)}_backward"]
    assert (after["triton"], after["reference"]) == (counts["triton"] + 1, counts["reference"])
    return found


def check(name: str, v: dict, plain_of=stock, **keywords) -> None:
    """Every gradient keeps the rule of close against eager PyTorch's."""
    grads = upstream(v, name)
    got, plain = backward(name, v, grads, **keywords), gradients(plain_of, name, v, grads)
    for argument, want in gradients(plain_of, name, wide(v), [grad.double() for grad in grads]).items():
        assert_close(got[argument], want, plain[argument], f"{name} {argument}")


QUICK = [(63, "one", torch.float32), (72, "chunk", torch.bfloat16), (128, "token", torch.float16)]


@pytest.mark.parametrize("width, kind, dtype", [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
                                                for case in itertools.product((63, 72, 128, 600, 2064), KINDS, DTYPES)])
def test_values(width, kind, dtype):
    """tail: of channels; no multiple of 16; whole vectors; 37 tokens are several tiles of rows, the last cut short; one row a tile."""
    v = inputs(2 if width > 100 else 3, 37 if width == 600 else 5, width, dtype, kind)
    check_unchanged = unchanged(*v.values())
    for name in NAMES:
        check(name, v)
    check_unchanged()


@pytest.mark.parametrize("dtype, norm", [(torch.float32, "rms"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    (torch.float32, "layer"), (torch.bfloat16, "layer"), (torch.bfloat16, "rms"), (torch.float16, "layer"), (torch.float16, "rms")))])
def test_affine(dtype, norm):
    """The gradients of weight and bias are sums over all samples."""
    v = with_affine(inputs(2, 3, 601, dtype))
    for name in ("adaln_modulate", "gate_residual_adaln"):
        check(name, v, affine_stock(norm), norm=norm)


@pytest.mark.parametrize("parts", (2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))))
def test_sums_over_many_tiles(monkeypatch, parts):
    """A program that walks over several tiles, the last one cut short, and steps beyond the tokens: 22 tokens are 11 tiles of two."""
    monkeypatch.setattr(triton_backward, "PARTS", parts)
    v = with_affine(inputs(1, 22, 500))
    for name in ("adaln_modulate", "gate_residual_adaln"):
        check(name, v, affine_stock("layer"))


def test_more_partial_sums_than_a_tile():
    """70 programs for a sample: the second kernel adds up three blocks of their sums."""
    check("gate_residual", inputs(1, 70, 1040))


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("affine", (("weight",), ("bias",), ()), ids=str)
def test_mixed_modulations(affine, norm):
    """Modulations of each kind in one call, one of weight and bias or neither: the kernel means what the reference means."""
    v, tokens = with_affine(inputs(2, 6, 40)), inputs(2, 6, 40, kind="token")
    v |= {k: tokens[k] for k in ("gate2", "scale", "shift2")}
    v = {k: t for k, t in v.items() if k not in ("weight", "bias") or k in affine}
    for name in ("adaln_modulate", *(("gate_residual_adaln",) if affine else ("two_gates", "adaln_modulate_dual"))):
        grads = upstream(v, name)
        want = gradients(call, name, wide(v), [grad.double() for grad in grads], "reference", numerics="close", norm=norm)
        for argument, got in backward(name, v, grads, norm=norm).items():
            assert_within(got, want[argument], 8, f"{name} {argument}")


@pytest.mark.parametrize("name", NAMES)
def test_some_gradients(name):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v = inputs(2, 6, 40)
    want = backward(name, v)
    for argument in used(name):
        if name != "gate_residual" or argument != "x":  # the gradient itself: no kernel runs
            assert_exact(backward(name, v, wanted=(argument,))[argument], want[argument], argument)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout):
    """strided-input, misaligned, strided-grad: the same values in any layout, gradients included, give the same bits."""
    for name, kind in (("gate_residual_adaln", "chunk"), ("adaln_modulate_dual", "token")):
        v = inputs(2, 5, 64, torch.float16, kind)
        v = v if kind == "token" else with_affine(v)
        for tensor in v.values():
            tensor[1] = tensor[0]  # so that an expanded layout exists
        grads = upstream(v, name)
        want = backward(name, v, grads)
        laid = [layout(grad) if i == (name == "adaln_modulate_dual") else grad for i, grad in enumerate(grads)]  # one: each has its own strides
        for argument, got in backward(name, {k: layout(t) for k, t in v.items()}, laid).items():
            assert_exact(got, want[argument], f"{name} {argument}")
            assert got.is_contiguous()


@pytest.mark.parametrize("kind", ("chunk", pytest.param("token", marks=pytest.mark.slow)))
def test_batch_coupling(kind):
    """batch-coupling: a sample alone has the gradients that it has in a batch of 3, sums over tokens included."""
    v = inputs(3, 9, 300, kind=kind)
    grads = upstream(v, "two_gates")
    together = backward("two_gates", v, grads)
    alone = backward("two_gates", {k: t[2:3] for k, t in v.items()}, [grad[2:3] for grad in grads])
    for argument in alone:
        assert_exact(alone[argument], together[argument][2:3], argument)


@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8), (2, 3, 0)), ids=str)
def test_empty(shape):
    """empty: a zero in each dimension; sums over no tokens are zero."""
    v = with_affine(inputs(*shape))
    for name in ("adaln_modulate", "gate_residual_adaln"):
        for argument, grad in backward(name, v).items():
            assert grad.shape == v[argument].shape and not grad.any(), f"{name} {argument}"


def test_alias():
    """alias: gradients share no storage with an input, with grad_out or with each other."""
    v = with_affine(inputs(2, 5, 32))
    grads = upstream(v, "gate_residual_adaln")
    found = backward("gate_residual_adaln", v, grads)
    mine, others = ([t.untyped_storage().data_ptr() for t in tensors] for tensors in (found.values(), (*v.values(), *grads)))
    assert len(set(mine)) == len(mine) and not set(mine) & set(others)


def test_cancellation():
    """cancellation: mean 100, standard deviation 0.01."""
    v, zero = {"x": 100 + 0.01 * torch.randn(1, 8, 1536)}, torch.zeros(1, 1536)
    v, grad = {**v, "shift": zero, "scale": zero}, torch.randn(1, 8, 1536)
    got = backward("adaln_modulate", v, [grad], eps=1e-12)
    want = gradients(stock, "adaln_modulate", wide(v), [grad.double()], eps=1e-12)
    for argument in ("x", "scale"):
        assert ((got[argument] - want[argument]).abs().amax(-1) / want[argument].abs().amax(-1)).max() <= 1e-5, argument


@pytest.mark.parametrize("name, argument", (("gate_residual", "y"), ("adaln_modulate", "x"), ("adaln_modulate", "scale")))
def test_biased_cast(name, argument):
    """biased-cast: the bfloat16 gradients are rounded, not truncated."""
    v = inputs(1, 8, 4096, torch.bfloat16, "token")
    grads = upstream(v, name)
    got, want = backward(name, v, grads)[argument], gradients(stock, name, wide(v), [grad.double() for grad in grads])[argument]
    assert_unbiased(got, want)


@pytest.mark.parametrize("name, kind", [pytest.param(*case, marks=pytest.mark.slow) if case[1] != "token" else case for case in (
    ("gate_residual_backward", "token"), ("gate_residual_backward", "chunk"), ("adaln_modulate_backward", "chunk"), ("adaln_modulate_backward", "one"))])
def test_fake_mismatch(name, kind):
    """fake-mismatch: opcheck of the Triton rows' own ops, on contiguous and on permuted inputs; they mean what the references mean."""
    v = with_affine(inputs(2, 3, 8, kind=kind))
    op = getattr(torch.ops.fusewire, f"{name}_triton").default
    for v in (v, {k: t.transpose(0, -1).contiguous().transpose(0, -1) for k, t in v.items()}):
        arguments = (v["x"], v["y"], v["gate"], 3) if name == "gate_residual_backward" else (
            v["y"], v["x"], v["shift"], v["scale"], v["weight"], v["bias"], 1e-6, False, 31)
        with dispatch.forced("triton"):
            opcheck(op, arguments)
        for got, want in zip(op(*arguments), getattr(reference, name)(*arguments), strict=True):
            assert got.shape == want.shape and got.stride() == want.stride()
            assert_within(got, want, 8)


def test_limits():
    """silent-off: what the rows decline, and why."""
    def gated(channels, two, affine):
        x, m = torch.empty(1, 2, channels), torch.empty(1, channels)
        second, w = (x, m) if two else (None, None), m[0] if affine else None
        return triton_limits.why_not_gate_modulate_backward(x, x, x, x, m, *second, m, m, None, w, 1e-6, False, 511)

    with dispatch.forced("triton"):
        assert not gated(4096, True, False) and not gated(4096, False, True) and not gated(2047, True, False)
        assert "six sums" in gated(64, True, True)
        assert "4112 channels, more than 4096" in gated(4112, False, False)
        assert "2049 channels, more than 2048 and no multiple of 16" in gated(2049, False, False)
        x, m = torch.empty(1, 2, 8), torch.empty(1, 8)
        for weight, bias in ((m[0], None), (None, m[0])):
            assert "six sums" in triton_limits.why_not_modulate_dual_backward(x, x, x, m, m, m, m, weight, bias, 1e-6, False, 127)
        assert not triton_limits.why_not_modulate_dual_backward(x, x, x, m, m, m, m, None, None, 1e-6, True, 127)
        assert "dtype" in triton_limits.why_not_gate_backward(x, x, m.bfloat16(), 3)
