"""The specification of attention: dense, and differentiated by JAX alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._inputs import Inputs


def weights(
    inputs: Inputs,
) -> tuple[Float[Array, "heads q_seq kv_seq"], Float[Array, "heads q_seq"]]:
    """Attention weights, before dropout, and the log-sum-exp of the scores."""
    kv_heads, group = inputs.kv_heads, inputs.heads // inputs.kv_heads
    q = inputs.q.reshape(inputs.q_seq, kv_heads, group, inputs.q.shape[-1])
    scores = jnp.einsum("qhgd,khd->hgqk", q, inputs.k, preferred_element_type=inputs.dtype)
    scores = scores.reshape(inputs.heads, inputs.q_seq, inputs.kv_seq) * inputs.scale
    q_pos, kv_pos = inputs.q_pos(), inputs.kv_pos()
    scores = inputs.modified(scores, q_pos, kv_pos)
    allowed = inputs.allowed(q_pos, kv_pos)[None]

    # Where nothing is allowed the exponentials are all zero, and so must their derivatives be:
    # hence scores are replaced before `exp` as well as after it.
    peak = jnp.max(scores, axis=-1, where=allowed, initial=-jnp.inf)
    if inputs.sinks is not None:
        sinks = inputs.sinks.astype(inputs.dtype)[:, None]
        peak = jnp.maximum(peak, sinks)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), 0, peak))
    shifted = jnp.where(allowed, scores, peak[..., None]) - peak[..., None]
    unnormalised = jnp.where(allowed, jnp.exp(shifted), 0)
    total = jnp.sum(unnormalised, axis=-1)
    if inputs.sinks is not None:
        total += jnp.exp(sinks - peak)
    empty = total == 0
    safe_total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, jnp.log(safe_total) + peak)
    return unnormalised / safe_total[..., None], lse


def reference(
    inputs: Inputs,
) -> tuple[Float[Array, "q_seq heads v_dim"], Float[Array, "q_seq heads"]]:
    """Attention output, in the dtype of `v`, and the log-sum-exp of the scores."""
    probabilities, lse = weights(inputs)
    dropped = inputs.dropout(
        jnp.arange(inputs.q_seq, dtype=jnp.int32),
        jnp.arange(inputs.kv_seq, dtype=jnp.int32),
    )
    if dropped is not None:
        probabilities *= dropped
    group = inputs.heads // inputs.kv_heads
    probabilities = probabilities.reshape(inputs.kv_heads, group, *probabilities.shape[1:])
    v = inputs.v.astype(inputs.dtype)
    out = jnp.einsum("hgqk,khd->qhgd", probabilities, v)
    return out.reshape(inputs.q_seq, inputs.heads, v.shape[-1]).astype(inputs.v.dtype), lse.T
