"""Packaging: the folder mapping, and the native libraries built by CMake + ninja where torch and a compiler are found.

``src/fusewire`` is the root package; ``kernels/`` and ``models/`` become ``fusewire.kernels`` and ``fusewire.models``. They carry no
``__init__.py``, so that a checkout never shadows the registry's own ``kernels`` package, which diffusers imports.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).parent.resolve()
CUDA = os.environ.get("FUSEWIRE_CUDA", "AUTO")  # AUTO, ON or OFF: CMakeLists.txt says what they mean


def rooms(name: str) -> list[str]:
    """The folder ``name`` and every folder of Python below it, as ``fusewire.<name>...``."""
    found = find_namespace_packages(str(ROOT / name), exclude=["*__pycache__*"])
    return [f"fusewire.{name}"] + [f"fusewire.{name}.{package}" for package in found]


def why_pure() -> str:
    """An empty string where the native library can be built; otherwise the reason why this will be a pure wheel."""
    if os.environ.get("FUSEWIRE_NATIVE", "1") == "0":
        return "FUSEWIRE_NATIVE=0"
    if importlib.util.find_spec("torch") is None:
        return "torch is not visible to this build (use --no-build-isolation in an environment that has it)"
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")):
        return "no C++ compiler was found"
    return ""


class CMakeBuild(build_ext):
    """Builds csrc/ into ``fusewire/lib`` (in the source tree for an editable install, in the wheel otherwise)."""

    def run(self):
        destination = (ROOT / "src" if self.editable_mode or self.inplace else Path(self.build_lib).resolve()) / "fusewire" / "lib"
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
                     f"-DPython_EXECUTABLE={sys.executable}", f"-DFUSEWIRE_LIB_DIR={destination}", f"-DFUSEWIRE_CUDA={CUDA}"]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        for stale in (*destination.glob("libfusewire_*.json"), destination / "libfusewire_cuda.so"):
            stale.unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", "--target", "fusewire_cpu"], check=True)
        if "FUSEWIRE_BUILDS_CUDA:INTERNAL=ON" in (build / "CMakeCache.txt").read_text():
            try:
                subprocess.run(["cmake", "--build", str(build), "--parallel", "--target", "fusewire_cuda"], check=True)
            except subprocess.CalledProcessError:
                if CUDA == "ON":
                    raise
                print("fusewire: the CUDA library was not built, see above; Triton serves GPUs", file=sys.stderr)
        # The schemas that each library was compiled for: a later checkout whose schemas differ does not call it.
        for library in destination.glob("libfusewire_*.so"):
            code = f"import fusewire.ops; from fusewire.kernels.library import record_schemas; record_schemas({str(library.with_suffix('.json'))!r})"
            subprocess.run([sys.executable, "-c", code], cwd=build, check=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "FUSEWIRE_NATIVE": "0"})

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "fusewire" / "lib").glob("libfusewire_*")]


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return not REASON


REASON = why_pure()
if REASON:
    print(f"fusewire: building without the native library: {REASON}", file=sys.stderr)

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel


class StableWheel(bdist_wheel):
    """The library uses LibTorch's stable ABI and no Python ABI: one wheel a platform serves every Python 3."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform if not REASON else "any"


setup(
    packages=["fusewire"] + [f"fusewire.{p}" for p in find_namespace_packages(str(ROOT / "src" / "fusewire"), exclude=["lib", "*__pycache__*"])]
    + rooms("kernels") + rooms("models"),
    package_dir={"fusewire": "src/fusewire", "fusewire.kernels": "kernels", "fusewire.models": "models"},
    package_data={"fusewire": ["lib/*.so", "lib/*.json", "report/*.html", "report/*.css"]},
    # The extension names no sources: CMakeBuild does the work, and the wheel becomes platform specific.
    ext_modules=[] if REASON else [Extension("fusewire.lib.fusewire_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableWheel},
    distclass=NativeDistribution,
)
