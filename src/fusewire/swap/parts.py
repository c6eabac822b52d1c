"""Parts of diffusers that several families are built of: modulating norms, feed-forwards, linears. What carries an op, and what stays and why."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm
from torch import nn

from fusewire.models import feed_forward, layers
from fusewire.models.layers import How, plain_layer_norm
from fusewire.swap.custom import called_linear, described
from fusewire.swap.families import Candidate
from fusewire.swap.fused import CARRIES, MAKERS, fused_class, stock_of, unknown_forward

# The stock methods that our forwards stand for, as diffusers 0.40 to 0.42 has them.
ADALN_ZERO = {AdaLayerNormZero.forward: ("690b44401a6e",)}
ADALN_ZERO_SINGLE = {AdaLayerNormZeroSingle.forward: ("ff138e112a4f",)}
ADALN_CONTINUOUS = {AdaLayerNormContinuous.forward: ("55cf4ec15e80",)}
RMS_NORM = {RMSNorm.forward: ("692c06909233", "fa67df9e7dd9")}
FEED_FORWARD = {FeedForward.forward: ("1c9cc6e8159c",)}
GEGLU_PROJECTION = {GEGLU.forward: ("bea068926b45", "9eec700025e2"), GEGLU.gelu: ("093eb05e6d9e",)}
GELU_PROJECTION = {GELU.forward: ("1e920b8c9a7d", "87ac7265011e"), GELU.gelu: ("c95d6b6161e5",)}

KEEPS_ATTENTION = "exact keeps PyTorch's attention, whose bits no other kernel gives; numerics='close' puts the fused attention here"
KEEPS_LINEAR = "exact keeps the stock matrix products; numerics='close' puts the fused linears with their epilogues here"

if not unknown_forward(RMS_NORM):
    layers.RMS_NORMS.add(RMSNorm)
if not unknown_forward(GELU_PROJECTION):
    feed_forward.GELU_PROJECTIONS.add(GELU)
if not unknown_forward(GEGLU_PROJECTION):
    feed_forward.GEGLU_PROJECTIONS.add(GEGLU)


def _adaln_zero(how: How) -> dict:
    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if not plain_layer_norm(self.norm):
            return AdaLayerNormZero.forward(self, x, timestep, class_labels, hidden_dtype, emb)
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        return layers.ada_layer_norm_zero(self, x, emb, how)

    return {"forward": forward}


def _adaln_zero_single(how: How) -> dict:
    def forward(self, x, emb=None):
        if not plain_layer_norm(self.norm):
            return AdaLayerNormZeroSingle.forward(self, x, emb)
        return layers.ada_layer_norm_zero_single(self, x, emb, how)

    return {"forward": forward}


def _adaln_continuous(how: How) -> dict:
    def forward(self, x, conditioning_embedding):
        if not plain_layer_norm(self.norm):
            return AdaLayerNormContinuous.forward(self, x, conditioning_embedding)
        return layers.ada_layer_norm_continuous(self, x, conditioning_embedding, how)

    return {"forward": forward}


def _feed_forward(how: How) -> dict:
    def forward(self, hidden_states, *args, **kwargs):
        if args or kwargs:
            return FeedForward.forward(self, hidden_states, *args, **kwargs)
        hidden, output = feed_forward.feed_forward_hidden(self, hidden_states, how)
        return layers.linear(output, hidden, how)

    return {"forward": forward, "takes_gate": True}


MAKERS.update({AdaLayerNormZero: _adaln_zero, AdaLayerNormZeroSingle: _adaln_zero_single, AdaLayerNormContinuous: _adaln_continuous,
               FeedForward: _feed_forward})
CARRIES.update({FeedForward: ("linear",), **dict.fromkeys((AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous), ("adaln_modulate",))})
# Norm class -> (what was verified of it, the op it carries); families add their own.
NORMS = {AdaLayerNormZero: (ADALN_ZERO, "adaln_modulate"), AdaLayerNormZeroSingle: (ADALN_ZERO_SINGLE, "adaln_modulate"),
         AdaLayerNormContinuous: (ADALN_CONTINUOUS, "adaln_modulate")}


def candidate(name: str, instance, ops: tuple[str, ...], how: How, reason: str) -> Candidate:
    """An instance that carries ``ops``, unless there is a reason why not."""
    stock = stock_of(instance) or type(instance)
    return Candidate(name, instance, ops, None if reason else fused_class(stock, how), reason)


def norm_candidates(name: str, norm: nn.Module, how: How) -> Iterator[Candidate]:
    """A modulating norm: a LayerNorm without weight, and the linear that gives its modulation."""
    known, op = NORMS.get(stock_of(norm) or type(norm), (None, "adaln_modulate"))
    if known is None:
        yield Candidate(name, norm, (op,), None, f"{type(norm).__name__} is not a norm that we know")
        return
    reason = unknown_forward(known)
    if not reason and not (type(norm.norm) is nn.LayerNorm and norm.norm.weight is None):
        reason = f"its norm is {described(norm.norm)}, not a LayerNorm without weight"
    yield candidate(name, norm, (op,), how, reason)
    yield from called_linear(f"{name}.linear", getattr(norm, "linear", None), how)


def feed_forward_candidates(name: str, module: nn.Module, how: How) -> Iterator[Candidate]:
    """A feed-forward of GELU-tanh or GEGLU, Dropout, Linear."""
    stock = stock_of(module) or type(module)
    if how.numerics == "exact":
        yield Candidate(name, module, ("linear",), None, KEEPS_LINEAR, by_choice=True)
        if stock is FeedForward and _is_known(module.net):
            yield from _called_projections(name, module, how)
        return
    if not how.linear:
        return
    if stock is not FeedForward:
        reason = f"{type(module).__name__} is not a feed-forward that we know"
    elif not _is_known(module.net):
        reason = f"its layers are {', '.join(type(part).__name__ for part in module.net)}, not GELU-tanh or GEGLU, Dropout, Linear"
    else:
        reason = unknown_forward(FEED_FORWARD) or unknown_forward(GEGLU_PROJECTION if type(module.net[0]) is GEGLU else GELU_PROJECTION)
    yield candidate(name, module, ("geglu", "linear") if not reason and type(module.net[0]) is GEGLU else ("linear",), how, reason)
    if not reason:
        yield from _called_projections(name, module, how)


def _called_projections(name: str, module: FeedForward, how: How) -> Iterator[Candidate]:
    yield from called_linear(f"{name}.net.0.proj", module.net[0].proj, how)
    yield from called_linear(f"{name}.net.2", module.net[2], how)


def _is_known(net: nn.ModuleList) -> bool:
    known = len(net) == 3 and type(net[1]) is nn.Dropout
    return known and (type(net[0]) is GEGLU or type(net[0]) is GELU and net[0].approximate == "tanh")


def attention_layer(name: str, module: nn.Module, how: How, has_norm: bool, reason: str, projections: tuple[str, ...]) -> Iterator[Candidate]:
    """An attention layer that stays for ``reason``, or carries the fused attention, or in exact its QK norm, if it has one.

    ``projections``: names of the linears that it would read.
    """
    ops = (("attention",) if how.attention else ("qk_norm_rope",) if has_norm else ()) + (("linear",) if how.linear else ())
    if reason:
        yield Candidate(name, module, ops or ("attention",), None, reason)
        return
    if ops:
        yield candidate(name, module, ops, how, "")
    if how.numerics == "exact":
        yield Candidate(name, module, ("attention",), None, KEEPS_ATTENTION, by_choice=True)
        yield Candidate(name, module, ("linear",), None, KEEPS_LINEAR, by_choice=True)
    for part in projections:
        yield from called_linear(f"{name}.{part}", getattr(module, part, None), how)
    if getattr(module, "to_out", None) is not None:
        yield from called_linear(f"{name}.to_out.0", module.to_out[0], how)
