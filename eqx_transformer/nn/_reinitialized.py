from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ._linear import Linear
from ._modulation import Modulation

Module = TypeVar("Module")


def reinitialized(
    module: Module,
    init: jax.nn.initializers.Initializer,
    *,
    where: Callable[[Any], Any] = lambda module: module,
    key: PRNGKeyArray,
) -> Module:
    """The module with the weights of its `Linear` layers drawn anew, and biases zero.

    `reinitialized(model, jax.nn.initializers.truncated_normal(0.02), key=key)` initialises a model
    like ViT; weights stacked over layers are drawn layer by layer. Those of a `Modulation` stay
    zero.

    Arguments:

    - `module`: a layer, a stack, a model.
    - `init`: the initialiser `(key, shape, dtype) -> weight`, as for `Linear`.
    - `where`: which part of it, or parts, e.g. `lambda model: model.stack.blocks.attention.o_proj`.
    - `key`: for the weights.

    Raises:

    - `ValueError` if there is no `Linear` there.
    """

    def is_layer(x: Any) -> bool:
        return isinstance(x, Linear | Modulation)

    def layers(part: Any) -> list[Any]:
        return [x for x in jax.tree.leaves(part, is_leaf=is_layer) if isinstance(x, Linear)]

    found = layers(where(module))
    if not found:
        raise ValueError("reinitialized: there is no Linear layer in what `where` selects.")

    def drawn(layer: Linear, key: PRNGKeyArray) -> Linear:
        weight, bias = layer.weight, layer.bias
        stack, shape = weight.shape[:-2], weight.shape[-2:]
        count = 1
        for size in stack:
            count *= size
        draws = [init(k, shape, weight.dtype) for k in jax.random.split(key, count)]
        weight = jnp.stack(draws).reshape(weight.shape)
        new = eqx.tree_at(lambda x: x.weight, layer, weight)
        if bias is None:
            return new
        return eqx.tree_at(lambda x: x.bias, new, jnp.zeros_like(bias))

    keys = jax.random.split(key, len(found))
    new = [drawn(layer, k) for layer, k in zip(found, keys, strict=True)]
    return eqx.tree_at(lambda module: layers(where(module)), module, new)
