"""``ops.linear`` in close, by the compiled library."""

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.linear import native


def close(x, weight, bias, **options):
    """Wherever the library can serve the call, also where the dispatcher would prefer PyTorch's own product; as dispatched elsewhere."""
    with forced("cpu"):
        why_not = native.why_not_cpu(x, weight, bias, options.get("activation") or "none", options.get("gate"), options.get("residual"), False)
    with forced(None if why_not else "cpu"):
        return ops.linear(x, weight, bias, numerics="close", **options)
