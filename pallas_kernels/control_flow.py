"""Loops and branches that also work inside `jax.shard_map` with its default checks.

There an array's type includes the mesh axes over which its values vary. A loop's carry must keep its type,
and both branches of a `cond` must have the same type. So a constant initial carry, which does not vary, is
refused if an iteration makes it vary. These functions convert the initial carry to the final type. Outside
`shard_map` they are the functions of `jax.lax`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
from jax import lax

_Carry = TypeVar("_Carry")
_Axes = list[frozenset[str]]


def fori_loop(lower: Any, upper: Any, body: Callable[[Any, _Carry], _Carry], carry: _Carry) -> _Carry:
    """As `jax.lax.fori_loop`."""
    if not _in_shard_map():
        return lax.fori_loop(lower, upper, body, carry)
    # If the bounds vary, the number of steps varies, and so does everything that a step changes.
    bounds = _axes_of((lower, upper))
    lower = _vary(lower, axes=bounds)
    axes = _loop_axes(partial(body, lower), carry, bounds)
    return lax.fori_loop(lower, upper, lambda i, carry: _typed(body(i, carry), axes), _typed(carry, axes))


def while_loop(condition: Callable[[_Carry], Any], body: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """As `jax.lax.while_loop`."""
    if not _in_shard_map():
        return lax.while_loop(condition, body, carry)
    axes = _loop_axes(body, carry, frozenset())
    # The number of steps varies over the axes over which the condition varies.
    steps = frozenset().union(*_result_axes(lambda: condition(_typed(carry, axes))))
    axes = _loop_axes(body, carry, steps)
    return lax.while_loop(condition, lambda carry: _typed(body(carry), axes), _typed(carry, axes))


def cond(predicate: Any, true_branch: Callable[[], Any], false_branch: Callable[[], Any]) -> Any:
    """As `jax.lax.cond`, for branches without arguments."""
    if not _in_shard_map():
        return lax.cond(predicate, true_branch, false_branch)
    both = zip(_result_axes(true_branch), _result_axes(false_branch), strict=True)
    axes = [one | other for one, other in both]

    return lax.cond(predicate, lambda: _typed(true_branch(), axes), lambda: _typed(false_branch(), axes))


def _in_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _loop_axes(step: Callable[[_Carry], _Carry], carry: _Carry, steps: frozenset[str]) -> _Axes:
    """For each leaf of the carry, the axes over which it varies initially or after any step.

    `steps` are the axes over which the number of steps varies; the carry varies over them too.
    """
    before = [_axes(leaf) | steps for leaf in jax.tree.leaves(carry)]
    while True:
        after = _result_axes(partial(_step_typed, step, carry, before))
        wanted = [old | new for old, new in zip(before, after, strict=True)]
        if wanted == before:
            return before
        before = wanted


def _step_typed(step: Callable[[_Carry], _Carry], carry: _Carry, axes: _Axes) -> _Carry:
    return step(_typed(carry, axes))


def _result_axes(function: Callable[[], Any]) -> _Axes:
    return [_aval_axes(aval) for aval in jax.make_jaxpr(function)().out_avals]


def _typed(tree: Any, axes: _Axes) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(_vary(leaf, axes=more) for leaf, more in zip(leaves, axes, strict=True))


def _vary(leaf: Any, *, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _axes(leaf)))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf


def _axes_of(tree: Any) -> frozenset[str]:
    return frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(tree)))


def _axes(leaf: Any) -> frozenset[str]:
    return _aval_axes(jax.typeof(leaf))


def _aval_axes(aval: Any) -> frozenset[str]:
    return frozenset(aval.mat.varying)
