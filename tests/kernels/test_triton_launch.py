"""Launches of Triton kernels: what was launched before is launched again at once, with what this call gives; anything else goes through Triton."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from fusewire.kernels import triton_launch  # noqa: E402
from fusewire.kernels.dispatch import TABLES, forced  # noqa: E402
from fusewire.kernels.triton_rows import INTERPRETED  # noqa: E402
from fusewire.kernels.tuning import cuda_arch  # noqa: E402
from tests.kernels.test_backends import CALLS  # noqa: E402
from tests.kernels.test_contract import call_of  # noqa: E402


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on the first GPU."""

    is_cuda = True

    def get_device(self) -> int:
        return 0


def on_gpu(n: int = 64, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype).as_subclass(OnGpu)


class Kernel:
    """In the place of a kernel that Triton compiles: ``anew`` are the calls by way of Triton, ``again`` those of its launcher."""

    __name__, arg_names = "kernel", ["x", "y", "n", "eps", "BLOCK", "EXACT"]

    def __init__(self):
        self.anew, self.again = [], []

    def __getitem__(self, grid):
        def call(*args, **options):
            self.anew.append((grid, args, options))
            return SimpleNamespace(run=lambda *args: self.again.append(args), function=len(self.anew), packed_metadata=("warps", options["num_warps"]))
        return call


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77 + device, raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.no_grad())
    return Kernel()


def start(kernel, x, y, n=64, eps=0.5, block=32, exact=False, programs=3, warps=4):
    triton_launch.launch(kernel, programs, x, x, y, n, eps, BLOCK=block, EXACT=exact, num_warps=warps)


def test_the_second_time(kernel):
    """The pointers, numbers and programs are the second call's, the kernel and its constants the first's, in the order of the kernel's parameters."""
    start(kernel, on_gpu(), None)
    assert len(kernel.anew) == 1 and not kernel.again and kernel.anew[0][0] == (3,)
    x = on_gpu()
    start(kernel, x, None, programs=5)
    assert len(kernel.anew) == 1
    assert kernel.again == [(5, 1, 1, 77, 1, ("warps", 4), None, None, None, x.data_ptr(), None, 64, 0.5, 32, False)]


def test_what_asks_triton_anew(kernel):
    """Another type, alignment, number, kind of number, constant or option than before; each of them is then known too."""
    x = on_gpu()
    others = [{}, {"x": on_gpu(dtype=torch.bfloat16)}, {"x": on_gpu()[1:]}, {"y": x}, {"y": on_gpu()[1:]}, {"n": 65}, {"n": 1}, {"n": True}, {"n": 1.0}, {"eps": 0.25},
              {"block": 64}, {"exact": True}, {"warps": 8}]
    for i, other in enumerate(others):
        arguments = {"x": x, "y": None} | other
        start(kernel, **arguments)
        before = len(kernel.anew)
        start(kernel, **arguments)
        assert len(kernel.anew) == before and len(kernel.again) >= i + 1, other
    assert len(kernel.anew) == len(others)
    another = Kernel()
    start(another, x, None)
    assert len(another.anew) == 1 and not another.again


def test_profilers_see_every_launch(kernel, monkeypatch):
    """Where something is hooked into Triton's launches, they go by way of Triton, which calls it."""
    for _ in range(2):
        start(kernel, on_gpu(), None)
    monkeypatch.setattr(triton_launch.knobs.runtime.launch_enter_hook, "calls", [print])
    start(kernel, on_gpu(), None)
    assert len(kernel.anew) == 2 and len(kernel.again) == 1


def test_another_device(kernel, monkeypatch):
    """The kernel starts on the tensor's device, whichever is the current one; the device before comes back."""
    current = []

    class device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.append("back")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    start(kernel, on_gpu(), None)
    start(kernel, on_gpu(), None)
    assert current == [0, "back"] and kernel.again[0][3] == 77


def test_what_is_remembered_has_an_end(kernel, monkeypatch):
    monkeypatch.setattr(triton_launch, "KEPT", 4)
    x = on_gpu()
    for n in range(20):
        start(kernel, x, None, n=n)
        assert len(triton_launch._compiled) <= 4
    assert len(kernel.anew) == 20
    start(kernel, x, None, n=19)
    assert len(kernel.anew) == 20 and kernel.again[-1][11] == 19


def test_cache_race_of_threads(kernel, monkeypatch):
    """cache-race: eight threads that start with nothing remembered, and forget all now and then: each launch is its own thread's, none is lost."""
    monkeypatch.setattr(triton_launch, "KEPT", 4)
    tensors = [on_gpu() for _ in range(8)]

    def launches(i):
        for n in range(50):
            start(kernel, tensors[i], None, n=10 * n + i)
            start(kernel, tensors[i], None, n=10 * n + i)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(launches, range(8)))
    anew = [(args[0].data_ptr(), args[2]) for _, args, _ in kernel.anew]
    again = [(args[9], args[11]) for args in kernel.again]
    assert sorted(anew + again) == sorted((x.data_ptr(), 10 * n + i) for i, x in enumerate(tensors) for n in range(50) for _ in range(2))


def test_no_program_and_too_many(kernel):
    for x in (on_gpu(), torch.zeros(4)):
        start(kernel, x, None, programs=0)
        with pytest.raises(ValueError, match="would need 2147483648 programs; the limit is 2147483647"):
            start(kernel, x, None, programs=2**31)
    assert not kernel.anew and not kernel.again


def test_every_launcher_names_its_constants():
    """What follows the arguments given by place is given by name: only so can a launch be repeated without asking Triton. They can be looked up, too."""
    from fusewire.kernels.aot.report import written_in_gluon
    from fusewire.kernels.aot.cases import CASES

    seen = set()

    def receive(kernel, programs, args, options):
        missing = set(kernel.arg_names[len(args):]) - set(options)
        assert not missing and len(args) <= len(kernel.arg_names), (kernel.__name__, missing)
        hash(tuple(value for value in args if not isinstance(value, torch.Tensor)) + tuple(options.items()))
        seen.add(kernel.__name__)

    with triton_launch.launches_go_to(cuda_arch(9, 0), receive):
        for name, call in CASES.items():
            if not written_in_gluon(name):
                call()
    assert len(seen) > 20


@pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here")
@pytest.mark.parametrize("op", [name for name, (*_, counted) in CALLS.items() if any(row.name == "triton" for row in TABLES[counted].rows)])
def test_every_kernel_starts_here(monkeypatch, op):
    """device-guard, stream, grid-limit: what the op launches, and its gradients do, is launched by ``launch_anew``, which has the guard, with one number of
    programs, for a tensor that lies where the call's do. (What that makes of device and stream: the tests above, and tests/gpu.)"""
    from triton.runtime import interpreter

    anew, run, started, inside = triton_launch.launch_anew, interpreter.GridExecutor.__call__, [], []

    def launch_anew(kernel, programs, tensor, *args, **options):
        inside.append(kernel)
        assert tensor.device == call.tensors[0].device and isinstance(programs, int) and programs <= triton_launch.GRID_LIMIT
        try:
            return anew(kernel, programs, tensor, *args, **options)
        finally:
            inside.pop()

    def execute(executor, *args, **options):
        assert inside and len(executor.grid) == 1
        started.append(inside[-1].__name__)
        return run(executor, *args, **options)

    call = call_of(op, "close", torch.bfloat16)  # (the gradients of a few queries in float32 are left to PyTorch)
    monkeypatch.setattr(triton_launch, "launch_anew", launch_anew)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", execute)
    with forced("triton"), torch.no_grad():
        call.run(*call.tensors)
    assert started
    gradients, forwards = TABLES.get(f"{CALLS[op][2]}_backward"), len(started)
    if gradients is not None and any(row.name == "triton" for row in gradients.rows):
        leaves = [tensor.clone().requires_grad_() for tensor in call.tensors]
        with forced("triton"):
            out = call.run(*leaves)
            torch.autograd.grad(sum(part.square().sum() for part in out), leaves, allow_unused=True)
        assert len(started) > 2 * forwards
