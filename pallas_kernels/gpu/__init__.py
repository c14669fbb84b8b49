"""Kernels for NVIDIA GPUs: Mosaic GPU for Hopper, Pallas-Triton for Ampere and Ada."""
