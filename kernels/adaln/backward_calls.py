"""What the rows of the backward ops that launch from Python have in common: which arguments have a gradient, by name and in the ops' order."""

from __future__ import annotations

from collections.abc import Callable

NONE, LAYER, RMS = 0, 1, 2  # which norm the forward applied
ROWWISE = ("x", "y", "y2")
MODULATIONS = ("gate", "gate2", "shift", "scale", "shift2", "scale2")
VECTORS = ("weight", "bias")  # their sums go over the samples too


def calls(backward: Callable) -> tuple[Callable, Callable, Callable, Callable]:
    """The backward of adaln_modulate, adaln_modulate_dual, gate_residual and gate_residual_adaln, with the ops' arguments.

    ``backward(wanted, norm, eps, grad, grad1, grad2, arguments)`` returns the gradients of ``arguments``, in their order; bit i of ``wanted`` asks for
    the i-th. ``grad``: of the residual, where there are gates; ``grad1``, ``grad2``: of the modulated norms.
    """

    def adaln_modulate_backward(grad, x, shift, scale, weight, bias, eps: float, rms: bool, wanted: int):
        arguments = {"x": x, "shift": shift, "scale": scale, "weight": weight, "bias": bias}
        return backward(wanted, RMS if rms else LAYER, eps, None, grad, None, arguments)

    def adaln_modulate_dual_backward(grad, grad2, x, shift, scale, shift2, scale2, weight, bias, eps: float, rms: bool, wanted: int):
        arguments = {"x": x, "shift": shift, "scale": scale, "shift2": shift2, "scale2": scale2, "weight": weight, "bias": bias}
        return backward(wanted, RMS if rms else LAYER, eps, None, grad, grad2, arguments)

    def gate_residual_backward(grad, y, gate, wanted: int):
        return backward(wanted, NONE, 0.0, grad, None, None, {"y": y, "gate": gate})

    def gate_residual_adaln_backward(grad, grad2, x, y, gate, y2, gate2, shift, scale, weight, bias, eps: float, rms: bool, wanted: int):
        arguments = {"x": x, "y": y, "gate": gate, "y2": y2, "gate2": gate2, "shift": shift, "scale": scale, "weight": weight, "bias": bias}
        return backward(wanted, RMS if rms else LAYER, eps, grad, grad2, None, arguments)

    return adaln_modulate_backward, adaln_modulate_dual_backward, gate_residual_backward, gate_residual_adaln_backward
