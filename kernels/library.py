"""The operator library: one schema per fused op, declared in its room, and the compiled libraries that implement it.

``define`` declares ``fusewire::<name>`` once, with its fake kernel, a fallback made of plain PyTorch (so that the op exists with and
without the compiled library) and its autograd formula. ``NATIVE`` tells which compiled libraries were loaded, and why one was not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

LIBRARY = torch.library.Library("fusewire", "DEF")
ISA_LEVELS = ("base", "avx2", "avx512", "avx512_bf16")


class NativeLibrary:
    """A compiled library: ``loaded`` says whether its ops can be called, ``reason`` why not."""

    def __init__(self, name: str):
        self.name, self.loaded, self.reason, self.path = name, False, "", None

    def load(self) -> None:
        """Load ``lib<name>.so`` from ``fusewire/lib``, once. A library that is there but does not load is an error, not a fallback."""
        import fusewire

        self.path = Path(fusewire.__file__).parent / "lib" / f"lib{self.name}.so"
        if os.environ.get("FUSEWIRE_NATIVE", "1") == "0":
            self.reason = "switched off by FUSEWIRE_NATIVE=0"
        elif not self.path.is_file():
            self.reason = f"{self.path.name} was not built (install with a C++ compiler and --no-build-isolation)"
        else:
            torch.ops.load_library(str(self.path))
            self.loaded = True


CPU = NativeLibrary("fusewire_cpu")
CUDA = NativeLibrary("fusewire_cuda")
CPU.load()
if torch.version.cuda is not None:
    CUDA.load()
else:
    CUDA.reason = "this torch was built without CUDA"


def cpu_isa() -> str:
    """The ISA level the CPU library runs at on this processor: one of ``ISA_LEVELS``, or ``""`` where it is not loaded."""
    return ISA_LEVELS[torch.ops.fusewire.cpu_isa()] if CPU.loaded else ""


def define(schema: str, *, fallback: Callable, fake: Callable, backward: Callable | None = None,
           setup_context: Callable | None = None) -> torch._ops.OpOverload:
    """Declare ``fusewire::<schema>`` and return its overload.

    ``fallback`` takes the schema's arguments and is used on every device without a kernel of its own. ``backward`` and ``setup_context`` are
    ``torch.library.register_autograd``'s; an op without them refuses to be differentiated rather than dropping a gradient.
    """
    name = schema.split("(", 1)[0]
    _DEFINED[name] = (schema, {"fake": fake, "backward": backward, "setup_context": setup_context})
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusewire::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fusewire::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.fusewire, name).default


_DEFINED: dict[str, tuple[str, dict]] = {}


def variant(op: torch._ops.OpOverload, suffix: str, kernel: Callable) -> torch._ops.OpOverload:
    """Declare ``fusewire::<op>_<suffix>``: ``op`` with ``kernel`` in the place of its fallback. The same schema, fake kernel and gradients."""
    name = op._schema.name.split("::")[1]
    schema, parts = _DEFINED[name]
    other = define(f"{name}_{suffix}{schema.removeprefix(name)}", fallback=kernel, **parts)
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.alias_info is not None and argument.alias_info.is_write]
    if written:
        def move_versions(keyset, *args):
            torch.autograd.graph.increment_version([args[i] for i in written])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return other(*args)

        LIBRARY.impl(f"{name}_{suffix}", move_versions, "ADInplaceOrView", with_keyset=True)
    return other


LIBRARY.define("cpu_isa() -> int")
LIBRARY.define("cpu_layer_norm_moments(Tensor x, float eps, int order, Tensor(a!) out) -> ()")
LIBRARY.define("cpu_layer_norm_order(Tensor x, int order) -> ()")
