"""Attention over paged K and V, and the writes to the pages. Takes and returns plain arrays.

Each operation has a folder: `api.py` checks the arguments, `call.py` is the record of them that `dispatch`
passes to a backend, `xla.py` is the specification and the CPU backend, `triton` is the Pallas Triton kernel
(CUDA and ROCm). `formats` defines how K and V are stored.
"""

from pallas_kernels.append_kv import append_kv as append_kv
from pallas_kernels.attention_mass import attention_mass as attention_mass
from pallas_kernels.copy_pages import copy_pages as copy_pages
from pallas_kernels.dispatch import BACKENDS as BACKENDS
from pallas_kernels.dispatch import use_backend as use_backend
from pallas_kernels.move_pages import move_pages as move_pages
from pallas_kernels.paged_attention import paged_attention as paged_attention
