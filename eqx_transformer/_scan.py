"""`lax.scan` over PyTrees that hold more than arrays."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np

Carry = TypeVar("Carry")


class _Static(eqx.Module):
    """Carries a value through a transformation in the PyTree structure instead of in leaves."""

    value: Any = eqx.field(static=True)


def filter_scan(
    f: Callable[[Carry, Any], tuple[Carry, Any]],
    init: Carry,
    xs: Any = None,
    length: int | None = None,
    *,
    reverse: bool = False,
    unroll: int = 1,
    remat: bool | Callable[..., Any] | None = None,
) -> tuple[Carry, Any]:
    """`jax.lax.scan`, where carry, inputs and outputs may also have leaves that are not arrays.

    Arrays are scanned over. Everything else (activation functions, flags, Python numbers) is the
    same at every step: in `xs` it is passed to each step as it is, in the carry it must not change,
    and in the outputs it is returned once.

    Arguments:

    - `f`: `(carry, x) -> (carry, y)`.
    - `init`: the initial carry.
    - `xs`: what to scan over, along the leading axis of every array in it.
    - `length`: the number of steps; only needed if `xs` has no arrays.
    - `reverse`: whether to run from the last step to the first.
    - `unroll`: how many steps make one iteration of the loop. More take longer to compile; on a CPU
        they can run up to twice as fast.
    - `remat`: what reverse mode keeps of every step. `None`: all it needs. `True`: only the carry,
        from which the step is recomputed. A policy of `jax.checkpoint_policies`: the carry and
        what the policy saves.

    Returns:

    The last carry, and the outputs stacked along a new leading axis.

    Raises:

    - `ValueError` if the part of the carry that is not arrays changes.
    """
    init_arrays, init_static = eqx.partition(init, _is_array)
    xs_arrays, xs_static = eqx.partition(xs, _is_array)

    def step(carry: Any, x: Any) -> Any:
        carry, y = f(eqx.combine(carry, init_static), eqx.combine(x, xs_static))
        carry, static = eqx.partition(carry, _is_array)
        _check_unchanged(init_static, static)
        y, y_static = eqx.partition(y, _is_array)
        return carry, (y, _Static(y_static))

    if remat is not None and remat is not False:
        policy = None if remat is True else remat
        leaves = jax.tree.leaves(xs_arrays)
        steps = length if not leaves else leaves[0].shape[0]
        # Forward and backward are separate loops, between which XLA cannot share computations,
        # unless unrolling leaves no loop.
        whole = steps is not None and unroll >= steps
        step = jax.checkpoint(step, policy=policy, prevent_cse=whole)
    carry, (ys, ys_static) = jax.lax.scan(
        step, init_arrays, xs_arrays, length, reverse=reverse, unroll=unroll
    )
    return eqx.combine(carry, init_static), eqx.combine(ys, ys_static.value)


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, np.ndarray | np.generic)


def _check_unchanged(before: Any, after: Any) -> None:
    old, old_structure = jax.tree_util.tree_flatten_with_path(before)
    new, new_structure = jax.tree_util.tree_flatten_with_path(after)
    if old_structure == new_structure:
        for (path, x), (_, y) in zip(old, new, strict=True):
            if x is not y and not (type(x) is type(y) and x == y):
                raise ValueError(
                    f"filter_scan: the carry{jax.tree_util.keystr(path)} is not an array, so it "
                    f"must stay the same, but it changed from {x!r} to {y!r}."
                )
        return
    old_paths, new_paths = ({jax.tree_util.keystr(path): x for path, x in s} for s in (old, new))
    for path in old_paths.keys() ^ new_paths.keys():
        value = old_paths.get(path, new_paths.get(path))
        if path in old_paths:
            change = f"{value!r} before the step and an array, or absent, after it"
        else:
            change = f"{value!r} after the step and an array, or absent, before it"
        raise ValueError(
            f"filter_scan: the carry{path} is {change}; pass it as an array if it is to change."
        )
    raise ValueError(
        f"filter_scan: a step changed the structure of the carry, from {old_structure} to "
        f"{new_structure}."
    )
