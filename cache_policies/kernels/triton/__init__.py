"""Triton kernels for GPUs: host side here, device functions in ``device``."""
