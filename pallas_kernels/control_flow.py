"""Loops and branches that work within `jax.shard_map` too, with its default checks.

There the type of an array says over which mesh axes its values differ. A loop's carry must keep its type, and
both branches of a `cond` must return the same: a carry that begins with a constant, which differs over no
axis, is refused once an iteration adds something that does. Here it begins with the type that it ends with.
Outside `shard_map` these are the functions of `jax.lax`.
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
    # Where the bounds differ, so do the numbers of steps, and whatever a step changes.
    bounds = _axes_of((lower, upper))
    lower = _vary(lower, axes=bounds)
    axes = _loop_axes(partial(body, lower), carry, bounds)
    return lax.fori_loop(lower, upper, lambda i, carry: _typed(body(i, carry), axes), _typed(carry, axes))


def only_if(condition: Any, operation: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """The operation where the condition holds, else the carry as it is; in place.

    A loop of one trip or none. On a GPU the branches of `lax.cond` each get a pool of their own, 4 GiB of
    temporary memory for a pool of 4 GiB (benchmarks/check_aot.py); a loop's carry stays where it is.
    """
    return fori_loop(0, condition.astype("int32"), lambda _, carry: operation(carry), carry)


def skip_where_idle(condition: Any, operation: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """The operation, which may be skipped where the condition does not hold: it changes nothing then.

    A CPU skips it. On a GPU a loop waits for the device, which costs more than some small kernels.
    """
    skipped, done = _alike(lambda: only_if(condition, operation, carry), lambda: operation(carry))
    return lax.platform_dependent(cpu=skipped, default=done)


def while_loop(condition: Callable[[_Carry], Any], body: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """As `jax.lax.while_loop`."""
    if not _in_shard_map():
        return lax.while_loop(condition, body, carry)
    axes = _loop_axes(body, carry, frozenset())
    # The number of steps differs over every axis that the condition does.
    asked = frozenset().union(*_result_axes(lambda: condition(_typed(carry, axes))))
    axes = _loop_axes(body, carry, asked)
    return lax.while_loop(condition, lambda carry: _typed(body(carry), axes), _typed(carry, axes))


def cond(predicate: Any, true_branch: Callable[[], Any], false_branch: Callable[[], Any]) -> Any:
    """As `jax.lax.cond`, of branches without arguments."""
    return lax.cond(predicate, *_alike(true_branch, false_branch))


def _alike(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Both branches, with results of the same types."""
    if not _in_shard_map():
        return one, other
    both = zip(_result_axes(one), _result_axes(other), strict=True)
    axes = [some | more for some, more in both]
    return lambda: _typed(one(), axes), lambda: _typed(other(), axes)


def _in_shard_map() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _loop_axes(step: Callable[[_Carry], _Carry], carry: _Carry, steps: frozenset[str]) -> _Axes:
    """For each part of the carry the axes that it differs over, at the beginning or after any step.

    `steps` are those that the number of steps differs over: what a step changes then differs over them too.
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
