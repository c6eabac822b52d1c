"""Reading the reference tensors of tests/data."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

DATA = Path(__file__).parents[1] / "data"


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(inputs and results, the official state dict) of ``tests/data/<name>.safetensors``."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    return {key: value for key, value in tensors.items() if not key.startswith("weights/")}, weights
