"""Blocks that the models for physics are made of."""

import jax
from jaxtyping import PRNGKeyArray

from ..nn import MLP, AbstractAttention, CrossAttention, LayerNorm
from ..stacks import PerceiverBlock, Residual, TransformerBlock


def pre_norm_block(
    attention: AbstractAttention,
    d_model: int,
    d_ff: int | None,
    *,
    norm_eps: float,
    dropout_rate: float,
    key: PRNGKeyArray,
) -> TransformerBlock:
    """A block with norms before its branches, and the given attention."""
    d_ff = 4 * d_model if d_ff is None else d_ff
    # Each with arrays of its own: one buffer in two leaves could not be donated.
    first, second = (
        Residual(LayerNorm(d_model, eps=norm_eps), dropout_rate=dropout_rate) for _ in range(2)
    )
    return TransformerBlock(attention, MLP(d_model, d_ff, key=key), first, second)


def perceiver_block(
    d_model: int,
    num_heads: int,
    d_ff: int | None,
    *,
    d_memory: int | None = None,
    norm_eps: float,
    dropout_rate: float,
    key: PRNGKeyArray,
) -> PerceiverBlock:
    """The same with attention to a source, whose vectors have size `d_memory`."""
    attention_key, mlp_key = jax.random.split(key)
    d_ff = 4 * d_model if d_ff is None else d_ff
    # Each with arrays of its own: one buffer in two leaves could not be donated.
    first, second = (
        Residual(LayerNorm(d_model, eps=norm_eps), dropout_rate=dropout_rate) for _ in range(2)
    )
    attention = CrossAttention(
        d_model,
        num_heads,
        d_memory=d_memory,
        use_bias=True,
        dropout_rate=dropout_rate,
        key=attention_key,
    )
    return PerceiverBlock(attention, MLP(d_model, d_ff, key=mlp_key), first, second)
