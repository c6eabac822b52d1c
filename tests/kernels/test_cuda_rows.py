"""The CUDA rows as ops: what they say where they cannot serve, registration, tracing, a library that is older than the sources."""

import pytest
import torch
from torch.library import opcheck

from fusewire import doctor, ops
from fusewire.kernels import cuda_rows, dispatch
from fusewire.kernels.adaln import cuda as adaln
from fusewire.kernels.adaln import cuda_backward as adaln_backward
from fusewire.kernels.dispatch import BackendError, forced
from fusewire.kernels.group_norm_silu import cuda as group_norm_silu
from fusewire.kernels.group_norm_silu import cuda_backward as group_norm_silu_backward
from fusewire.kernels.library import CUDA
from fusewire.kernels.qk_norm_rope import cuda as qk_norm_rope
from fusewire.kernels.qk_norm_rope import cuda_backward as qk_norm_rope_backward
from fusewire.kernels.sampler_step import cuda as sampler_step
from fusewire.kernels.sampler_step import solver_cuda
from tests.kernels.attention.test_cuda import ROWS as ATTENTION_ROWS

X, ROW, HEADS, PICTURE = torch.randn(2, 5, 64), torch.randn(2, 64), torch.randn(2, 5, 2, 32), torch.randn(2, 8, 5, 6)
TABLE = ops.flow_euler_table(torch.tensor([1.0, 0.5, 0.0]))
SOLVER = ops.solver_table(2, x0_x=0.5, e_previous=1.0, x=1.0, x0=-0.5, noise=0.25).to(X.device)
CALLS = {
    "adaln_modulate": (X, ROW, ROW, None, None, 1e-6, False, False),
    "adaln_modulate_dual": (X, ROW, ROW, ROW, ROW, None, None, 1e-6, False, True),
    "gate_residual": (X, X, ROW, True),
    "gate_residual_adaln": (X, X, ROW, X, ROW, ROW, ROW, None, None, 1e-6, True, False),
    "adaln_modulate_backward": (X, X, ROW, ROW, ROW[0], None, 1e-6, False, 15),
    "adaln_modulate_dual_backward": (X, X, X, ROW, ROW, ROW, ROW, None, None, 1e-6, False, 31),
    "gate_residual_backward": (X, X, ROW, 3),
    "gate_residual_adaln_backward": (X, X, X, X, ROW, X, ROW, ROW, ROW, None, None, 1e-6, True, 127),
    "qk_norm_rope": (HEADS, HEADS, None, None, None, None, 1e-6, 0, False),
    "qk_norm_into": (HEADS, HEADS, None, None, torch.zeros_like(HEADS), torch.zeros_like(HEADS), None, None, 1e-6, 0, False),
    "qk_norm_rope_backward": (HEADS, HEADS, HEADS, HEADS, ROW[0, :32], None, None, None, 1e-6, 7),
    "group_norm_silu": (PICTURE, 4, None, None, 1e-5, None, None, None, True, False),
    "group_norm_silu_backward": (PICTURE, PICTURE, 4, None, PICTURE[0, :, 0, 0], 1e-5, PICTURE[:, :, 0, 0], None, PICTURE[:, :, 1, 1], True, True),
    "flow_euler_step": (X, X, None, TABLE, 1, None, True),
    "solver_step": (X, X, None, X, None, X, None, None, None, SOLVER, 1, None, True, True, True, False, True),
}


PYTORCHS = "linear", "layer_norm"  # kernels that PyTorch has itself


def test_every_row_is_here():
    assert {op for op, table in dispatch.TABLES.items() if any(row.name == "cuda" for row in table.rows)} == set(CALLS) | {*PYTORCHS, *ATTENTION_ROWS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_forced_without_a_gpu():
    with forced("cuda"), pytest.raises(BackendError, match="gate_residual: the forced backend 'cuda' cannot serve this call: .*(built|on cpu)"):
        ops.gate_residual(X, X, ROW)


@pytest.mark.parametrize("name", CALLS)
def test_registration(in_cuda, name):
    """fake-mismatch, device-guard, stream, grid-limit: schema, fake kernel and registration of the op that graphs see, on contiguous and permuted inputs.
    The machine that runs the kernels refuses a launch without the guard or on another stream, and a grid that a GPU does not take."""
    for permute in (lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(t, torch.Tensor) and t.dim() > 1 else t):
        args = tuple(permute(value) for value in CALLS[name])
        opcheck(getattr(torch.ops.fusewire, f"{name}_cuda").default, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_the_ops_of_csrc_change_their_outputs_alone(in_cuda):
    """What their schemas say of aliases is true."""
    out, heads, picture = torch.zeros_like(X), torch.zeros_like(HEADS), torch.zeros_like(PICTURE)
    none = (None,) * 7
    for op, args in ((adaln.op, (X, X, ROW, None, None, *none[:2], ROW, ROW, None, None, out, torch.zeros_like(X), None, 1e-6, 1, False)),
                     (adaln_backward.op, (X, X, None, X, X, ROW, None, None, ROW, None, ROW[0], None, out, torch.zeros_like(X), None, torch.zeros_like(ROW), None,
                                          torch.zeros_like(ROW), torch.zeros_like(ROW), None, None, torch.zeros(64), None, torch.zeros(4, 2, 5, 64), 1e-6, 1)),
                     (qk_norm_rope.op, (HEADS, HEADS, None, None, None, None, heads, torch.zeros_like(HEADS), None, None, 1e-6, 2, False)),
                     (qk_norm_rope_backward.op, (HEADS, HEADS, HEADS, HEADS, ROW[0, :32], None, None, None, heads, None, torch.zeros(32), None,
                                                 torch.zeros(1, 32), None, 1e-6)),
                     (sampler_step.op, (X, X, None, TABLE, 1, None, out, False)),
                     (solver_cuda.op, (X, X, *none, SOLVER, 1, None, out, torch.zeros_like(X), torch.zeros_like(X), True, False, True)),
                     (group_norm_silu.op, (PICTURE, *none[:5], picture, torch.zeros(16, 4), 4, 1e-5, False, True)),
                     (group_norm_silu_backward.op, (PICTURE, PICTURE, PICTURE[0, :, 0, 0], *none[:3], PICTURE[:, :, 0, 0], picture, torch.zeros(8), *none[:3],
                                                    torch.zeros(2, 8), torch.zeros(16, 4), torch.zeros(2, 3, 8), torch.zeros(2, 8, 8),
                                                    torch.zeros(2, 2, 8), 4, 1e-5, False, True))):
        opcheck(op, args, test_utils=("test_schema",))


def test_compile(in_cuda):
    """One graph, with the registered ops in it, and the same bits."""
    def block(x, row, heads, picture):
        residual, modulated = ops.gate_residual_adaln(x, x, row, row, row, numerics="close")
        joint = torch.zeros_like(heads)
        ops.qk_norm_into(heads, heads, None, None, joint, torch.zeros_like(heads), numerics="close")
        return residual, modulated, joint, ops.group_norm_silu(picture, 4, numerics="close"), ops.sampler_step(x, x, TABLE, 1)

    with forced("cuda"), torch.no_grad():
        want = block(X, ROW, HEADS, PICTURE)
        got = torch.compile(block, fullgraph=True, backend="aot_eager")(X, ROW, HEADS, PICTURE)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.skipif(CUDA.loaded, reason="the real library is here")
def test_a_library_that_lacks_an_op(monkeypatch):
    """Its row stands down with the reason, and doctor says that it is broken."""
    monkeypatch.setattr(CUDA, "loaded", True)
    monkeypatch.setattr(CUDA, "stale", {})
    monkeypatch.setattr(dispatch, "variant", lambda op, suffix, kernel: kernel)
    with pytest.warns(UserWarning, match="the compiled library lacks fusewire::cuda_adaln: it is older than these sources"):
        row = cuda_rows.row(torch.ops.fusewire.gate_residual.default, adaln.op, adaln.why_not_gate, adaln.gate_residual)
    assert "lacks fusewire::cuda_adaln" in row.why_not(X, X, ROW, True)
    assert "gate_residual" in CUDA.stale and doctor.served("cuda") == f"{len(CALLS) - 1 + len(PYTORCHS) + len(ATTENTION_ROWS)} of {len(dispatch.TABLES)}"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = doctor._cuda()
    assert not found.ready and found.state.startswith("broken: the compiled library lacks") and found.fix == "make lib"


@pytest.mark.parametrize("reason, state, fix", [("libfusewire_cuda.so was not built", "libfusewire_cuda.so was not built", "nvcc"),
                                                ("libfusewire_cuda.so does not load into torch 2.13", "broken: ", "make clean lib")])
def test_doctor_without_the_library(monkeypatch, reason, state, fix):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(CUDA, "loaded", False)
    monkeypatch.setattr(CUDA, "reason", reason)
    found = doctor._cuda()
    assert not found.ready and found.state.startswith(state) and fix in found.fix


def test_large_samples_are_better_by_triton(monkeypatch):
    """By a sample's size, never by the batch; a forced backend serves what it can."""
    monkeypatch.setattr(cuda_rows, "INTERPRETED", False)
    monkeypatch.setattr(cuda_rows, "MISSING", "")
    small, large = torch.empty(64, 4, 64, device="meta"), torch.empty(1, cuda_rows.LARGE // 64, 64, device="meta")
    assert cuda_rows.better_by_triton(small) == cuda_rows.better_by_triton(torch.empty(10**6, 4, 64, device="meta")) == ""
    assert "Triton" in cuda_rows.better_by_triton(large) and "Triton" in cuda_rows.better_by_triton(large.expand(3, -1, -1))
    with forced("cuda"):
        assert cuda_rows.better_by_triton(large) == ""
