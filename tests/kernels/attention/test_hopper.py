"""The attention kernel for Hopper, as far as there is no such GPU: what it serves, what is preferred to it, what its launcher hands over, and that all goes
on without it. (Its values: tests/gpu/test_hopper_attention.py. What it compiles to: tests/kernels/test_triton_aot.py.)"""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fusewire import ops
from fusewire.kernels.attention import cuda, hopper_limits, reference
from fusewire.kernels.attention.hopper_limits import hopper_tile, why_not_hopper
from fusewire.kernels.dispatch import forced
from fusewire.kernels.tuning import attention_ours
from tests.kernels.attention.cases import qkv, stock
from tests.kernels.attention.test_cuda import pretend
from tests.kernels.interpreted import INTERPRETED, ON_GPU, in_triton
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

pytestmark = pytest.mark.skipif(ON_GPU or not INTERPRETED, reason="tests/gpu has the kernel itself")


@pytest.fixture
def hopper():
    from fusewire.kernels.attention import hopper

    hopper._started.clear()
    yield hopper
    hopper._started.clear()


def available(monkeypatch, reason=""):
    def unavailable(index):
        return reason

    unavailable._dynamo_marked_constant = True
    monkeypatch.setattr(hopper_limits, "unavailable", unavailable)


def test_what_is_served(monkeypatch):
    available(monkeypatch)
    with FakeTensorMode():
        def make(*shape, dtype=torch.bfloat16, device="cuda"):
            return torch.empty(shape, dtype=dtype, device=device)

        for dim in (64, 128):
            for dtype in (torch.bfloat16, torch.float16):
                q = make(2, 9, 4, dim, dtype=dtype)
                assert why_not_hopper(q, q) == why_not_hopper(q, make(2, 1, 2, dim, dtype=dtype), 0.1, q, q) == ""
        q, none = make(2, 9, 4, 64), make(2, 0, 4, 64)
        for reason, arguments in (("q is on cpu", [make(2, 9, 4, 64, device="cpu")] * 2), ("float32", [make(2, 9, 4, 64, dtype=torch.float32)] * 2),
                                  ("head dimension is 72", [make(2, 9, 4, 72)] * 2), ("head dimension is 32", [make(2, 9, 4, 32)] * 2),
                                  ("not positive", (q, q, -1.0)), ("not positive", (q, q, 0.0)), ("empty", [make(0, 9, 4, 64)] * 2), ("empty", (none, q)),
                                  ("empty", (q, none)), ("empty", (q, q, None, none, q)), ("empty", (q, q, None, q, none)),
                                  ("2147483648 tokens", (q, make(1, 2**31, 4, 64)))):
            assert reason in why_not_hopper(*arguments), reason
        available(monkeypatch, "not today")
        assert why_not_hopper(q, q) == "not today"


def test_where_it_is_not_available(monkeypatch):
    """Another GPU, no Triton, another Triton, a Gluon that lacks something: each is named, and asked for once a device."""
    monkeypatch.setattr(hopper_limits, "_known", {})
    asked = []
    capability = {0: (9, 0), 1: (8, 0), 2: (10, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (asked.append(index), capability[index])[1])
    assert [hopper_limits.unavailable(index) for index in (0, 1, 2, 0, 1, 2)] == 2 * ["", *["the device is not of the Hopper architecture"] * 2]
    assert asked == [0, 1, 2]
    import triton

    for version, served in (("3.6.0", True), ("3.7.1", True), ("3.5.1", False), ("3.60.0", False), ("4.0", False)):
        with monkeypatch.context() as patch:
            patch.setattr(triton, "__version__", version)
            assert hopper_limits._gluon() == ("" if served else f"Triton is {version}; Gluon's kernel is for 3.6 and 3.7")
    with monkeypatch.context() as patch:
        patch.delattr("fusewire.kernels.attention.hopper", raising=False)
        patch.setitem(sys.modules, "fusewire.kernels.attention.hopper", None)
        assert hopper_limits._gluon().startswith("Gluon cannot be imported: ")
    monkeypatch.setattr(hopper_limits, "MISSING", "triton is not installed")
    assert hopper_limits._gluon() == "triton is not installed"


@pytest.mark.parametrize("dim, queries, keys, causal, arch, want", [
    (64, 1178, 1178, False, "sm_90", True), (128, 8192, 1024, False, "sm_90", True), (64, 1024, 1023, False, "sm_90", False),
    (64, 1023, 4096, False, "sm_90", False), (128, 4096, 4096, True, "sm_90", False), (72, 4096, 4096, False, "sm_90", False),
    (64, 4096, 4096, False, "sm_100", False), (128, 4096, 4096, False, "sm_80", False)])
def test_choice(dim, queries, keys, causal, arch, want):
    assert attention_ours(dim, queries, keys, causal, arch) is want


def test_what_is_preferred(monkeypatch):
    """cuDNN's row stands aside where the kernel was faster, and serves where it was not, is not there or gives no log-sum-exp."""
    pretend(monkeypatch)
    available(monkeypatch)
    for batch in (1, 3):
        for dim in (64, 128):
            monkeypatch.setattr(cuda, "OURS_FROM", 2 * 1024**2 * dim)
            q, short = torch.empty(batch, 1024, 2, dim, dtype=torch.bfloat16), torch.empty(batch, 24, 2, dim, dtype=torch.bfloat16)
            none = (None,) * 4
            ours = f"our own kernel for Hopper is preferred for heads of {dim}, 1024 queries and 1024 keys"
            assert cuda.why_not_attention(q, q, q, None, None, None, False, None, 1e-6) == ours
            assert cuda.why_not_joint(*[q[:, :1000]] * 3, *[short] * 3, *none, None, 1e-6) == ours
            served = [cuda.why_not_attention(q, q, q, None, None, None, True, None, 1e-6), cuda.why_not_softmax(q, q, q, None, False, None),
                      cuda.why_not_attention(q[:, :1000], q, q, None, None, None, False, None, 1e-6),
                      cuda.why_not_joint(*[q] * 3, *[short[:, :0]] * 3, *none, None, 1e-6)]
            with monkeypatch.context() as patch:
                available(patch, "Gluon cannot be imported")
                served += [cuda.why_not_attention(q, q, q, None, None, None, False, None, 1e-6),
                           cuda.why_not_joint(*[q] * 3, *[short] * 3, *none, None, 1e-6)]
            monkeypatch.setattr(cuda, "OURS_FROM", 2 * 1024**2 * dim + 1)  # too little work to make up for a slower launch; joint streams always gain
            served.append(cuda.why_not_attention(q, q, q, None, None, None, False, None, 1e-6))
            assert served == 7 * [""]
            assert cuda.why_not_joint(*[q[:, :1000]] * 3, *[short] * 3, *none, None, 1e-6) == ours


@pytest.mark.on_reference(reason="no kernel serves bfloat16 on a CPU that pretends to be a GPU")
def test_the_choice_is_traced(monkeypatch):
    pretend(monkeypatch)
    available(monkeypatch)
    q = torch.randn(1, 1030, 1, 64).bfloat16()
    with torch.no_grad():
        want = ops.attention(q, q, q)
        assert_exact(torch.compile(lambda q: ops.attention(q, q, q), fullgraph=True, backend="aot_eager")(q), want)


class Served:
    """In the place of the kernel's two functions: PyTorch's attention."""

    def __init__(self, monkeypatch, hopper):
        from fusewire.kernels.attention import triton_kernel

        self.calls = []
        monkeypatch.setattr(hopper, "attention", self.attention)
        monkeypatch.setattr(hopper, "joint_attention", self.joint_attention)
        monkeypatch.setattr(triton_kernel, "why_not_hopper", lambda *arguments: "")

    def attention(self, q, k, v, causal, scale):
        self.calls.append((q, k))
        return stock(q, k, v, None, causal, scale, q.dtype).contiguous()

    def joint_attention(self, q, k, v, q2, k2, v2, scale):
        self.calls.append((q, k, q2, k2))
        out = stock(*(torch.cat(pair, 1) for pair in ((q, q2), (k, k2), (v, v2))), scale=scale, dtype=q.dtype)
        return tuple(part.contiguous() for part in out.split((q.shape[1], q2.shape[1]), 1))


@pytest.mark.parametrize("weighted", ["", "q", "k", "qk"])
def test_attention_launches_it(monkeypatch, hopper, weighted):
    """After the norms; not where there is a mask, a pattern or a log-sum-exp to give."""
    kernel = Served(monkeypatch, hopper)
    q, k, v = qkv(2, 9, 7, 2, 64, torch.bfloat16)
    w = torch.rand(64).bfloat16()
    q_weight, k_weight = (w if name in weighted else None for name in "qk")
    with in_triton("attention"):
        got = ops.attention(q, k, v, q_weight=q_weight, k_weight=k_weight, scale=0.2, causal=True)
    wide = [None if x is None else x.double() for x in (q_weight, k_weight)]
    want = reference.attention(q.double(), k.double(), v.double(), None, *wide, True, 0.2, 1e-6)
    normed = [x if weight is None else reference.widen(x, weight, 1e-6).bfloat16() for x, weight in ((q, q_weight), (k, k_weight))]
    assert_close(got, want, stock(*normed, v, None, True, 0.2, torch.bfloat16))
    assert len(kernel.calls) == 1
    for given, x, weight in zip(kernel.calls[0], (q, k), (q_weight, k_weight)):
        assert given is x if weight is None else given.is_contiguous() and given is not x
    with torch.no_grad(), forced("triton"):
        ops.attention(q, k, v, mask=torch.ones(9, 7, dtype=torch.bool))
        ops.attention(q, k, v, pattern=ops.block_pattern(lambda q, k: k <= q, 9, 7))
        ops.attention(q, k, v, return_lse=True)
    assert len(kernel.calls) == 1


@pytest.mark.parametrize("weighted", ["", "1", "2", "12"])
def test_joint_attention_launches_it(monkeypatch, hopper, weighted):
    kernel = Served(monkeypatch, hopper)
    given, given2 = qkv(2, 9, 9, 2, 64, torch.bfloat16), qkv(2, 4, 4, 2, 64, torch.bfloat16)
    weights = [torch.rand(64).bfloat16() if name in weighted else None for name in "1122"]
    with in_triton("joint_attention"):
        got = ops.joint_attention(*given, *given2, **dict(zip(("q_weight", "k_weight", "q2_weight", "k2_weight"), weights)))
    wide = [None if x is None else x.double() for x in (*given, *given2, *weights)]
    normed = [x if w is None else reference.widen(x, w, 1e-6).bfloat16() for x, w in zip((*given[:2], *given2[:2]), weights)]
    plain = stock(torch.cat(normed[::2], 1), torch.cat(normed[1::2], 1), torch.cat([given[2], given2[2]], 1), dtype=torch.bfloat16)
    assert_close(torch.cat(got, 1), torch.cat(reference.joint_attention(*wide, None, 1e-6), 1), plain)
    assert len(kernel.calls) == 1


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_rows(hopper, layout, heads_first):
    """strided-input: the same values in any layout, where they lie or in a copy, by strides that TMA takes."""
    x = torch.randn(2, 9, 3, 64).bfloat16()
    x[1] = x[0]
    given = layout(x.transpose(1, 2).contiguous().transpose(1, 2) if heads_first else x)
    rows = hopper._rows(given)
    assert_exact(torch.as_strided(rows.base, rows.shape, rows.strides, rows.base.storage_offset()), x.transpose(1, 2))
    assert rows.base.data_ptr() % 16 == 0 and rows.strides[3] == 1 and all(s > 0 and s % 8 == 0 for s in rows.strides[:3])
    if layout.__name__ == "contiguous":
        assert rows.base is given


def test_rows_of_single_elements(hopper):
    """A stride over one element may be anything: the tensor is not copied for it, and it is handed on as none that TMA refuses."""
    x = torch.randn(64).bfloat16().as_strided((1, 1, 1, 64), (0, 3, 5, 1))
    rows = hopper._rows(x)
    assert rows.base is x and rows.shape == [1, 1, 1, 64] and rows.strides == [64, 64, 64, 1]
    far = torch.empty(1, dtype=torch.bfloat16, device="meta").as_strided((2, 9, 3, 64), (2**40, 192, 64, 1))
    assert hopper._rows(far).strides == [9 * 192, 64, 192, 1]  # TMA's strides end at 2^40 bytes


class Launches:
    """In the place of Triton: what is launched, by which of the two ways."""

    def __init__(self, monkeypatch, hopper):
        self.first, self.again = [], []
        monkeypatch.setattr(hopper, "launch_anew", lambda kernel, programs, like, *args, **options: (self.first.append((programs, args, options)), len(self.first))[1])
        monkeypatch.setattr(hopper, "relaunch", lambda compiled, programs, like, *args: self.again.append((compiled, programs, args)))


def test_launches(monkeypatch, hopper):
    """The second launch hands over what the first did, in the order of the kernel's arguments, to the kernel that was compiled for such arguments."""
    seen = Launches(monkeypatch, hopper)
    kinds = 0
    for dtype in (torch.bfloat16, torch.float16):
        for dim in (64, 128):
            q, k, v = qkv(2, 200, 300, 4, dim, dtype, key_heads=2)
            q2, k2, v2 = qkv(2, 30, 20, 4, dim, dtype, key_heads=2)
            for call in (lambda: hopper.attention(q, k, v), lambda: hopper.attention(q, k, v, True, 0.3), lambda: hopper.joint_attention(q, k, v, q2, k2, v2)):
                kinds += 1
                call()
                call()
                assert len(seen.first) == len(seen.again) == kinds
                programs, args, options = seen.first[-1]
                compiled, again, others = seen.again[-1]
                assert compiled == kinds and again == programs and len(args) == len(others) == len(hopper.hopper_attention_kernel.arg_names)
                for one, other in zip(args[:8], others[:8]):
                    assert (one is None) is (other is None)
                    if one is not None:
                        assert (one.shape, one.strides, one.padding) == (other.shape, other.strides, other.padding) and one.block_shape[2] in (64, 128)
                assert args[8:] == others[8:] and [type(x) for x in args[8:]] == [type(x) for x in others[8:]]
    tile = hopper_tile(128)
    named = dict(zip(hopper.hopper_attention_kernel.arg_names, args, strict=True))  # of the last call
    assert [named[name] for name in ("tiles", "tiles2", "programs", "heads", "group", "k_tokens", "k2_tokens")] == [2, 1, 24, 4, 2, 300, 20]
    assert (named["CONSUMERS"], named["BLOCK_N"], named["DIM"], named["STAGES"], named["CAUSAL"]) == (*tile[:2], 128, tile.stages, False)
    assert named["scale"] == pytest.approx(128**-0.5 * 1.4426950408889634) and named["q2"].shape == [2, 4, 30, 128] and programs == 24


def test_programs(monkeypatch, hopper):
    """One for each multiprocessor, or fewer."""
    seen = Launches(monkeypatch, hopper)
    for batch, want in ((1, 8), (16, 128), (17, 132), (100, 132)):
        q = torch.empty(batch, 200, 4, 64, dtype=torch.bfloat16)
        hopper.attention(q, q, q)
        assert (seen.first + [x[1:] for x in seen.again])[-1][0] == want
