"""Conditioning, the embedding of times, and pooling by attention."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Padding
from eqx_transformer.nn import (
    MLP,
    AttentionPooling,
    CrossAttention,
    LayerNorm,
    Modulation,
    TimestepEmbedding,
    modulate,
)


def test_modulation_begins_as_nothing():
    layer = Modulation(3, 4, 6, key=jr.key(0))
    vectors = layer(jr.normal(jr.key(1), (3,)))
    assert vectors.shape == (6, 4) and (vectors == 0).all()
    x = jr.normal(jr.key(2), (5, 4))
    np.testing.assert_array_equal(modulate(x, *vectors[:2]), x)


def test_modulate():
    x, shift, scale = jr.normal(jr.key(0), (5, 4)), jnp.arange(4.0), jnp.ones(4)
    np.testing.assert_allclose(modulate(x, shift, scale), 2 * x + shift[None, :], rtol=1e-6)
    assert modulate(x.astype(jnp.bfloat16), shift, scale).dtype == jnp.bfloat16


def test_timestep_embedding(x64):
    layer = TimestepEmbedding(4, num_features=6, max_period=100.0, key=jr.key(0))
    out = layer(jnp.asarray(0.7))
    angle = 0.7 * 100.0 ** (-np.arange(3) / 3)
    features = np.concatenate([np.cos(angle), np.sin(angle)])
    expected = layer.down_proj(jax.nn.silu(layer.up_proj(jnp.asarray(features, float))))
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    slope = jax.jvp(layer, (jnp.asarray(0.7),), (jnp.asarray(1.0),))[1]
    ahead, behind = layer(jnp.asarray(0.7 + 1e-6)), layer(jnp.asarray(0.7 - 1e-6))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="num_features=5"):
        TimestepEmbedding(4, num_features=5, key=jr.key(0))
    for period in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"max_period={period} must be positive and finite"):
            TimestepEmbedding(4, max_period=period, key=jr.key(0))


def test_attention_pooling(getkey):
    attention = CrossAttention(8, 2, use_bias=True, key=getkey())
    pooling = AttentionPooling(attention, LayerNorm(8), MLP(8, 12, key=getkey()), key=getkey())
    x = jr.normal(getkey(), (5, 8))
    out = pooling(x)
    assert out.shape == (8,)
    # It does not matter in which order the sequence is, nor what padding holds.
    np.testing.assert_allclose(pooling(x[::-1]), out, rtol=1e-5, atol=1e-5)
    padded = jnp.concatenate([x, jnp.full((2, 8), jnp.nan)])
    valid = Padding(jnp.arange(7) < 5)
    np.testing.assert_allclose(pooling(padded, mask=valid), out, rtol=1e-5, atol=1e-5)
    assert pooling(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert (eqx.filter_grad(lambda m: m(x).sum())(pooling).query != 0).any()
