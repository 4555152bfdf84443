"""Moves many pages within the pool at once."""

from pallas_kernels.move_pages.api import move_pages as move_pages
