"""The parts of models that a `TransformerConfig` describes."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..attention import ALiBi, Causal, RelativeBias
from ..nn import (
    MLP,
    GatedMLP,
    LearnedPositions,
    Linear,
    LinearAttention,
    MixtureOfExperts,
    RoPE,
    SinusoidalPositions,
)
from ..stacks import (
    AbstractBlock,
    BiasedStack,
    Stack,
    StackSequence,
    decoder_block,
    encoder_block,
    linear_drop_path,
    stack_of_kinds,
)
from ._transformer_config import BlockKind, TransformerConfig
from ._vocabulary import ACTIVATIONS, GATED, REMAT, attention_fn_of, norm_of

AnyStack = Stack | StackSequence | BiasedStack
"""The stacks that models are built with. Functions take anything with the same interface, such as
the result of `unstacked`."""


def check_no_encoder_fields(owner: str, config: TransformerConfig) -> None:
    """Raises an error for fields that only a `TransformerEncoder` uses."""
    for name in ("num_token_types", "uncounted_token_id", "pooler"):
        value = getattr(config, name)
        if value is not None and value is not False:
            raise ValueError(
                f"{owner}: {name}={value} has no meaning here, only for a TransformerEncoder; "
                "leave it out."
            )


def make_norm(config: TransformerConfig, size: int) -> Any:
    """The norm of a configuration."""
    return norm_of(config.norm, size, eps=config.norm_eps, use_bias=config.use_bias)


def make_positions(
    config: TransformerConfig, *, key: PRNGKeyArray
) -> SinusoidalPositions | LearnedPositions | None:
    """The position vectors added to embeddings; `None` if there are none."""
    if config.positions in ("sinusoidal", "sinusoidal_halves"):
        return SinusoidalPositions(
            config.embedding_dim, halves=config.positions == "sinusoidal_halves"
        )
    if config.positions == "learned":
        rows = config.max_len + config.position_offset
        return LearnedPositions(rows, config.embedding_dim, key=key)
    return None


def make_head(
    config: TransformerConfig, *, key: PRNGKeyArray
) -> tuple[Linear | None, Float[Array, " vocab"] | None]:
    """The output head, if it is not the embedding, and the bias of logits, if they have one."""
    bias = jnp.zeros((config.vocab_size,)) if config.head_bias else None
    if not config.tie_embeddings:
        return Linear(config.d_model, config.vocab_size, key=key), bias
    if config.embedding_dim != config.d_model:
        raise ValueError(
            f"tie_embeddings=True makes the embedding the head, but d_embedding="
            f"{config.d_embedding} and d_model={config.d_model} differ."
        )
    return None, bias


def make_stack(
    config: TransformerConfig,
    num_layers: int,
    *,
    causal: bool,
    cross: bool = False,
    key: PRNGKeyArray,
) -> AnyStack:
    """The blocks of an encoder or a decoder, with or without attention to a source."""
    num_heads, d_ff = config.num_heads, config.d_ff
    if cross:
        num_heads = config.num_decoder_heads or num_heads
        d_ff = config.decoder_d_ff or d_ff
    stack = stack_of_kinds(
        functools.partial(_make_block, config, num_heads, d_ff, causal, cross),
        config.block_kinds(num_layers),
        remat=REMAT[config.remat],
        unroll=config.unroll,
        key=key,
    )
    if not isinstance(stack, Stack):
        return stack
    if config.drop_path_rate > 0:
        stack = linear_drop_path(stack, config.drop_path_rate)
    if config.positions == "relative":
        bias = RelativeBias(
            num_heads,
            config.relative_buckets,
            config.relative_max_distance,
            bidirectional=not causal,
            key=jax.random.fold_in(key, 0),
        )
        return BiasedStack(stack, bias)
    return stack


def _make_block(
    config: TransformerConfig,
    num_heads: int,
    d_ff: int,
    causal: bool,
    cross: bool,
    kind: BlockKind,
    *,
    key: PRNGKeyArray,
) -> AbstractBlock:
    attention_fn = attention_fn_of(config.attention_implementation, config.attention_block_size)
    block_key, mlp_key, attention_key = jax.random.split(key, 3)
    rope = None
    if config.positions == "rope":
        local_theta = config.rope_local_theta if kind.sliding else None
        rope = RoPE(theta=config.rope_theta if local_theta is None else local_theta)
    options: dict[str, Any] = {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "window": config.window if kind.sliding else None,
        "score_mod": ALiBi(num_heads) if config.positions == "alibi" else None,
        "scale": config.query_scale,
        "rope": rope,
        "qk_norm": config.qk_norm,
        "gate": config.gate,
        "attention_fn": attention_fn,
        "layout": config.layout,
        "make_norm": functools.partial(make_norm, config),
        "attention": _make_linear_attention(config, num_heads, causal, key=attention_key),
        "mlp": _make_mlp(config, d_ff, key=mlp_key),
        "use_bias": config.use_bias,
        "k_bias": config.k_bias,
        "dropout_rate": config.dropout_rate,
        "layer_scale": config.layer_scale,
        "drop_path_rate": 0.0 if config.drop_path_rate > 0 else None,
        "key": block_key,
    }
    sizes = (config.d_model, num_heads, d_ff)
    if cross:
        block = decoder_block(*sizes, causal=causal, cross_attention_fn=attention_fn, **options)
    else:
        block = encoder_block(*sizes, causal=causal, **options)
    if kind.norm_first:
        return block
    return eqx.tree_at(lambda block: block.attention_residual.norm, block, None)


def _make_linear_attention(
    config: TransformerConfig, num_heads: int, causal: bool, *, key: PRNGKeyArray
) -> LinearAttention | None:
    if config.attention != "linear":
        return None
    return LinearAttention(
        config.d_model,
        num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope=RoPE(theta=config.rope_theta) if config.positions == "rope" else None,
        qk_norm=config.qk_norm,
        mask=Causal() if causal else None,
        chunk_size=config.linear_chunk_size,
        use_bias=config.use_bias,
        key=key,
    )


def _make_mlp(config: TransformerConfig, d_ff: int, *, key: PRNGKeyArray) -> Callable[..., Array]:
    make_expert = functools.partial(
        GatedMLP if config.activation in GATED else MLP,
        config.d_model,
        d_ff,
        activation=ACTIVATIONS[config.activation],
        use_bias=config.use_bias,
    )
    if config.num_experts is None:
        return make_expert(key=key)
    return MixtureOfExperts(
        config.d_model,
        config.num_experts,
        make_expert,
        top_k=config.experts_per_token,
        # With one expert per token, weights that sum to one would be constant.
        renormalize=config.experts_per_token > 1,
        capacity_factor=config.expert_capacity_factor,
        key=key,
    )
