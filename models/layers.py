"""The modules that the model families share, under diffusers' attribute names, so that checkpoints load unchanged.

Each forward is a free function over those names (``ada_layer_norm_zero(module, ...)``): our own modules call it, and so do the subclasses that
``fusewire.swap`` puts into somebody else's pipeline.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._device import DeviceContext

from typing import NamedTuple

from fusewire import ops
from fusewire.kernels.checks import autocasts, kind_of
from fusewire.kernels.rounding import compute_dtype, is_exact


class How(NamedTuple):
    """How a fused forward computes. ``attention`` and ``linear`` permit the ops of those rooms, which do not give stock's bits; ``keeps_layout``: a block's
    output lies in memory as its input does, as the bits of a product in 16 bits depend on that; the last convolution's of an autoencoder as behind its
    attention."""

    numerics: str = "exact"
    attention: bool = False
    linear: bool = False
    keeps_layout: bool = False

    @classmethod
    def of(cls, numerics: str) -> How:
        """Everything that ``"exact"`` or ``"close"`` permits; ValueError for any other."""
        close = not is_exact(numerics)
        return cls(numerics, attention=close, linear=close)


# What a fused forward may read instead of calling. It grows by the stock classes whose forwards ``fusewire.swap`` has verified.
RMS_NORMS: set[type] = set()


# PyTorch's own forwards, of which ours know the meaning; None for one that somebody had replaced before
_FORWARDS = {cls: cls.forward if cls.forward.__module__.startswith("torch.nn.") else None
             for cls in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.SiLU, nn.GELU, nn.Dropout)}
_ATTENTION = F.scaled_dot_product_attention if F.scaled_dot_product_attention.__module__.startswith("torch.") else None


def as_made(cls: type) -> bool:
    """Whether a class of PyTorch's has the forward that it came with."""
    return _FORWARDS.get(cls, cls.forward) is cls.forward


def intercepted(module: nn.Module) -> bool:
    """Whether PyTorch's attention, or a function mode around it, is somebody's own (``F.scaled_dot_product_attention = mine``, perturbed attention
    guidance): then that is what is called. A default device is a function mode, too, that changes nothing here."""
    if F.scaled_dot_product_attention is not _ATTENTION:
        return True
    depth = torch._C._len_torch_function_stack()
    if not depth or torch.compiler.is_compiling():
        return bool(depth) and not untouched(module)
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(depth))


def projected_out(module: nn.Module, x: torch.Tensor, how: How) -> torch.Tensor:
    """The projection and the dropout of an attention layer's ``to_out``. What somebody has put behind them stock never calls."""
    projection, dropout = module.to_out[0], module.to_out[1]
    x = linear(projection, x, how)
    return x if inactive(dropout) else dropout(x)


def takes(module: nn.Module, what: str) -> bool:
    """Whether a block may compute what follows a module, ``"takes_gate"`` or ``"takes_residual"``, together with it, in place of calling its forward."""
    cls = type(module)
    return getattr(cls, what, False) and (not hasattr(cls, "stands_for_stock") or cls.stands_for_stock()) and untouched(module)


def untouched(module: nn.Module) -> bool:
    """Nothing observes or replaces this instance's forward: no hook of any kind, no forward on the instance (as offloading puts there), none for all of
    its class."""
    own = module.__dict__
    return as_made(type(module)) and not (
        own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"] or "forward" in own
        or _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks)


def plain_linear(module: nn.Module) -> bool:
    """Exactly ``nn.Linear`` with an ordinary weight: not LoRA, not quantised, pruned or normalised, not offloaded, not observed. Only then may its weight be
    read."""
    parameters = module._parameters
    return type(module) is nn.Linear and _is_parameter(parameters.get("weight")) and "bias" in parameters and untouched(module)


def _is_parameter(tensor) -> bool:
    """A plain Parameter, or what stands for one while torch.export records: a FakeTensor that says that it is."""
    return type(tensor) is nn.Parameter or type(tensor) is FakeTensor and isinstance(tensor, nn.Parameter)


def plain_layer_norm(module: nn.Module) -> bool:
    """Exactly ``nn.LayerNorm`` without parameters, not observed."""
    return type(module) is nn.LayerNorm and module._parameters.get("weight", module) is None and untouched(module)


def inactive(dropout: nn.Module) -> bool:
    """Whether a dropout changes nothing and is not observed, so that it need not be called."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p) and untouched(dropout)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: How) -> torch.Tensor:
    """``x @ weight.T + bias`` by ``ops.linear``, or on a GPU by what that would choose there in any case, without its checks, which take longer than a launch."""
    return F.linear(x, weight, bias) if x.is_cuda else ops.linear(x, weight, bias, numerics=how.numerics)


def linear(module: nn.Module, x: torch.Tensor, how: How, activation: str | None = None) -> torch.Tensor:
    """``module(x)``, then GELU-tanh where asked for: by ``ops.linear`` where that is permitted and the module is plain, otherwise by calling it."""
    if how.linear and plain_linear(module):
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        return product(x, weight, bias, how) if activation is None else ops.linear(x, weight, bias, activation=activation, numerics=how.numerics)
    y = module(x)
    return y if activation is None else F.gelu(y, approximate="tanh")


def autocasts_norms(x: torch.Tensor) -> bool:
    """Autocast makes a LayerNorm of this tensor compute in, and return, float32. It does so on accelerators, not on the CPU."""
    return x.dtype in (torch.bfloat16, torch.float16) and not x.is_cpu and autocasts(kind_of(x))


def norm_input(x: torch.Tensor) -> torch.Tensor:
    return x.float() if autocasts_norms(x) else x


def gated_linear(module: nn.Module, x: torch.Tensor, gate: torch.Tensor | None, residual: torch.Tensor, how: How) -> torch.Tensor:
    """``residual + gate * module(x)``; without a gate where it is None."""
    if how.linear and (gate is not None or not x.is_cuda) and plain_linear(module):
        parameters = module._parameters
        return ops.linear(x, parameters["weight"], parameters["bias"], gate=gate, residual=residual, numerics=how.numerics)
    return gated_sum(residual, linear(module, x, how), gate, how)


def gated_sum(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, how: How) -> torch.Tensor:
    """``x + gate * y``; without a gate where it is None."""
    return x + y if gate is None else ops.gate_residual(x, y, gate, numerics=how.numerics)


def timestep_waves(timestep: torch.Tensor, channels: int, dtype: torch.dtype, shift: float = 0, cosines_first: bool = True) -> torch.Tensor:
    """Sinusoids of the timestep [B] -> [B, channels], cosines first or sines first, in ``dtype``; computed in float32 (float64 for float64).

    Frequencies fall from 1 to 1 / 10000, which the last one reaches with ``shift`` 1 (diffusers: ``downscale_freq_shift``).
    """
    wide = compute_dtype(dtype)
    half = channels // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=wide, device=timestep.device) / (half - shift))
    angle = timestep[:, None].to(wide) * frequency
    waves = (angle.cos(), angle.sin()) if cosines_first else (angle.sin(), angle.cos())
    return torch.cat(waves, dim=-1).to(dtype)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with every parameter 0: what joins another network begins by changing nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """(timestep [B], pooled text [B, P]) -> conditioning [B, C]; with ``guidance`` (models distilled from guidance) also of its scale [B]."""

    WAVES = 256

    def __init__(self, channels: int, pooled_channels: int, guidance: bool = False):
        super().__init__()
        self.timestep_embedder = MLPEmbedder(self.WAVES, channels)
        self.guidance_embedder = MLPEmbedder(self.WAVES, channels) if guidance else None
        self.text_embedder = MLPEmbedder(pooled_channels, channels)

    def forward(self, timestep: torch.Tensor, pooled: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        time = self.timestep_embedder(timestep_waves(timestep, self.WAVES, pooled.dtype))
        if guidance is not None:
            time = time + self.guidance_embedder(timestep_waves(guidance, self.WAVES, pooled.dtype))
        return time + self.text_embedder(pooled)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a gain, rounding as diffusers' RMSNorm does (see kernels/adaln/reference.py)."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.to(compute_dtype(x.dtype)).pow(2).mean(-1, keepdim=True)
        y = x * torch.rsqrt(variance + self.eps)
        return y.to(self.weight.dtype) * self.weight if self.weight.dtype in (torch.float16, torch.bfloat16) else y * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


RMS_NORMS.add(RMSNorm)


class AdaLayerNormZero(nn.Module):
    """adaLN-Zero (Peebles and Xie, 2023): ``parts`` chunks of one projection. With 3 (Flux's single blocks) there is one gate and no second
    modulation; with 9 (SD3.5) one norm feeds two modulations."""

    def __init__(self, channels: int, parts: int = 6, how: How = How()):
        super().__init__()
        self.parts, self.how = parts, how
        self.silu = nn.SiLU()
        self.linear = nn.Linear(channels, parts * channels)
        self.norm = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)

    def forward(self, x: torch.Tensor, emb: torch.Tensor):
        return {3: ada_layer_norm_zero_single, 6: ada_layer_norm_zero, 9: ada_layer_norm_zero_x}[self.parts](self, x, emb, self.how)


def for_all(batch: int, *streams: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A stream [1, ...] for all samples, as the product with a modulation of ``batch`` rows broadcasts it in stock; others as they are."""
    return tuple(stream.expand(batch, *stream.shape[1:]) if stream.shape[0] == 1 != batch else stream for stream in streams)


def modulations(module, x: torch.Tensor, emb: torch.Tensor, parts: int, how: How) -> tuple[torch.Tensor, ...]:
    """The chunks of the projected conditioning [B, C], or [1, C] for all samples of x."""
    rows = linear(module.linear, emb, how)
    return (rows.expand(x.shape[0], -1) if rows.shape[0] == 1 != x.shape[0] else rows).chunk(parts, dim=1)


def ada_layer_norm_zero(module, x, emb, how: How):
    """-> (modulated x [B, T, C], gate_msa, shift_mlp, scale_mlp, gate_mlp [B, C])."""
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulations(module, x, module.silu(emb), 6, how)
    y = ops.adaln_modulate(norm_input(x), shift_msa, scale_msa, eps=module.norm.eps, numerics=how.numerics)
    return y, gate_msa, shift_mlp, scale_mlp, gate_mlp


def ada_layer_norm_zero_x(module, x, emb, how: How):
    """-> (modulated x, gate_msa, shift_mlp, scale_mlp, gate_mlp, second modulated x, gate_msa2)."""
    (shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp,
     shift_msa2, scale_msa2, gate_msa2) = modulations(module, x, module.silu(emb), 9, how)
    y, y2 = ops.adaln_modulate_dual(norm_input(x), shift_msa, scale_msa, shift_msa2, scale_msa2, eps=module.norm.eps, numerics=how.numerics)
    return y, gate_msa, shift_mlp, scale_mlp, gate_mlp, y2, gate_msa2


def ada_layer_norm_zero_single(module, x, emb, how: How):
    """-> (modulated x, gate): of Flux's single blocks."""
    shift, scale, gate = modulations(module, x, module.silu(emb), 3, how)
    return ops.adaln_modulate(norm_input(x), shift, scale, eps=module.norm.eps, numerics=how.numerics), gate


class AdaLayerNormContinuous(nn.Module):
    """The modulation without a gate: the last context block's, and the final norm's. Chunks are scale, shift."""

    def __init__(self, channels: int, how: How = How()):
        super().__init__()
        self.how = how
        self.silu = nn.SiLU()
        self.linear = nn.Linear(channels, 2 * channels)
        self.norm = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)

    def forward(self, x: torch.Tensor, conditioning_embedding: torch.Tensor) -> torch.Tensor:
        return ada_layer_norm_continuous(self, x, conditioning_embedding, self.how)


def ada_layer_norm_continuous(module, x, emb, how: How) -> torch.Tensor:
    scale, shift = modulations(module, x, module.silu(emb).to(x.dtype), 2, how)
    return ops.adaln_modulate(norm_input(x), shift, scale, eps=module.norm.eps, numerics=how.numerics)


def gate_residual_norm(norm: nn.Module, x, y, gate, shift, scale, how: How, y2=None, gate2=None):
    """-> (r, norm(r) * (1 + scale) + shift) with ``r = x + gate * y (+ gate2 * y2)``; an observed or unusual norm, and
    one that autocast casts for, is called."""
    if plain_layer_norm(norm) and not autocasts_norms(x):
        return ops.gate_residual_adaln(x, y, gate, shift, scale, y2=y2, gate2=gate2, eps=norm.eps, numerics=how.numerics)
    r = ops.gate_residual(x, y, gate, numerics=how.numerics)
    if y2 is not None:
        r = ops.gate_residual(r, y2, gate2, numerics=how.numerics)
    return r, norm(r) * (1 + scale[:, None]) + shift[:, None]
