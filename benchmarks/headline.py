"""The README's table of whole models: stock's better of eager and warm torch.compile over ``close``, from the files in benchmarks/results.

``python benchmarks/headline.py --write README.md``
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"SD3.5-medium": "sd3_block", "FLUX.1-dev": "flux-dev", "SD1.5 U-Net, 512 x 512": "sd1.5", "SDXL U-Net, 512 x 512": "sdxl", "DiT-XL/2": "dit-xl-2",
          "VAE, 256 x 256": "sd-vae"}
CPUS = {"AMD Zen 5, AVX512-BF16": "zen5", "Intel, AMX": "", "Intel, AVX512-BF16": "xeon-avx512"}
DTYPES = ("bfloat16", "float32")
GPU, ON_GPU = "NVIDIA H200, CUDA graphs", {"SD3.5-medium": "sd3.5-large:1024", "FLUX.1-dev": "flux-dev:1024", "SD1.5 U-Net, 512 x 512": "sd1.5",
                                    "SDXL U-Net, 512 x 512": "sdxl:1024"}
OTHERS = {"SD3.5-medium": "SD3.5-large", "SDXL U-Net, 512 x 512": "1024 x 1024"}  # what the GPU's row is of, where it is another
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


def cell(value: float | None, path: Path, more: str = "") -> str:
    return "" if value is None else f"[{value:.2f}x](benchmarks/results/{path.relative_to(RESULTS)}){more}"


def on_gpu(model: str) -> str:
    path = RESULTS / "gpu-models.json"
    times = {row["side"]: row["ms"] for row in json.loads(path.read_text())["rows"] if row["model"] == ON_GPU.get(model)}
    if not times:
        return ""
    return cell(times["eager, CUDA graph"] / times["close, CUDA graph"], path, f" ({OTHERS[model]})" if model in OTHERS else "")


def table() -> str:
    lines = [["", "dtype", *CPUS, GPU]]
    for model, name in MODELS.items():
        for dtype in DTYPES:
            files = [file_of(folder, name, dtype) for folder in CPUS.values()]
            lines.append([model, dtype, *(cell(ratio(path), path) for path in files), on_gpu(model) if dtype == "bfloat16" else ""])
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
