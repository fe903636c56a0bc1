"""The parts of the models for physics."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn import (
    MLP,
    AbstractAttention,
    CrossAttention,
    DropPath,
    LayerNorm,
    LayerScale,
    Modulation,
    TimestepEmbedding,
)
from ..stacks import PerceiverBlock, Residual, TransformerBlock


class ConditionEmbedding(eqx.Module):
    """A vector for some numbers: the sum of a `TimestepEmbedding` of each."""

    embeddings: TimestepEmbedding
    num_conditions: int = eqx.field(static=True)

    def __init__(self, num_conditions: int, d_model: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, num_conditions)
        self.embeddings = eqx.filter_vmap(lambda key: TimestepEmbedding(d_model, key=key))(keys)
        self.num_conditions = num_conditions

    def __call__(self, conditions: Float[Array, " conditions"]) -> Float[Array, " d_model"]:
        vectors = eqx.filter_vmap(lambda embedding, x: embedding(x))(self.embeddings, conditions)
        return vectors.sum(axis=0)


def condition_vector(
    owner: str,
    embedding: ConditionEmbedding | None,
    conditions: Float[Array, " conditions"] | None,
) -> Float[Array, " d_model"] | None:
    """The vector of conditions, if a model is built for any.

    Raises:

    - `ValueError` if there are not as many as the model is built for.
    """
    expected = 0 if embedding is None else embedding.num_conditions
    given = 0 if conditions is None else conditions.shape[0]
    if given != expected:
        raise ValueError(
            f"{owner}: there are {given} conditions, but num_conditions={expected}; give as many, "
            "or build the model for them."
        )
    return None if embedding is None or conditions is None else embedding(conditions)


def pre_norm_block(
    attention: AbstractAttention,
    d_model: int,
    d_ff: int | None,
    *,
    norm_eps: float,
    dropout_rate: float,
    layer_scale: float | None,
    drop_path_rate: float,
    conditioned: bool,
    key: PRNGKeyArray,
) -> TransformerBlock:
    """A block with norms before its branches, and the given attention.

    With a `drop_path_rate` its branches have a `DropPath`, whose rate is then set by depth.
    """
    d_ff = 4 * d_model if d_ff is None else d_ff
    # Each with arrays of its own: one buffer in two leaves could not be donated.
    first, second = (
        Residual(
            # Scales and shifts come from the modulation, if there is one.
            LayerNorm(d_model, eps=norm_eps, use_weight=not conditioned, use_bias=not conditioned),
            scale=None if layer_scale is None else LayerScale(d_model, init=layer_scale),
            dropout_rate=dropout_rate,
            drop_path=DropPath(0.0) if drop_path_rate > 0 else None,
        )
        for _ in range(2)
    )
    modulation = Modulation(d_model, d_model, 6, key=key) if conditioned else None
    return TransformerBlock(attention, MLP(d_model, d_ff, key=key), first, second, modulation)


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
    """The same with attention to a source whose vectors have size `d_memory`."""
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
