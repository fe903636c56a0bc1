"""Functions as PyTrees: what a user's function captures becomes leaves."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array


class _Elementwise(eqx.Module):
    """A scalar function with its captured arrays as leaves, applied with broadcasting."""

    function: Callable[..., Array]

    def __call__(self, *args: Array) -> Array:
        return jnp.vectorize(self.function)(*args)


def hoist(function: Any, *examples: Any, what: str, out_dtype: Any) -> Any:
    """Turns an elementwise function into one whose captured arrays are PyTree leaves.

    A derivative rule or a kernel sees only its arguments, so an array that a function merely
    closes over would get no gradient and, under `vmap`, no batch axis. A PyTree (any
    `eqx.Module`) already carries its arrays and is returned as it is, unless it holds a function
    that captures some. A function that captures nothing is kept: its identity is what lets
    compilations be reused.

    A plain function is applied to scalars, so that one that is not elementwise after all (it
    subtracts a mean, say) cannot depend on how an implementation tiles.

    Arguments:

    - `function`: elementwise.
    - `examples`: example arguments, which broadcast against each other.
    - `what`: whose function it is, for error messages.
    - `out_dtype`: the dtype it must return.

    Raises:

    - `ValueError` if the function does not map scalars to one scalar of `out_dtype`, or if a
        Module does not map the examples to an array of their broadcast shape.
    """
    scalars = [jax.ShapeDtypeStruct((), x.dtype) for x in examples]
    _check(function, scalars, what, out_dtype)
    if not all(_captures_nothing(leaf) for leaf in jax.tree.leaves(function) if callable(leaf)):
        # The lambda is for functions that capture arrays as default arguments: Equinox looks only
        # for a closure.
        closure = eqx.filter_closure_convert(lambda *args: function(*args), *scalars)
        return _Elementwise(closure)
    if not isinstance(function, eqx.Module):
        return _Elementwise(function)
    _check(function, examples, what, out_dtype)
    return function


def _check(function: Any, examples: Any, what: str, out_dtype: Any) -> None:
    shape = jnp.broadcast_shapes(*(x.shape for x in examples))
    out = eqx.filter_eval_shape(function, *examples)
    if getattr(out, "shape", None) != shape or out.dtype != jnp.dtype(out_dtype):
        raise ValueError(
            f"{what}: the function must be elementwise, mapping arguments that broadcast to shape "
            f"{shape} to one {jnp.dtype(out_dtype).name} of that shape, but it returned {out}."
        )


def _captures_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function certainly holds no arrays: a plain one with no closure or defaults."""
    held = [
        getattr(function, name, ()) for name in ("__closure__", "__defaults__", "__kwdefaults__")
    ]
    return all(x is None for x in held)
