"""The gradient of a batch that is too large for memory."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._precision import accumulation_dtype
from .._scan import filter_scan

Model = TypeVar("Model")


def accumulated_value_and_grad(
    loss: Callable[[Model, Any], tuple[Array, Array]],
    num_parts: int,
) -> Callable[[Model, Any], tuple[Float[Array, ""], Model]]:
    """Value and gradient of a mean over a batch, computed in parts one after another.

    The mean of the means of parts would give more weight to tokens of parts in which few count. So
    the loss returns a sum and a count, and the sum over the whole batch is divided by the count
    over the whole batch:

        def loss(model, batch):
            losses, counts = ...                       # one number each for every token
            return jnp.sum(losses * counts), jnp.sum(counts)

        value, gradient = accumulated_value_and_grad(loss, 4)(model, batch)

    Arguments:

    - `loss`: `(model, batch) -> (sum, count)`. The count is a constant to derivatives.
    - `num_parts`: how many parts; each has every `num_parts`-th example.

    Returns:

    A function of the model and a batch, like that of `equinox.filter_value_and_grad`. The leading
    axis of every array in the batch counts examples (PRNG keys are such arrays: give one for each);
    what is not an array is the same for all parts. Gradients are summed in float32 or wider and
    returned in the dtypes of the parameters.

    Raises:

    - `ValueError` if `num_parts` is less than 1, or, when called, if it does not divide the number
        of examples.
    """
    if num_parts < 1:
        raise ValueError(f"accumulated_value_and_grad: num_parts={num_parts} must be at least 1.")

    def value_and_grad(model: Model, batch: Any) -> tuple[Array, Model]:
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def of_part(sums: PyTree, part: Any) -> tuple[PyTree, None]:
            def total(params: PyTree) -> tuple[Array, Array]:
                return loss(eqx.combine(params, static), part)

            (value, count), gradient = jax.value_and_grad(total, has_aux=True)(params)
            new = (value, count, gradient)
            return jax.tree.map(lambda sum, x: sum + x.astype(sum.dtype), sums, new), None

        parts = jax.tree.map(lambda x: _split(x, num_parts) if eqx.is_array(x) else x, batch)
        first = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, parts)
        value, count = eqx.filter_eval_shape(loss, model, first)
        zeros = jax.tree.map(_zeros, (value, count, params))
        (value, count, gradient), _ = filter_scan(of_part, zeros, parts, num_parts)
        count = count.astype(value.dtype)
        mean = jax.tree.map(
            lambda g, p: (g / count.astype(g.dtype)).astype(p.dtype), gradient, params
        )
        return value / count, mean

    return value_and_grad


def _split(x: Array, num_parts: int) -> Array:
    """`[examples, ...]` as `[num_parts, examples / num_parts, ...]`."""
    if x.ndim == 0 or x.shape[0] % num_parts:
        raise ValueError(
            f"accumulated_value_and_grad: an array of the batch has shape {x.shape}; its first "
            f"axis counts examples and must be a multiple of num_parts={num_parts}."
        )
    # Neighbours go to different parts: each part of a batch that is split over devices still is.
    return jnp.swapaxes(x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]), 0, 1)


def _zeros(x: Any) -> Array:
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros(x.shape, accumulation_dtype(x.dtype) if inexact else x.dtype)
