"""Calls by the plan of one before (kernels/plans.py): what a launcher would have done with these arguments, and a plan only of what can be done again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import get_ident

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")
from fusewire import ops  # noqa: E402
from fusewire.kernels import plans, triton_launch  # noqa: E402
from fusewire.kernels.dispatch import TABLES, forced  # noqa: E402
from fusewire.kernels.qk_norm_rope import op as qk_norm  # noqa: E402
from fusewire.kernels.qk_norm_rope.reference import RMS  # noqa: E402
from fusewire.kernels.triton_rows import INTERPRETED  # noqa: E402
from tests.kernels.test_backends import CALLS  # noqa: E402
from tests.kernels.test_contract import call_of  # noqa: E402
from tests.kernels.test_triton_launch import Kernel, kernel, on_gpu  # noqa: E402, F401
from tests.tolerance import assert_exact  # noqa: E402

TRITON_OPS = [name for name, (*_, counted) in CALLS.items() if any(row.name == "triton" for row in TABLES[counted].rows)]
# Triton's kernels, in its interpreter where there is no GPU; there also what serves by default, csrc/cuda
backends = pytest.mark.parametrize("backend", ("triton",) if INTERPRETED else ("triton", None), ids=str)
WITHOUT = {"linear"}  # what it computes beside its launch is PyTorch's: a matrix product


@pytest.fixture(autouse=True)
def nothing_known():
    plans.forget()
    yield
    plans.forget()


class Counted:
    """A launcher, and how often it ran."""

    def __init__(self, body):
        self.body, self.runs = body, 0
        self.call = plans.Planned(self)

    def __call__(self, *args):
        self.runs += 1
        return self.body(*args)


def double(x, y):
    """In the place of a kernel."""
    y.copy_(x * 2)


def start(x, y):
    """A launch: what it does with tensors is not watched, that it was made is told."""
    watch = plans.recorders.pop(get_ident(), None)
    with _disable_current_modes():
        double(x, y)
    if watch is not None:
        plans.recorders[get_ident()] = watch
        watch.called(double, x, y)


def doubled(x, n=0):
    y = x.new_empty(x.shape)
    start(x, y)
    return y


@backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", TRITON_OPS)
def test_of_every_op(op, dtype, backend, monkeypatch):
    """The second call of a kind, with other values in other memory, is not worked out again, and has the bits of one that is."""
    call, ran = call_of(op, "close", dtype), []
    original = plans.Plan.__call__
    monkeypatch.setattr(plans.Plan, "__call__", lambda plan, args: (ran.append(plan), original(plan, args))[1])
    other = [torch.randn_like(tensor) for tensor in call.tensors]
    with forced(backend), torch.no_grad():
        call.run(*call.tensors)
        assert not ran
        got = call.run(*other)
        assert backend is None or bool(ran) is (op not in WITHOUT)
        assert not ops.stats()[call.counted]["reference"]
        plans.forget()
        want = call.run(*other)
    for mine, theirs in zip(got, want, strict=True):
        assert_exact(mine, theirs)
        assert mine.stride() == theirs.stride() and mine.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()


@backends
@pytest.mark.parametrize("op", TRITON_OPS)
def test_gradients_of_every_op(op, backend):
    """Twice, with other values: the bits of gradients that are worked out."""
    call = call_of(op, "close", torch.bfloat16)

    def gradients(tensors):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = [part for part in call.run(*leaves) if part.requires_grad]
        return torch.autograd.grad(out, leaves, [torch.ones_like(part) for part in out], allow_unused=True) if out else ()

    other = [torch.randn_like(tensor) for tensor in call.tensors]
    with forced(backend):
        gradients(call.tensors)
        got = gradients(other)
        plans.forget()
        want = gradients(other)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine is None) is (theirs is None)
        if mine is not None:
            assert_exact(mine, theirs)


def filled(x):
    y = x.new_empty(x.shape).zero_()
    start(x, y)
    return y


def test_kinds():
    """Another dtype, shape, stride, alignment, number, class of number or forced backend is another kind; another tensor of one kind is not."""
    launcher = Counted(doubled)
    base = torch.arange(64.0)
    kinds = [(base[:16],), (base[:16].double(),), (base[:15],), (base[:32:2],), (base[1:17],), (base[:16], 1), (base[:16], 1.0), (base[:16], True), (base[:16], 2),
             (base[:16].view(4, 4),), (base[:16].view(4, 4).t(),)]
    for i, (x, *numbers) in enumerate(kinds):
        for _ in range(2):
            assert torch.equal(launcher.call(x, *numbers), x * 2) and launcher.runs == i + 1
    assert torch.equal(launcher.call(torch.ones(16)), torch.full((16,), 2.0)) and launcher.runs == len(kinds)
    with forced("reference"):
        launcher.call(*kinds[0])
    assert launcher.runs == len(kinds) + 1


def test_what_has_no_plan():
    """Work that a plan would not do again, a result that is an argument, a tensor that comes from elsewhere, arguments that are not numbers."""
    kept = torch.zeros(8)
    launchers = {
        "fills": lambda x: filled(x), "computes": lambda x: (doubled(x), doubled(x.clone()))[1], "argument": lambda x: (doubled(x), x)[1], "elsewhere": lambda x: doubled(kept),
        "copies": lambda x: doubled(x.reshape(-1)), "another type": lambda x: doubled(x.view(torch.int32)),
        "nothing": lambda x: x.new_empty(3)}
    for name, body in launchers.items():
        launcher, x = Counted(body), torch.ones(3, 4).t()
        for _ in range(3):
            launcher.call(x)
        assert launcher.runs == 3, name
    launcher = Counted(lambda x, numbers: doubled(x))
    for _ in range(3):
        assert torch.equal(launcher.call(kept + 1, [1, 2]), kept + 2)
    assert launcher.runs == 3


def test_two_arguments_that_are_one_tensor():
    """aliasing: a plan of such a call does not tell them apart, and serves such calls alone; one of two tensors serves both."""
    def summed(x, y):
        return doubled(x), doubled(y)

    launcher, x, y = Counted(summed), torch.ones(8), torch.full((8,), 2.0)
    for one in (x, y):
        assert all(torch.equal(part, 2 * one) for part in launcher.call(one, one)) and launcher.runs == 1
    for first, second in ((x, y), (y, x), (y, y)):
        got = launcher.call(first, second)
        assert launcher.runs == 2 and torch.equal(got[0], 2 * first) and torch.equal(got[1], 2 * second) and got[0].data_ptr() != got[1].data_ptr()


def test_launchers_without_plans_are_left_alone(monkeypatch):
    """After some kinds of calls without a plan no more are looked at; one with a plan, and all are."""
    seen, kind = [], plans._kind
    monkeypatch.setattr(plans, "_kind", lambda args: (seen.append(args), kind(args))[1])
    launcher = Counted(lambda x, n: doubled(x.clone() if n else x))
    for n in range(1, 20):
        launcher.call(torch.ones(4), n)
    assert len(seen) == plans.TRIED
    plans.forget()
    seen.clear()
    for n in range(20):
        launcher.call(torch.ones(4), n)
    assert len(seen) == 20


def test_views_and_results():
    """Views of arguments and of what was made, wherever they begin; a tuple with None; nothing."""
    def halves(x):
        left, right = x.chunk(2, -1)
        both = x.new_empty((2, *left.shape))
        start(right, both[0])
        start(left, both[1])
        return both[1], None, both

    launcher = Counted(halves)
    for storage in (torch.randn(2, 8), torch.randn(3, 8)[1:], torch.randn(4, 8)[2:]):
        first, none, both = launcher.call(storage)
        assert none is None and torch.equal(first, 2 * storage[:, :4]) and torch.equal(both[0], 2 * storage[:, 4:]) and first.data_ptr() == both[1].data_ptr()
    assert launcher.runs == 1


def test_addresses():
    """What a compiled kernel is started with: the addresses of this call's tensors and of views of them, the numbers of the call before."""
    started = []

    def start(programs, values):
        started.append((programs, values))

    def launch(programs, *args):
        values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        start(programs, values)
        if (watch := plans.watching()) is not None:
            watch.started(start, programs, args, values)

    def body(x, y):
        out = x.new_empty(8)
        launch(3, x[4:], y, 64, 0.5)
        launch(5, x, out[2:], None, x[:0])
        return out

    launcher = Counted(body)
    for _ in range(3):
        x, y = torch.zeros(80)[16:], torch.zeros(64)
        started.clear()
        out = launcher.call(x, y)
        assert started == [(3, [x.data_ptr() + 16, y.data_ptr(), 64, 0.5]), (5, [x.data_ptr(), out.data_ptr() + 8, None, 0])]
    assert launcher.runs == 1


def test_a_compiled_kernel(kernel):
    """The launcher of Triton's kernels tells a plan what it started, with the kernel, its constants, the device and the stream of the day."""
    def body(x):
        triton_launch.launch(kernel, 3, x, x, None, 64, 0.5, BLOCK=32, EXACT=False, num_warps=4)

    launcher = Counted(body)
    for runs in (1, 2, 3):
        x, before = on_gpu(), len(kernel.again)
        launcher.call(x)
        assert launcher.runs == 1 and len(kernel.anew) == 1 and len(kernel.again) - before == min(runs - 1, 1)
    assert kernel.again[-1] == (3, 1, 1, 77, 1, ("warps", 4), None, None, None, x.data_ptr(), None, 64, 0.5, 32, False)


def test_who_looks_sees_every_call():
    """A dispatch mode, and a profiler of Triton's launches: the launcher runs."""
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    seen = []
    launcher = Counted(doubled)
    launcher.call = plans.Planned(launcher, lambda: bool(seen))
    x = torch.ones(4)
    for _ in range(2):
        launcher.call(x)
    assert launcher.runs == 1
    with Nothing():
        launcher.call(x)
    assert launcher.runs == 2
    seen.append(1)
    launcher.call(x)
    assert launcher.runs == 3


def test_errors_leave_nothing_behind():
    def broken(x):
        doubled(x)
        raise ValueError("no")

    launcher = Counted(broken)
    for runs in (1, 2):
        with pytest.raises(ValueError, match="^no$"):
            launcher.call(torch.ones(4))
        assert launcher.runs == runs and not plans.recorders


def test_what_is_remembered_has_an_end(monkeypatch):
    monkeypatch.setattr(plans, "KEPT", 4)
    launcher = Counted(doubled)
    for n in range(20):
        launcher.call(torch.ones(4), n)
        assert len(launcher.call.plans) <= 4
    assert launcher.runs == 20
    assert torch.equal(launcher.call(torch.ones(4), 19), torch.full((4,), 2.0)) and launcher.runs == 20


def test_cache_race_of_threads(monkeypatch):
    """cache-race: eight threads that start with nothing known, and forget all now and then: each call's result is its own."""
    monkeypatch.setattr(plans, "KEPT", 4)
    launcher = Counted(doubled)

    def calls(i):
        for n in range(60):
            x = torch.full((4,), float(100 * i + n))
            assert torch.equal(launcher.call(x, n % 8), 2 * x)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(calls, range(8)))
    assert not plans.recorders


def test_ops_inside_are_counted(monkeypatch):
    """What a launcher calls by another room's table is called by the plan too, without the dispatcher, and counted: one call of the op, one of each inside."""
    q, k, weight = torch.randn(1, 9, 2, 32), torch.randn(1, 9, 2, 32), torch.ones(32)
    runs = []

    def launcher(q, k, weight):
        runs.append(1)
        out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
        qk_norm._into(q, k, weight, weight, out_q, out_k, None, None, 1e-6, RMS, False)
        return out_q, out_k

    call = plans.Planned(launcher)
    with forced("triton"), torch.no_grad():
        call(q, k, weight)
        before = ops.stats()["qk_norm_into"]["triton"]
        got = call(q + 1, k + 1, weight)
        assert len(runs) == 1 and ops.stats()["qk_norm_into"]["triton"] == before + 1
        want = ops.qk_norm_rope(q + 1, k + 1, weight, weight, numerics="close", eps=1e-6)
    for mine, theirs in zip(got, want):
        assert_exact(mine, theirs)
