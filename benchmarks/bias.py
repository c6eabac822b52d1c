"""The mean signed error of float32, in units in the last place of each element, against float64: of ``close`` and of the plain PyTorch code that it stands for.

``python benchmarks/bias.py [--json FILE]``: of each op's result and of the gradient of its first argument (of a gate with a norm behind it: of the norm,
and its scale), over some thousands of rows, as all of a row shares the error of its root; elements below a sixteenth of the mean magnitude count in its
units. And attention's log-sum-exp of 16-bit inputs, whose weights are summed as they meet the values, rounded to bfloat16 where an instruction
multiplies these, beside what PyTorch's own fused attention returns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from alternating import machine, write
from fusewire import ops
from fusewire.kernels.dispatch import forced

TOKENS, PICTURES, HEADS = (8, 512, 256), (16, 1024, 8, 8), (2, 512, 8, 64)
CALLS = {
    "adaln_modulate": ((TOKENS, TOKENS, TOKENS), {}), "gate_residual": ((TOKENS, TOKENS, TOKENS), {}), "gate_residual_adaln": ((TOKENS,) * 5, {}),
    "qk_norm_rope": ((HEADS, HEADS), {}), "attention": ((HEADS, HEADS, HEADS), {}), "linear": (((8, 512, 64), (256, 64), (256,)), {}),
    "linear, GELU": (((8, 512, 64), (256, 64), (256,)), {"activation": "gelu_tanh"}), "rms_norm": ((TOKENS,), {}), "layer_norm": ((TOKENS,), {}),
    "layer_norm_2d": ((PICTURES,), {}), "global_response_norm": (((256, 8, 8, 64), (64,), (64,)), {}), "geglu": (((8, 512, 512),), {}),
    "swiglu": (((8, 512, 512),), {}), "quick_gelu": ((TOKENS,), {}), "group_norm_silu": ((PICTURES,), {"groups": 256}),
    "sampler_step": (((64, 4, 32, 32),) * 2, {"table": ops.flow_euler_table(torch.tensor([1.0, 0.8125, 0.0]), 4.3125), "step": 0}),
}


def bias(got: torch.Tensor, want: torch.Tensor) -> float:
    """The larger of the mean errors away from zero and upwards."""
    mantissa, exponent = torch.frexp(want.abs().clamp_min(want.abs().mean().item() / 16))
    error = (got.double() - want) / torch.ldexp(torch.full_like(mantissa, torch.finfo(got.dtype).eps), exponent - 1)
    return round(max((error * want.sign()).mean().item(), error.mean().item(), key=abs), 4)


def found(name: str, tensors: list[torch.Tensor], options: dict) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, which = getattr(ops, name)(*leaves, **options), 0
    if isinstance(out, tuple):
        which = 1 if name == "gate_residual_adaln" else 0  # its norm
        out = out[which]
    torch.manual_seed(1)
    return [out.detach(), torch.autograd.grad(out, leaves[-which], torch.randn(out.shape).to(out.dtype))[0]]


def rows():
    for title, (shapes, options) in CALLS.items():
        torch.manual_seed(0)
        name, tensors = title.partition(",")[0], [torch.randn(shape) for shape in shapes]
        numerics = {} if name == "attention" else {"numerics": "close"}
        ours = found(name, tensors, options | numerics)
        with forced("reference"):
            plain = found(name, tensors, options | {key: "exact" for key in numerics})
            want = found(name, [tensor.double() for tensor in tensors], options | numerics)
        for what, mine, theirs, true in zip(("result", "gradient"), ours, plain, want):
            yield {"op": title, "of": what, "dtype": "float32", "close": bias(mine, true), "plain": bias(theirs, true)}
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (torch.randn(1, 1178, 24, 64).to(dtype) for _ in range(3))
        want = torch.logsumexp(q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) / 8, -1)
        _, plain = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*(x.transpose(1, 2) for x in (q, k, v)))
        yield {"op": "attention", "of": "log-sum-exp", "dtype": str(dtype).removeprefix("torch."), "close": bias(ops.attention(q, k, v, return_lse=True)[1], want),
               "plain": bias(plain if plain.shape == want.shape else plain.transpose(1, 2), want)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    state, made = machine(), []
    for row in rows():
        made.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.json:
        write(arguments.json, made, state, "units in the last place")
