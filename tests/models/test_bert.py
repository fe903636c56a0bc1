"""What BERT's kin needs of an encoder: types, norms and projections of embeddings, and heads."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Padding
from eqx_transformer.models import (
    SequenceClassifier,
    TokenClassifier,
    TransformerConfig,
    TransformerEncoder,
)

BERT = TransformerConfig(
    vocab_size=13,
    d_model=8,
    d_embedding=6,
    num_layers=2,
    num_heads=2,
    d_ff=12,
    max_len=12,
    dropout_rate=0.0,
    pad_token_id=None,
    num_token_types=2,
    embedding_norm=True,
    positions="learned",
    layout="post",
    final_norm=False,
    tie_embeddings=True,
    head_bias=True,
)
MODERN = BERT.replace(
    d_embedding=None,
    num_layers=5,
    num_token_types=None,
    positions="rope",
    rope_local_theta=100.0,
    window=3,
    layer_types=("global", "sliding", "sliding"),
    layout="pre",
    first_norm=False,
    final_norm=True,
    use_bias=False,
    activation="geglu",
)
TOKENS = jnp.asarray([3, 9, 1, 4, 12, 7, 2, 5])
TYPES = jnp.asarray([0, 0, 0, 1, 1, 1, 1, 1])
VALID = jnp.arange(8) < 6


def noisy(model, key=1):
    """Biases and norms that are not zeros and ones."""
    leaves, structure = jax.tree.flatten(model)
    keys = jr.split(jr.key(key), len(leaves))
    leaves = [
        x + 0.2 * jr.normal(k, x.shape, x.dtype) if eqx.is_inexact_array(x) else x
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_the_embedding_is_the_sum_then_norm_then_projection():
    embedding = noisy(TransformerEncoder(BERT, key=jr.key(0))).embedding
    x = embedding.embedding(TOKENS) + embedding.token_types(TYPES)
    x = x + embedding.positions.table.weight[:8]
    close(embedding(TOKENS, token_types=TYPES), embedding.projection(embedding.norm(x)))
    # The first type is added where none is said.
    close(embedding(TOKENS), embedding(TOKENS, token_types=jnp.zeros_like(TYPES)))
    assert not jnp.allclose(embedding(TOKENS), embedding(TOKENS, token_types=TYPES), atol=1e-3)


@pytest.mark.parametrize("config", [BERT, MODERN], ids=["bert", "modernbert"])
def test_padding_reaches_nobody(config):
    model = noisy(TransformerEncoder(config, key=jr.key(0)))
    run = eqx.filter_jit(lambda model, tokens, mask: model(tokens, mask=mask))
    short = run(model, TOKENS[:6], None)
    # An id that does not exist has vectors of NaN.
    poisoned = TOKENS.at[6:].set(99)
    long = run(model, poisoned, Padding(VALID))
    assert jnp.isnan(long[6:]).all()
    close(long[:6], short)


def test_modern_layers():
    stack = TransformerEncoder(MODERN, key=jr.key(0)).stack
    layers = list(stack)
    assert [x.attention.mask is None for x in layers] == [True, False, False, True, False]
    assert [x.attention.rope.theta for x in layers] == [1e4, 100, 100, 1e4, 100]
    assert [x.attention_residual.norm is None for x in layers] == [True] + [False] * 4
    assert all(x.mlp_residual.norm.bias is None for x in layers)
    # Two before, two after, and the position itself.
    reach = layers[1].attention.mask(jnp.arange(8)[:, None], jnp.arange(8)[None])
    assert reach[4].tolist() == [False, False, True, True, True, True, True, False]


def test_masked_lm_head():
    model = noisy(TokenClassifier(BERT, transform="linear_norm", key=jr.key(0)))
    assert model.head is None and model.config is BERT
    x = model.encoder(TOKENS, token_types=TYPES)
    x = model.transform.norm(jax.nn.gelu(model.transform.linear(x), approximate=False))
    assert x.shape == (8, 6)
    want = x @ model.encoder.embedding.embedding.weight.T + model.logit_bias[None]
    close(model(TOKENS, token_types=TYPES), want)
    untied = TokenClassifier(BERT.replace(tie_embeddings=False), key=jr.key(0))
    assert untied.head.weight.shape == (8, 13) and untied.logit_bias.shape == (13,)
    with pytest.raises(ValueError, match="d_embedding=6 and d_model=8 differ; use a transform"):
        TokenClassifier(BERT, key=jr.key(0))


def test_discriminator():
    model = noisy(TokenClassifier(BERT, 1, transform="linear", key=jr.key(0)))
    assert model.transform.norm is None and model.logit_bias is None
    x = jax.nn.gelu(model.transform.linear(model.encoder(TOKENS)), approximate=False)
    close(model(TOKENS), model.head(x))


def test_sequence_classifier():
    pooled = BERT.replace(pooler=True)
    model = noisy(SequenceClassifier(pooled, 3, pooling="pooler", key=jr.key(0)))
    x = model.encoder(TOKENS, token_types=TYPES)
    want = model.head(jnp.tanh(model.encoder.pooler(x[0])))
    close(model(TOKENS, token_types=TYPES), want)
    mean = noisy(SequenceClassifier(BERT, 3, transform="linear_norm", key=jr.key(0)))
    poisoned = TOKENS.at[6:].set(99)
    close(mean(poisoned, valid=VALID), mean(TOKENS[:6]))
    for config, pooling in ((BERT, "pooler"), (pooled, "first")):
        with pytest.raises(ValueError, match=f"pooling='{pooling}' and pooler="):
            SequenceClassifier(config, 3, pooling=pooling, key=jr.key(0))


@pytest.mark.parametrize("config", [BERT, MODERN], ids=["bert", "modernbert"])
def test_derivatives(config, x64):
    model = noisy(TokenClassifier(config, transform="linear_norm", key=jr.key(0)))
    model = jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, model)
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    tangent = jax.tree.map(jnp.cos, arrays)
    weight = jnp.sin(jnp.arange(8 * 13.0)).reshape(8, 13)

    def loss(arrays):
        return (weight * eqx.combine(arrays, static)(TOKENS, mask=Padding(VALID))).sum()

    @jax.jit
    def both(arrays, tangent):
        gradient = jax.grad(loss)(arrays)
        slope = jax.jvp(loss, (arrays,), (tangent,))[1]
        step = 1e-5
        near = jax.tree.map(lambda x, t: jnp.stack([x + step * t, x - step * t]), arrays, tangent)
        above, below = jax.lax.map(loss, near)
        dot = sum(
            jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, tangent)), strict=True)
        )
        return slope, dot, (above - below) / (2 * step)

    slope, dot, difference = both(arrays, tangent)
    np.testing.assert_allclose(slope, dot, rtol=1e-9)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
