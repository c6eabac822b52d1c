"""Fusewire: fused kernels for text-to-image models, as drop-in parts.

``swap`` puts them into a pipeline, ``parity`` proves that the picture stayed the same, ``profile`` shows what was gained, ``restore`` takes
them out again. ``fusewire.ops`` has the kernels themselves.
"""

import importlib as _importlib
from pathlib import Path as _Path

__version__ = "0.1.0"
__all__ = ["keep_memory", "ops", "parity", "profile", "restore", "swap", "swapped"]

# In a checkout kernels/ and models/ lie beside src/, not inside this package (an installed package has them inside).
_root = _Path(__file__).resolve().parents[2]
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    # Loaded when first used: ``import fusewire`` imports neither torch nor diffusers. swap, parity and profile are packages that can be called.
    if name in ("ops", "swap", "parity", "profile"):
        return _importlib.import_module(f"fusewire.{name}")
    if name in ("restore", "swapped"):
        return getattr(_importlib.import_module("fusewire.swap"), name)
    if name == "keep_memory":
        return _importlib.import_module("fusewire.memory").keep_memory
    raise AttributeError(f"module 'fusewire' has no attribute {name!r}")
