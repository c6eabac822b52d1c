"""T2I-Adapter against diffusers and against golden tensors of the official repository."""

from __future__ import annotations

import pytest
import torch
from diffusers import T2IAdapter

from fusewire.models.adapter import Adapter, AdapterConfig, from_official
from tests.models.golden import golden
from tests.models.stock_sd3 import randomise
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64

SMALL = dict(channels=[8, 12, 16, 16], num_res_blocks=2, downscale_factor=8)
VARIANTS = {"full_adapter": SMALL, "light_adapter": dict(SMALL, channels=[8, 12, 16]), "full_adapter_xl": dict(SMALL, in_channels=1, downscale_factor=16)}


def stock_model(kind: str, dtype: torch.dtype = torch.float32) -> T2IAdapter:
    torch.manual_seed(0)
    return randomise(T2IAdapter(**VARIANTS[kind], adapter_type=kind)).eval().to(dtype)


def picture(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Not square; a side that stages divide with a rest."""
    return torch.rand(2, VARIANTS[kind].get("in_channels", 3), 96, 80, generator=torch.Generator().manual_seed(1)).to(dtype)


def ours(stock: T2IAdapter) -> Adapter:
    model = Adapter(AdapterConfig.from_dict(stock.config)).eval().to(stock.dtype)
    model.load_state_dict(stock.state_dict())
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", VARIANTS)
@torch.no_grad()
def test_against_diffusers(kind, dtype):
    stock, x = stock_model(kind, dtype), picture(kind, dtype)
    want = stock(x)
    got = ours(stock)(x)
    assert len(got) == len(want) == 4 and all(torch.equal(mine, stocks) for mine, stocks in zip(got, want))


GOLDEN = {"full": ("t2i_adapter_sd", "full_adapter", "full.", "full_"), "light": ("t2i_adapter_sd", "light_adapter", "light.", "light_"),
          "xl": ("t2i_adapter_xl", "full_adapter_xl", "", "feature_")}


@pytest.mark.parametrize("case", GOLDEN)
@torch.no_grad()
def test_golden_tensors(case):
    name, kind, prefix, feature = GOLDEN[case]
    data, weights = golden(name)
    model = Adapter(AdapterConfig(**VARIANTS[kind], adapter_type=kind)).double()
    model.load_state_dict(from_official({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}))
    for index, got in enumerate(model(data["in/x"].double())):
        want = data[f"out/{feature}{index}"]
        assert (got - want).abs().max() <= MODEL_FLOAT64 * want.abs().max().clamp_min(1)
    for index, got in enumerate(model.float()(data["in/x"])):
        want = data[f"out/{feature}{index}"]
        assert (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max().clamp_min(1)


def test_gradients():
    stock = stock_model("light_adapter", torch.float64)
    model, x = ours(stock), picture("light_adapter", torch.float64)
    for one in (model, stock):
        sum(feature.square().mean() for feature in one(x)).backward()
    want = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - want[name].grad).abs().max() <= GRADIENTS_FLOAT64 * want[name].grad.abs().max().clamp_min(1), name


@pytest.mark.parametrize("call, error, message", [
    (lambda: AdapterConfig(adapter_type="heavy"), ValueError, "^adapter_type is 'heavy'"),
    (lambda: AdapterConfig.from_dict(dict(stages=3)), ValueError, "unknown entries.*stages"),
    (lambda: ours(stock_model("full_adapter"))(torch.zeros(1, 3, 64, 60)), ValueError, r"^x has shape \[1, 3, 64, 60\]"),
    (lambda: from_official({"body.2.down_opt.op.weight": torch.zeros(1)}), KeyError, "down_opt"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
