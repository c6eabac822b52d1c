"""Triton's interpreter in half of its time, with the same results: what it finds out anew for each operation or launch is remembered.

Numbers are computed as before; only names, dtypes and shapes are.
"""

import inspect

from triton.language import core, semantic
from triton.runtime import interpreter


def remap_once() -> None:
    """Triton's interpreter remaps its language, some thousand names, at every call of a device function: half of the time of our tests in it. The names of a
    module are the same throughout a launch: there, once will do."""
    remap, run, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def remap_unless_done(function):
        if (module := id(function.__globals__)) in done:
            return None  # asked for by a device function, which does not look at it
        done.add(module)
        return remap(function)

    def run_anew(self, *args, **kwargs):
        done.clear()
        try:
            return run(self, *args, **kwargs)
        finally:
            done.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = remap_unless_done, run_anew


def remember() -> None:
    """What the interpreter finds out anew for each operation or launch, and is the same each time: numpy's dtypes, and which names of a module are builtins."""
    builtins, dtypes = {}, {}
    np_dtype = interpreter._get_np_dtype

    def remembered_dtype(dtype):
        key = str(dtype.scalar)
        if key not in dtypes:
            dtypes[key] = np_dtype(dtype)
        return dtypes[key]

    def patch_remembered(package, builder, scope):
        if id(package) not in builtins:
            builtins[id(package)] = [(name, member) for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        for name, member in builtins[id(package)]:
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._get_np_dtype, interpreter._patch_builtin = remembered_dtype, patch_remembered


def remember_shapes() -> None:
    """The language wraps each number of a shape, and checks the shape, for the type of every block and for every block: some thousand times a launch. Blocks
    of one shape share it here, and those that do are not made compatible anew."""
    init_block, init_tensor, compatible = core.block_type.__init__, core.tensor.__init__, semantic.TritonSemantic.broadcast_impl_value
    blocks, tensors = {}, {}

    def block_type(self, element_ty, shape):
        key = tuple(s if type(s) is int else core._unwrap_if_constexpr(s) for s in shape)
        if key in blocks:
            self.element_ty, (self.shape, self.numel, written) = element_ty, blocks[key]
            self.name = f"<{written}, {element_ty.name}>"
        else:
            init_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, str(self.shape)

    def tensor(self, handle, type):
        key = type.shape if type.is_block() else ()
        if key in tensors:
            self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, tensors[key]
        else:
            init_tensor(self, handle, type)
            tensors[key] = self.shape, self.numel

    def broadcast(self, lhs, rhs):
        return (lhs, rhs) if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape else compatible(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__, semantic.TritonSemantic.broadcast_impl_value = block_type, tensor, broadcast


def install() -> None:
    """Once for the process."""
    remap_once()
    remember()
    remember_shapes()
