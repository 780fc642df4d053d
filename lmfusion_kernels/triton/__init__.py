"""Triton kernels. The package itself does not import triton; its modules do."""
