"""Copies whole pages, in all layers."""

from pallas_kernels.copy_pages.api import copy_pages as copy_pages
