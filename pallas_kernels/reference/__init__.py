"""The operations in NumPy float64, which every backend is held to, and the cases they are compared in."""

from pallas_kernels.reference.operations import attention as attention
from pallas_kernels.reference.operations import softmax as softmax
from pallas_kernels.reference.operations import paged_attention as paged_attention
from pallas_kernels.reference.operations import attention_mass as attention_mass
from pallas_kernels.reference.operations import append_kv as append_kv
from pallas_kernels.reference.operations import copy_pages as copy_pages
from pallas_kernels.reference.operations import move_pages as move_pages
from pallas_kernels.reference.operations import encode as encode
from pallas_kernels.reference.operations import dequantize as dequantize
from pallas_kernels.reference.operations import unscaled as unscaled
from pallas_kernels.reference.operations import read_pages as read_pages
