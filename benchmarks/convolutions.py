"""Convolutions of SD1.5's U-Net and of its autoencoder: PyTorch's of contiguous and of channels-last pictures, and as products (patches, rows), in turn in
one process, whichever of them ``fusewire.models.convolution`` would take here.

``python benchmarks/convolutions.py [--dtype NAME] [--first N] [--rounds N] [--json FILE]``: medians, GFLOP/s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alternating import main, measure
from fusewire.kernels.library import CPU
from fusewire.kernels.linear import patches
from fusewire.kernels.linear import rows as by_rows

# (batch, channels, outputs, pixels along a side, kernel, stride)
SHAPES = ((2, 320, 320, 64, 3, 1), (2, 640, 640, 32, 3, 1), (2, 1280, 1280, 16, 3, 1), (2, 1280, 1280, 8, 3, 1), (2, 2560, 1280, 16, 3, 1),
          (2, 1920, 640, 32, 3, 1), (2, 960, 320, 64, 3, 1), (2, 320, 320, 64, 3, 2), (2, 320, 320, 64, 1, 1), (1, 128, 128, 256, 3, 1), (1, 512, 512, 64, 3, 1))
DTYPES = "bfloat16", "float16", "float32"


def options(parser) -> None:
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be given several times (default: all)")
    parser.add_argument("--first", type=int, default=len(SHAPES), help="so many of the shapes: PyTorch's float16 takes half a minute for one where the "
                        "processor has no instructions for it")


def rows(arguments):
    if not CPU.has("conv_rows") or not CPU.has("conv_patches"):
        raise SystemExit(f"the compiled library is not here, or is older than this ({CPU.reason or 'run `make lib`'})")
    for dtype in (getattr(torch, name) for name in arguments.dtype or DTYPES):
        for batch, channels, outputs, size, kernel, stride in SHAPES[:arguments.first]:
            x, weight, bias = torch.randn(batch, channels, size, size), torch.randn(outputs, channels, kernel, kernel) / 50, torch.randn(outputs)
            x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
            last, geometry = x.contiguous(memory_format=torch.channels_last), ((stride, stride), (kernel // 2, kernel // 2))
            times = measure({"contiguous": lambda: F.conv2d(x, weight, bias, *geometry), "channels-last": lambda: F.conv2d(last, weight, bias, *geometry),
                             "patches": lambda: patches.convolution(last, weight, bias, *geometry),
                             "rows": lambda: by_rows.convolution(last, weight, bias, *geometry)}, arguments.rounds, warm=1)
            flops = 2 * batch * outputs * channels * kernel**2 * (size // stride) ** 2
            taken = next((way.__name__.rpartition(".")[2] for way in (patches, by_rows) if way.serves(last, weight, bias, *geometry)), "PyTorch's")
            yield {"shape": [batch, channels, outputs, size, kernel, stride], "dtype": str(dtype)[6:], "taken": taken, **times,
                   "GFLOP/s": {name: round(flops / time / 1e3) for name, time in times.items()}}


if __name__ == "__main__":
    main(__doc__, rows, rounds=7, options=options)
