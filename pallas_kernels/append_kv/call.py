"""The record of arguments of `append_kv`."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from pallas_kernels.checks import Pool


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """The arguments of `api.append_kv`, checked; page ids and offsets are int32."""

    pool: Pool
    k: Float[Array, "tokens kv_heads head_dim"]
    v: Float[Array, "tokens kv_heads head_dim"]
    page_ids: Int[Array, " tokens"]
    offsets: Int[Array, " tokens"]
    layer: int | Int[Array, ""]
