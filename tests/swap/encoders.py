"""What the tests of swapped text encoders share."""

from __future__ import annotations

import pytest
import torch

from fusewire.swap import text_encoders
from fusewire.swap.fused import unknown_forward
from tests.models.stock_text import T5S, tensors, tokens

BOTH = pytest.mark.parametrize("numerics", ["exact", "close"])
SOME = pytest.mark.parametrize("variant", ["CLIP quick_gelu", "CLIP gelu", "T5 gated-gelu"])

OLD_T5 = bool(unknown_forward(text_encoders.T5_BLOCK))  # before transformers 5.15 only its norms and feed-forwards are swapped
WHOLE_T5 = pytest.mark.skipif(OLD_T5, reason="the T5 of this transformers is swapped in parts")


@pytest.fixture(autouse=True)
def what_is_swapped_of_t5(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if OLD_T5 and parameters.get("variant") in T5S and parameters.get("numerics") != "exact" and "exact" not in request.node.originalname:
        pytest.skip(WHOLE_T5.kwargs["reason"])


@torch.no_grad()
def run(model, ids=None, **more) -> list[torch.Tensor]:
    return tensors(model(tokens() if ids is None else ids, **more))


def same(got, want, numerics) -> bool:
    if numerics == "exact":
        return all(torch.equal(mine, stock) for mine, stock in zip(got, want, strict=True))
    return all((mine - stock).abs().max() <= 3e-5 * max(1.0, stock.abs().max().item()) for mine, stock in zip(got, want, strict=True))
