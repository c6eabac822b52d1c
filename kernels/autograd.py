"""Gradients of a fused op: by a kernel (``fused``), or by differentiating the reference, recomputed (``recomputing``).

A gradient is never dropped: what the op's autograd formula does not compute by a kernel, it computes from the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad


def recomputing(reference: Callable) -> tuple[Callable, Callable]:
    """(backward, setup_context) for ``torch.library.register_autograd``.

    ``reference`` takes the op's arguments and is made of differentiable PyTorch calls; the backward recomputes it from the saved inputs.
    The backward is itself differentiable (``create_graph=True``).
    """

    def setup_context(ctx, inputs, output):
        ctx.layout = tuple(isinstance(value, torch.Tensor) for value in inputs)
        ctx.rest = tuple(None if isinstance(value, torch.Tensor) else value for value in inputs)
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, torch.Tensor)))

    def backward(ctx, *grads):
        return _recompute(reference, ctx, ctx.saved_tensors, grads)

    return backward, setup_context


def _recompute(reference: Callable, ctx, tensors: Sequence[torch.Tensor], grads: tuple) -> tuple:
    """The gradients of the op's arguments, of which ``tensors`` are those that were saved, first."""
    saved = iter(tensors)
    again = torch.is_grad_enabled()  # create_graph=True: differentiate through the saved tensors themselves
    arguments, wanted = [], []
    for is_tensor, value, needed in zip(ctx.layout, ctx.rest, ctx.needs_input_grad):
        if is_tensor:
            value = next(saved)
            if needed:
                value = value.view_as(value) if again else value.detach().requires_grad_()
                wanted.append(value)
            elif not again:
                value = value.detach()
        arguments.append(value)
    with torch.enable_grad():
        outputs = reference(*arguments)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    pairs = [(out, grad) for out, grad in zip(outputs, grads) if grad is not None and out.requires_grad]
    found = torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=again,
                                allow_unused=True) if pairs else [None] * len(wanted)
    # What has no elements, and what a result without elements was made of, may not have been used: no gradient is one of its own shape
    empty = all(not out.numel() for out in outputs)
    found = iter([torch.zeros_like(value) if gradient is None and (empty or not value.numel()) else gradient for value, gradient in zip(wanted, found)])
    return tuple(next(found) if is_tensor and needed else None for is_tensor, needed in zip(ctx.layout, ctx.needs_input_grad))


def fused(reference: Callable, gradients: Callable, recomputed_for: Callable[..., bool], *, kept: slice | None = None) -> tuple[Callable, Callable]:
    """(backward, setup_context) for ``torch.library.register_autograd``, with a kernel for the backward.

    ``gradients(needed, grads, *args)`` returns one gradient (or None) for each of the op's arguments ``args``; ``needed`` says which are wanted,
    ``grads`` are those of the outputs, None where an output was not used. The reference is differentiated instead where
    ``recomputed_for(*args)`` holds (``exact``: the gradients are then those of the stock code, bit for bit), and where the gradients are to be
    differentiated themselves (``create_graph=True``, or forward mode). ``kept``: which of the op's outputs are kept too, unchanged; ``gradients`` gets
    them after ``args``.
    """
    _, keep_inputs = recomputing(reference)

    def setup_context(ctx, inputs, output):
        keep_inputs(ctx, inputs, output)
        if kept is not None:
            ctx.set_materialize_grads(False)  # None, not zeros: what follows from an output that was not used need not be computed
            ctx.save_for_backward(*(value for value in inputs if isinstance(value, torch.Tensor)), *output[kept])

    def backward(ctx, *grads):
        tensors = ctx.saved_tensors  # asked for once: activation checkpointing makes them anew at each request, and allows one
        saved = iter(tensors)
        arguments = [next(saved) if is_tensor else value for is_tensor, value in zip(ctx.layout, ctx.rest)]
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or recomputed_for(*arguments):
            return _recompute(reference, ctx, tensors, grads)
        return gradients(ctx.needs_input_grad, grads, *arguments, *saved)

    return backward, setup_context


def over_rows(x: torch.Tensor) -> torch.Tensor:
    """The sum over all dimensions but the last, [C]: what a bias gets. Of x [C] a copy, where ``x.sum(())`` would be one number."""
    rows = tuple(range(x.dim() - 1))
    return x.sum(rows) if rows else x.clone()
