"""Every kernel of csrc/cuda, and Triton's of the same rooms, once on small shapes with tails: for compute-sanitizer, which finds accesses outside of an
allocation (memcheck) and races in shared memory (racecheck).

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/gpu_sanitize.py [cuda|triton]

Without PyTorch's cache each tensor is an allocation of its own, whose end the tool knows to the byte. Results are compared with the reference's, roughly:
the tests do that well.
"""

from __future__ import annotations

import sys

import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rand(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def cases():
    """(op, its arguments, its keywords, whether gradients are wanted): rows that do and do not fill their threads, vectors and single elements."""
    for dtype in DTYPES:
        for width in (8, 40, 63, 300, 1152):
            x, y, grown = (rand(2, 7, width, dtype=dtype) for _ in range(3))
            m = [rand(2, width, dtype=dtype) for _ in range(4)]
            yield ops.adaln_modulate, (x, *m[:2]), dict(weight=rand(width, dtype=dtype)), True
            yield ops.adaln_modulate_dual, (x, *m), {}, True
            yield ops.gate_residual, (x, y, m[0]), {}, True
            yield ops.gate_residual_adaln, (x, y, *m[:3]), dict(y2=grown, gate2=m[3]), True
        for dim in (20, 64, 128):
            yield ops.qk_norm_rope, (rand(2, 7, 3, dim, dtype=dtype), rand(2, 7, 3, dim, dtype=dtype), rand(dim, dtype=dtype), rand(dim, dtype=dtype)), {}, True
        for shape in ((2, 8, 5, 7), (1, 40, 9, 11)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = rand(*shape, dtype=dtype).contiguous(memory_format=memory_format)
                yield ops.group_norm_silu, (x, 4, rand(shape[1], dtype=dtype), rand(shape[1], dtype=dtype)), {}, True
        x, table = rand(2, 4, 9, 7, dtype=dtype), ops.flow_euler_table(torch.tensor([1.0, 0.5, 0.0])).cuda()
        yield ops.sampler_step, (x, rand(4, 4, 9, 7, dtype=dtype), table, 0), {}, False
        yield ops.solver_step, (x, x, ops.solver_table(2, x=0.9, e=0.1, noise=0.2).cuda(), 1), dict(noise=x), False


def differ(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got.float() - want.float()).norm() > 0.02 * want.float().norm() + 1e-3)


def main() -> int:
    backend, wrong, ran = (sys.argv[1:] or ["cuda"])[0], 0, 0
    for op, given, keywords, learns in cases():
        found = []
        for name in (backend, "reference"):
            arguments = [x.clone().requires_grad_(learns) if isinstance(x, torch.Tensor) else x for x in given]
            with forced(name), torch.set_grad_enabled(learns):
                out = op(*arguments, **keywords, numerics="close")
                parts = out if isinstance(out, tuple) else (out,)
                leaves = [x for x in arguments if isinstance(x, torch.Tensor)]
                grads = torch.autograd.grad(sum(part.float().square().sum() for part in parts), leaves) if learns else ()
            found.append([*parts, *grads])
        ran += 1
        if any(differ(mine, theirs) for mine, theirs in zip(*found)):
            wrong += 1
            print(f"{op.__name__} {[list(x.shape) for x in given if isinstance(x, torch.Tensor)]} {given[0].dtype}: not what the reference gives")
    torch.cuda.synchronize()
    print(f"{ran} calls, {wrong} of them wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
