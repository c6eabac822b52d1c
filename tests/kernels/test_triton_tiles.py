"""Every tile that Triton's launchers choose for a GPU, run in the interpreter: the reference's result, of memory that held NaN before."""

import pytest
import torch

pytest.importorskip("triton")
from fusewire import ops  # noqa: E402
from fusewire.kernels.aot.report import TARGETS  # noqa: E402
from fusewire.kernels.dispatch import TABLES, forced  # noqa: E402
from fusewire.kernels.triton_launch import launches_go_to  # noqa: E402
from tests.kernels.interpreted import needs_interpreter  # noqa: E402
from tests.kernels.test_backends import CALLS  # noqa: E402
from tests.tolerance import assert_within  # noqa: E402

pytestmark = needs_interpreter
HARDWARE = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")  # options that mean nothing to the interpreter
WIDE = {  # the shapes of tensors, and what else is given, of calls whose tiles depend on the architecture: heads of 128 and 256, a group of many channels
    "attention": [(3 * [(1, 70, 1, 128)], (), dict(causal=True)), ([(1, 20, 1, 256), (1, 40, 1, 256), (1, 40, 1, 256)], (), {})],
    "group_norm_silu": [([(1, 64, 4, 4)], (2,), {})],
}
MOST_BACKWARD = 128  # head dimensions of float32 gradients
WITH_TRITON = [name for name, (*_, counted) in CALLS.items() if any(row.name == "triton" for row in TABLES[counted].rows)]


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def outcomes(op: str, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Results and gradients of the call."""
    learns = op not in ("sampler_step", "solver_step", "qk_norm_into") and args[0].shape[-1] <= MOST_BACKWARD
    leaves = [x.clone().requires_grad_(learns and x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in args]
    found = getattr(ops, op)(*leaves, **kwargs)
    found = leaves[4:6] if op == "qk_norm_into" else found
    results = [found] if isinstance(found, torch.Tensor) else [x for x in found if isinstance(x, torch.Tensor)]
    learning = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    if not learning:
        return results
    torch.manual_seed(5)
    grads = [torch.randn(x.shape).to(x) for x in results]  # the same in any dtype
    return [*(x.detach() for x in results), *torch.autograd.grad(results, learning, grads)]


def by_triton(op: str, args: tuple, kwargs: dict, arch, receive) -> list[torch.Tensor]:
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        with forced("triton"), launches_go_to(arch, receive):
            return outcomes(op, args, kwargs)
    finally:
        torch.use_deterministic_algorithms(False)


def chosen(op: str, args: tuple, kwargs: dict, arch) -> tuple:
    """The kernels that would be launched, and their tiles."""
    found = []

    def receive(kernel, programs, given, options):
        found.append((kernel.__name__, *((key, value) for key, value in options.items() if key not in HARDWARE)))

    by_triton(op, args, kwargs, arch, receive)
    return tuple(found)


@pytest.mark.parametrize("op", WITH_TRITON)
def test_every_tile(op):
    """autotune: each architecture's own configurations, alone."""
    calls = [CALLS[op][:2], *(((*(torch.randn(shape) for shape in shapes), *others), kwargs) for shapes, others, kwargs in WIDE.get(op, ()))]
    for args, kwargs in calls:
        kwargs = kwargs | (dict(numerics="close") if "numerics" in getattr(ops, op).__annotations__ else {})
        with forced("reference"):
            want = outcomes(op, tuple(map(wide, args)), {name: wide(x) for name, x in kwargs.items()})
            plain = outcomes(op, args, kwargs)
        seen = set()
        for name, arch in TARGETS.items():
            if (tiles := chosen(op, args, kwargs, arch)) in seen:
                continue
            assert tiles, f"{op} launches nothing on {name}"
            seen.add(tiles)
            got = by_triton(op, args, kwargs, arch, lambda kernel, programs, given, options: kernel[(programs,)](*given, **options))
            for i, (one, other, same) in enumerate(zip(got, want, plain, strict=True)):
                assert_within(one, other, 8, f"{op}, {name}, outcome {i}", same)
