"""Tile sizes and warps of the Triton kernels: pure functions of shape and architecture, never of the batch and never of a timing.

The order in which a row is summed must not depend on the batch, so nothing here sees the number of rows.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024


class Arch(NamedTuple):
    """A GPU architecture: ``kind`` "cuda" or "hip"; ``name`` "sm_90" or "gfx942"; lanes of a warp; bytes of shared memory that a block may have."""

    kind: str
    name: str
    warp: int
    shared: int


def cuda_arch(major: int, minor: int) -> Arch:
    """163 KiB of shared memory a block on sm_80, 227 KiB on sm_90 and sm_100; the consumer parts (sm_86, sm_89, sm_120) have 99 KiB."""
    number = 10 * major + minor
    return Arch("cuda", f"sm_{number}", 32, {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(number, 99) * KIB)


def hip_arch(name: str) -> Arch:
    """``name`` as "gfx942". CDNA (gfx9..) has warps of 64 lanes; all have 64 KiB of shared memory a block, gfx950 160 KiB."""
    name = name.split(":")[0]
    return Arch("hip", name, 64 if name.startswith("gfx9") else 32, (160 if name == "gfx950" else 64) * KIB)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own, which kernels may call too, takes longer than a launch of PyTorch's.)"""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def all_registers(warps: int, arch: Arch) -> dict[str, int]:
    """Triton's option for a kernel whose programs may have all of a multiprocessor's 65,536 registers: ptxas would rather spill a few bytes than have room for
    a program less, until it is told."""
    return {"maxnreg": min(65536 // (32 * warps), 255)} if arch.kind == "cuda" else {}


class RowTile(NamedTuple):
    """``rows`` rows of ``block`` columns in one program of ``warps`` warps."""

    block: int
    rows: int
    warps: int


def row_tile(channels: int, arch: Arch, each: int = 16) -> RowTile:
    """One program holds whole rows in registers: ``each`` elements a thread (16: two 16-byte loads of a 16-bit type), at least 2048 a program."""
    block = power_of_2(channels)
    rows = max(1, 2048 // block)
    return RowTile(block, rows, max(min(block * rows // (each * arch.warp), 16), 1))


def aligned(channels: int, inputs, outputs) -> bool:
    """Whether a kernel that sums over ``channels`` may load vectors. ``inputs``, ``outputs``: dtypes.

    Triton gives each thread as many neighbouring elements as the widest vector of any load or store takes, and the order of the sum follows.
    The outputs are contiguous and fresh. Where their rows keep 16-byte alignment and no input is narrower, they alone decide, so that the
    inputs' layouts cannot change a bit of the result; elsewhere every access is one element wide.
    """
    return channels % 16 == 0 and min(dtype.itemsize for dtype in inputs) >= min(dtype.itemsize for dtype in outputs)


def flat_tile(elements: int, arch: Arch) -> tuple[int, int]:
    """(block, warps) of an elementwise kernel over runs of ``elements`` contiguous elements: 8 a thread, at most 1024 a program."""
    block = min(max(power_of_2(elements), 64), 1024)
    return block, max(block // (8 * arch.warp), 1)


class GroupTile(NamedTuple):
    """``steps`` blocks of ``block`` elements in one program of ``warps`` warps."""

    block: int
    steps: int
    warps: int


def group_tile(elements: int, arch: Arch) -> GroupTile:
    """For sums over runs of ``elements``: 16 elements a thread, and at most 128 programs for each run, whose results are put together at the end."""
    block = min(max(power_of_2(elements), 256), 4096)
    return GroupTile(block, max(-(-elements // (block * 128)), 1), max(block // (16 * arch.warp), 1))


class PictureTile(NamedTuple):
    """``channels`` channels of ``pixels`` pixels in one program of ``warps`` warps."""

    channels: int
    pixels: int
    warps: int


def picture_tile(pixels: int, run: int, itemsize: int, backward: bool, arch: Arch) -> PictureTile:
    """For sums over the channels of pictures of so many pixels: 8 elements a thread, 4 where the ``run`` that lies side by side in memory (pixels, or
    channels) is no multiple of 16, and in a float32 forward: what ptxas compiles without spills for every target. At least 32 bytes side by side in
    either memory format. A small picture gives few programs: each has fewer pixels."""
    warps = (512 if run % 16 or (itemsize == 4 and not backward) else 256) // arch.warp
    return PictureTile(32, 64, warps) if pixels >= 4096 else PictureTile(128, 16, warps)


class ResponseTile(NamedTuple):
    """``pixels`` pixels of ``channels`` channels in one program of ``warps`` warps; sums over a picture take ``steps`` such tiles one after another."""

    pixels: int
    channels: int
    warps: int
    steps: int


def response_tile(pixels: int, channels: int, arch: Arch) -> ResponseTile:
    """For sums over the pixels of pictures of so many pixels and channels: 16 elements a thread, about 512 programs a picture, none of more than 64 steps."""
    block = min(max(power_of_2(channels), 16), 64)
    rows = 2048 // block
    steps = min(max(cdiv(pixels, rows) * cdiv(channels, block) // 512, 1), 64)
    return ResponseTile(rows, block, 128 // arch.warp, steps)


class PartsTile(NamedTuple):
    """``parts`` rows of ``channels`` numbers at once in one program of ``warps`` warps."""

    parts: int
    channels: int
    warps: int


def parts_tile(parts: int, channels: int, arch: Arch) -> PartsTile:
    """For the one program that adds up the ``parts`` of a sample and goes through all of its channels: 16 numbers a thread and, as it waits for each load,
    as many at once as a program can hold, 32 a thread."""
    block = min(max(power_of_2(channels), 16), 2048)
    rows = min(power_of_2(parts), 16384 // block, 256)
    threads = min(max(rows * block // 16, arch.warp), 512)
    return PartsTile(rows, block, threads // arch.warp)


class AttentionTile(NamedTuple):
    """Blocks of queries and keys, the padded head dimension, and how float32 is multiplied."""

    queries: int
    keys: int
    dim: int
    warps: int
    stages: int
    precision: str


def attention_tile(dim: int, itemsize: int, masked: bool, causal: bool, arch: Arch) -> AttentionTile:
    """``dim``: the head dimension; ``itemsize``: bytes of an element. The key blocks in flight and the queries must fit into shared memory."""
    padded = max(power_of_2(dim), 16)
    whole = dim == padded  # what is beyond is masked, which takes registers
    large = arch.shared >= 160 * KIB
    hopper = arch.kind == "cuda" and arch.shared >= 227 * KIB  # wgmma reads its operands from shared memory: more registers are left
    if itemsize == 4:
        # Three TF32 products come close to float32; AMD has float32 matrix instructions
        queries, keys = (64, 32) if padded <= 64 else (32, 32) if padded <= 128 else (32, 16)
        warps, stages = 8, 2 if large and padded <= 128 else 1
        return AttentionTile(queries, keys, padded, warps, stages, "ieee" if arch.kind == "hip" else "tf32x3")
    if padded > 256:
        queries, keys, warps, stages = (32, 32, 8, 1 if arch.name == "sm_90" and masked else 2) if large else (32, 16, 8, 1)
    elif arch.kind == "hip":
        queries, keys, warps, stages = (128, 64, 4, 1) if padded <= 64 else (64, 32, 4, 1)
    elif padded <= 64:
        keys = 128 if hopper and not masked and not causal and arch.name != "sm_90" else 64  # measured on an H100: 394 TFLOP/s with 64, 302 with 128
        if (masked or causal) and not hopper:
            keys = 32  # hidden keys take more registers
        queries, keys, warps, stages = 128, keys, 8, 3 if large else 2
    elif padded <= 128:
        queries, keys, warps, stages = (64, 32, 8, 3) if large else (64, 32, 4, 2)
        if large and (hopper or not (masked or causal)):
            queries, keys, warps, stages = (128, 32 if masked or not (hopper or whole) else 64, 8, 3)
        if arch.name == "sm_90" and not (masked or causal):
            queries, keys, warps, stages = 64, 64, 4, 3  # measured on an H100: 512 TFLOP/s, the above 446
    else:
        # measured on an H200, 256 channels: 310 us; (128, 32) 455, (64, 32) 945
        queries, keys, warps, stages = (128, 64, 8, 2) if arch.name == "sm_90" and not masked else (64, 32, 8, 2) if large else (64, 16, 8, 2)
    return AttentionTile(queries, keys, padded, warps, stages, "ieee")


class BackwardPart(NamedTuple):
    """One kernel's blocks of queries and keys. ``registers``: of a thread at most, 0 for what ptxas chooses: it would rather spill a few bytes than have
    room for a program less, until it is told that all it can have will do."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0


class BackwardTile(NamedTuple):
    """The two kernels of attention's gradients, the padded head dimension, and how float32 is multiplied."""

    dq: BackwardPart
    dkdv: BackwardPart
    dim: int
    precision: str


def attention_backward_tile(dim: int, itemsize: int, masked: bool, arch: Arch) -> BackwardTile:
    """``masked``: by a mask or a pattern, or as causal. The kernel of dk and dv holds two sums of its keys in registers, and keys, values, queries and
    gradients in shared memory. What Triton 3.6 and 3.7 compile without spills."""
    padded = max(power_of_2(dim), 16)
    large = arch.shared >= 160 * KIB
    hopper = arch.kind == "cuda" and arch.shared >= 227 * KIB  # as in attention_tile
    if itemsize == 4:
        part = BackwardPart(32 if padded <= 64 else 16, 32, 8, 1)
        return BackwardTile(part, part, padded, "ieee" if arch.kind == "hip" else "tf32x3")
    if arch.kind == "hip":
        size = 64 if padded <= 64 else 32 if padded <= 128 else 16
        dq = dkdv = BackwardPart(size, size, 4, 1)
    elif padded <= 64:
        dq = BackwardPart(128, 64 if hopper else 32, 8, 2)
        if arch.name == "sm_90":
            dq, dkdv = dq if masked else BackwardPart(64, 64, 4, 3), BackwardPart(32 if masked else 64, 64, 4, 2)
        else:
            dkdv = BackwardPart(32, 32, 4, 2, 255) if hopper or masked else BackwardPart(32, 64, 8, 2)
    elif padded <= 128:
        dq = BackwardPart(64, 32 if masked else 64, 8, 2) if large else BackwardPart(64, 32, 8, 1)
        if arch.name == "sm_90" and not masked and dim == padded:
            dq, dkdv = BackwardPart(128, 64, 8, 3), BackwardPart(32, 128, 8, 3)  # 8 or 16 bytes spill by Triton 3.6; without, a tenth slower
        elif hopper and arch.name != "sm_90":
            dkdv = BackwardPart(32, 32, 4, 1, 255)
        else:
            whole = dim == padded
            dkdv = BackwardPart(64 if large and not (hopper or masked) and whole else 32, 64, 8, 2 if large and not (hopper and masked and not whole) else 1)
    else:
        dq = BackwardPart(32, 32 if hopper else 16, 8, 1) if masked else BackwardPart(64 if hopper and arch.name != "sm_90" else 16, 32, 8, 1)
        dkdv = BackwardPart(16 if hopper and masked else 32, 32, 8, 1)
    return BackwardTile(dq, dkdv, padded, "ieee")


def attention_library(dim: int, queries: int, keys: int, arch: str) -> str:
    """Which library serves attention in 16 bits without a mask before our own kernel: "cudnn", "flash", or "" for neither. cuDNN's is the
    only one of them that is written for sm_90 and sm_100; fewer tokens than one of its tiles are ours, as FlashAttention's wide heads are on GPUs with little
    shared memory. cuDNN has wide heads on sm_90, forwards: twice as fast as FlashAttention's (benchmarks/results/gpu-wide-heads.json)."""
    if 128 < dim <= 256 and min(queries, keys) >= 64 and arch == "sm_90":
        return "cudnn"
    return attention_library_backward(dim, queries, keys, arch)


CUDNN_WIDE = 91100  # the version from which PyTorch gives cuDNN heads of more than 128 on sm_90, forwards


# A sample's queries times keys times channels from which on the 3 to 10 percent that our kernel for Hopper gains outweigh what its launch takes the
# processor more than cuDNN's (benchmarks/results/gpu.json). Where two streams are joined, which saves their concatenation, it always serves.
OURS_FROM = 2**32


def attention_ours(dim: int, queries: int, keys: int, causal: bool, arch: str) -> bool:
    """Whether our kernel for Hopper comes before the libraries, where no gradient is wanted: from 1024 tokens on, as far as it was measured against cuDNN
    (benchmarks/results/hopper_attention.json: 1.03 to 1.10 times as fast on an H200, 1178 to 8192 tokens)."""
    return arch == "sm_90" and dim in (64, 128) and not causal and min(queries, keys) >= 1024


def attention_library_backward(dim: int, queries: int, keys: int, arch: str) -> str:
    """The same for the gradients of q, k and v."""
    if dim > 256 or min(queries, keys) < 64:
        return ""
    if dim <= 128 and arch in ("sm_90", "sm_100", "sm_103"):
        return "cudnn"
    return "flash" if dim <= 128 or arch in ("sm_80", "sm_90", "sm_100", "sm_103") else ""


def attention_library_softmax(dim: int, queries: int, keys: int, arch: str) -> str:
    """The same forwards, where the gradients will want each query's log-sum-exp: what serves them."""
    return attention_library_backward(dim, queries, keys, arch)
