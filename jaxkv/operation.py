"""Wraps a function of a cache in `jax.jit`, and makes it work on meshes with explicit axes.

Inside the caller's `jit`, all layers of a model share one trace of the function. The compiler inlines it, so
updates stay in place.

On a mesh with explicit axes, the default of `jax.make_mesh`, sharding is part of an array's type, and each
gather would need an output sharding. Inside an operation the axes are automatic instead, so the compiler
chooses; the operation states how its results are sharded.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, PartitionSpec

_Function = TypeVar("_Function", bound=Callable)
REPLICATED = PartitionSpec()


def operation(
    *, results: Callable[..., Any], static: tuple[str, ...] = ()
) -> Callable[[_Function], _Function]:
    """A decorator that makes a function of arrays an operation.

    Args:
      results: called with the positional arguments; returns how the results are sharded over explicit axes,
        as a `PartitionSpec` or a tree prefix of them.
      static: names of the static keyword arguments.
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

        # Arrays that a function leaves unused still say on which devices it runs.
        return jax.jit(run, static_argnames=static, keep_unused=True)  # type: ignore[return-value]

    return decorate


def as_given(tree: Any) -> Any:
    """Partition specs for results that are sharded like these arguments."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def axis_of(array: Any, number: int) -> Any:
    """The mesh axes over which one axis of an array is sharded; None if it is not."""
    spec = jax.typeof(array).sharding.spec
    return spec[number] if number < len(spec) else None


def is_traced(tree: Any) -> bool:
    """Whether any array is of a function being traced."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def is_known(array: Any) -> bool:
    """Whether this process can read the array's value now."""
    return not is_traced(array) and (array.is_fully_addressable or array.is_fully_replicated)


def _explicit_mesh(arrays: Any) -> AbstractMesh | None:
    for leaf in jax.tree.leaves(arrays):
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty and mesh.explicit_axes:
            return mesh
    return None
