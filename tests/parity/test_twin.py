"""The float64 truth: free of float32 casts, sharing nothing with the model that it copies."""

import pytest
import torch
from torch import nn

from fusewire.copies import shared_copy
from fusewire.parity import twin
from tests.models.stock_text import stock_model, tokens
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def inputs():
    return dict(hidden_states=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 5, 32), pooled_projections=torch.randn(1, 32),
                timestep=torch.tensor([500.0]), return_dict=False)


def test_shared_copy_shares_weights_and_nothing_else(pipe):
    copy = shared_copy(pipe)
    assert copy.transformer is not pipe.transformer and copy.scheduler is not pipe.scheduler
    assert all(a is b for a, b in zip(copy.transformer.parameters(), pipe.transformer.parameters()))
    copy.transformer.transformer_blocks[0].register_forward_hook(lambda *a: None)
    assert not pipe.transformer.transformer_blocks[0]._forward_hooks


def test_a_copied_pipeline_has_its_options(pipe):
    """Those that its class was made with, and those that somebody set since."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    from tests.models import stock_unet

    none = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    stock = StableDiffusionXLPipeline(**none, unet=stock_unet.unet("sd"), scheduler=DDIMScheduler(), force_zeros_for_empty_prompt=False)
    stock.vae_scale_factor, pipe.default_sample_size = 4, 3
    twin = shared_copy(stock)
    assert twin.config.force_zeros_for_empty_prompt is False and twin.vae_scale_factor == 4 and shared_copy(pipe).default_sample_size == 3
    twin.scheduler, twin.vae_scale_factor = None, 8
    assert stock.scheduler is not None and stock.config["scheduler"][1] is not None and stock.vae_scale_factor == 4


def test_twin_computes_in_float64_and_leaves_the_model_alone(pipe, inputs):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    with torch.inference_mode():
        true = twin.float64_twin(pipe.transformer)(**twin.widen(inputs))[0]
        stock = pipe.transformer(**inputs)[0]
    assert true.dtype is torch.float64 and stock.dtype is torch.float32
    assert 0 < (true - stock).abs().max() < 1e-4
    after = pipe.transformer.state_dict()
    assert all(after[name].dtype is torch.float32 and torch.equal(after[name], tensor) for name, tensor in before.items())


def test_block_by_block_is_the_same_truth(pipe, inputs, monkeypatch):
    with torch.inference_mode():
        at_once = twin.float64_twin(pipe.transformer)(**twin.widen(inputs))[0]
        monkeypatch.setattr(twin, "AT_ONCE", 0)
        late = twin.float64_twin(pipe.transformer)
        assert late.transformer_blocks[0].ff.net[2].weight.dtype is torch.float32
        assert torch.equal(late(**twin.widen(inputs))[0], at_once)
        assert late.transformer_blocks[0].ff.net[2].weight.dtype is torch.float32


def test_blocks_of_a_text_encoder_are_widened_one_by_one(monkeypatch):
    """Its ModuleList lies deeper; a T5 of five billion weights would be 38 GB in float64."""

    encoder, ids = stock_model("T5 gated-gelu"), tokens()
    with torch.inference_mode():
        at_once = twin.float64_twin(encoder)(ids)[0]
        monkeypatch.setattr(twin, "AT_ONCE", 0)
        late = twin.float64_twin(encoder)
        first = late.encoder.block[0].layer[1].DenseReluDense.wo.weight
        assert first.dtype is torch.float32 and torch.equal(late(ids)[0], at_once) and at_once.dtype is torch.float64


def test_rms_norm_is_float64_inside():
    """diffusers' RMSNorm takes its mean square in float32 whatever comes in: a plain ``.double()`` would be wrong in the eighth digit."""
    from diffusers.models.normalization import RMSNorm

    norm = RMSNorm(64, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 64, dtype=torch.float64)
    want = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    got = twin.float64_twin(norm)(x)
    assert (got - want).abs().max() <= 1e-14
    assert (norm.double()(x) - want).abs().max() > 1e-9


def test_wrong_weights_would_show(pipe, inputs):
    copy = shared_copy(pipe).transformer
    copy.proj_out.weight = nn.Parameter(copy.proj_out.weight * 1.01)
    with torch.inference_mode():
        a, b = (twin.float64_twin(m)(**twin.widen(inputs))[0] for m in (copy, pipe.transformer))
    assert (a - b).abs().max() > 1e-4


def test_t5s_norm_is_float64_inside():
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    norm = T5LayerNorm(64, eps=1e-5)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 64, dtype=torch.float64)
    want = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm.weight.double()
    assert (twin.float64_twin(norm)(x) - want).abs().max() < 1e-14
    assert (norm.double()(x) - want).abs().max() > 1e-10
