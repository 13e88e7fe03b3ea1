"""Triton kernels and their launchers, one file per op; `_define` imports a file on the first call of its op.

Each file exports the op's function (and ``<op>_bwd``) with exactly the schema's arguments, and takes and returns plain tensors.
"""
