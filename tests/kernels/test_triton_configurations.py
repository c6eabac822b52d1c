"""Every configuration that a Triton launcher can choose is compiled by a case of kernels/aot: each tile of kernels/tuning.py on each target, each value of
each flag, each argument given and left out. (To what they compile: docs/kernels-compiled.md.)

The launchers run on meta tensors and hand over what they would launch; nothing is compiled here.
"""

import ast
import functools
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fusewire.kernels import tuning  # noqa: E402
from fusewire.kernels.aot.cases import CASES, SWEPT  # noqa: E402
from fusewire.kernels.aot.register import SHORT  # noqa: E402
from fusewire.kernels.aot.report import TARGETS, written_in_gluon  # noqa: E402
from fusewire.kernels.attention import triton_kernel as attention  # noqa: E402
from fusewire.kernels.attention.hopper_limits import DIMS  # noqa: E402
from fusewire.kernels.triton_launch import launches_go_to  # noqa: E402

ROOMS = Path(tuning.__file__).parent
TILE = ("BLOCK", "ROWS", "LEVELS", "BLOCK_LEVELS", "ALIGNED", "BLOCK_M", "BLOCK_N", "BLOCK_D", "PIXELS", "PIXEL_LEVELS", "PRECISION", "num_warps", "num_stages", "maxnreg")
SIZES = ("DIM", "PARTS", "COLUMNS", "TILES")  # given by the tensors
TYPES = ("GATED", "SUM", "GATED2", "SCALED", "SCALED2", "PRODUCT", "Q_NORMED", "K_NORMED")  # given by the tensors' dtypes
BOTH, THREE = {False, True}, {0, 1, 2}
FLAGS = {**dict.fromkeys(("ALIGNED", "EXACT", "RMS", "SILU", "PLANES", "MERGED", "GRAD_MERGED", "WIDE_X0", "WIDE_OUT", "RECIPROCAL", "CAUSAL"), BOTH),
         **dict.fromkeys(("NORM", "GATES", "MODULATIONS", "MASK", "ROOT", "ACT"), THREE),
         "UNIT": BOTH,  # rows that start on 16 bytes, or anywhere
         "SUMMED": {1 << i for i in range(8)}, "ACTIVATION": {"gelu_tanh", "gelu", "silu"}}
MORE = {("epilogue_kernel", "ACTIVATION"): {"none"}}
SMALL = 32  # blocks of at most so many elements count as one


def launches(target: str, run) -> list[tuple]:
    """(kernel, its arguments by name, constants and options) of what ``run`` launches on the target."""
    found = []
    with launches_go_to(TARGETS[target], lambda kernel, programs, args, options: found.append((kernel, dict(zip(kernel.arg_names, args)), options))):
        run()
    return found


def width(given: dict) -> int:
    """Bytes of an element of the launch's first tensor of floating point numbers."""
    return next((x.element_size() for x in given.values() if isinstance(x, torch.Tensor) and x.dtype in SHORT), 0)


def tile_of(kernel, given: dict, options: dict) -> tuple:
    """What tuning.py and the launchers' own rules chose, and the parts of a kernel that it was chosen for."""
    chosen = {name: options[name] for name in TILE if name in options}
    if "group_norm" in kernel.__name__:
        chosen.pop("ALIGNED", None)  # one element a load takes no more registers there
    if chosen.get("BLOCK", 2 * SMALL) <= SMALL:
        chosen = {"BLOCK": SMALL} | {name: chosen[name] for name in ("num_warps", "ALIGNED") if name in chosen}
    if "DIM" in options:
        chosen |= dict(whole=options["DIM"] == options["BLOCK_D"] or options["BLOCK_D"] < 64, MASK=options.get("MASK"), CAUSAL=options.get("CAUSAL"),
                       pattern=given.get("blocks") is not None, joint=given.get("q2") is not None)
        if given.get("cu_seqlens_q") is not None or chosen["pattern"] or chosen["joint"]:
            chosen |= dict(whole=True, packed=not (chosen["pattern"] or chosen["joint"]), CAUSAL=None)
    return kernel.__name__, width(given), *sorted(chosen.items(), key=lambda item: item[0])


@functools.cache
def compiled(target: str) -> dict[str, list[tuple]]:
    return {name: launches(target, run) for name, run in CASES.items() if not written_in_gluon(name)}


@functools.cache
def sizes(most: int) -> list[int]:
    """Of 1 to ``most``, one for each choice that tuning.py makes on any target, and for each alignment."""
    chosen = {}
    for size in range(1, most + 1):
        key = [size % 16 == 0, size % 8 == 0, size % 2 == 0, size & size - 1 == 0]
        for arch in TARGETS.values():
            key += [tuning.row_tile(size, arch), tuning.flat_tile(size, arch), tuning.group_tile(size, arch)[::2]]
            if size <= 512:
                key += [tuning.attention_tile(size, bytes, masked, causal, arch) for bytes, masked, causal in ((2, 0, 0), (2, 1, 0), (2, 0, 1), (4, 0, 0), (4, 1, 0), (4, 0, 1))]
                key += [tuning.attention_backward_tile(size, bytes, masked, arch) for bytes in (2, 4) for masked in (False, True)]
        chosen.setdefault(tuple(key), size)
    return list(chosen.values())


def missing(target: str, launchers: dict, sizes_of=sizes) -> dict[tuple, str]:
    """Tiles that no case reaches -> a launch that would."""
    covered = {tile_of(*one) for found in compiled(target).values() for one in found}
    found = {}
    for (name, dtype), swept in launchers.items():
        for size in filter(swept.serves, sizes_of(swept.most)):
            for tile in {tile_of(*one) for one in launches(target, lambda: swept.run(size, dtype))} - covered:
                found.setdefault(tile, name.format(size, SHORT[dtype]))
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_tile(target):
    found = missing(target, SWEPT)
    assert not found, "\n".join(f"{case}: {tile}" for tile, case in found.items())


def test_a_new_tile_is_missed(monkeypatch):
    """An entry for heads of 48, which no case has, is found by its name."""
    one = {key: SWEPT[key] for key in (("attention {} {}", torch.bfloat16),)}
    tile = attention.attention_tile
    assert not missing("sm_90", one, lambda most: [48])
    monkeypatch.setattr(attention, "attention_tile", lambda dim, *rest: tile(dim, *rest)._replace(**({"keys": 16} if dim == 48 else {})))
    assert set(missing("sm_90", one, lambda most: [40, 48]).values()) == {"attention 48 bf16"}


@functools.cache
def optional(function) -> frozenset[str]:
    """The parameters of a kernel, or of what it calls, that may be None: those that it, or what they are handed to, compares with None."""
    tree, found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            found.add(node.left.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and hasattr(called := function.__globals__.get(node.func.id), "fn"):
            for argument, parameter in zip(node.args, called.arg_names):
                if isinstance(argument, ast.Name) and parameter in optional(called.fn):
                    found.add(argument.id)
    return frozenset(found & set(inspect.signature(function).parameters))


def kernels() -> dict[str, object]:
    modules = [importlib.import_module(f"fusewire.kernels.{'.'.join(path.relative_to(ROOMS).with_suffix('').parts)}") for path in ROOMS.rglob("*triton*.py")]
    return {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "arg_names")}


def test_every_flag():
    """In 16 bits and in float32, each flag of each kernel has each of its values in some case, and each argument that may be None is so in one and not in another."""
    values, given_or_not = defaultdict(set), defaultdict(set)
    for one in (one for found in compiled("sm_90").values() for one in found):
        kernel, given, options = one
        for name, value in options.items():
            if name == "UNIT":
                value = value > 1
            values[kernel.__name__, width(given), name] |= {1 << i for i in range(8) if value >> i & 1} if name == "SUMMED" else {value}
        for name, value in given.items():
            given_or_not[kernel.__name__, width(given), name].add(value is None)
    assert kernels().keys() == {kernel for kernel, *_ in values}
    wrong = []
    for name, kernel in kernels().items():
        constants = [parameter.name for parameter in inspect.signature(kernel.fn).parameters.values() if "constexpr" in str(parameter.annotation)]
        for bytes in {bytes for seen, bytes, _ in values if seen == name}:
            for flag in constants:
                if flag in FLAGS:
                    if missing := (FLAGS[flag] | MORE.get((name, flag), set())) - values[name, bytes, flag]:
                        wrong.append((name, bytes, flag, missing))
                elif flag not in (*TILE, *SIZES, *TYPES):
                    wrong.append((name, flag, "is in no table of this file"))
            wrong += [(name, bytes, argument, found) for argument in sorted(optional(kernel.fn)) if (found := given_or_not[name, bytes, argument]) != BOTH]
    assert not wrong, "\n".join(map(str, wrong))


def test_hopper():
    """The kernel in Gluon has one tile for a head dimension."""
    for dim in DIMS:
        assert {f"attention hopper {dim} bf16", f"attention hopper {dim} bf16 causal", f"joint_attention hopper {dim} bf16"} <= CASES.keys()


ONE_CHANNEL = """
import torch
from triton.runtime import driver
from fusewire.kernels.aot.report import TARGETS, Offline
from fusewire.kernels.group_norm_silu import triton_kernel
from fusewire.kernels.triton_launch import launches_go_to

driver.set_active(Offline(TARGETS["sm_90"]))
x, weight = torch.empty(2, 1, 16, 16, dtype=torch.bfloat16, device="meta"), torch.empty(1, dtype=torch.bfloat16, device="meta")
found = []
with launches_go_to(TARGETS["sm_90"], lambda *launch: found.append(launch)):
    triton_kernel.group_norm_silu(x, 1, weight, weight, 1e-5, None, None, None, True, False)
    triton_kernel.group_norm_silu_backward(x, x, 1, weight, weight, 1e-5, None, None, None, True, True)
for kernel, programs, args, options in found:
    kernel.run(*args, grid=(1,), warmup=True, **options)
    print(kernel.__name__)
"""


def test_one_channel_compiles():
    """A size of 1 reaches a kernel as a constant, which has no methods; in the interpreter it is a tensor like any other."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ONE_CHANNEL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(done.stdout.split()) == {f"group_norm_{part}_kernel" for part in ("parts", "apply", "sums", "dx")}
