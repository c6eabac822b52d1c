"""What csrc/cpu/qk_norm_rope.cpp serves: the predicates of the room's CPU rows."""

from __future__ import annotations


def why_not_rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact) -> str:
    return "not written yet"


def why_not_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact) -> str:
    return "not written yet"
