"""docs/bug-classes.md: which test looks for which way in which kernels of this kind have failed elsewhere.

    python -m tests.bug_classes --write docs/bug-classes.md

A test belongs to a class if its name or its docstring says so (``test_batch_coupling``; "strided-input, misaligned: ..."), or if ``ALSO`` lists it.
What no test looks for yet stands in ``NOT_YET`` with the reason.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("adaln", "qk_norm_rope", "attention", "linear", "norm", "gated_mlp", "group_norm_silu", "sampler_step")
ELSEWHERE = "elsewhere"  # GPU, ahead-of-time compilation, models, swap, instruments

# Class: (what went wrong, the rooms that it can concern: None for all, () for none but the project as a whole)
CLASSES = {
    "strided-input": ("wrong result on non-contiguous input", None),
    "strided-grad": ("wrong gradient from an expanded or transposed gradient", None),
    "misaligned": ("16-byte loads on an offset view", None),
    "int32-numel": ("offsets past 2^31", ()),
    "int32-stride": ("few elements, strides past 2^31", None),
    "grid-limit": ("more than 65,535 programs along y or z", ()),
    "masked-row": ("NaN where a query sees no key", ("attention",)),
    "nan-under-mask": ("NaN in hidden keys leaks", ("attention",)),
    "mask-ignored": ("a mask is silently dropped", ("attention",)),
    "head-dim": ("an unusual head dimension is wrong or unsupported", ("qk_norm_rope", "attention")),
    "tail": ("rows or columns that do not fill a block", None),
    "empty": ("a dimension of size zero", None),
    "fp16-overflow": ("squares, logits or exponentials leave float16", ("adaln", "qk_norm_rope", "attention", "linear", "norm", "gated_mlp",
                                                                       "group_norm_silu")),
    "cancellation": ("variance as the difference of two large means", ("adaln", "norm", "group_norm_silu")),
    "eps": ("eps outside the root, or ignored", ("adaln", "qk_norm_rope", "attention", "norm", "group_norm_silu")),
    "biased-cast": ("casts that truncate", None),
    "alias": ("inputs changed, or outputs that share memory", None),
    "device-guard": ("launch on another GPU than the tensor's", ()),
    "stream": ("launch on another stream than the current one", ()),
    "graph-capture": ("synchronising or tuning inside a capture", ()),
    "autotune": ("a configuration gives other or wrong results", ()),
    "cache-race": ("two processes and one cold cache", ()),
    "fork": ("importing touches the GPU", ()),
    "nondeterminism": ("repeats give other bits", None),
    "batch-coupling": ("a sample's result depends on its batch", None),
    "autocast": ("dtypes under autocast differ from stock's", None),
    "fake-mismatch": ("the fake kernel's shapes, dtypes or strides differ", None),
    "patched-module": ("deepcopy, pickle or hooks of a patched module break", ()),
    "vacuous": ("a test that cannot fail", ()),
    "silent-off": ("the fused path quietly stops running", None),
}

# Tests whose names do not say it. path: {test: classes}
ALSO = {
    "tests/kernels/adaln/test_adaln.py": {"test_exact": "tail", "test_close": "tail"},
    "tests/kernels/attention/test_triton.py": {"test_values": "head-dim tail", "test_norm": "head-dim"},
    "tests/kernels/attention/test_contract.py": {"test_gradcheck": "strided-grad"},
    "tests/kernels/attention/test_attention.py": {"test_against_float64": "head-dim tail silent-off", "test_norm": "eps"},
    "tests/kernels/linear/test_linear.py": {"test_gradients": "strided-grad", "test_activation": "tail", "test_registration": "fake-mismatch",
                                            "test_strided_input": "misaligned"},
    "tests/kernels/qk_norm_rope/test_qk_norm_rope.py": {"test_exact_equals_stock_modules": "head-dim tail silent-off", "test_strided_input": "misaligned"},
    "tests/kernels/qk_norm_rope/test_contract.py": {"test_opcheck": "fake-mismatch"},
    "tests/kernels/sampler_step/test_sampler_step.py": {
        "test_opcheck": "fake-mismatch", "test_alias_empty_and_batch": "alias empty batch-coupling", "test_long_strided_rows_are_gathered_in_blocks": "tail",
        "test_exact_trajectory_equals_diffusers": "silent-off", "test_strided_input": "misaligned"},
    "tests/kernels/test_triton_aot.py": {"test_within_limits": "autotune", "test_16_byte_loads": "misaligned"},
    "tests/gpu/test_triton_gpu.py": {"test_more_than_2_31_elements": "int32-numel", "test_large_stride": "int32-stride", "test_determinism": "nondeterminism"},
    "tests/swap/test_exact.py": {"test_every_op_runs_on_the_cpu_library": "silent-off"},
    "tests/kernels/test_library.py": {"test_an_op_is_lacking": "silent-off", "test_a_schema_has_changed": "silent-off"},
    "tests/benchmarks/test_recording.py": {"test_a_row_is_about_one_backend": "silent-off"},
    "tests/swap/test_instances.py": {"test_pickle": "patched-module", "test_deepcopy_keeps_its_own_weights": "patched-module",
                                     "test_classes_keys_and_processors": "patched-module"},
    "tests/swap/test_hooks.py": {"test_hooked_before_and_the_block_itself_is_fused": "patched-module",
                                 "test_hooked_after_the_swap_and_restored_under_the_hook": "patched-module"},
    "tests/kernels/test_import.py": {"test_ops_import_no_compiler_and_touch_no_gpu": "fork", "test_ops_work_in_a_process_that_sees_no_gpu": "fork"},
    "tests/cli/test_doctor.py": {"test_a_library_that_computes_wrongly_is_broken": "vacuous"},
}
# Holes, and why: a new one needs a line here.
NOT_YET = {
    "cache-race": "Triton's own cache; to be tried where there is a GPU",
}


def tests() -> list[tuple[str, str, str]]:
    """(path, test function, docstring) of the whole suite."""
    found = []
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.append((path.relative_to(ROOT).as_posix(), node.name, ast.get_docstring(node) or ""))
    return found


def classes_of(path: str, name: str, doc: str) -> set[str]:
    head = doc.partition(":")[0].split(", ") if ":" in doc else []
    listed = ALSO.get(path, {}).get(name, "").split()
    words = f"_{name}_"
    return {row for row in CLASSES if row in listed or row in head or ("-" in row and re.search(rf"\b{row}\b", doc))
            or (f"_{row.replace('-', '_')}_" in words and ("-" in row or words.startswith(f"_test_{row.replace('-', '_')}_")))}


def table() -> dict[str, dict[str, list[str]]]:
    """Class -> room -> ids of the tests that look for it."""
    found = {row: {room: [] for room in (*ROOMS, ELSEWHERE)} for row in CLASSES}
    for path, name, doc in tests():
        room = next((room for room in ROOMS if f"kernels/{room}/" in path), ELSEWHERE)
        for row in classes_of(path, name, doc):
            found[row][room].append(f"{path}::{name}")
    return found


def holes(found: dict) -> set[str]:
    """``"class"`` or ``"class, room"``: what no test looks for, though it can concern the room or the project."""
    rooms = {f"{row}, {room}" for row, (_, concerned) in CLASSES.items() for room in (ROOMS if concerned is None else concerned) if not found[row][room]}
    return rooms | {row for row, (_, concerned) in CLASSES.items() if concerned == () and not found[row][ELSEWHERE]}


def page() -> str:
    found = table()
    lines = ["# Bug classes", "", "How kernels of this kind have failed elsewhere, and the tests that look for it here: how many in each room's folder, and elsewhere",
             "(GPU, compiled kernels, models, swap, instruments). `-`: cannot concern the room. **0**: no test there yet. Tests under `tests/gpu` need a GPU.",
             "Generated by `python -m tests.bug_classes --write docs/bug-classes.md`.", "",
             f"| class | what went wrong | {' | '.join(ROOMS)} | {ELSEWHERE} |", f"|---|---|{'---|' * (len(ROOMS) + 1)}"]
    for row, (what, concerned) in CLASSES.items():
        cells = [str(len(found[row][room])) if found[row][room] else "-" if concerned is not None and room not in concerned else "**0**" for room in ROOMS]
        whole = str(len(found[row][ELSEWHERE])) if found[row][ELSEWHERE] else "**0**" if concerned == () else ""
        lines.append(f"| {row} | {what} | {' | '.join(cells)} | {whole} |")
    lines += ["", "## The tests", ""]
    for row in CLASSES:
        ids = [name for room in found[row].values() for name in room]
        lines += [f"**{row}**", "", *(f"- {name}" for name in ids or [f"none yet: {NOT_YET[row]}"]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page to write; printed unless given")
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(page())
    else:
        print(page())


if __name__ == "__main__":
    main()
