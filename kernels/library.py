"""The operator library: one schema per fused op, declared in its room, and the compiled libraries that implement it.

``define`` declares ``fusewire::<name>`` once, with its fake kernel, a fallback made of plain PyTorch (so that the op exists with and
without the compiled library) and its autograd formula. ``CPU`` and ``CUDA`` are the compiled libraries: loaded or not, why not, and whether
they are as new as these sources. ``FUSEWIRE_NATIVE=0`` leaves them out; ``FUSEWIRE_LIB`` names another folder to take them from.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from fusewire.errors import BadInput
from fusewire.kernels import transforms

LIBRARY = torch.library.Library("fusewire", "DEF")
ISA_LEVELS = ("base", "avx2", "avx512", "avx512_bf16", "amx")


def _one_of(variable: str, values: tuple[str, ...]) -> str | None:
    """An environment variable's value, None where it is not set; BadInput for one that means nothing."""
    value = os.environ.get(variable) or None
    if value is not None and value not in values:
        raise BadInput(f"{variable} is {value!r}; it should be one of {', '.join(values)}")
    return value


class NativeLibrary:
    """A compiled library: ``loaded`` says whether its ops can be called, ``reason`` why not; ``stale`` names the ops that it serves no more.

    A library may be older than the Python sources beside it. An op that it lacks would silently run the fallback, and a kernel compiled for
    another schema would misread its arguments: both are found, at import, and the op's row stands down (``dispatch.Table``).
    """

    def __init__(self, name: str, key: str, compiler: str):
        self.name, self.key, self.compiler, self.loaded, self.reason, self.path = name, key, compiler, False, "", None
        self.stale: dict[str, str] = {}  # op -> why the library does not serve it
        self.schemas: dict[str, str] = {}  # op -> the schema that it was compiled for, as the build recorded it

    def load(self) -> None:
        """Load ``lib<name>.so``, once. One that does not load is said in a warning; the package then works without it."""
        import fusewire

        _one_of("FUSEWIRE_CPU_ISA", ISA_LEVELS)
        folder = os.environ.get("FUSEWIRE_LIB") or Path(fusewire.__file__).parent / "lib"
        self.path = Path(folder) / f"lib{self.name}.so"
        if _one_of("FUSEWIRE_NATIVE", ("1", "0")) == "0":
            self.reason = "switched off by FUSEWIRE_NATIVE=0"
        elif not self.path.is_file():
            named = os.environ.get("FUSEWIRE_LIB")
            self.reason = (f"{self.path.name} is not in {named!r}, which FUSEWIRE_LIB names" if named else
                           f"{self.path.name} was not built (install with {self.compiler} and --no-build-isolation)")
        else:
            try:
                record = self.path.with_suffix(".json")
                self.schemas = json.loads(record.read_text()) if record.is_file() else {}
                if _cut_short(self.path):
                    raise OSError("the file is cut short")
                torch.ops.load_library(str(self.path))
                self.loaded = True
            except (OSError, ValueError) as error:
                cause = str(error.__cause__ or error).replace(str(self.path), self.path.name)
                self._refuse(f"{self.path.name} does not load into torch {torch.__version__}: {cause}")

    def _refuse(self, reason: str) -> None:
        self.loaded, self.reason = False, reason
        warnings.warn(f"fusewire runs without its compiled library: {reason}", stacklevel=2)

    def has(self, op: str) -> bool:
        """Whether a kernel of this library is registered for ``fusewire::<op>`` (the fallbacks have another key)."""
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"fusewire::{op}", self.key)

    def changed(self, schema: str) -> bool:
        """Whether the library was compiled for another schema of that name."""
        return self.schemas.get(schema.split("(", 1)[0], schema) != schema

    def require(self, schemas: tuple[str, ...]) -> None:
        """Refuse the whole library where it lacks one of the ops that the rooms call when they are imported."""
        for schema in schemas:
            op = schema.split("(", 1)[0]
            there = self.has(op) or torch._C._dispatch_has_kernel_for_dispatch_key(f"fusewire::{op}", "CompositeExplicitAutograd")
            if self.loaded and (not there or self.changed(schema)):
                self._refuse(_older(f"the compiled library {'has another schema for' if there else 'lacks'} fusewire::{op}"))

    def why_not(self, op: str) -> str:
        """Why a loaded library does not serve ``fusewire::<op>``; ``""`` where it does. For rows, once: not for calls."""
        if self.loaded and op not in self.stale and not self.has(op):
            self.mark(op, f"the compiled library lacks fusewire::{op}")
        return self.stale.get(op, "")

    def mark(self, op: str, what: str) -> None:
        """Note that the library does not serve ``op``, with one warning for all of them."""
        if self.loaded and not self.stale:
            warnings.warn(f"{_older(what)}. What it lacks runs on the other backends, more slowly; `fusewire doctor` lists it", stacklevel=2)
        self.stale[op] = _older(what)


def _cut_short(path: Path) -> bool:
    """Whether the end of a 64-bit ELF file is missing, its table of sections: mapped, it would end the process with a bus error."""
    with path.open("rb") as file:
        head = file.read(64)
    offset, size, count = (int.from_bytes(head[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return head[:4] == b"\x7fELF" and (len(head) < 64 or offset + size * count > path.stat().st_size)


def _older(what: str) -> str:
    return f"{what}: it is older than these sources; run `make lib`"


def cpu_isa() -> str:
    """The ISA level the CPU library runs at on this processor: one of ``ISA_LEVELS``, or ``""`` where it is not loaded."""
    return ISA_LEVELS[torch.ops.fusewire.cpu_isa()] if CPU.loaded else ""


def cpu_is_intel() -> bool:
    """Whether the processor is Intel's, as the CPU library sees it; False where it is not loaded."""
    return CPU.loaded and torch.ops.fusewire.cpu_is_intel()


def cpu_scratch(reset: bool = False) -> int:
    """Bytes of working memory that the CPU library's threads needed since the count last began anew, which ``reset`` makes it do.

    Each keeps its own until it ends; PyTorch's allocator does not see it. 0 where the library is not loaded, or is older than this count.
    """
    return torch.ops.fusewire.cpu_scratch(reset) if CPU.loaded and _counts_scratch else 0


def define(schema: str, *, fallback: Callable, fake: Callable, backward: Callable | None = None, setup_context: Callable | None = None,
           meaning: Callable | None = None, out_of_place: Callable | None = None) -> torch._ops.OpOverload:
    """Declare ``fusewire::<schema>`` and return its overload.

    ``fallback`` takes the schema's arguments and is used on every device without a kernel of its own. ``backward`` and ``setup_context`` are
    ``torch.library.register_autograd``'s; an op without them refuses to be differentiated rather than dropping a gradient. ``meaning`` is what
    torch.func differentiates, where that is not the fallback. ``out_of_place``, of an op that changes arguments: returns what each of them becomes.
    """
    name = schema.split("(", 1)[0]
    meaning = meaning or fallback
    _DEFINED[name] = (schema, {"fake": fake, "backward": backward, "setup_context": setup_context, "meaning": meaning, "out_of_place": out_of_place})
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    if CPU.changed(schema) and CPU.has(name):
        CPU.mark(name, f"the compiled library has another schema for fusewire::{name}")
        with warnings.catch_warnings():  # torch warns of the override, which is meant: nobody can reach the old kernel, torch.ops included
            warnings.simplefilter("ignore")
            LIBRARY.impl(name, fallback, CPU.key)
    torch.library.register_fake(f"fusewire::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fusewire::{name}", backward, setup_context=setup_context, lib=transforms.Differentiable(LIBRARY, meaning))
    op = getattr(torch.ops.fusewire, name).default
    if op._schema.is_mutable:
        LIBRARY.impl(name, transforms.copying(op, out_of_place), "FuncTorchDynamicLayerFrontMode")
    else:
        torch.library.register_vmap(f"fusewire::{name}", transforms.by_sample(op), lib=LIBRARY)
    return op


_DEFINED: dict[str, tuple[str, dict]] = {}


def declare(schema: str) -> None:
    """Declare ``fusewire::<schema>`` without a fallback: an op that a compiled library alone implements and the rooms alone call."""
    name = schema.split("(", 1)[0]
    _DECLARED.append(schema)
    LIBRARY.define(schema)
    if CUDA.changed(schema):
        CUDA.mark(name, f"the compiled library has another schema for fusewire::{name}")


_DECLARED: list[str] = []


def variant(op: torch._ops.OpOverload, suffix: str, kernel: Callable) -> torch._ops.OpOverload:
    """Declare ``fusewire::<op>_<suffix>``: ``op`` with ``kernel`` in the place of its fallback. The same schema, fake kernel and gradients."""
    name = op._schema.name.split("::")[1]
    schema, parts = _DEFINED[name]
    other = define(f"{name}_{suffix}{schema.removeprefix(name)}", fallback=kernel, **parts)
    if written := transforms.written_by(op):
        def move_versions(keyset, *args):
            torch.autograd.graph.increment_version([args[i] for i in written])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return other(*args)

        LIBRARY.impl(f"{name}_{suffix}", move_versions, "ADInplaceOrView", with_keyset=True)
    return other


def record_schemas(path: str) -> None:
    """Write the declared schemas beside a library that was compiled from the same sources. setup.py calls it once all rooms are imported."""
    schemas = {schema.split("(", 1)[0]: schema for schema in (*_HELPERS, *_DECLARED, *(schema for schema, _ in _DEFINED.values()))}
    Path(path).write_text(json.dumps(schemas, indent=1, sort_keys=True) + "\n")


# What the rooms ask the CPU library when they are imported.
_HELPERS = ("cpu_isa() -> int", "cpu_is_intel() -> bool", "cpu_layer_norm_moments(Tensor x, float eps, int order, Tensor(a!) out) -> ()",
            "cpu_layer_norm_order(Tensor x, int order) -> ()", "cpu_stream_from(int bytes) -> int", "cpu_streamed() -> int", "cpu_group_norm_order(Tensor x, int order, bool fused_offset, int silu_step) -> ()")
for _schema in _HELPERS:
    LIBRARY.define(_schema)

LIBRARY.define("cpu_scratch(bool reset) -> int")

CPU = NativeLibrary("fusewire_cpu", "CPU", "a C++ compiler")
CUDA = NativeLibrary("fusewire_cuda", "CUDA", "nvcc")
CPU.load()
CPU.require(_HELPERS)
_counts_scratch = torch._C._dispatch_has_kernel_for_dispatch_key("fusewire::cpu_scratch", "CompositeExplicitAutograd")
if torch.version.cuda is not None:
    CUDA.load()
else:
    CUDA.reason = "this torch was built without CUDA"
