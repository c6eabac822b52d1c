"""Reads pictures back: the digit with a small network trained on real scans only, the colours by measuring them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import data
from .stage import generator, rate_factor


def measure(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures [N, 3, 32, 32] in -1..1 -> (coverage [N, 1, 32, 32] in 0..1, ink [N, 3], paper [N, 3] in -1..1).

    The paper is the median of the border, two pixels wide; the ink is the mean of the pixels that differ most from it.
    """
    frame = torch.ones(x.shape[-2:], dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    paper = x[:, :, frame].median(dim=-1).values
    distance = (x - paper[:, :, None, None]).square().sum(1, keepdim=True).sqrt()
    coverage = distance / distance.flatten(1).quantile(0.99, dim=1).clamp(min=0.05).view(-1, 1, 1, 1)
    most = (coverage > 0.85).float()
    ink = (x * most).sum((2, 3)) / most.sum((2, 3))
    return coverage.clamp(max=1), ink, paper


def read_colours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [N, 3, 32, 32] -> (ink index [N], paper index [N]): the nearest of INKS and of PAPERS in RGB."""
    _, ink, paper = measure(x)
    nearest = [torch.cdist(colour, torch.tensor(list(table.values())) / 127.5 - 1).argmin(1)
               for colour, table in ((ink, data.INKS), (paper, data.PAPERS))]
    return nearest[0], nearest[1]


class Reader(nn.Module):
    """Digit logits [N, 10] of pictures [N, 3, 32, 32]: a convolutional network on the ink coverage."""

    def __init__(self):
        super().__init__()
        def conv(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]

        self.net = nn.Sequential(*conv(1, 16), *conv(16, 32), *conv(32, 48), nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * 16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(measure(x)[0])


def train(seed: int = 0, steps: int = 800, batch: int = 128, pool: int = 8192) -> Reader:
    """A reader trained on the held-in scans, drawn with the varied strokes and colours that the pipeline was trained on."""
    from tqdm import trange

    (scans, digits), _ = data.split_scans()
    random = generator(seed, "reader", 0)
    pick = torch.randint(len(scans), (pool,), generator=random)
    ink, paper = (torch.randint(len(table), (pool,), generator=random) for table in (data.INKS, data.PAPERS))
    coverage = torch.cat([measure(data.render(scans[i], j, k, random))[0]
                          for i, j, k in zip(pick.split(512), ink.split(512), paper.split(512))])
    torch.manual_seed(seed)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    for step in trange(steps, desc="reader", mininterval=2.0):
        rows = torch.randint(pool, (batch,), generator=random)
        optimizer.param_groups[0]["lr"] = 3e-3 * rate_factor(step, step / steps, warmup=50)
        loss = F.cross_entropy(model.net(coverage[rows]), digits[pick[rows]], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def accuracy_on_held_out(model: Reader) -> dict[str, float]:
    """How often digit, ink and paper are read right on the held-out real scans, drawn with varied strokes and colours."""
    _, (scans, digits) = data.split_scans()
    random = generator(0, "held-out", 0)
    ink, paper = (torch.randint(len(t), (len(scans),), generator=random) for t in (data.INKS, data.PAPERS))
    x = data.render(scans, ink, paper, random)
    read_ink, read_paper = read_colours(x)
    return {"digit": (model(x).argmax(1) == digits).float().mean().item(),
            "ink": (read_ink == ink).float().mean().item(), "paper": (read_paper == paper).float().mean().item()}
