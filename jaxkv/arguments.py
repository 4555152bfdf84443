"""Checks numeric arguments from Python, NumPy or JAX and converts them to Python numbers."""

from pallas_kernels.arguments import integer, real, whole

__all__ = ["integer", "real", "whole"]
