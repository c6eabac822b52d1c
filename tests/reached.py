"""tests/reached.json: which public ops the tests of docs/bug-classes.md call.

    python -m tests.reached [--again] [FILE ...]

Runs the tests that look for a class of bugs and have no entry yet (``--again``: all of them; FILE: those of these files) and writes down, for each test
function that passes, the ops that it called as ``ops.<name>``; of a test that calls none so, those behind whose names it called registered ops, or whose
calls ``ops.stats()`` has counted, here or in Python processes that it started. Where its parameter ``name`` or ``op`` is that of an op: that op alone.
What reaches none, and what cannot run here, for want of a GPU or as it is slow, is read instead, which the file says: the ops that the test, or what it
uses of the tests' own functions and tables, names as ``ops.<name>``, as ``torch.ops.fusewire.<name>`` or, where it looks ops up by their names, in a string.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
CHILDREN = "FUSEWIRE_TESTS_REACHED"  # a folder, for the processes that a test starts: tests/children/sitecustomize.py
OPS = ("adaln_modulate", "adaln_modulate_dual", "gate_residual", "gate_residual_adaln", "qk_norm_rope", "qk_norm_into", "attention", "joint_attention",
       "attention_varlen", "linear", "rms_norm", "layer_norm", "layer_norm_2d", "global_response_norm", "geglu", "swiglu", "quick_gelu", "group_norm_silu",
       "sampler_step", "solver_step")
READ = "read:"  # before the ops of a test that were read from its source
# Of registered ops and of counts: what public op leads to them, where the name does not begin with it
ELSEWISE = {"flow_euler_step": "sampler_step", "bias_activation": "linear", "linear_activated": "linear", "linear_onednn": "linear"}
# Read, but named by no one: what is behind the public op is called
BEHIND = {"tests/gpu/test_attention_gradients.py": {"test_graph_capture": "attention", "test_large_stride": "attention"}}


def public(name: str) -> str | None:
    """The public op of a registered op: of ``attention_varlen_backward_triton``, ``attention_varlen``."""
    for suffix in ("_triton", "_cuda", "_backward", "_softmax"):
        name = name.removesuffix(suffix)
    name = ELSEWISE.get(name, name)
    return name if name in OPS else None


class Calls:
    """Since ``clear``: the public ops that were called as ``ops.<name>``; the registered ops, and the calls that were counted, which a test may reset."""

    def __init__(self):
        from torch._ops import OpOverload, OpOverloadPacket

        from fusewire import ops
        from fusewire.kernels import dispatch

        self.public: set[str] = set()
        self.seen: set[str] = set()
        for name in OPS:
            setattr(ops, name, self._noted(getattr(ops, name)))
        self.tables, reset = dispatch.TABLES, dispatch.reset_stats

        def reset_stats():
            self.count()
            reset()

        dispatch.reset_stats = ops.reset_stats = reset_stats
        for kind, name_of in ((OpOverload, lambda op: op._schema.name), (OpOverloadPacket, lambda op: op._qualified_op_name)):
            self._watch(kind, name_of)

    def _noted(self, op):
        @functools.wraps(op)
        def noted(*args, **kwargs):
            if not torch.compiler.is_compiling():
                self.public.add(op.__name__)
            return op(*args, **kwargs)

        return noted

    def clear(self) -> None:
        self.public.clear()
        self.seen.clear()

    def _watch(self, kind: type, name_of) -> None:
        call = kind.__call__

        def watched(op, /, *args, **kwargs):
            space, _, name = name_of(op).partition("::")
            if space == "fusewire":
                self.seen.add(name)
            return call(op, *args, **kwargs)

        kind.__call__ = watched

    def count(self) -> None:
        self.seen |= {name for name, table in self.tables.items() if any(table.calls.values())}


class Recording:
    """A pytest plugin: ``reached``, {path: {test: ops}}, of what passed."""

    def __init__(self, folder: Path):
        self.calls, self.folder, self.reached = Calls(), folder, {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item):
        self.calls.clear()
        self.in_children()
        result = yield  # (a failing or skipped test ends here)
        self.calls.count()
        found = set(self.calls.public) or {op for name in self.calls.seen | self.in_children() if (op := public(name))}
        path = item.path.relative_to(ROOT).as_posix()
        self.reached.setdefault(path, {}).setdefault(item.originalname, set()).update(named(item) or found)
        return result

    def in_children(self) -> set[str]:
        """What processes that have ended have written since the last time."""
        found = set()
        for file in self.folder.iterdir():
            found |= set(json.loads(file.read_text()))
            file.unlink()
        return found


def named(item) -> set[str]:
    """The op that the test's parameter ``name`` or ``op`` is."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    return {value for value in map(values.get, ("name", "op")) if isinstance(value, str) and value in OPS}


class Collecting:
    """A pytest plugin: ``named``, {path: {test: ops that its parameters name}}."""

    def __init__(self):
        self.named = {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.named.setdefault(item.path.relative_to(ROOT).as_posix(), {}).setdefault(item.originalname, set()).update(named(item))


def _module(path: Path) -> tuple[dict[str, ast.AST], dict[str, tuple[Path, str]]]:
    """What a file of tests defines, by name; and what it imports from other ones."""
    defined, imported = {}, {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                defined |= {name.id: node for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests."):
            file = (ROOT / node.module.replace(".", "/")).with_suffix(".py")
            imported |= {alias.asname or alias.name: (file, alias.name) for alias in node.names}
    return defined, imported


def read(path: Path, test: str) -> set[str]:
    """The ops that a test's source names, itself or in what it uses."""
    found, strings, by_name, waiting, done = set(), set(), False, [(path, test)], set()
    while waiting:
        file, name = waiting.pop()
        if (file, name) in done or not file.is_file():
            continue
        done.add((file, name))
        defined, imported = _module(file)
        for node in ast.walk(defined[name]) if name in defined else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops":
                found.add(node.attr)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "fusewire":
                found.add(public(node.attr))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(public(node.value))
            elif isinstance(node, ast.Call) and ast.unparse(node).startswith(("getattr(ops,", "getattr(torch.ops.fusewire,", "ops.backends(")):
                by_name = True
            elif isinstance(node, ast.Name) and node.id in defined:
                waiting.append((file, node.id))
            elif isinstance(node, ast.Name) and node.id in imported:
                waiting.append(imported[node.id])
    return (found | strings if by_name else found) & set(OPS)


def load() -> dict[str, dict[str, list[str]]]:
    """{path: {test: ops}}, the first of them ``READ`` where that is how they were found."""
    return {path: {test: ops.split() for test, ops in tests.items()} for path, tests in json.loads(FILE.read_text()).items()}


def save(reached: dict[str, dict[str, list[str]]]) -> None:
    FILE.write_text(json.dumps({path: {test: " ".join(sorted(ops, key=(READ, *OPS).index)) for test, ops in sorted(tests.items())}
                                for path, tests in sorted(reached.items())}, indent=1) + "\n")


def record(wanted: dict[str, set[str]]) -> tuple[dict[str, dict[str, set[str]]], int]:
    """Runs those tests, {path: names}. What they reached, and pytest's exit code."""
    ids = [f"{ROOT / path}::{test}" for path, tests in wanted.items() for test in sorted(tests)]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    import tests.conftest  # noqa: F401  (before the ops: Triton's interpreter)

    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(ROOT / "tests" / "children"), str(ROOT), os.environ.get("PYTHONPATH"))))
        os.environ.update({CHILDREN: folder, "PYTHONPATH": path})
        recording, collecting = Recording(Path(folder)), Collecting()
        status = pytest.main([*options, *ids], plugins=[recording])
        pytest.main([*options, "--collect-only", "-q", "-q", "-m", "", *ids], plugins=[collecting])
    for path, names in wanted.items():
        ran = recording.reached.setdefault(path, {})
        for test in names:
            if not ran.get(test):
                ran[test] = {READ, *BEHIND.get(path, {}).get(test, "").split(), *(collecting.named.get(path, {}).get(test) or read(ROOT / path, test))}
    return recording.reached, status


def main() -> int:
    from tests.bug_classes import with_classes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of tests; all unless given")
    parser.add_argument("--again", action="store_true", help="also what has an entry")
    arguments = parser.parse_args()
    there, known = with_classes(), load() if FILE.is_file() else {}
    known = {path: {test: ops for test, ops in tests.items() if test in there.get(path, ())} for path, tests in known.items() if path in there}
    chosen = {Path(file).resolve().relative_to(ROOT).as_posix() for file in arguments.files} or set(there)
    wanted = {path: there[path] - set(() if arguments.again else known.get(path, ())) for path in sorted(chosen & set(there))}
    status = 0
    if any(wanted.values()):
        reached, status = record({path: tests for path, tests in wanted.items() if tests})
        known |= {path: known.get(path, {}) | tests for path, tests in reached.items()}
    save(known)
    return int(status not in (0, 5))  # 5: nothing that runs here


if __name__ == "__main__":
    raise SystemExit(main())
