"""diffusers' schedulers whose step is one call of ``ops.solver_step``; each file fills ``KNOWN``."""
