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


def only_if(condition: Any, operation: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    """The operation where the condition holds, else the carry as it is; in place.

    A loop of one trip or none. On a GPU the branches of `lax.cond` each get a pool of their own, 4 GiB of
    temporary memory for a pool of 4 GiB (tests/compiled/check_aot.py); a loop's carry stays where it is.
    """

    def trip(state: tuple[Any, _Carry]) -> tuple[Any, _Carry]:
        return ~state[0], operation(state[1])

    # The condition itself is carried: a CPU would need three more small operations for a counter.
    return while_loop(lambda state: state[0], trip, (condition.astype("bool"), carry))[1]


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
    # The number of steps varies over the axes over which the condition varies.
    steps = frozenset().union(*_result_axes(lambda: condition(_typed(carry, axes))))
    axes = _loop_axes(body, carry, steps)
    return lax.while_loop(condition, lambda carry: _typed(body(carry), axes), _typed(carry, axes))


def cond(predicate: Any, true_branch: Callable[[], Any], false_branch: Callable[[], Any]) -> Any:
    """As `jax.lax.cond`, for branches without arguments."""
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
