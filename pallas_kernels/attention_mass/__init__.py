"""The attention that each place of a sequence received, for policies that drop what receives little."""

from pallas_kernels.attention_mass.api import attention_mass as attention_mass
