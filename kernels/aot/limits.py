"""What a compiled Triton kernel must not have, and what is waived: by case, target and Triton's version, with the most that may be and the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from fusewire.kernels.aot.report import TARGETS, Compiled, written_in_gluon

ATOMICS = (" atom.", " red.", "\tatom.", "\tred.", "global_atomic", "buffer_atomic")


class Waiver(NamedTuple):
    """Spills of up to ``most`` bytes in cases whose whole name the regular expression is, on these targets (all where none is named), by these versions
    of Triton, each as the beginning of one (all where none is named)."""

    cases: str
    most: int
    why: str
    targets: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    def holds(self, one: Compiled) -> bool:
        return (re.fullmatch(self.cases, one.case) is not None and one.target in (self.targets or TARGETS)
                and any(f"{one.triton}.".startswith(f"{version}.") for version in self.versions or (one.triton,)))


NVIDIA = ("sm_80", "sm_90", "sm_100")
WAIVERS = (
    Waiver(r"(joint_)?attention.* f32.*", 4048, "float32: three TF32 products keep both halves of a block of queries in registers; worst beside a mask "
           "where heads have more than 128 channels"),
    Waiver(r"attention (384|512) bf16 (bool|additive|causal|pattern)", 72, "blocks of 512 channels beside which keys are hidden", NVIDIA),
    Waiver(r"attention 160 bf16 bool", 8, "as many registers as there are, by 3.7 just enough", ("sm_90",), ("3.6",)),
    Waiver(r"(joint_)?attention(_varlen)? (160|256) bf16( causal| softmax)?", 216, "tiles of 32 keys, which spill nothing, take 1.2 to 3 times as long "
           "(benchmarks/results/gpu-wide-heads.json)", ("sm_90",)),
    Waiver(r"layer_norm (8191|16383) .*", 40, "rows of more than 4096 channels, read element by element: no model has such", NVIDIA),
    Waiver(r"layer_norm_backward 8191 .*", 256, "rows of more than 4096 channels, read element by element, with two sums beside them: no model has such", NVIDIA),
    Waiver(r"attention(_backward)? (20|100) bf16|layout of attention 64: (reversed|step two)", 1112, "rows that start anywhere are read element by element, each with an address of its own; the tile must not "
           "follow the layout, as equal values in another would give other bits", NVIDIA),
    Waiver(r"(adaln_modulate|gate_residual_adaln).* 16383 .*|adaln_modulate float32 modulation 16384 bf16", 1072, "rows of more than 8192 channels, "
           "read element by element: no model has such; a multiprocessor's registers do not hold them", NVIDIA),
    Waiver(r"attention(_varlen)?_backward 128 (bf16|f16)", 16, "the tile without a spill is a tenth slower (benchmarks/results/gpu-gradient-tiles.json)", ("sm_90",), ("3.6",)),
)

# Kernels that read or write some of their numbers less than 16 bytes at a time where rows are aligned: loads and stores of so many bytes, and why
_SUMS = "partial sums in float32, one or two of them for a thread where rows are short"
NARROW: dict[str, tuple[set[int], set[int], str]] = {
    "adaln_backward_kernel": (set(), {4, 8}, _SUMS),
    "norm_backward_kernel": ({2, 4, 8}, {4, 8}, f"weights of short rows; {_SUMS}"),
    "norm_kernel": ({2, 4, 8}, set(), "weights of short rows, which every row of a program shares"),
    "qk_norm_rope_backward_kernel": ({2, 4, 8}, {4, 8}, f"weights; {_SUMS}"),
    "qk_norm_rope_kernel": ({2, 4, 8}, set(), "weights of short rows, which every row of a program shares"),
    "column_sums_kernel": (set(), {2, 4}, "one value for each column: it reads the partial sums of 32 columns 16 bytes at a time"),
    "attention_kernel": ({1, 2, 4, 8}, {8}, "a mask's values and a pattern's words lie as the matrix instructions want them; norm weights; bounds of packed "
                         "sequences; heads of 16 channels; what the softmax leaves to the gradients"),
    "delta_kernel": ({8}, {4}, "a query's numbers"),
    "dq_kernel": ({1, 2, 4, 8}, {8}, "a query's numbers; masks and patterns, as above; heads of 16 channels"),
    "dkdv_kernel": ({1, 2, 4, 8}, {8}, "a query's numbers; masks and patterns, as above; heads of 16 channels"),
    "pattern_tiles_kernel": ({4}, {4}, "a list of blocks' numbers"),
    "group_norm_parts_kernel": ({2, 4}, {4}, "a channel's time embedding; a part's four sums"),
    "group_norm_sums_kernel": ({2, 4}, {4}, "a group's parts and a channel's parameters; three sums"),
    "group_norm_apply_kernel": ({2, 4}, set(), "a group's parts and a channel's parameters"),
    "group_norm_dx_kernel": ({2, 4}, set(), "a group's parts and means, a channel's parameters"),
    "layer_norm_2d_kernel": ({2, 4}, set(), "a channel's weight and bias, for pixels that lie side by side"),
    "layer_norm_2d_backward_kernel": ({2, 4}, {4}, "a channel's weight, for pixels that lie side by side; its two sums"),
    "response_sums_kernel": (set(), {4}, "a part's sums, one for each channel"),
    "response_means_kernel": ({2, 4, 8}, {4, 8}, "channels' weights, norms and sums, few for a thread"),
    "response_apply_kernel": ({2, 4, 8}, set(), "channels' norms, sums and parameters, which every pixel of a program shares"),
    "response_affine_kernel": ({4, 8}, {2, 4}, "samples' scales, channels' sums and gradients: one value for a thread"),
    "flow_euler_kernel": ({4, 8}, set(), "a step's scalars"),
    "solver_kernel": ({4, 8}, set(), "a step's scalars"),
}
LISTS = ("pattern_tiles_kernel",)  # which read nothing else
# Rows, or runs, of fewer elements than 16 bytes for each thread; and layouts that are there for the order of the sums
SHORT_ROWS = r".* 16 (bf16|f32).*|attention_(varlen_)?backward 32 f32.*|group_norm_silu pixels 256 .*|group_norm_silu(_backward)? 512 .*|layout of .*"


def spills_waived(one: Compiled) -> bool:
    return any(waiver.holds(one) and one.spills <= waiver.most for waiver in WAIVERS)


def widths_left(one: Compiled) -> list[str]:
    """What an aligned launch reads or writes less than 16 bytes at a time, beyond what is narrow by nature."""
    loads, stores, _ = NARROW.get(one.kernel, (set(), set(), ""))
    return [f"{what} of {size} bytes" for what, found, narrow in (("loads", one.loads, loads), ("stores", one.stores, stores))
            for size in sorted(map(int, found)) if size < 16 and size not in narrow]


def faults(one: Compiled) -> list[str]:
    """What must not be: a spill that is not waived, too much shared memory, a 32-bit offset, an atomic; where rows are aligned, no 16-byte load or, on
    NVIDIA's, narrow accesses that are not narrow by nature."""
    found = []
    if one.spills and not spills_waived(one):
        found.append(f"{one.spills} bytes spilled")
    if one.shared > one.shared_limit:
        found.append(f"{one.shared} bytes of shared memory, more than {one.shared_limit}")
    if one.offsets != ([] if written_in_gluon(one.case) else [64]):
        found.append(f"offsets of {one.offsets} bits")
    if any(name in one.instructions for name in ATOMICS):
        found.append("atomics")
    if one.aligned and not re.fullmatch(SHORT_ROWS, one.case):
        if one.loads and not {"16", "32"} & set(one.loads) and one.kernel not in LISTS:
            found.append("no 16-byte load")
        if TARGETS[one.target].kind == "cuda":
            found += widths_left(one)
    return found


def unused_waivers(reports: Iterable[Compiled]) -> list[str]:
    """Waivers that nothing needs, or that allow more than there is."""
    reports = [one for one in reports if one.spills]
    most = {waiver: max((one.spills for one in reports if waiver.holds(one)), default=0) for waiver in WAIVERS}
    return [f"the waiver of {waiver.cases} allows {waiver.most} bytes; the most is {found}" for waiver, found in most.items() if found < waiver.most]
