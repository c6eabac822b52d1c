"""The GPU kernels against eager PyTorch, torch.compile, SDPA's backends and cuBLASLt: medians, every side in turn, caches flushed.

``benchmarks/gpu.py --json FILE [--seconds N] [--no-compile] [--no-sweep]``; ``--dry`` runs tiny shapes once on the CPU, in Triton's
interpreter, to see that the script itself works. Rows are written as they come, so that a time limit loses nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CUDA

DRY = "--dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
ROUNDS = 3
SHORT = {torch.bfloat16: "bf16", torch.float32: "f32"}


def rand(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE).to(dtype)


def with_backend(name: str, call):
    def run():
        with forced(name):
            return call()
    return run


def once(call) -> float:
    """Median microseconds of a call, the L2 cache flushed before each."""
    if DRY:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=40, return_mode="median") * 1e3


def sized(full: tuple, tiny: tuple) -> tuple:
    return tiny if DRY else full


def elementwise_cases():
    """(op, what, bytes, flops, {side: call}); "eager" is the reference in the rounding of the stock modules."""
    for (batch, tokens, channels), dtype in ((s, d) for s in (sized((2, 1024, 1536), (1, 2, 32)), sized((2, 4096, 1536), (1, 3, 16)),
                                                              sized((1, 4608, 3072), (1, 1, 48))) for d in SHORT):
        x, y = rand(batch, tokens, channels, dtype=dtype), rand(batch, tokens, channels, dtype=dtype)
        m = rand(batch, 6 * channels, dtype=dtype).chunk(6, -1)
        size = x.numel() * x.element_size()
        what = f"{list(x.shape)} {SHORT[dtype]}"
        for op, count, call in (
            ("adaln_modulate", 2, lambda n: ops.adaln_modulate(x, m[0], m[1], numerics=n)),
            ("adaln_modulate_dual", 3, lambda n: ops.adaln_modulate_dual(x, *m[:4], numerics=n)),
            ("gate_residual", 3, lambda n: ops.gate_residual(x, y, m[0], numerics=n)),
            ("gate_residual_adaln", 4, lambda n: ops.gate_residual_adaln(x, y, m[0], m[1], m[2], numerics=n)),
        ):
            yield op, what, count * size, 0, three_sides(lambda n, call=call: call(n))
    for (batch, tokens, heads, dim), dtype in ((s, d) for s in (sized((2, 4250, 24, 64), (1, 2, 2, 16)), sized((1, 4608, 24, 128), (1, 3, 1, 16)))
                                               for d in SHORT):
        q, k = rand(batch, tokens, 3, heads, dim, dtype=dtype).unbind(2)[:2]  # read in place from a packed QKV
        w, angle = rand(dim, dtype=dtype), rand(tokens, dim // 2, dtype=torch.float32)
        for rope in (None, (angle.cos(), angle.sin())):
            yield ("qk_norm_rope", f"{list(q.shape)} {SHORT[dtype]}{' rotated' if rope else ''}", 4 * q.numel() * q.element_size(), 0,
                   three_sides(lambda n, q=q, k=k, w=w, rope=rope: ops.qk_norm_rope(q, k, w, w, rope=rope, numerics=n)))
    for dtype in SHORT:
        shape = sized((2, 16, 128, 128), (1, 2, 4, 4))
        sample, output = rand(*shape, dtype=torch.float32), rand(2 * shape[0], *shape[1:], dtype=dtype)
        table, counter = ops.flow_euler_table(torch.linspace(1, 0, 29), 4.5).to(DEVICE), torch.tensor(3, device=DEVICE)
        yield ("flow_euler_step", f"{list(shape)} {SHORT[dtype]}", sample.numel() * (4 + 3 * output.element_size()), 0,
               three_sides(lambda n, s=sample, o=output: ops.sampler_step(s, o, table, counter, numerics=n)))


    for shape, dtype, last in ((s, d, last) for s in (sized((2, 320, 64, 64), (1, 4, 2, 3)), sized((1, 128, 1024, 1024), (1, 4, 3, 3))) for d in SHORT
                               for last in (False, True)):
        x, w = rand(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), rand(shape[1], dtype=dtype)
        sides = three_sides(lambda n, x=x, w=w: ops.group_norm_silu(x, 2 if DRY else 32, w, w, numerics=n))
        yield ("group_norm_silu", f"{list(shape)}{' channels last' if last else ''} {SHORT[dtype]}", 2 * x.numel() * x.element_size(), 0,
               {side: call for side, call in sides.items() if not side.endswith("exact")})  # which keeps PyTorch's norm


def three_sides(call, cuda: bool = True) -> dict:
    """``cuda``: whether the room has CUDA kernels."""
    sides = {"eager": with_backend("reference", lambda: call("exact")), "triton exact": with_backend("triton", lambda: call("exact")),
             "triton close": with_backend("triton", lambda: call("close"))}
    if cuda and CUDA.loaded and not DRY:
        sides |= {f"cuda {numerics}": with_backend("cuda", lambda numerics=numerics: call(numerics)) for numerics in ("exact", "close")}
    return sides


def linear_cases():
    for (rows, inner, outer), dtype in ((s, d) for s in (sized((2048, 1536, 6144), (4, 16, 16)), sized((4608, 3072, 12288), (4, 16, 16))) for d in SHORT):
        x, w, b = rand(1, rows, inner, dtype=dtype), rand(outer, inner, dtype=dtype) / inner**0.5, rand(outer, dtype=dtype)
        flops, what = 2 * rows * inner * outer, f"{rows}x{inner}x{outer} {SHORT[dtype]}"
        gelu = lambda n, x=x, w=w, b=b: ops.linear(x, w, b, activation="gelu_tanh", numerics=n)  # noqa: E731
        sides = {"eager": with_backend("reference", lambda: gelu("exact")), "triton close": with_backend("triton", lambda: gelu("close"))}
        if not DRY:
            sides["cublaslt close"] = with_backend("cuda", lambda: gelu("close"))
        yield "linear gelu_tanh", what, 0, flops, sides
        back, bias, gate, residual = rand(inner, outer, dtype=dtype) / outer**0.5, rand(inner, dtype=dtype), rand(1, inner, dtype=dtype), rand(1, rows, inner, dtype=dtype)
        h = rand(1, rows, outer, dtype=dtype)
        yield "linear gate residual", what, 0, flops, three_sides(
            lambda n, h=h, back=back, bias=bias, gate=gate, residual=residual: ops.linear(h, back, bias, gate=gate, residual=residual, numerics=n), cuda=False)


def attention_cases():
    def sdpa(q, k, v, backend=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    lengths = ((16, 1, 16),) if DRY else ((1178, 24, 64), (4250, 24, 64), (2048, 16, 128), (4608, 24, 128), (8192, 16, 128), (4096, 8, 40), (4096, 16, 72))
    for tokens, heads, dim in lengths:
        for dtype in SHORT if tokens < 2048 else (torch.bfloat16,):
            q, k, v = (rand(2, tokens, heads, dim, dtype=dtype) for _ in range(3))
            sides = {"eager": lambda q=q, k=k, v=v: sdpa(q, k, v), "triton close": with_backend("triton", lambda q=q, k=k, v=v: ops.attention(q, k, v))}
            if not DRY and dtype is torch.bfloat16:
                sides["sdpa flash"] = lambda q=q, k=k, v=v: sdpa(q, k, v, SDPBackend.FLASH_ATTENTION)
                if dim % 8 == 0 and dim <= 128:
                    sides["sdpa cudnn"] = lambda q=q, k=k, v=v: sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)
            yield "attention", f"{list(q.shape)} {SHORT[dtype]}", 0, 4 * 2 * heads * tokens**2 * dim, sides
    for tokens, text, heads, dim in (((8, 3, 1, 16),) if DRY else ((1024, 154, 24, 64), (4096, 154, 24, 64), (4096, 512, 24, 128))):
        q, k, v = (rand(2, tokens, heads, dim) for _ in range(3))
        q2, k2, v2 = (rand(2, text, heads, dim) for _ in range(3))
        w = rand(dim)

        def stock(q=q, k=k, v=v, q2=q2, k2=k2, v2=v2, w=w):
            normed = [F.rms_norm(x, x.shape[-1:], w, 1e-6) for x in (q, q2, k, k2)]
            out = sdpa(torch.cat(normed[:2], 1), torch.cat(normed[2:], 1), torch.cat([v, v2], 1))
            return out[:, :q.shape[1]], out[:, q.shape[1]:]

        joint = lambda q=q, k=k, v=v, q2=q2, k2=k2, v2=v2, w=w: ops.joint_attention(  # noqa: E731
            q, k, v, q2, k2, v2, q_weight=w, k_weight=w, q2_weight=w, k2_weight=w)
        yield ("joint_attention", f"{list(q.shape)} + {text} bf16, norm", 0, 4 * 2 * heads * (tokens + text)**2 * dim,
               {"eager": stock, "triton close": with_backend("triton", joint)})


def sweep_rows(deadline: float):
    """Other tiles for unmasked attention in bfloat16: what kernels/tuning.py should choose here."""
    from triton.runtime.errors import OutOfResources

    from fusewire.kernels.attention import triton_kernel
    from fusewire.kernels.tuning import AttentionTile

    for tokens, heads, dim in (((16, 1, 16),) if DRY else ((4250, 24, 64), (4608, 24, 128))):
        q, k, v = (rand(2, tokens, heads, dim) for _ in range(3))
        want = None
        for queries, keys, warps, stages in (((16, 16, 4, 1),) if DRY else (
                (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 4), (64, 64, 4, 3), (128, 32, 4, 4), (64, 128, 4, 2))):
            if time.monotonic() > deadline:
                return
            tile = AttentionTile(queries, keys, dim, warps, stages, "ieee")
            side = f"{queries}x{keys}, {warps} warps, {stages} stages"
            with mock.patch.object(triton_kernel, "attention_tile", lambda *arguments, tile=tile: tile), forced("triton"):
                try:
                    got = ops.attention(q, k, v)
                except OutOfResources as reason:
                    yield {"op": "attention tiles", "what": f"{list(q.shape)} bf16", "side": side, "failed": str(reason).splitlines()[0]}
                    continue
                want = got if want is None else want
                # A fast tile whose result is wrong is no result
                error = (got.float() - want.float()).abs().max().item()
                took = once(lambda: ops.attention(q, k, v))
            yield {"op": "attention tiles", "what": f"{list(q.shape)} bf16", "side": side,
                   "us": round(took, 2), "tflops": round(8 * heads * tokens**2 * dim / took / 1e6, 1), "difference": error}


def rows(deadline: float, compiling: bool):
    compiled_ops: set[str] = set()
    for cases in (attention_cases, elementwise_cases, linear_cases):
        for op, what, size, flops, sides in cases():
            if time.monotonic() > deadline:
                return
            if compiling and "attention" not in op and (op, what.split()[-1]) not in compiled_ops:
                compiled_ops.add((op, what.split()[-1]))  # one shape for each op and dtype: compiling takes seconds
                torch._dynamo.reset()
                sides["torch.compile"] = torch.compile(sides["eager"], dynamic=False)
            reference = sides["eager"]()
            reference = reference if isinstance(reference, tuple) else (reference,)
            error = {}
            for side, call in list(sides.items()):  # warm, and compare: a fast wrong answer is no result
                try:
                    out = call()
                except RuntimeError as reason:  # PyTorch's backends do not serve every shape; ours must
                    if not side.startswith("sdpa"):
                        raise
                    yield {"op": op, "what": what, "side": side, "failed": str(reason).splitlines()[0]}
                    del sides[side]
                    continue
                out = out if isinstance(out, tuple) else (out,)
                error[side] = max((a.float() - b.float()).abs().max().item() for a, b in zip(out, reference))
            times: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(1 if DRY else ROUNDS):
                for side, call in sides.items():
                    times[side].append(once(call))
            for side, taken in times.items():
                took = statistics.median(taken)
                row = {"op": op, "what": what, "side": side, "us": round(took, 2), "rounds": [round(t, 2) for t in taken], "difference": error[side]}
                if size:
                    row["gb_per_s"] = round(size / took / 1e3, 1)
                if flops:
                    row["tflops"] = round(flops / took / 1e6, 1)
                yield row


def machine() -> dict:
    import triton

    found = {"torch": torch.__version__, "cuda library": CUDA.loaded, "triton": triton.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
             "cudnn": torch.backends.cudnn.version(), "when": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    if not DRY:
        found["gpu"] = torch.cuda.get_device_name()
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu"
        found["nvidia-smi"] = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seconds", type=float, default=250, help="start no measurement after this many seconds")
    parser.add_argument("--tests", type=int, help="the exit status of the GPU tests, to be written beside the figures")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-sweep", action="store_true", help="leave the attention tiles out")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: the script's own test")
    options = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("no CUDA device here (--dry runs the script on the CPU)", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    begin = time.monotonic()
    found = {"machine": machine(), "tests": options.tests, "rows": []}
    with torch.inference_mode():
        sections = [rows(begin + 0.8 * options.seconds, not (options.no_compile or DRY))]
        if not options.no_sweep:
            sections.append(sweep_rows(begin + options.seconds))
        for section in sections:
            for row in section:
                found["rows"].append(row)
                print(row, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1))
    found["machine_after"] = machine()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
