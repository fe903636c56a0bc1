"""Looking into a stack: what is between its blocks, and where its attention goes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..attention import AbstractMask, attention_weights
from ..nn import Attention
from ._block import AbstractBlock
from ._stack import Stack


def hidden_states(
    stack: Stack,
    x: Float[Array, "seq d_model"],
    *,
    context: Any = None,
    mask: AbstractMask | None = None,
    positions: Int[Array, " seq"] | None = None,
) -> Float[Array, "states seq d_model"]:
    """What enters the first block of a stack, and what leaves each.

    Arguments are those of the stack. Dropout must be switched off, by `eqx.nn.inference_mode`.
    """

    def apply(block: AbstractBlock, x: Array, **options: Any) -> tuple[Array, Array]:
        x = block(x, **options)
        return x, x

    _, outputs = stack.apply_with(apply, x, context=context, mask=mask, positions=positions)
    return jnp.concatenate([x[None], outputs])


def attention_maps(
    stack: Stack,
    x: Float[Array, "seq d_model"],
    *,
    context: Any = None,
    mask: AbstractMask | None = None,
    positions: Int[Array, " seq"] | None = None,
) -> Float[Array, "attentions heads seq seq"]:
    """The weights of every self-attention in a stack, in the order in which they are computed.

    They are dense: memory is quadratic in the sequence. Rows sum to one, or to less where a query
    may attend to nothing or a layer has sinks.

    Arguments are those of the stack. Dropout must be switched off, by `eqx.nn.inference_mode`.

    Raises:

    - `ValueError` if there is no `Attention` in the blocks.
    """

    def attentions(tree: Any) -> list[Any]:
        leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Attention))
        return [leaf for leaf in leaves if isinstance(leaf, Attention)]

    found = attentions(stack.blocks)
    if not found:
        raise ValueError("attention_maps: there is no Attention in the blocks of this stack.")

    def apply(block: AbstractBlock, x: Array, **options: Any) -> tuple[Array, Array]:
        # Every layer computes attention as usual; its attention function also records the weights.
        maps: list[Array] = []

        def recording(attention_fn: Any) -> Any:
            def recorded(q: Array, k: Array, v: Array, **options: Any) -> Array:
                names = ("mask", "score_mod", "scale", "q_positions", "kv_positions", "sinks")
                asked = {name: options[name] for name in names if name in options}
                maps.append(attention_weights(q, k, **asked))
                return attention_fn(q, k, v, **options)

            return recorded

        functions = [recording(layer.attention_fn) for layer in attentions(block)]
        block = eqx.tree_at(
            lambda block: [layer.attention_fn for layer in attentions(block)], block, functions
        )
        return block(x, **options), jnp.stack(maps)

    _, maps = stack.apply_with(apply, x, context=context, mask=mask, positions=positions)
    return maps.reshape(-1, *maps.shape[2:])
