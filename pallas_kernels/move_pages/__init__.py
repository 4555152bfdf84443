"""Many pages to new places at once."""

from pallas_kernels.move_pages.api import move_pages as move_pages
