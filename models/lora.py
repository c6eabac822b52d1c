"""A LoRA in a model of ours: peft's layers around its linears (Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models")."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def require_peft():
    """peft. ImportError that says what to do where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("a LoRA needs peft: pip install peft") from error
    return peft


def add_lora(model: nn.Module, weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Puts a LoRA on, under ``name``, in the place of one of that name, and switches others off.

    ``weights``: for each linear ``<linear>.lora_A.weight`` [rank, in] and ``<linear>.lora_B.weight`` [out, rank], its product with a scale of 1.
    """
    peft = require_peft()
    remove_lora(model, name)
    ranks = {key.removesuffix(".lora_A.weight"): value.shape[0] for key, value in weights.items() if key.endswith(".lora_A.weight")}
    config = peft.LoraConfig(r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=ranks, target_modules=list(ranks))
    peft.inject_adapter_in_model(config, model, adapter_name=name)
    peft.set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_adapter(name)


def remove_lora(model: nn.Module, name: str) -> None:
    """Takes a LoRA off, and peft's layers where they have no other. Nothing happens where there is none of that name."""
    for path, module in list(model.named_modules()):
        if not hasattr(module, "base_layer") or name not in getattr(module, "r", {}):
            continue
        module.delete_adapter(name)
        if not module.r:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base_layer)
    configs = getattr(model, "peft_config", {})  # what peft notes on a model
    configs.pop(name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
