"""What benchmarks/gpu.py measures: (op, shape, bytes, flops, {side: call}); "eager" is the reference in the rounding of the stock modules."""

from __future__ import annotations

import sys
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusewire import ops
from fusewire.kernels.attention import cuda
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CUDA

DRY = "--dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
SHORT = {torch.bfloat16: "bf16", torch.float32: "f32"}


def rand(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE).to(dtype)


def with_backend(name: str, call):
    def run():
        with forced(name):
            return call()
    return run


def sized(full: tuple, tiny: tuple) -> tuple:
    return tiny if DRY else full


def elementwise_cases():
    for (batch, tokens, channels), dtype in ((s, d) for s in (sized((2, 4608, 3072), (1, 1, 48)), sized((2, 1024, 1536), (1, 2, 32))) for d in SHORT):
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

    lengths = ((16, 1, 16),) if DRY else ((1178, 24, 64), (4250, 24, 64), (4608, 24, 128), (8192, 16, 128), (4096, 8, 40), (4096, 16, 72))
    for tokens, heads, dim in lengths:
        for dtype in SHORT if tokens < 2048 else (torch.bfloat16,):
            q, k, v = (rand(2, tokens, heads, dim, dtype=dtype) for _ in range(3))
            call = lambda q=q, k=k, v=v: ops.attention(q, k, v)  # noqa: E731
            sides = {"eager": lambda q=q, k=k, v=v: sdpa(q, k, v), "close": with_backend(None, call), "triton close": with_backend("triton", call)}
            if not DRY and dtype is torch.bfloat16:
                sides["sdpa flash"] = lambda q=q, k=k, v=v: sdpa(q, k, v, SDPBackend.FLASH_ATTENTION)
                if dim % 8 == 0 and dim <= 128:
                    sides["sdpa cudnn"] = lambda q=q, k=k, v=v: sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)
            yield "attention", f"{list(q.shape)} {SHORT[dtype]}", 0, 4 * 2 * heads * tokens**2 * dim, sides
    for queries, keys, heads, dim in (() if DRY else ((4096, 77, 10, 64), (1024, 77, 20, 64), (256, 256, 24, 64), (512, 512, 24, 64), (512, 512, 24, 128))):
        q, k, v = (rand(2, tokens, heads, dim) for tokens in (queries, keys, keys))
        yield "attention", f"{list(q.shape)} on {keys} bf16", 0, 4 * 2 * heads * queries * keys * dim, {
            "eager": lambda q=q, k=k, v=v: sdpa(q, k, v), "triton close": with_backend("triton", lambda q=q, k=k, v=v: ops.attention(q, k, v)),
            "sdpa cudnn": lambda q=q, k=k, v=v: sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)}
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
               {"eager": stock, "close": with_backend(None, joint), "triton close": with_backend("triton", joint)} | ({} if DRY else {
                   "cudnn close": lambda q=q, k=k, v=v, q2=q2, k2=k2, v2=v2, w=w: cuda.joint_attention(q, k, v, q2, k2, v2, w, w, w, w, None, 1e-6)}))


def backward_cases():
    """The gradients of all arguments alone, from a graph that is kept: bytes are what a kernel has to read and write once."""
    def graph(call, *inputs, both: bool = True, grads: list | None = None):
        """{side: a call that runs the backward} for ``call(numerics)`` on leaves; eager's is stock's own graph. ``both``: whether the room has gradients
        in Triton and in CUDA, of which "close" runs what dispatch prefers. ``grads``, filled where it is empty: one for all sides, which are compared."""
        sides, grads = {}, [] if grads is None else grads
        for side, backend, numerics in (("eager", "reference", "exact"), ("close", None, "close")):
            with torch.inference_mode(False), torch.enable_grad(), forced(backend):
                leaves = [x.detach().clone().requires_grad_() for x in inputs]
                outs = call(leaves, numerics)
                outs = outs if isinstance(outs, tuple) else (outs,)
                grads += [] if grads else [torch.randn_like(out) for out in outs]
            sides[side] = lambda outs=outs, leaves=leaves, grads=grads: _gradients(outs, leaves, grads)
        if both and CUDA.loaded and not DRY:
            sides |= {f"{backend} close": with_backend(backend, sides["close"]) for backend in ("triton", "cuda")}
        return sides

    for (batch, tokens, channels), dtype in ((s, d) for s in (sized((2, 4608, 3072), (1, 2, 48)),) for d in SHORT):
        x, y, size = rand(batch, tokens, channels, dtype=dtype), rand(batch, tokens, channels, dtype=dtype), batch * tokens * channels * dtype.itemsize
        m, w = [rand(batch, channels, dtype=dtype) for _ in range(3)], rand(channels, dtype=dtype)
        what = f"{list(x.shape)} {SHORT[dtype]}"
        yield "adaln_modulate backward", what, 3 * size, 0, graph(lambda v, n: ops.adaln_modulate(*v, numerics=n), x, m[0], m[1])
        yield "gate_residual backward", what, 3 * size, 0, graph(lambda v, n: ops.gate_residual(*v, numerics=n), x, y, m[0])
        yield "gate_residual_adaln backward", what, 6 * size, 0, graph(lambda v, n: ops.gate_residual_adaln(*v, numerics=n), x, y, *m)
        yield "rms_norm backward", what, 3 * size, 0, graph(lambda v, n: ops.rms_norm(*v, numerics=n), x, w, both=False)
        yield "layer_norm backward", what, 3 * size, 0, graph(lambda v, n: ops.layer_norm(*v, numerics=n), x, w, w, both=False)
    for (batch, tokens, channels), dtype in ((sized((2, 4096, 2560), (1, 2, 16)), d) for d in SHORT):
        x = rand(batch, tokens, 2 * channels, dtype=dtype)
        yield ("geglu backward", f"{list(x.shape)} {SHORT[dtype]}", 5 * x.numel() // 2 * dtype.itemsize, 0,
               graph(lambda v, n: ops.geglu(*v, numerics=n), x, both=False))
    pictures = ((sized((2, 320, 128, 128), (1, 4, 2, 3)), False), (sized((2, 320, 128, 128), (1, 4, 2, 3)), True),
                (sized((2, 1280, 16, 16), (1, 4, 2, 2)), False), (sized((1, 128, 1024, 1024), (1, 4, 3, 3)), False))
    for shape, last, dtype in ((*picture, d) for picture in pictures for d in SHORT):
        x, w = rand(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), rand(shape[1], dtype=dtype)
        yield ("group_norm_silu backward", f"{list(shape)}{' channels last' if last else ''} {SHORT[dtype]}", 3 * x.numel() * dtype.itemsize, 0,
               graph(lambda v, n: ops.group_norm_silu(v[0], 2 if DRY else 32, *v[1:], numerics=n), x, w, w))
    for (batch, tokens, heads, dim), dtype in ((sized((1, 4608, 24, 128), (1, 3, 1, 16)), d) for d in SHORT):
        q, w = rand(batch, tokens, heads, dim, dtype=dtype), rand(dim, dtype=dtype)
        yield ("qk_norm_rope backward", f"{list(q.shape)} {SHORT[dtype]}", 6 * q.numel() * dtype.itemsize, 0,
               graph(lambda v, n: ops.qk_norm_rope(*v, numerics=n), q, q, w, w))
    for tokens, heads, dim in ((16, 1, 16),) if DRY else ((4250, 24, 64), (4608, 24, 128)):
        q, k, v = (rand(1, tokens, heads, dim) for _ in range(3))
        options = {"both": False, "grads": []}
        sides = graph(lambda v, n: ops.attention(*v), q, k, v, **options)
        if not DRY:
            stock = lambda v, n: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in v)).transpose(1, 2)  # noqa: E731
            sides["eager"] = graph(stock, q, k, v, **options)["eager"]
            ours = sides["close"]
            sides["close, libraries"] = lambda ours=ours: _with_libraries(ours)
        yield "attention backward", f"{list(q.shape)} bf16", 0, 10 * heads * tokens**2 * dim, sides


def _with_libraries(call):
    with mock.patch.object(cuda, "NONDETERMINISTIC", True):
        return call()


def _gradients(outs, leaves, grads):
    with torch.inference_mode(False), torch.enable_grad():
        return torch.autograd.grad(outs, leaves, grads, retain_graph=True)
