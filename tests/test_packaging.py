"""What is packed: extras that cover what they are for, an sdist from which everything can be built, a wheel with everything in it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DISTRIBUTION = {"sklearn": "scikit-learn", "PIL": "pillow", "tokenizers": "transformers"}  # of a module's name; tokenizers come with transformers


def imported(*files: Path) -> set[str]:
    """Top-level names of what the files import from other distributions."""
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"fusewire", "digits"}


def listed(key: str) -> set[str]:
    """The distributions in a list of pyproject.toml. (Python 3.10 has no reader of TOML.)"""
    found = re.search(rf"^{key} = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    return {re.match(r"[A-Za-z0-9_-]+", entry)[0] for entry in re.findall(r'"([^"]+)"', found)}


def test_the_extra_train_has_what_training_imports():
    files = [ROOT / "examples/train_digits_sd3.py", *(ROOT / "examples/digits").glob("*.py")]
    wanted = {DISTRIBUTION.get(name, name) for name in imported(*files)}
    assert {"diffusers", "transformers", "scikit-learn", "matplotlib", "tqdm"} <= wanted
    assert wanted <= listed("train") | listed("dependencies")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A copy of the checkout without what the build makes, its sdist unpacked, and the names in it."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("csrc", "kernels", "models", "src"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "lib"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    run(copy, "sdist", "--dist-dir", str(folder))
    archive, = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    root = folder / archive.name.removesuffix(".tar.gz")
    return root, {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def run(folder: Path, *command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"FUSEWIRE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def sources(folder: str, *suffixes: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*")
            if path.suffix in suffixes and not {"lib", "__pycache__"} & set(path.relative_to(ROOT).parts)}


def test_the_sdist_has_what_the_build_needs(unpacked):
    _, names = unpacked
    native = sources("csrc", ".cpp", ".h", ".cu")
    assert len(native) > 100 and native <= names
    assert sources("kernels", ".py") | sources("models", ".py") | sources("src", ".py", ".html", ".css") <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_a_wheel_from_the_sdist_has_every_module(unpacked):
    root, _ = unpacked
    run(root, "bdist_wheel", "--dist-dir", str(root))
    wheel, = root.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {f"fusewire/{name}" for name in sources("kernels", ".py") | sources("models", ".py")} <= names
    assert {name.removeprefix("src/") for name in sources("src", ".py", ".html", ".css")} <= names


def test_what_the_package_offers_is_listed_before_its_first_use():
    code = "import sys, fusewire; assert {'swap', 'parity', 'profile', 'ops', 'restore', 'swapped', 'keep_memory'} <= set(dir(fusewire)); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code + "; from fusewire import *; swap, ops.adaln_modulate"]).returncode == 0
