"""Pictures for the page: PNG files written into the page itself, and difference maps with one scale."""

from __future__ import annotations

import base64
import io

import torch

LARGEST = 256  # pixels; a larger picture is reduced


def data_uri(picture: torch.Tensor) -> str:
    """A picture [3, H, W] float32 in 0..1 as a ``data:`` address."""
    from PIL import Image

    image = Image.fromarray((torch.nan_to_num(picture).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def difference(picture: torch.Tensor, stock: torch.Tensor) -> torch.Tensor:
    """[3, H, W] and [3, H, W] -> [H, W]: the largest difference over the colours, 0 to 1; 1 where one has no number."""
    return torch.nan_to_num((picture.float() - stock.float()).abs().amax(0), nan=1.0, posinf=1.0)


def heat(values: torch.Tensor, scale: float) -> torch.Tensor:
    """[H, W] -> [3, H, W]: magma colours, ``scale`` being the brightest."""
    import matplotlib

    shares = (values / scale if scale > 0 else torch.zeros_like(values)).clamp(0, 1)
    return torch.from_numpy(matplotlib.colormaps["magma"](shares.numpy())[..., :3]).permute(2, 0, 1).float()


def gradient(steps: int = 9) -> str:
    """The colours of ``heat`` as a CSS gradient."""
    import matplotlib

    magma = matplotlib.colormaps["magma"]
    return ", ".join("#" + "".join(f"{round(255 * part):02x}" for part in magma(i / (steps - 1))[:3]) for i in range(steps))
