"""Stable Diffusion 3 and 3.5: what is swapped in ``SD3Transformer2DModel`` and its ControlNets (and in whatever else is built of their blocks)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import SD35AdaLayerNormZeroX
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock, SD3Transformer2DModel

from fusewire.models import layers
from fusewire.models.controlnet_sd3 import single_block
from fusewire.models.layers import How, plain_layer_norm
from fusewire.models.mmdit import joint_block
from fusewire.swap.attention import attention_candidates
from fusewire.swap.families import Candidate, Family
from fusewire.swap.fused import ANNOUNCE, CARRIES, MAKERS, announce_block, stock_of, unknown_forward
from fusewire.swap.parts import NORMS, candidate, feed_forward_candidates, norm_candidates

OPS = ("adaln_modulate", "adaln_modulate_dual", "gate_residual", "gate_residual_adaln", "qk_norm_rope", "attention", "linear")

# The stock methods that our forwards stand for, as diffusers 0.40 to 0.42 has them.
BLOCK = {JointTransformerBlock.forward: ("f12a42101b07",)}
SINGLE_BLOCK = {SD3SingleTransformerBlock.forward: ("6350df9ef738", "1aeb7e4de380")}
ADALN_ZERO_X = {SD35AdaLayerNormZeroX.forward: ("4f1a3bc7c343",)}

GATES = ("gate_residual", "gate_residual_adaln")
# Stock block -> its forward, and what finds the candidates in which of its parts
BLOCKS = {
    JointTransformerBlock: (BLOCK, {norm_candidates: ("norm1", "norm1_context"), attention_candidates: ("attn", "attn2"),
                                    feed_forward_candidates: ("ff", "ff_context")}),
    SD3SingleTransformerBlock: (SINGLE_BLOCK, {norm_candidates: ("norm1",), attention_candidates: ("attn",), feed_forward_candidates: ("ff",)}),
}


def _block(how: How) -> dict:
    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        if self._chunk_size is not None:
            return JointTransformerBlock.forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        context, x = joint_block(self, hidden_states, encoder_hidden_states, temb, how, joint_attention_kwargs)
        return context, _laid_as(hidden_states, x, how)

    return {"forward": forward}


def _single_block(how: How) -> dict:
    def forward(self, hidden_states, temb):
        return _laid_as(hidden_states, single_block(self, hidden_states, temb, how), how)

    return {"forward": forward}


def _laid_as(stream: torch.Tensor, x: torch.Tensor, how: How) -> torch.Tensor:
    return x.mT.contiguous().mT if how.keeps_layout and not stream.is_contiguous() else x


def _adaln_zero_x(how: How) -> dict:
    def forward(self, hidden_states, emb=None):
        if not plain_layer_norm(self.norm):
            return SD35AdaLayerNormZeroX.forward(self, hidden_states, emb)
        return layers.ada_layer_norm_zero_x(self, hidden_states, emb, how)

    return {"forward": forward}


MAKERS.update({JointTransformerBlock: _block, SD3SingleTransformerBlock: _single_block, SD35AdaLayerNormZeroX: _adaln_zero_x})
NORMS[SD35AdaLayerNormZeroX] = (ADALN_ZERO_X, "adaln_modulate_dual")
ANNOUNCE[JointTransformerBlock] = announce_block
CARRIES.update({JointTransformerBlock: GATES, SD3SingleTransformerBlock: GATES, SD35AdaLayerNormZeroX: ("adaln_modulate_dual",),
                SD3Transformer2DModel: ("adaln_modulate",)})


def candidates(name: str, instance, how: How) -> Iterator[Candidate]:
    """A block with its parts, or the final norm of an ``SD3Transformer2DModel``.

    A block's output may go into a product without a norm between, as a ControlNet's does: in ``exact`` it lies as stock's, which is as the block's input.
    Not in the transformer, whose final norm makes it contiguous.
    """
    stock = stock_of(instance) or type(instance)
    dot = f"{name}." if name else ""
    if stock is SD3Transformer2DModel:
        yield from norm_candidates(f"{dot}norm_out", instance.norm_out, how)
        for index, block in enumerate(instance.transformer_blocks):
            kind = stock_of(block) or type(block)
            if kind in BLOCKS and not unknown_forward(BLOCKS[kind][0]):
                yield candidate(f"{dot}transformer_blocks.{index}", block, GATES, how, "")
    if stock not in BLOCKS:
        return
    known, parts = BLOCKS[stock]
    yield candidate(name or "block", instance, GATES, how._replace(keeps_layout=how.numerics == "exact"), unknown_forward(known))
    for find, names in parts.items():
        for part in names:
            if getattr(instance, part) is not None:
                yield from find(dot + part, getattr(instance, part), how)


FAMILY = Family("sd3", OPS, candidates)
