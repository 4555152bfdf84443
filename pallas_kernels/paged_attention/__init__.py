"""Causal attention over ragged sequences whose K and V lie in pages."""

from pallas_kernels.paged_attention.api import paged_attention as paged_attention
