"""Of what the rooms share: files of kernels/ itself, and tests of tests/kernels itself."""

from tests.mutants.mutant import of_room

mutant = of_room("")
MUTANTS = (
    mutant("alignment is no part of a kind", "kernels/plans.py", "arg.get_device(), arg.data_ptr() & 15)", "arg.get_device())", "test_plans.py"),
    mutant("strides are no part of a kind", "kernels/plans.py", "arg.shape, arg.stride(), arg.get_device()", "arg.shape, arg.get_device()", "test_plans.py"),
    mutant("1 is True", "kernels/plans.py", "key += (arg, arg.__class__)", "key += (arg,)", "test_plans.py"),
    mutant("a view begins where its tensor does", "kernels/plans.py", "source.storage_offset() + self.offset)", "source.storage_offset())", "test_plans.py"),
    mutant("an address is that of the whole", "kernels/plans.py", "values[i] = addresses[source] + offset", "values[i] = addresses[source]", "test_plans.py"),
    mutant("one tensor given twice is told apart", "kernels/plans.py", "            if args[i] is not args[j]:\n", "            if False:\n", "test_plans.py"),
    mutant("work beside the launches is forgotten", "kernels/plans.py", 'self.reason = f"{name} computes"', "pass", "test_plans.py"),
    mutant("a dispatch mode sees nothing", "kernels/plans.py", "if torch._C._len_torch_dispatch_stack() or self.visible()", "if self.visible()", "test_plans.py"),
    mutant("an error leaves its recorder behind", "kernels/plans.py", "        finally:\n            del recorders[thread]\n", "        finally:\n            pass\n", "test_plans.py"),
    mutant("an op past its formula drops gradients", "kernels/dispatch.py", "if _is_inference() or forward_ad._current_level >= 0 or _is_grad_enabled() and (_any_requires_grad(*args) or _transforms_active()):", "if _is_inference():",
           "test_unrecorded.py"),
    mutant("versions stay behind", "kernels/dispatch.py", "        increment_version([args[i] for i in written])\n", "", "test_unrecorded.py"),
    mutant("the formula is always asked", "kernels/dispatch.py", "        with _BelowAutograd():\n            return call(*args)\n", "        return call(*args)\n", "test_unrecorded.py"),
)
