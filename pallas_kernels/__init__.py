"""Attention over paged K and V, and the writes that go with it. Plain arrays in, plain arrays out.

Each operation has a folder: `api.py` checks the call, `call.py` is the record of it that `dispatch` hands to
the backend that serves it, `xla.py` is the specification and what a CPU runs, `triton` is the kernel in
Pallas Triton (CUDA and ROCm). `formats` says how K and V are stored.
"""

from pallas_kernels.append_kv import append_kv as append_kv
from pallas_kernels.attention_mass import attention_mass as attention_mass
from pallas_kernels.copy_pages import copy_pages as copy_pages
from pallas_kernels.dispatch import BACKENDS as BACKENDS
from pallas_kernels.dispatch import use_backend as use_backend
from pallas_kernels.move_pages import move_pages as move_pages
from pallas_kernels.paged_attention import paged_attention as paged_attention
