"""What qk_norm_into writes is memory of its own: outputs that share elements with each other or with an input are refused, packed slices are not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.kernels.overlap import overlap
from tests.effort import examples

BUFFER = torch.zeros(4096)


def view(shape, strides, offset=0) -> torch.Tensor:
    return BUFFER.as_strided(shape, strides, offset)


def places(x: torch.Tensor) -> set[int]:
    start = x.storage_offset()
    return {start + sum(i * s for i, s in zip(index, x.stride())) for index in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist()}


sizes = st.tuples(*[st.integers(1, 3)] * 4)


@settings(max_examples=examples(300), deadline=None)
@given(sizes, sizes, st.tuples(*[st.integers(1, 40)] * 4), st.integers(0, 200), st.integers(0, 200))
def test_property(a_shape, b_shape, strides, a_offset, b_offset):
    """Against all places of both, in Python and by the library's kernel; which never says so of tensors that are apart."""
    a, b = view(a_shape, strides, a_offset), view(b_shape, strides, b_offset)
    wanted = bool(places(a) & places(b))
    assert overlap(a, b) == overlap(b, a) == wanted
    if not CPU.loaded or not len(places(a)) == a.numel() or not len(places(b)) == b.numel():
        return
    call = torch.ops.fusewire.qk_norm_into.default
    args = (torch.zeros(a_shape), torch.zeros(b_shape), None, None, a, b, None, None, 1e-6, 0, False)
    if a_shape[0] != b_shape[0] or a_shape[3] != b_shape[3]:
        return
    if wanted:
        with pytest.raises(RuntimeError, match="q_out and k_out overlap"):
            call(*args)
    else:
        call(*args)


def test_other_strides():
    """Apart in memory: not an overlap. Between each other's elements: one only where both start at the same."""
    assert not overlap(view((1, 4, 2, 8), (64, 16, 8, 1)), view((1, 4, 2, 8), (64, 8, 32, 1), 64))
    assert overlap(view((1, 4, 2, 8), (64, 16, 8, 1)), view((1, 4, 2, 8), (64, 8, 32, 1)))
    assert not overlap(view((1, 0, 2, 8), (64, 16, 8, 1)), view((1, 4, 2, 8), (64, 16, 8, 1)))


@pytest.mark.on_reference(reason="nothing is computed on the meta device")
def test_without_memory():
    q, k, q_out, k_out = (torch.empty(1, 4, 2, 8, device="meta") for _ in range(4))
    with torch.no_grad():
        ops.qk_norm_into(q, k, None, None, q_out, k_out)


def packed():
    buffer = torch.randn(2, 6, 3, 4, 16)  # [B, T, (q, k, v), H, D]
    return buffer[:, :, 0], buffer[:, :, 1], buffer[:, :, 2]


REFUSED = {
    "one output twice": ("q_out", "k_out", lambda q, k, v: (q, k, v, v)),
    "outputs a token apart": ("q_out", "k_out", lambda q, k, v: (q[:, 1:], k[:, 1:], v[:, 1:], v[:, :-1])),
    "q a token further": ("q_out", "q", lambda q, k, v: (q[:, :-1], k[:, :-1], q[:, 1:], v[:, 1:])),
    "crosswise": ("q_out", "k", lambda q, k, v: (q, k, k, q)),
    "k over q": ("k_out", "q", lambda q, k, v: (q, k, v, q)),
    "q turned in place": ("q_out", "q", lambda q, k, v: (q[:, :4], k[:, :4], q[:, :4].transpose(1, 2), v[:, :4])),
}


@pytest.mark.on_reference(reason="a call that is refused reaches no kernel")
@pytest.mark.parametrize("mode", (torch.no_grad, torch.enable_grad, torch.inference_mode), ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("form", ({}, {"halves": True, "rope": True}), ids=("norm", "halves"))
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, form, mode):
    """alias, overlap: nothing is written."""
    written, read, make = REFUSED[case]
    with mode():
        q, k, q_out, k_out = make(*packed())
        form = {**form, "rope": (torch.ones(q.shape[1], 8), torch.zeros(q.shape[1], 8))} if form else {}
        before = [x.clone() for x in (q, k, q_out, k_out)]
        with pytest.raises(ValueError, match=f"{written} shares elements with {read}; it should be memory of its own"):
            ops.qk_norm_into(q, k, None, None, q_out, k_out, **form)
        assert all(torch.equal(x, kept) for x, kept in zip((q, k, q_out, k_out), before))


@pytest.mark.parametrize("rope", (False, True), ids=("norm", "rotated"))
def test_neighbours_are_taken(rope):
    """alias, strided-out: slices of packed buffers, in place and beside each other; of another number of heads and tokens."""
    options = {"rope": (torch.rand(6, 8), torch.rand(6, 8))} if rope else {}
    with torch.no_grad():
        q, k, v = packed()
        wanted = ops.qk_norm_rope(q, k, **options)
        ops.qk_norm_into(q, k, None, None, q, k, **options)
        assert torch.equal(q, wanted[0]) and torch.equal(k, wanted[1])
        q, k, v = packed()
        wanted = ops.qk_norm_rope(q, k, **options)
        ops.qk_norm_into(q, k, None, None, q, v, **options)
        assert torch.equal(q, wanted[0]) and torch.equal(v, wanted[1])
        heads = torch.randn(2, 6, 6, 16)
        joint = torch.zeros(2, 6, 6, 16)
        wanted = ops.qk_norm_rope(heads[:, :, :4], heads[:, :, 4:], **options)
        ops.qk_norm_into(heads[:, :, :4], heads[:, :, 4:], None, None, joint[:, :, :4], joint[:, :, 4:], **options)
        assert torch.equal(joint, torch.cat(wanted, dim=2))
    assert not CPU.loaded or ops.stats()["qk_norm_into"] == {"cpu": 3, "cuda": 0, "triton": 0, "reference": 0}


def test_empty_outputs_share_nothing():
    """empty: PyTorch's views of nothing have strides of 0."""
    q, out = torch.randn(1, 0, 2, 8), torch.empty_strided((1, 0, 2, 8), (0, 1, 0, 0))
    for weight in (None, torch.ones(8)):
        ops.qk_norm_into(q, q, weight, weight, out, out.clone())
