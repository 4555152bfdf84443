"""Causal attention over ragged sequences with paged K and V."""

from pallas_kernels.paged_attention.api import paged_attention as paged_attention
