"""Public ops: one signature and docstring each, dispatched over the kernels below."""
