"""The record of arguments of `move_pages`."""

from dataclasses import dataclass

from jaxtyping import Array, Int

from pallas_kernels.checks import Pool


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """The arguments of `api.move_pages`, checked; page ids are int32."""

    pool: Pool
    targets: Int[Array, " pages"]
