"""The attention that each token slot received, for policies that drop tokens that receive little."""

from pallas_kernels.attention_mass.api import attention_mass as attention_mass
