"""Mosaic TPU kernels: v5e, v5p, v6e, v7x."""
