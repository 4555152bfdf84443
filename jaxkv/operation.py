"""How a function of a cache is run: traced and compiled once for arguments of a kind, wherever it is called.

Within the caller's `jit` it is a function that the layers of a model share, so 24 layers are traced once; the
compiler inlines it, and what it updates stays in place. Outside it is a compiled program that is kept.

Over a mesh with explicit axes, the default of `jax.make_mesh`, how an array is sharded is part of its type,
and each gather would have to say what comes of it. Within an operation the compiler decides, as it does over
automatic axes; what is returned is sharded as the operation says.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, PartitionSpec

_Function = TypeVar("_Function", bound=Callable)
REPLICATED = PartitionSpec()


def operation(
    *, results: Callable[..., Any], static: tuple[str, ...] = ()
) -> Callable[[_Function], _Function]:
    """Makes a function of arrays an operation.

    Args:
      results: of the positional arguments; says how each result is sharded over explicit axes, as a
        `PartitionSpec`, or a pytree of them that the results begin like.
      static: names of its keyword arguments that are static.
    """

    def decorate(function: _Function) -> _Function:
        @wraps(function)
        def run(*arrays: Any, **options: Any) -> Any:
            mesh = _explicit_mesh(arrays)
            if mesh is None:
                return function(*arrays, **options)
            automatic = jax.sharding.auto_axes(
                partial(function, **options), axes=mesh.explicit_axes, out_sharding=results(*arrays)
            )
            known = not jax.sharding.get_abstract_mesh().empty
            with nullcontext() if known else jax.sharding.use_abstract_mesh(mesh):
                return automatic(*arrays)

        return jax.jit(run, static_argnames=static)  # type: ignore[return-value]

    return decorate


def as_given(tree: Any) -> Any:
    """Results that are sharded as these arguments are."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def axis_of(array: Any, number: int) -> Any:
    """The mesh axes that one axis of an array is sharded over; None for none."""
    spec = jax.typeof(array).sharding.spec
    return spec[number] if number < len(spec) else None


def _explicit_mesh(arrays: Any) -> AbstractMesh | None:
    for leaf in jax.tree.leaves(arrays):
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty and mesh.explicit_axes:
            return mesh
    return None
