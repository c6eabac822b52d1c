"""The norms, forward and with backward, against the eager modules' arithmetic, torch.compile of it (warm), and a clone of the output.

``python benchmarks/test_norm.py [--case WORDS] [--rounds N] [--json FILE]``
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alternating import main
from fusewire import ops
from gradients import row
from registry import case_option, chosen


# The eager chains, as diffusers' and transformers' modules spell them.
def rms_norm(x, weight):
    y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return y.to(weight.dtype) * weight


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def layer_norm_2d(x, weight, bias):
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, 1e-6).permute(0, 3, 1, 2)


def global_response_norm(x, weight, bias):
    response = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    response = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
    return weight * (x * response) + bias + x


EAGER = {f.__name__: f for f in (rms_norm, layer_norm, layer_norm_2d, global_response_norm)}


def rows(arguments):
    for op, eager in EAGER.items():
        def ours(*tensors, numerics, op=op):
            return getattr(ops, op)(*tensors, eps=1e-6, numerics=numerics)

        for case in chosen(op, arguments):
            for name in case.dtypes:
                dtype, channels = getattr(torch, name), case.shape[1 if op == "layer_norm_2d" else -1]
                affine = [torch.randn(channels).to(dtype) for _ in range(1 if op == "rms_norm" else 2)]
                yield row(op, case, name, ours, eager, (torch.randn(case.shape).to(dtype), *affine), arguments.rounds,
                          ("close",) if op == "global_response_norm" else ("exact", "close"))


if __name__ == "__main__":
    main(__doc__, rows, options=case_option)
