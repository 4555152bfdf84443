"""K and V as integers of 16 bits, with one scale per token and KV head."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.formats.base import Format


@dataclass(frozen=True)
class Int16(Format):
    """The defaults of `Format` say the rest."""

    name = "int16"
    storage_dtype = "int16"
    bits = 16
    quantized = True

    def encode(self, values, *, keys):
        values = jnp.nan_to_num(values.astype(jnp.float32))
        scales = jnp.maximum(jnp.abs(values).max(axis=-1) / 32767, 1e-30)
        return jnp.round(values / scales[..., None]).astype(jnp.int16), scales

    def decode(self, codes, scales, dtype):
        return (codes.astype(jnp.float32) * scales[..., None]).astype(dtype)

    def widen(self, codes):
        return codes.astype(jnp.float32)

    def lacks(self, device, row_size, *, converts=True):
        return (
            self.name if converts else None
        )  # on a GPU "auto" then takes `xla`


FORMATS = (Int16(),)
