"""What each backend can do on this machine, and why not: the facts behind ``fusewire doctor``."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusewire import ops  # noqa: F401  (fills the tables of backends)
from fusewire.kernels import dispatch
from fusewire.kernels.library import CPU, CUDA, NativeLibrary, cpu_isa
from fusewire.kernels.triton_rows import too_old
from fusewire.machine import describe, version_of
from fusewire.parity.verdict import measure

# Package: (the range that pyproject.toml asks for, the version that the test suite ran with, what it is needed for).
SUPPORTED = {
    "torch": (">=2.10", "2.13.0", "everything"),
    "diffusers": (">=0.40", "0.42.1", "swap, parity and profile of pipelines"),
    "transformers": (">=5.0", "5.23.0", "pipelines' text encoders"),
    "peft": ("", "0.21.2", "LoRA on a swapped pipeline"),
    "triton": (">=3.6.0", "3.7.1", "Triton kernels on a GPU"),
    "matplotlib": ("", "3.11.2", "fusewire demo's page"),
}


@dataclass(frozen=True)
class Finding:
    """One backend: ready here or not, what it serves, and what would mend it. ops: how many ops have a kernel for it, of how many."""

    backend: str
    ready: bool
    state: str
    ops: str
    fix: str


@dataclass(frozen=True)
class Package:
    """One package: its version (empty: not installed), the range that is asked for, the version tested with, and a remark."""

    name: str
    installed: str
    wanted: str
    tested: str
    remark: str


@dataclass(frozen=True)
class Diagnosis:
    """``ok`` is False only where something that is installed does not work."""

    ok: bool
    backends: list[Finding]
    packages: list[Package]
    machine: dict

    def to_dict(self) -> dict:
        return {"kind": "doctor", "schema": 1, "ok": self.ok, "backends": [dataclasses.asdict(f) for f in self.backends],
                "packages": [dataclasses.asdict(p) for p in self.packages], "machine": self.machine}


def diagnose() -> Diagnosis:
    """Look at every backend and package; each backend that claims to be ready runs one op against the reference."""
    backends = [_reference(), _cpu(), _triton(), _cuda()]
    packages = [_package(name) for name in SUPPORTED]
    broken = any(f.state.startswith("broken") for f in backends) or any(p.remark.startswith("older") for p in packages)
    return Diagnosis(not broken, backends, packages, describe())


def served(backend: str) -> str:
    """How many ops have a row for ``backend`` that the compiled library does not leave without a kernel, of how many."""
    lost = {"cpu": CPU.stale, "cuda": CUDA.stale}.get(backend, {})
    rows = [op not in lost and any(row.name == backend for row in table.rows) for op, table in dispatch.TABLES.items()]
    return f"{sum(rows)} of {len(rows)}"


def self_test(backend: str, device: str) -> str:
    """Run one op on ``backend`` and judge it by the project's rule: ``""``, or what is wrong."""
    x, shift, scale = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device) for shape in ((2, 63, 72), (2, 72), (2, 72)))
    with dispatch.forced("reference"):
        stock, true = ops.adaln_modulate(x, shift, scale), ops.adaln_modulate(x.double(), shift.double(), scale.double(), numerics="close")
    with dispatch.forced(backend):
        found = measure([ops.adaln_modulate(x, shift, scale, numerics="close")], [stock], [true], exact=False)
    return "" if found.holds else f"broken: adaln_modulate: {found.reason}"


def _reference() -> Finding:
    return Finding("reference", True, "plain PyTorch, every device and dtype", served("reference"), "")


def _cpu() -> Finding:
    return _unusable("cpu", CPU, "install g++ and make, then: make lib, or pip install --no-build-isolation .") or _tested(
        "cpu", "cpu", lambda: f"compiled library at ISA level {cpu_isa()}; the processor has {torch.backends.cpu.get_cpu_capability()}")


def _unusable(backend: str, library: NativeLibrary, fix: str) -> Finding | None:
    """What keeps a compiled library from being used; None where nothing does."""
    if not library.loaded:
        variable = next((name for name in ("FUSEWIRE_NATIVE", "FUSEWIRE_LIB") if name in library.reason), "")
        built = not variable and ("does not load" in library.reason or "older" in library.reason)  # (a folder's name may have any word)
        fix = f"unset {variable}" if variable else "make clean lib" if built else fix
        return Finding(backend, False, f"broken: {library.reason}" if built else library.reason, served(backend), fix)
    if library.stale:
        return Finding(backend, False, "broken: " + "; ".join(dict.fromkeys(library.stale.values())), served(backend), "make lib")
    return None


def _tested(backend: str, device: str, state: Callable[[], str]) -> Finding:
    wrong = self_test(backend, device)
    return Finding(backend, not wrong, wrong or state(), served(backend), "make clean lib" if wrong else "")


def _gpu() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        fix = "pip install triton" if platform.system() == "Linux" else "Triton is published for Linux only"
        return Finding("triton", False, "triton is not installed", served("triton"), fix)
    version = version_of("triton")
    if not _gpu():
        return Finding("triton", False, f"triton {version} is installed, but torch sees no GPU: its kernels can be compiled and interpreted here, "
                       "not run", served("triton"), "a GPU, and a build of torch for it")
    if served("triton").startswith("0 "):
        return Finding("triton", False, f"triton {version} on {_gpu()}, but no op has a Triton kernel", served("triton"), "")
    wrong = self_test("triton", "cuda")
    return Finding("triton", not wrong, wrong or f"triton {version} on {_gpu()}", served("triton"), "")


def _cuda() -> Finding:
    """The library of csrc/cuda. (cuBLASLt's row of ``linear`` is PyTorch's own and needs no library.)"""
    if torch.version.cuda is None:
        return Finding("cuda", False, CUDA.reason, served("cuda"), "a GPU of NVIDIA's, a build of torch with CUDA and nvcc, then: make lib")
    if unusable := _unusable("cuda", CUDA, "install nvcc (the CUDA toolkit), then: FUSEWIRE_CUDA=ON make lib"):
        return unusable
    if not _gpu():
        return Finding("cuda", False, "the library is loaded, but torch sees no GPU", served("cuda"), "a GPU and its driver")
    if reason := too_old(0):
        return Finding("cuda", False, f"{_gpu()}: {reason}", served("cuda"), "a GPU of compute capability 8.0 or higher")
    return _tested("cuda", "cuda", lambda: f"compiled library on {_gpu()}")


def _package(name: str) -> Package:
    wanted, tested, purpose = SUPPORTED[name]
    installed = version_of(name)
    if not installed:
        remark = f"not installed; needed for {purpose}"
    elif wanted and _numbers(installed) < _numbers(wanted.removeprefix(">=")):
        remark = f"older than {wanted}: pip install '{name}{wanted}'"
    elif _numbers(installed)[:2] > _numbers(tested)[:2]:
        remark = "newer than tested"
    else:
        remark = ""
    return Package(name, installed, wanted, tested, remark)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
