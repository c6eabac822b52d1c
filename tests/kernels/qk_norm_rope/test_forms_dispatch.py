"""Which backend the forms of QK norm and rotary embedding come to, and which calls are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import BackendError, forced
from fusewire.kernels.qk_norm_rope import cuda, triton_limits
from tests.kernels.qk_norm_rope.test_forms import NUMERICS, ROPES, heads, inputs, rope_of
from tests.tolerance import assert_exact


def test_rotation_of_halves_is_left_to_pytorch_on_a_gpu():
    """silent-off: the Triton and CUDA rows say that they have no such kernel."""
    v = inputs("rotation")
    for limits, module in ((triton_limits, "why_not"), (cuda, "cuda_rows")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, module, (lambda *_: "") if module == "why_not" else SimpleNamespace(why_not=lambda *_: "", better_by_triton=lambda *_: ""))
            for norm in range(4):
                reason = limits.why_not_rope(v["q"], v["k"], None, None, *v["rope"], 1e-6, norm, True)
                assert reason == ("the kernel turns adjacent pairs alone" if norm == 3 else "")


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("norm", ("rms", "torch_rms", "layer", "float32_layer", "l2", "none"))
def test_every_form_is_dispatched(norm, numerics):
    """silent-off: whatever the form, ``ops.backends`` names one backend that runs, and the call is counted there."""
    q = heads(2, 5, 4, 16)
    for kind in (None, *ROPES):
        if kind is None and norm == "none":
            continue
        keywords = dict(norm=norm, numerics=numerics) if kind is None else dict(norm=norm, numerics=numerics, rope=rope_of(kind, 2, 5, 16), halves=ROPES[kind][1])
        for name, outputs in (("qk_norm_rope", ()), ("qk_norm_into", (None, None, torch.empty_like(q), torch.empty_like(q)))):
            said = [choice.backend for choice in ops.backends(name, q, q, *outputs, **keywords) if choice.runs]
            ops.reset_stats()
            getattr(ops, name)(q, q, *outputs, **keywords)
            assert len(said) == 1 and any(counts.get(said[0]) for counts in ops.stats().values()), (kind, name)


# Of which no part is a table's but by what PyTorch alone computes
STOCK_ALONE = {"l2": dict(norm="l2"), "l2 scaled": dict(norm="l2", q_log_scale=torch.ones(4)), "l2 complex": dict(norm="l2", rope="complex"),
               "complex by sample": dict(norm="none", rope="complex by sample")}


@pytest.mark.on_reference(reason="exact keeps PyTorch's own calls")
@pytest.mark.parametrize("case", STOCK_ALONE)
def test_what_pytorch_alone_computes(case):
    """silent-off: it is counted on the reference, a forced kernel refuses it, and ``ops.backends`` says why."""
    q, keywords = heads(2, 5, 4, 16), dict(STOCK_ALONE[case])
    if "rope" in keywords:
        keywords["rope"] = rope_of(keywords["rope"], 2, 5, 16)
    want = ops.qk_norm_rope(q, q, **keywords)
    assert ops.stats()["qk_norm_rope"] == {"cpu": 0, "cuda": 0, "triton": 0, "reference": 1}
    said = ops.backends("qk_norm_rope", q, q, **keywords)
    assert [choice.backend for choice in said] == ["cpu", "cuda", "triton", "reference"] and [choice.runs for choice in said] == [False, False, False, True]
    assert all("PyTorch's own F.normalize" in choice.reason for choice in said[:3]) and said[3].reason == ""
    for backend in ("cpu", "cuda", "triton"):
        with forced(backend):
            with pytest.raises(BackendError, match=f"qk_norm_rope: the forced backend '{backend}' cannot serve this call: numerics='exact' keeps"):
                ops.qk_norm_rope(q, q, **keywords)
            said = ops.backends("qk_norm_rope", q, q, **keywords)
            assert not any(choice.runs for choice in said) and said[3].reason == f"the backend is forced to {backend!r}"
    with forced("reference"):
        for got, expected in zip(ops.qk_norm_rope(q, q, **keywords), want, strict=True):
            assert_exact(got, expected)
        assert ops.backends("qk_norm_rope", q, q, **keywords)[3].runs
    assert ops.stats()["qk_norm_rope"] == {"cpu": 0, "cuda": 0, "triton": 0, "reference": 2}


Q = torch.ones(2, 3, 4, 8)
TABLES = torch.ones(3, 4), torch.ones(3, 4)
BAD = {
    "nothing to do": (dict(norm="none"), ValueError, "norm is 'none' and rope is None"),
    "weight of l2": (dict(norm="l2", q_weight=torch.ones(8)), ValueError, "q_weight is given; for norm 'l2' it should be None"),
    "bias of rms": (dict(k_bias=torch.ones(8)), ValueError, "k_bias is given; for norm 'rms' it should be None"),
    "scale of rms": (dict(q_log_scale=torch.ones(4)), ValueError, "q_log_scale is given; for norm 'rms' it should be None"),
    "scale shape": (dict(norm="l2", q_log_scale=torch.ones(8)), ValueError, r"q_log_scale has shape \[8\]; it should be \[4\]"),
    "weight across": (dict(across_heads=True, q_weight=torch.ones(8)), ValueError, r"q_weight has shape \[8\]; it should be \[32\]"),
    "l2 across": (dict(norm="l2", across_heads=True), ValueError, "across_heads is True; for norm 'l2' it should be False"),
    "batch of rope": (dict(rope=tuple(t.expand(3, 3, 4) for t in TABLES)), ValueError,
                      r"rope's cos has shape \[3, 3, 4\]; it should be \[3, 4\] or \[2, 3, 4\]"),
    "wide rope": (dict(rope=(torch.ones(3, 8),) * 2), ValueError, r"rope's cos has shape \[3, 8\]; it should be \[3, 4\]"),
    "unlike tables": (dict(rope=(TABLES[0], TABLES[0][:, :2])), ValueError, r"rope's sin has shape \[3, 2\]; it should be \[3, 4\], as rope's cos"),
    "complex128": (dict(rope=torch.ones(3, 4, dtype=torch.complex128)), TypeError, "rope is a Tensor; it should be a pair"),
    "norm list": (dict(norm=["rms"]), ValueError, r"norm is \['rms'\]; it should be one of 'rms'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    keywords, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ops.qk_norm_rope(Q, Q, **keywords)
    assert all(sum(counts.values()) == 0 for counts in ops.stats().values())
