"""Attention by the fused kernels that PyTorch brings along for NVIDIA GPUs, cuDNN's and FlashAttention-2: predicates and functions of the room's
CUDA rows.

They serve 16-bit heads without a mask or a pattern; their norms are the fused op of qk_norm_rope, which reads q and k where they lie and writes what
they multiply. Which of the two libraries, if any, is the faster for a shape says kernels/tuning.py. A query's log-sum-exp stands in the place of its
highest logit, with a total of 1: the weights exp(logit - highest) / total are the same. Their gradients are summed by atomics, so by default the next row
serves, whose gradients are the same every time; ``FUSEWIRE_NONDETERMINISTIC=1`` lets the libraries' serve where PyTorch is not asked for deterministic ones.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from fusewire.kernels.attention import hopper_limits
from fusewire.kernels.attention.triton_limits import TURNED_BEFORE
from fusewire.kernels.checks import kind_of
from fusewire.kernels.dispatch import forced_backend, recording
from fusewire.kernels.qk_norm_rope import op as qk_norm
from fusewire.kernels.qk_norm_rope.reference import RMS
from fusewire.kernels.triton_rows import capability, too_old
from fusewire.kernels.tuning import CUDNN_WIDE, OURS_FROM, attention_library, attention_library_backward, attention_library_softmax, attention_ours

DEVICE = "cuda"  # the tests, which have no GPU, make it "cpu", and put functions for the CPU into the two tables below
NONDETERMINISTIC = os.environ.get("FUSEWIRE_NONDETERMINISTIC") == "1"
MAX_BATCH = 65535  # samples, and heads: of a cuDNN graph
SPLITS_FROM = 256  # see _splits

_by_itself: dict[tuple, bool] = {}


def _chooses_cudnn(q, k, v, causal: bool, scale: float | None) -> bool:
    """Whether PyTorch's attention would choose cuDNN for such arguments by itself: it is asked once for each kind."""
    key = (q.device, q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride(), causal)
    if key not in _by_itself:
        if len(_by_itself) >= 4096:
            _by_itself.clear()
        choose = getattr(torch, "_fused_sdp_choice", None)
        _by_itself[key] = choose is not None and choose(q, k, v, is_causal=causal, scale=scale) == SDPBackend.CUDNN_ATTENTION.value
    return _by_itself[key]


_at_once: set[tuple] = set()  # kinds of calls that PyTorch's own attention was seen to serve, by cuDNN


def _kind(q, k, v, causal: bool, scale: float | None) -> tuple:
    """All that the predicates of attention look at where there is no mask and no norm, but for where the first elements lie."""
    return (q.device, k.device, v.device, q.dtype, k.dtype, v.dtype, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), causal, scale)


def at_once(q, k, v, causal: bool, scale: float | None) -> torch.Tensor | None:
    """Attention without a mask or a norm, where no graph is recorded, nothing is forced, and the same kind of call went to PyTorch's own attention before:
    checked and chosen then, which takes the processor twice as long as PyTorch's call. None: another call."""
    if not _at_once or recording() or forced_backend() is not None or not all(isinstance(x, torch.Tensor) for x in (q, k, v)):
        return None
    if _kind(q, k, v, causal, scale) not in _at_once or q.data_ptr() % 16 or k.data_ptr() % 16 or v.data_ptr() % 16 or not torch._C._get_cudnn_sdp_enabled():
        return None
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, scale=scale)
    return out.transpose(1, 2).contiguous()


def _cudnn_op(q, k, v, causal: bool, scale: float | None, wanted: bool):
    return torch.ops.aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, wanted, 0.0, causal, False, scale=scale)[:2]


def _cudnn(q, k, v, causal: bool, scale: float | None, wanted: bool):
    # The op by itself returns nine values, which takes longer to launch
    if not wanted and not torch.is_grad_enabled() and torch._C._get_cudnn_sdp_enabled() and _chooses_cudnn(q, k, v, causal, scale):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale), None
    return _cudnn_op(q, k, v, causal, scale, wanted)


FORWARD = {
    "cudnn": _cudnn,
    "flash": lambda q, k, v, causal, scale, wanted: torch.ops.aten._scaled_dot_product_flash_attention.default(
        q, k, v, 0.0, causal, False, scale=scale)[:2],
}


def _cudnn_backward(grad, q, k, v, out, lse, causal: bool, scale: float | None):
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout of 0
    lse = lse.unsqueeze(-1) if _LSE_DIMS == [4] else lse
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
        grad, q, k, v, out, lse, seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale)


def _flash_backward(grad, q, k, v, out, lse, causal: bool, scale: float | None):
    seed, unused = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty((), dtype=torch.uint64, device=q.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward.default(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, unused, scale=scale)


BACKWARD = {"cudnn": _cudnn_backward, "flash": _flash_backward}
_LSE_DIMS = [3]  # of cuDNN's log-sum-exp: some versions of PyTorch keep a last dimension of 1, and want it back


def _gpu(index: int | None) -> tuple[str, str]:
    """(why these libraries cannot serve on the device, its architecture)."""
    if torch.version.hip is not None:
        return "cuDNN and FlashAttention are asked for on NVIDIA GPUs alone", ""
    major, minor = capability(index)
    return too_old(index), f"sm_{major}{minor}"


_gpu._dynamo_marked_constant = True  # as too_old


def _library(name: str) -> str:
    """Why the library is not there, or ``""``."""
    if name == "flash":
        return "" if torch.backends.cuda.is_flash_attention_available() else "this torch was built without FlashAttention"
    return "" if (torch.backends.cudnn.version() or 0) >= 90000 else "there is no cuDNN 9"


_library._dynamo_marked_constant = True


def _cudnn_is_wide() -> bool:
    return (torch.backends.cudnn.version() or 0) >= CUDNN_WIDE


_cudnn_is_wide._dynamo_marked_constant = True  # as too_old


def _forward_library(dim: int, queries: int, keys: int, arch: str) -> str:
    library = attention_library(dim, queries, keys, arch)
    return "flash" if library == "cudnn" and dim > 128 and not _cudnn_is_wide() else library


def _splits(heads: int, dim: int, queries: int, keys: int) -> bool:
    """Whether FlashAttention may share out a query's keys among programs: by a rule that counts the samples, so that a sample's bits would depend on its
    batch. It does not where one sample gives every multiprocessor (of up to 160) two of the rule's blocks of 64 queries."""
    return heads * -(-queries // 64) < SPLITS_FROM and keys > (256 if dim <= 64 else 128 if dim <= 128 else 64)


def _loads(x) -> bool:
    """Whether x [B, T, H, D] can be read where it lies: rows whole multiples of 16 bytes apart, that share no memory. (Where the first one lies cannot be
    asked while a graph is traced: see _heads_first.)"""
    if x.is_contiguous():
        return True  # the head dimension is a multiple of 8
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape) if size != 1]
    return x.stride(3) == 1 and all(stride and stride % 8 == 0 for stride in strides)


def _choice(q, k, queries: int, keys: int, causal: bool, scale, choose, read: tuple) -> tuple[str, str]:
    """(the library that serves, or "", and why none does). ``read``: the tensors that it would read where they lie."""
    if (kind := kind_of(q)) != DEVICE:
        return "", f"q is on {kind}"
    if q.dtype is not torch.bfloat16 and q.dtype is not torch.float16:
        return "", f"q has dtype {q.dtype}; bfloat16 and float16 are served"
    reason, arch = _gpu(q.device.index)
    if reason:
        return "", reason
    batch, _, heads, dim = q.shape
    if k.shape[2] != heads:
        return "", "q has more heads than k"
    if dim % 8 or not dim:
        return "", f"the head dimension is {dim}; multiples of 8 are served"
    if causal and queries != keys:
        return "", "causal, and there are not as many keys as queries"
    if scale is not None and scale <= 0:
        return "", "scale is not positive"
    if not 0 < batch <= MAX_BATCH or not 0 < heads <= MAX_BATCH:
        return "", f"{batch} samples of {heads} heads"
    library = choose(dim, queries, keys, arch)
    if not library:
        return "", f"our own kernel is preferred for heads of {dim}, {queries} queries and {keys} keys on {arch}"
    if reason := _library(library):
        return "", reason
    if library == "flash" and choose is not attention_library_backward and _splits(heads, dim, queries, keys):
        return "", "so few queries that FlashAttention would split the keys, by a rule that counts the samples of the batch"
    if not all(map(_loads, read)):
        return "", "a tensor's rows are not whole multiples of 16 bytes apart, or share memory"
    return library, ""


def _weights_differ(q, *weights) -> str:
    if weights[0] is weights[1] is None and len(weights) == 2:
        return ""
    return "a norm's weight has another dtype than q" if any(w is not None and w.dtype is not q.dtype for w in weights) else ""


def _hides(mask, blocks) -> str:
    return "mask" if mask is not None else "pattern" if blocks is not None else ""


def _ours(q, queries: int, keys: int, causal: bool) -> str:
    """That our kernel for Hopper is preferred, or ``""``; a forced backend serves what it can."""
    index = q.device.index
    if forced_backend() != "cuda" and attention_ours(q.shape[3], queries, keys, causal, _gpu(index)[1]) and not hopper_limits.unavailable(index):
        return f"our own kernel for Hopper is preferred for heads of {q.shape[3]}, {queries} queries and {keys} keys"
    return ""


def why_not_attention(q, k, v, mask, q_weight, k_weight, causal, scale, eps, blocks=None, words=None, cos=None, sin=None) -> str:
    if cos is not None:
        return TURNED_BEFORE
    if reason := _why_not(q, k, v, mask, q_weight, k_weight, causal, scale, blocks):
        return reason
    queries, keys = q.shape[1], k.shape[1]
    return "" if queries * keys * q.shape[2] * q.shape[3] < OURS_FROM else _ours(q, queries, keys, causal)


def _why_not(q, k, v, mask, q_weight, k_weight, causal, scale, blocks, choose=_forward_library) -> str:
    if reason := _hides(mask, blocks):
        return f"there is a {reason}"
    read = (q, k, v) if q_weight is k_weight is None else tuple(x for x, weight in ((q, q_weight), (k, k_weight), (v, None)) if weight is None)
    return _choice(q, k, q.shape[1], k.shape[1], causal, scale, choose, read)[1] or _weights_differ(q, q_weight, k_weight)


def why_not_softmax(q, k, v, mask, causal, scale, blocks=None, words=None) -> str:
    return _why_not(q, k, v, mask, None, None, causal, scale, blocks, attention_library_softmax)


def why_not_joint(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale, eps, *tables) -> str:
    if any(table is not None for table in tables):
        return TURNED_BEFORE
    queries, keys = q.shape[1] + q2.shape[1], k.shape[1] + k2.shape[1]
    if reason := _choice(q, k, queries, keys, False, scale, _forward_library, ())[1] or _weights_differ(q, q_weight, k_weight, q2_weight, k2_weight):
        return reason
    return "" if 0 in (q.shape[1], q2.shape[1], k.shape[1], k2.shape[1]) else _ours(q, queries, keys, False)  # ours reads no empty segment


def why_not_backward(grad, lse_grad, q, k, v, out, highest, total, mask, causal, scale, blocks=None, words=None) -> str:
    if reason := _hides(mask, blocks):
        return f"there is a {reason}"
    if lse_grad is not None:
        return "the log-sum-exp has a gradient"
    if torch.are_deterministic_algorithms_enabled() or not NONDETERMINISTIC:
        return "its gradients are summed by atomics (FUSEWIRE_NONDETERMINISTIC=1 allows that, unless PyTorch is asked for deterministic algorithms)"
    return _choice(q, k, q.shape[1], k.shape[1], causal, scale, attention_library_backward, (q, k, v))[1]


def _heads_first(x) -> torch.Tensor:
    """x [B, T, H, D] as [B, H, T, D], copied where its first element does not lie at a multiple of 16 bytes."""
    return (x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)).transpose(1, 2)


def _attend(q, k, v, causal: bool, scale: float | None, choose, wanted: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, T, H, D] contiguous, what the library says of the log-sum-exp: where it is ``wanted``, float32 [B, H, T] or [B, H, T, 1])."""
    library = choose(q.shape[3], q.shape[1], k.shape[1], _gpu(q.device.index)[1])
    out, lse = FORWARD[library](_heads_first(q), _heads_first(k), _heads_first(v), causal, scale, wanted)
    if wanted and library == "cudnn":
        _LSE_DIMS[0] = lse.dim()
    return out.transpose(1, 2).contiguous(), lse


def _norm_into(pairs, eps: float) -> None:
    """``pairs``: two of (x, weight or None, where it goes); RMS-normalised where there is a weight, otherwise copied."""
    weighted = [pair for pair in pairs if pair[1] is not None]
    for x, weight, out in pairs:
        if weight is None:
            out.copy_(x)
    if weighted:
        (q, q_weight, q_out), (k, k_weight, k_out) = weighted[0], weighted[-1]
        if len(weighted) == 1:
            k, k_out = k[:, :0], k_out[:, :0]  # nothing
        args = (q, k, q_weight, k_weight, q_out, k_out, None, None, eps, RMS, False)
        next(row for row in qk_norm._into.rows if not row.why_not(*args)).run(*args)


def _normalised(x, weight) -> torch.Tensor:
    """Where the norm of x goes; x itself where there is none."""
    return x if weight is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def attention(q, k, v, mask, q_weight, k_weight, causal: bool, scale: float | None, eps: float, blocks=None, words=None) -> torch.Tensor:
    if q_weight is k_weight is None:
        out, lse = _attend(q, k, v, causal, scale, _forward_library)
        # Without a log-sum-exp PyTorch's own attention was called
        if lse is None and not recording() and forced_backend() is None:
            if len(_at_once) >= 4096:
                _at_once.clear()
            _at_once.add(_kind(q, k, v, causal, scale))
        return out
    normed_q, normed_k = _normalised(q, q_weight), _normalised(k, k_weight)
    pairs = [pair for pair in ((q, q_weight, normed_q), (k, k_weight, normed_k)) if pair[1] is not None]
    _norm_into(pairs, eps)
    return _attend(normed_q, normed_k, v, causal, scale, _forward_library)[0]


def attention_softmax(q, k, v, mask, causal: bool, scale: float | None, blocks=None, words=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse = _attend(q, k, v, causal, scale, attention_library_softmax, True)
    lse = lse.reshape(q.shape[0], q.shape[2], q.shape[1]).to(torch.float64, memory_format=torch.contiguous_format)
    return out, lse, torch.ones_like(lse)


def joint_attention(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale: float | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both streams' q and k are written where the concatenation would have copied them to."""
    tokens, keys = q.shape[1], k.shape[1]
    joint_q, joint_k = (x.new_empty((x.shape[0], x.shape[1] + x2.shape[1], *x.shape[2:])) for x, x2 in ((q, q2), (k, k2)))
    _norm_into(((q, q_weight, joint_q[:, :tokens]), (k, k_weight, joint_k[:, :keys])), eps)
    _norm_into(((q2, q2_weight, joint_q[:, tokens:]), (k2, k2_weight, joint_k[:, keys:])), eps)
    out, _ = _attend(joint_q, joint_k, torch.cat([v, v2], dim=1), False, scale, _forward_library)
    # The text's rows are few: copied, the two results share no memory
    return out[:, :tokens].contiguous(), out[:, tokens:].clone(memory_format=torch.contiguous_format)


def attention_backward(grad, lse_grad, q, k, v, out, highest, total, mask, causal: bool, scale: float | None, blocks=None,
                       words=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lse = (highest + torch.log(total)).to(torch.float32, memory_format=torch.contiguous_format)
    library = attention_library_backward(q.shape[3], q.shape[1], k.shape[1], _gpu(q.device.index)[1])
    grad, out, q, k, v = (_heads_first(x) for x in (grad.contiguous(), out.contiguous(), q, k, v))
    return tuple(x.transpose(1, 2).contiguous() for x in BACKWARD[library](grad, q, k, v, out, lse, causal, scale)[:3])
