"""Triton kernels. Nothing here imports triton before one of the modules is asked for."""
