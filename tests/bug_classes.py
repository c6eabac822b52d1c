"""docs/bug-classes.md: which test looks at which op for which way in which kernels of this kind have failed elsewhere.

    python -m tests.bug_classes --write docs/bug-classes.md

A test belongs to a class if its name or its docstring says so (``test_batch_coupling``; "strided-input, misaligned: ..."), or if ``ALSO`` lists it; to
the ops that it calls, which ``python -m tests.reached`` finds by running it. A class that no test looks for in an op needs a reason in ``HOLES``.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

from tests import reached
from tests.reached import OPS

ROOT = Path(__file__).parents[1]
ROOMS = ("adaln", "qk_norm_rope", "attention", "linear", "norm", "gated_mlp", "group_norm_silu", "sampler_step")
BY_OP = ("tests/kernels/", "tests/gpu/")  # elsewhere: whole models, swap and the project's instruments

CLASSES = {
    "strided-input": "wrong result on non-contiguous input",
    "strided-grad": "wrong gradient from an expanded or transposed gradient",
    "misaligned": "16-byte loads on an offset view",
    "int32-numel": "offsets past 2^31",
    "int32-stride": "few elements, strides past 2^31",
    "grid-limit": "more than 65,535 programs along y or z",
    "masked-row": "NaN where a query sees no key",
    "nan-under-mask": "NaN in hidden keys leaks",
    "mask-ignored": "a mask is silently dropped",
    "head-dim": "an unusual head dimension is wrong or unsupported",
    "tail": "rows or columns that do not fill a block",
    "empty": "a dimension of size zero",
    "fp16-overflow": "squares, products, logits or exponentials leave float16",
    "cancellation": "variance as the difference of two large means",
    "eps": "eps outside the root, or ignored",
    "biased-cast": "casts that truncate",
    "alias": "inputs changed, or outputs that share memory",
    "device-guard": "launch on another GPU than the tensor's",
    "stream": "launch on another stream than the current one",
    "graph-capture": "synchronising or tuning inside a capture",
    "autotune": "a configuration gives other or wrong results",
    "nondeterminism": "repeats give other bits",
    "batch-coupling": "a sample's result depends on its batch",
    "autocast": "dtypes under autocast differ from stock's",
    "fake-mismatch": "the fake kernel's shapes, dtypes or strides differ",
    "silent-off": "the fused path quietly stops running",
}
# Of no op by itself: (what went wrong, why it is not looked for op by op)
OF_THE_WHOLE = {
    "cache-race": ("two processes and one cold cache", "the cache is Triton's, one for all kernels: four processes (eight in `make test-all`) compile one of them at once, eight threads launch"),
    "fork": ("importing touches the GPU", "all ops come by one import"),
    "patched-module": ("deepcopy, pickle or hooks of a patched module break", "ops are functions; the modules that call them are swap's"),
    "vacuous": ("a test that cannot fail", "a property of tests: [mutation.md](mutation.md) has it by room, the tolerances are tested here"),
}

# Which op is in no test of a class, and why: (classes, ops, reason)
ATTENTION, QK, STEPS = ("attention", "joint_attention", "attention_varlen"), ("qk_norm_rope", "qk_norm_into"), ("sampler_step", "solver_step")
GATED, WITH_VARIANCE = ("geglu", "swiglu", "quick_gelu"), ("adaln_modulate", "adaln_modulate_dual", "gate_residual_adaln", *QK, "layer_norm", "layer_norm_2d",
                                                         "group_norm_silu")
WITH_EPS = (*WITH_VARIANCE, "attention", "joint_attention", "rms_norm", "global_response_norm")


def but(*ops: str) -> tuple[str, ...]:
    return tuple(op for op in OPS if op not in ops)


HOLES = [
    (("masked-row", "nan-under-mask"), but("attention", "attention_varlen"), "it has no keys that could be hidden"),
    (("mask-ignored",), but("attention", "attention_varlen", "solver_step"), "it takes no mask"),
    (("head-dim",), but(*ATTENTION, *QK), "it knows no heads"),
    (("cancellation",), but(*WITH_VARIANCE, "attention", "linear", "rms_norm"), "it subtracts no mean"),
    (("eps",), but(*WITH_EPS), "it has no eps"),
]

# Tests whose names do not say it. path: {test: classes}
ALSO = {
    "tests/kernels/adaln/test_adaln.py": {"test_exact": "tail", "test_close": "tail"},
    "tests/kernels/attention/test_triton.py": {"test_values": "head-dim tail", "test_norm": "head-dim"},
    "tests/kernels/attention/test_contract.py": {"test_gradcheck": "strided-grad"},
    "tests/kernels/attention/test_attention.py": {"test_against_float64": "head-dim tail silent-off", "test_norm": "eps",
                                                    "test_joint": "tail silent-off"},
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
    return {row for row in (*CLASSES, *OF_THE_WHOLE) if row in listed or row in head or ("-" in row and re.search(rf"\b{row}\b", doc))
            or (f"_{row.replace('-', '_')}_" in words and ("-" in row or words.startswith(f"_test_{row.replace('-', '_')}_")))}


def with_classes() -> dict[str, set[str]]:
    """Path -> names of the tests that look for a class in ops."""
    found: dict[str, set[str]] = {}
    for path, name, doc in tests():
        if path.startswith(BY_OP) and classes_of(path, name, doc) & set(CLASSES):
            found.setdefault(path, set()).add(name)
    return found


def ids() -> dict[str, list[str]]:
    """Class -> ids of the tests that look for it."""
    found: dict[str, list[str]] = {row: [] for row in (*CLASSES, *OF_THE_WHOLE)}
    for path, name, doc in tests():
        for row in classes_of(path, name, doc):
            found[row].append(f"{path}::{name}")
    return found


def reached_by(test: str, known: dict[str, dict[str, list[str]]]) -> list[str]:
    """The ops that the test (path::name) calls; of tests of whole models and instruments, none."""
    path, name = test.split("::")
    return [op for op in known.get(path, {}).get(name, ()) if op != reached.READ] if path.startswith(BY_OP) else []


def table() -> dict[str, dict[str, list[str]]]:
    """Class -> op -> ids of the tests that look for it there."""
    found, known = ids(), reached.load()
    return {row: {op: [test for test in found[row] if op in reached_by(test, known)] for op in OPS} for row in CLASSES}


def reasons() -> dict[tuple[str, str], int]:
    """(class, op) -> the place of its reason in ``HOLES``."""
    return {(row, op): i for i, (rows, ops, _) in enumerate(HOLES) for row in rows for op in ops}


def faults(found: dict[str, dict[str, list[str]]]) -> list[str]:
    """Cells with neither a test nor a reason, or with both."""
    given = reasons()
    return [f"{row}, {op}: {'a reason and tests' if found[row][op] else 'no test and no reason'}" for row in CLASSES for op in OPS
            if bool(found[row][op]) is ((row, op) in given)]


TABLES = (("adaLN, QK norm", OPS[:6]), ("Attention, linear", OPS[6:10]), ("Norms", (*OPS[10:14], "group_norm_silu")),
          ("Gated activations, samplers' steps", (*OPS[14:17], *OPS[18:])))


def page() -> str:
    found, names, given, known = table(), ids(), reasons(), reached.load()
    lines = ["# Bug classes", "", "How kernels of this kind have failed elsewhere, and how many tests look for it here, by op: functions, most of which run with many parameters,",
             "in both directions where the op has gradients, on the backends that there are. A test counts for the ops that it calls, which was recorded as it",
             "ran, and read from the source of those that need a GPU (`tests/gpu`). A letter: no test, for the reason below the tables. The tests follow.",
             "Generated by `make bug-classes`.", "", "| class | what went wrong |", "|---|---|", *(f"| {row} | {what} |" for row, what in CLASSES.items())]
    for title, ops in TABLES:
        lines += ["", f"## {title}", "", f"| class | {' | '.join(f'`{op}`' for op in ops)} |", f"|---|{'---|' * len(ops)}"]
        for row in CLASSES:
            cells = [str(len(found[row][op])) if found[row][op] else f"({chr(97 + given[row, op])})" if (row, op) in given else "**?**" for op in ops]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", "## Why there is none", "", *(f"- ({chr(97 + i)}) {', '.join(rows)}: {reason}" for i, (rows, _, reason) in enumerate(HOLES))]
    lines += ["", "## Of the project as a whole", "", "| class | what went wrong | why not by op | tests |", "|---|---|---|---|",
              *(f"| {row} | {what} | {why} | {len(names[row])} |" for row, (what, why) in OF_THE_WHOLE.items())]
    lines += ["", "## The tests", "", "With the ops that they call. Without: of whole models, of swap, or of what all ops share.", ""]
    for row in (*CLASSES, *OF_THE_WHOLE):
        lines += [f"**{row}**", ""]
        for test in names[row]:
            ops = reached_by(test, known) if row in CLASSES else []
            lines.append(f"- {test}{': ' * bool(ops)}{', '.join(ops)}")
        lines.append("")
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
