"""``ops.backends`` says beforehand what a call then does, for every op."""

import inspect
import threading

import pytest
import torch

from fusewire import ops
from fusewire.kernels import dispatch
from fusewire.kernels.library import CPU, cpu_isa

X, ROW, HEADS = torch.randn(2, 5, 64), torch.randn(2, 64), torch.randn(2, 5, 2, 32)
TABLE = ops.flow_euler_table(torch.tensor([1.0, 0.5, 0.0])).to(X.device)
# Public op: (its arguments, its keywords, the name under which its calls are counted)
CALLS = {
    "adaln_modulate": ((X, ROW, ROW), dict(norm="rms"), "adaln_modulate"),
    "adaln_modulate_dual": ((X, ROW, ROW, ROW, ROW), dict(eps=1e-5), "adaln_modulate_dual"),
    "attention": ((HEADS, HEADS, HEADS), dict(causal=True), "attention"),
    "attention_varlen": ((HEADS[0], HEADS[0], HEADS[0], torch.tensor([0, 2, 5], dtype=torch.int32)), {}, "attention_varlen"),
    "gate_residual": ((X, X, ROW), {}, "gate_residual"),
    "gate_residual_adaln": ((X, X, ROW, ROW, ROW), dict(y2=X, gate2=ROW), "gate_residual_adaln"),
    "geglu": ((X,), dict(gate=X, numerics="close"), "geglu"),
    "global_response_norm": ((HEADS, HEADS[0, 0, 0], HEADS[0, 0, 1]), dict(numerics="close"), "global_response_norm"),
    "group_norm_silu": ((HEADS.transpose(1, 3), 8), dict(eps=1e-6), "group_norm_silu"),
    "joint_attention": ((HEADS,) * 6, {}, "joint_attention"),
    "layer_norm": ((X, ROW[0]), dict(rounding="float32"), "layer_norm"),
    "layer_norm_2d": ((HEADS,), {}, "layer_norm_2d"),
    "linear": ((torch.randn(2, 64, 64), torch.randn(192, 64)), dict(activation="gelu_tanh", numerics="close"), "linear"),
    "qk_norm_into": ((HEADS, HEADS, None, None, torch.zeros_like(HEADS), torch.zeros_like(HEADS)), {}, "qk_norm_into"),
    "qk_norm_rope": ((HEADS, HEADS), dict(norm="torch_rms"), "qk_norm_rope"),
    "quick_gelu": ((X,), dict(numerics="close"), "quick_gelu"),
    "rms_norm": ((X, ROW[0]), dict(rounding="torch"), "rms_norm"),
    "sampler_step": ((X, X, TABLE, 1), {}, "flow_euler_step"),
    "solver_step": ((X, X, ops.solver_table(2, x=1.0).to(X.device), 1), dict(noise=X), "solver_step"),
    "swiglu": ((X,), dict(gate_first=True, numerics="close"), "swiglu"),
}
# What those calls leave out: with it every tensor argument is there. Of QK norm's, those of a layer norm with rotation, and of an L2 norm
VECTOR, COUNTER, OTHER, STARTS = HEADS[0, 0, 0], torch.tensor(1), torch.zeros(2, 32), torch.tensor([0, 2, 5], dtype=torch.int32)
AFFINE = dict(weight=ROW[0], bias=ROW[0])
TURNS = (torch.zeros(5, 16), torch.ones(5, 16))
QK = [dict(q_weight=VECTOR, k_weight=VECTOR, q_bias=VECTOR, k_bias=VECTOR, norm="layer", rope=TURNS),
      dict(norm="l2", q_log_scale=torch.zeros(2), k_log_scale=torch.zeros(2))]
FULL = {
    "adaln_modulate": [AFFINE], "adaln_modulate_dual": [AFFINE], "attention": [dict(mask=torch.zeros(5, 5), q_weight=VECTOR, k_weight=VECTOR, rope=TURNS)],
    "attention_varlen": [dict(cu_seqlens_k=STARTS)], "gate_residual_adaln": [AFFINE], "geglu": [dict(bias=torch.zeros(128))],
    "group_norm_silu": [dict(weight=VECTOR, bias=VECTOR, shift=OTHER, scale=OTHER, add=OTHER)],
    "joint_attention": [dict(q_weight=VECTOR, k_weight=VECTOR, q2_weight=VECTOR, k2_weight=VECTOR, rope=TURNS, rope2=TURNS)], "layer_norm": [AFFINE],
    "layer_norm_2d": [dict(weight=torch.ones(5), bias=torch.ones(5))],
    "linear": [dict(activation=None, bias=torch.zeros(192), gate=torch.zeros(2, 192), residual=torch.zeros(2, 64, 192))], "qk_norm_into": QK,
    "qk_norm_rope": QK, "quick_gelu": [dict(bias=ROW[0])], "rms_norm": [AFFINE | dict(rounding="diffusers")], "sampler_step": [dict(uncond=X, step=COUNTER)],
    "solver_step": [dict(uncond=X, previous=X, base=X, mask=X, known=X, known_noise=X, step=COUNTER)],
    "swiglu": [dict(gate_first=False, gate=X, bias=torch.zeros(128))],
}
# Reached where gradients are wanted, from no public op of that name
_WITH_BACKWARD = ("adaln_modulate", "adaln_modulate_dual", "attention", "gate_residual", "gate_residual_adaln", "geglu", "global_response_norm",
                  "group_norm_silu", "layer_norm", "layer_norm_2d", "qk_norm_rope", "quick_gelu", "rms_norm", "swiglu")
BACKWARD = {f"{op}_backward" for op in _WITH_BACKWARD} | {"attention_softmax", "attention_varlen_backward", "attention_varlen_softmax", "bias_activation",
                                                          "bias_activation_backward"}


def test_every_op_is_here():
    about = {"BlockPattern", "backends", "block_pattern", "flow_euler_table", "reset_stats", "solver_table", "stats"}
    assert set(CALLS) == set(ops.__all__) - about and {counted for *_, counted in CALLS.values()} == set(dispatch.TABLES) - BACKWARD
    assert all(inspect.isfunction(getattr(ops, name)) for name in set(ops.__all__) - {"BlockPattern"})


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_said_is_what_runs(name, backend):
    if backend == "cpu" and not CPU.loaded:
        pytest.skip(CPU.reason)
    if backend == "cpu" and name == "linear" and cpu_isa() == "base":
        pytest.skip("linear in float32 has no kernel without AVX2")
    args, kwargs, counted = CALLS[name]
    with dispatch.forced(backend):
        said = ops.backends(name, *args, **kwargs)
        assert not any(ops.stats()[counted].values())
        getattr(ops, name)(*args, **kwargs)
    running = [choice.backend for choice in said if choice.runs]
    assert running == [row for row, calls in ops.stats()[counted].items() if calls] and len(running) == 1
    assert [choice.backend for choice in said] == list(ops.stats()[counted])
    assert all(bool(choice.reason) is not choice.runs for choice in said)
    assert backend in (None, *running)


def on_meta(value):
    """A tensor on the meta device; of a pair, one of the two, either."""
    return [value.to("meta")] if isinstance(value, torch.Tensor) else [(value[0].to("meta"), value[1]), (value[0], value[1].to("meta"))]


@pytest.mark.parametrize("name", CALLS)
def test_mixed_devices(name):
    """Each tensor argument alone on the meta device: the error names it, where it is and where it should be, and nothing has run."""
    args, kwargs, _ = CALLS[name]
    signature, seen = inspect.signature(getattr(ops, name)), set()
    for more in ({}, *FULL.get(name, ())):
        given = dict(signature.bind(*args, **kwargs).arguments) | more
        getattr(ops, name)(**given)
        tensors = {key: value for key, value in given.items() if isinstance(value, (torch.Tensor, tuple))}
        seen |= set(tensors)
        ops.reset_stats()
        for argument, value in tensors.items() if len(tensors) > 1 else ():
            for moved in on_meta(value):
                # The first argument says where the others should be: on meta then, where it is
                with pytest.raises(ValueError, match=rf"^{argument}\b.* is on meta; it should be on cpu|is on cpu; it should be on meta, where {argument} is"):
                    getattr(ops, name)(**given | {argument: moved})
        assert not any(sum(served.values()) for served in ops.stats().values())
    # What has no annotation is a tensor
    assert seen == {key for key, parameter in signature.parameters.items() if parameter.annotation is inspect.Parameter.empty}


def test_nothing_is_written():
    args = CALLS["qk_norm_into"][0]
    before = args[4].clone(), args[4]._version
    ops.backends("qk_norm_into", *args)
    assert torch.equal(args[4], before[0]) and args[4]._version == before[1]


def test_reasons():
    said = {choice.backend: choice.reason for choice in ops.backends("linear", X, torch.randn(48, 64))}
    assert said["cpu"] == "numerics='exact' keeps the stock matrix product" and said["reference"] == ""
    with dispatch.forced("cpu"):
        assert not any(choice.runs for choice in ops.backends("linear", X, torch.randn(48, 64)))
    said = {choice.backend: choice.reason for choice in ops.backends("gate_residual", *(t.to("meta") for t in (X, X, ROW)))}
    assert "meta" in said["cpu"] or not CPU.loaded


def test_an_op_without_a_table():
    """silent-off: an op that chooses no backend is a fault that is said as such, and the next question is answered."""
    def undispatched(x):
        return x

    with pytest.raises(RuntimeError, match="undispatched returned without choosing a backend"):
        dispatch.choices(undispatched, X)
    assert dispatch.forced_backend() is None and any(choice.runs for choice in ops.backends("gate_residual", X, X, ROW))


def test_a_question_is_one_threads_own():
    """While one thread asks, calls of another run, and are counted."""
    x, shift = torch.randn(1, 8, 64), torch.randn(1, 64)
    reached, answered, done = threading.Event(), threading.Event(), []

    def probe(*args):
        reached.set()
        assert answered.wait(20)
        return ops.adaln_modulate(*args)

    asking = threading.Thread(target=lambda: done.append(dispatch.choices(probe, x, shift, shift)))
    asking.start()
    assert reached.wait(20)
    y = ops.adaln_modulate(x, shift, shift)
    served = sum(ops.stats()["adaln_modulate"].values())
    other = dispatch.choices(ops.adaln_modulate, x, shift, shift)
    answered.set()
    asking.join()
    assert y.shape == x.shape and served == 1 == sum(ops.stats()["adaln_modulate"].values()) and done == [other]
    assert ops.adaln_modulate(x, shift, shift).equal(y)


def test_bad_questions():
    with pytest.raises(ValueError, match="name is 'adaln'; it should be one of adaln_modulate, "):
        ops.backends("adaln", X)
    with pytest.raises(ValueError, match="shift has shape"):
        ops.backends("adaln_modulate", X, ROW[:, :3], ROW)
    assert dispatch.forced_backend() is None
    ops.adaln_modulate(X, ROW, ROW)  # and the next call runs
