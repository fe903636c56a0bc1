from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..stacks import Stack


def weight_decay_mask(model: PyTree) -> PyTree:
    """Which parameters weight decay applies to: matrices, not norms and biases.

    The rule "at least two axes" is wrong for stacked layers, whose norm weights are
    `[num_layers, d_model]`; here the axis that a `Stack` adds does not count. Pass the function
    itself as the `mask` of `optax.adamw`.

    Arguments:

    - `model`: the parameters; what is no floating array has no entry.

    Returns:

    A PyTree of the same structure with a boolean for every floating array.
    """

    def mark(node: Any) -> Any:
        if isinstance(node, Stack):
            return jax.tree.map(lambda x: _is_matrix(x, stacked=1), node)
        return _is_matrix(node, stacked=0)

    return jax.tree.map(mark, model, is_leaf=lambda x: isinstance(x, Stack))


def _is_matrix(x: Any, stacked: int) -> Any:
    if eqx.is_inexact_array(x) or isinstance(x, jax.ShapeDtypeStruct):
        return x.ndim - stacked >= 2
    return x
