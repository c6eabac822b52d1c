"""Outputs that do not fit the last cache are written past it: the same bits, at every ISA level, dtype and rounding, and for rows that cannot be streamed."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fusewire import ops
from fusewire.kernels.library import CPU
from tests.kernels.isa_levels import run_at
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact

pytestmark = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEVER = 2**62


@pytest.fixture
def stream_from():
    """Sets from how many bytes on outputs are streamed."""
    before = torch.ops.fusewire.cpu_stream_from(-1)
    yield torch.ops.fusewire.cpu_stream_from
    torch.ops.fusewire.cpu_stream_from(before)


def calls(width: int, dtype: torch.dtype, numerics: str, tokens: int = 7, layout=lambda x: x):
    """Every op that streams, with all of its outputs: blocks of rows and single ones; a modulation for each token; with and without weights."""
    def rand(*shape):
        return layout(torch.randn(shape).to(dtype))

    x, y, y2, m = rand(2, tokens, width), rand(2, tokens, width), rand(2, tokens, width), [rand(2, width) for _ in range(4)]
    per_token, gain, keywords = rand(2, tokens, width), torch.randn(width).to(dtype), {"numerics": numerics}
    q, k, head = rand(2, tokens, 3, width), rand(2, tokens, 3, width), gain
    rope = tuple(torch.randn(tokens, width // 2) for _ in range(2))
    return {
        "adaln_modulate": lambda: ops.adaln_modulate(x, *m[:2], **keywords), "by token": lambda: ops.adaln_modulate(x, per_token, y, **keywords),
        "affine": lambda: ops.adaln_modulate(x, *m[:2], weight=gain, bias=gain, **keywords),
        "rms": lambda: ops.adaln_modulate(x, *m[:2], norm="rms", weight=gain, **keywords),
        "dual": lambda: ops.adaln_modulate_dual(x, *m, **keywords), "gate": lambda: ops.gate_residual(x, y, m[0], **keywords),
        "gate and norm": lambda: ops.gate_residual_adaln(x, y, *m[:3], **keywords),
        "two gates": lambda: ops.gate_residual_adaln(x, y, *m[:3], y2=y2, gate2=m[3], **keywords),
        "gate and affine norm": lambda: ops.gate_residual_adaln(x, y, *m[:3], weight=gain, **keywords),
        "heads": lambda: ops.qk_norm_rope(q, k, head, head, **keywords), "heads without weight": lambda: ops.qk_norm_rope(q, k, **keywords),
        "turned heads": lambda: ops.qk_norm_rope(q, k, head, head, rope=rope, **keywords),
    }


def same_bits(stream_from, found: dict, streamed: bool) -> None:
    """``streamed``: whether the rows can be, as the library counts."""
    count = torch.ops.fusewire.cpu_streamed
    for name, call in found.items():
        ops.reset_stats()
        before = count()
        stream_from(NEVER)
        want = call()
        assert count() == before
        stream_from(0)
        got = call()
        assert (count() > before) is streamed, name
        served = {backend for calls in ops.stats().values() for backend, number in calls.items() if number}
        assert served == {"cpu"}, (name, served)
        for one, other in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True):
            assert_exact(one, other, name)


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("width", (32, 64, 96, 40))  # whole lines of some dtypes, of all, and of none
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(stream_from, dtype, width, numerics):
    heads = ("heads", "heads without weight", "turned heads")
    found = calls(width, dtype, numerics)
    whole = width * dtype.itemsize % 64 == 0
    same_bits(stream_from, {name: call for name, call in found.items() if name in heads}, whole)
    same_bits(stream_from, {name: call for name, call in found.items() if name not in heads}, whole and dtype is not torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(stream_from, layout):
    """strided-input, misaligned: inputs of any layout."""
    torch.manual_seed(0)
    found = calls(64, torch.float32, "close", layout=lambda x: layout(x.clone().copy_(x[:1]) if layout.__name__ == "expanded" else x))
    same_bits(stream_from, found, True)


def test_into_a_view(stream_from):
    """misaligned, alias: heads go into views whose rows do not start on a line, into the rear of a joint buffer, and in place; the rest stays."""
    for width, first in ((64, 0), (64, 8), (20, 0)):
        q, k = torch.randn(2, 5, 3, width), torch.randn(2, 5, 3, width)
        found = []
        for bound in (NEVER, 0):
            stream_from(bound)
            room = torch.full((2, 9, 3, width + 16), 7.0)
            q_out, k_out = room[:, 4:, :, first:first + width], torch.empty(2, 9, 3, width)[:, 4:]
            ops.qk_norm_into(q, k, None, None, q_out, k_out)
            packed = q.clone()
            ops.qk_norm_into(packed, k, None, None, packed, k_out)
            found.append((room, k_out.clone(), packed))
        for one, other in zip(*found):
            assert_exact(one, other)
        assert (found[1][0][:, :4] == 7).all()


@pytest.mark.parametrize("level", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))  # no level of these kernels is above it
def test_isa_levels(level):
    run_at(level, __file__, "test_bits or test_into_a_view")


def test_default(stream_from):
    """From three quarters of the last cache on, as glibc copies memory."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not size.is_file():
        pytest.skip("the system does not say how large the last cache is")
    assert stream_from(-1) == int(size.read_text().strip().removesuffix("K")) * 1024 // 4 * 3


def fenceless(listing: str) -> set[str]:
    """Of the lines of ``objdump -d`` that matter: the functions that store past the caches without a fence, which some of those that call them lack too."""
    fenced, streaming, callers, function = set(), set(), {}, ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1:-2]
        elif "sfence" in line:
            fenced.add(function)
        elif "movnt" in line:
            streaming.add(function)
        else:
            callers.setdefault(line[line.rindex("<") + 1:-1], set()).add(function)

    def ends(function: str, below: frozenset) -> bool:
        above = callers.get(function, set()) - below - {function}
        return function in fenced or bool(above) and all(ends(caller, below | {function}) for caller in above)

    assert streaming
    return {function for function in streaming if not ends(function, frozenset())}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_fences():
    """No result shows that a fence lacks, so the compiled code is searched: where a function streams, it or each that calls it has one."""
    lines = r"""objdump -d --no-show-raw-insn "$0" | grep -E '>:$|sfence|movnt|(call|jmp) .*<[^+]*>$'"""
    listing = subprocess.run(["sh", "-c", lines, str(CPU.path)], check=True, capture_output=True, text=True).stdout
    if listing.count(">:") < 100:
        pytest.skip("the library is stripped")
    assert not fenceless(listing)


def test_a_fence_that_lacks_is_found():
    def function(name, *instructions):
        return f"0000000000001000 <{name}>:\n" + "".join(f"    1000:\t{line}\n" for line in instructions)

    called = function("inner", "vmovntdq %zmm0,(%rax)")
    by_one, by_other = function("outer", "call   20 <inner>", "sfence"), function("other", "jmp    20 <inner>")
    assert fenceless(called + by_one) == set()
    assert fenceless(called) == fenceless(called + by_one + by_other) == {"inner"}
    assert fenceless(function("alone", "movntps %xmm0,(%rax)")) == {"alone"}
    assert fenceless(called + by_other + function("top", "call   20 <other>", "sfence")) == set()
