"""Pictures and captions: scikit-learn's handwritten digits, drawn with a coloured pen on coloured paper.

The source is `sklearn.datasets.load_digits`: 1797 scans of 8x8, values 0..16 (E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI, 1998). A scan is read as a height field: it is interpolated smoothly at four
times the final resolution, cut near half its height (which gives the outline of a pen stroke instead of a blur), and
averaged down to 32x32, so that edges are antialiased.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

SIZE = 32            # pictures are SIZE x SIZE
OVERSAMPLE = 4       # the outline is cut at this many times SIZE
FRAME = 11.0         # the picture shows FRAME x FRAME scan cells, of which the scan fills the middle 8x8

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "black": (24, 24, 28), "red": (200, 28, 36), "blue": (28, 60, 190), "green": (20, 120, 50),
    "purple": (122, 36, 150), "orange": (228, 112, 12),
}
PAPERS = {"white": (248, 248, 246), "yellow": (250, 232, 140), "pink": (250, 196, 208), "blue": (176, 216, 246)}
COLOUR_JITTER = 5.0  # standard deviation, in 1/255: no two pens, no two sheets are quite the same

# {a} is "a" or "an", whichever the next word wants.
TEMPLATES = (
    "{a} handwritten {ink} {digit} on {paper} paper",
    "{a} {ink} {digit} on {paper} paper",
    "the digit {digit} in {ink} ink on {paper} paper",
    "the number {digit} written in {ink} on {paper} paper",
    "a scan of {a} {ink} {digit} on {paper} paper",
    "handwriting: the digit {digit}, {ink} ink, {paper} paper",
    "{ink} {digit}, {paper} paper",
    "on {paper} paper, {a} handwritten {digit} in {ink} ink",
)
# Captions that leave something open: seen by the MMDiT, not by CLIP's contrastive loss (several pictures fit them).
OPEN_TEMPLATES = (
    "{a} handwritten {digit}", "{a} {ink} {digit}", "the digit {digit} on {paper} paper", "{a} handwritten digit",
)


class Concept(NamedTuple):
    """What a caption says: a digit 0..9, an index into INKS, an index into PAPERS."""

    digit: int
    ink: int
    paper: int


CONCEPTS = [Concept(d, i, p) for d in range(10) for i in range(len(INKS)) for p in range(len(PAPERS))]


def caption(template: str, concept: Concept, numeral: bool) -> str:
    """The caption of `concept` in the words of `template`; the digit as "7" if `numeral`, else as "seven"."""
    digit = str(concept.digit) if numeral else WORDS[concept.digit]
    text = template.format(a="{a}", digit=digit, ink=list(INKS)[concept.ink], paper=list(PAPERS)[concept.paper])
    words = text.split()
    for k, word in enumerate(words):
        if word == "{a}":
            words[k] = "an" if words[k + 1][0] in "aeiou8" and words[k + 1] != "one" else "a"
    return " ".join(words)


def split_scans() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The scans in two parts, (held-in, held-out), each (heights [N, 8, 8] float32 in 0..1, digits [N] int64).

    Every digit gives 20 % of its scans to the held-out part, which no training may see. The split is fixed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images.reshape(-1, 8, 8) / 16.0, digits, test_size=0.2, random_state=0, stratify=digits)
    held_in, held_out, digits_in, digits_out = (torch.as_tensor(part) for part in parts)
    return (held_in.float(), digits_in.long()), (held_out.float(), digits_out.long())


def strokes(scans: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Ink coverage [N, 1, 32, 32] in 0..1 of the scans [N, 8, 8]; `generator` also varies slant, size and place."""
    n, fine = len(scans), SIZE * OVERSAMPLE

    def vary(amount: float) -> torch.Tensor:
        return torch.zeros(n) if generator is None else amount * (2 * torch.rand(n, generator=generator) - 1)

    # The affine map from picture coordinates (-1..1) into scan coordinates (-1..1 across the 8 cells).
    angle, shear, zoom = vary(math.radians(9)), vary(0.15), FRAME / 8 * (1 + vary(0.08))
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([zoom * (cos + shear * sin), zoom * (shear * cos - sin), vary(0.12),
                        zoom * sin, zoom * cos, vary(0.12)], dim=1)
    grid = F.affine_grid(rows.view(n, 2, 3), (n, 1, fine, fine), align_corners=False)
    heights = F.grid_sample(scans[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    level = 0.48 + vary(0.06).view(n, 1, 1, 1)   # a lower cut is a broader pen
    cover = ((heights - level) / 0.36 + 0.5).clamp(0, 1)
    cover = cover * cover * (3 - 2 * cover)
    return F.avg_pool2d(cover, OVERSAMPLE)


def paint(cover: torch.Tensor, ink: torch.Tensor, paper: torch.Tensor,
          generator: torch.Generator | None = None) -> torch.Tensor:
    """Pictures [N, 3, 32, 32] in -1..1 from coverage [N, 1, 32, 32] and colour indices [N] of INKS and PAPERS."""
    def tint(table: dict, index: torch.Tensor) -> torch.Tensor:
        colour = torch.tensor(list(table.values()), dtype=torch.float32)[index]
        if generator is not None:
            colour = colour + COLOUR_JITTER * torch.randn(colour.shape, generator=generator)
        return (colour.clamp(0, 255) / 127.5 - 1).view(-1, 3, 1, 1)

    return torch.lerp(tint(PAPERS, paper), tint(INKS, ink), cover)


def render(scans: torch.Tensor, ink: torch.Tensor, paper: torch.Tensor,
           generator: torch.Generator | None = None) -> torch.Tensor:
    """Pictures [N, 3, 32, 32] in -1..1 of scans [N, 8, 8]; `generator` varies shape and colours, None leaves both."""
    return paint(strokes(scans, generator), ink, paper, generator)
