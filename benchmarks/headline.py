"""The README's table of whole models: stock's better of eager and warm torch.compile over ``close``, from the files in benchmarks/results.

``python benchmarks/headline.py --write README.md``
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"SD3.5-medium, 3 of 24 blocks": "sd3_block", "FLUX.1-dev, 1 + 2 of 19 + 38": "flux-dev", "SD1.5 U-Net, 512 x 512": "sd1.5",
          "SDXL U-Net, 512 x 512": "sdxl", "DiT-XL/2, 4 of 28 blocks": "dit-xl-2", "VAE, encoded and decoded, 256 x 256": "sd-vae",
          "VAE, decoded, 256 x 256": "sd-vae-decode"}
CPUS = {"AMD Zen 5, AVX512-BF16": "zen5", "AMD Zen 4, AVX512-BF16": "zen4", "Intel, AMX": "", "the same, host shared": "amx-shared",
        "Intel, AVX512-BF16": "xeon-avx512"}
DTYPES = ("bfloat16", "float32")
GPU, ON_GPU = "NVIDIA H200, CUDA graphs", {"sd3_block": ("sd3.5-large:1024", " (SD3.5-large)"), "flux-dev": ("flux-dev:1024", ""),
                                           "sd1.5": ("sd1.5", " (512 x 512)"), "sdxl": ("sdxl:1024", "")}
MARKS = ("<!-- headline -->", "<!-- /headline -->")


def ratio(path: Path) -> float | None:
    """How often ``close`` is done in the time of the better of eager and torch.compile."""
    if not path.is_file():
        return None
    times = {row["side"]: row["median"] for row in json.loads(path.read_text())["rows"]}
    return min(times[side] for side in ("eager", "compile") if side in times) / times["close"]


def file_of(folder: str, name: str, dtype: str) -> Path:
    """That of the model's own run, or of the one in which the swapped model was compiled too."""
    found = RESULTS / folder / f"{name}-{dtype}.json"
    return found if found.is_file() else RESULTS / folder / f"compiled-{name}-{dtype}.json"


def option(path: Path, name: str) -> str:
    """What the file's command gave for an option, or ""."""
    words = json.loads(path.read_text())["command"].split()
    return words[words.index(name) + 1] if name in words else ""


def cell(value: float, path: Path, more: str = "") -> str:
    return f"[{value:.2f}x](benchmarks/results/{path.relative_to(RESULTS)}){more}"


def on_cpu(path: Path) -> str:
    found = ratio(path)
    return "" if found is None else cell(found, path, f" (batch of {option(path, '--batch')})" if option(path, "--batch") else "")


def on_gpu(name: str) -> str:
    path, (model, more) = RESULTS / "gpu-models.json", ON_GPU.get(name, ("", ""))
    times = {row["side"]: row["ms"] for row in json.loads(path.read_text())["rows"] if row["model"] == model}
    return cell(times["eager, CUDA graph"] / times["close, CUDA graph"], path, more) if times else ""


def table() -> str:
    lines = [["", "dtype", *CPUS, GPU]]
    for model, name in MODELS.items():
        for dtype in DTYPES:
            files = [file_of(folder, name, dtype) for folder in CPUS.values()]
            lines.append([model, dtype, *map(on_cpu, files), on_gpu(name) if dtype == "bfloat16" else ""])
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def placed(text: str) -> str:
    """The README with the table between its marks."""
    return re.sub(f"(?<={re.escape(MARKS[0])}\n).*?(?={re.escape(MARKS[1])})", lambda _: table() + "\n", text, flags=re.S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, required=True, help="the README")
    readme = parser.parse_args().write
    readme.write_text(placed(readme.read_text()))
