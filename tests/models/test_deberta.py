"""DeBERTa: attention to content and to distances, and a convolution beside the first layer."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.models import DeBERTa, DeBERTaConfig, TransformerConfig
from eqx_transformer.nn import Convolution, DisentangledAttention

TINY = DeBERTaConfig(
    transformer=TransformerConfig(
        vocab_size=13,
        d_model=8,
        num_layers=3,
        num_heads=2,
        d_ff=12,
        max_len=12,
        dropout_rate=0.0,
        pad_token_id=None,
        embedding_norm=True,
        positions="none",
        layout="post",
        final_norm=False,
    ),
    num_buckets=4,
    share_projections=False,
    convolution_size=3,
)
TOKENS = jnp.asarray([3, 9, 1, 4, 12, 7, 2, 5])
VALID = jnp.arange(8) < 6


def build(config=TINY):
    """A model with biases and norms that are not zeros and ones."""
    leaves, structure = jax.tree.flatten(DeBERTa(config, key=jr.key(0)))
    keys = jr.split(jr.key(1), len(leaves))
    leaves = [
        x + 0.3 * jr.normal(k, x.shape, x.dtype) if eqx.is_inexact_array(x) else x
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


@eqx.filter_jit
def run(model, tokens, valid=None):
    return model(tokens, valid=valid)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def bucket(distance, num_buckets, max_distance):
    """As the paper's code has it, for one number."""
    mid = num_buckets // 2
    if abs(distance) <= mid:
        return distance
    far = np.log(abs(distance) / mid) / np.log((max_distance - 1) / mid) * (mid - 1)
    return int(np.sign(distance) * (np.ceil(far - 1e-9) + mid))


@pytest.mark.parametrize("buckets", [None, 6])
@pytest.mark.parametrize("terms", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("share", [True, False])
def test_attention_pair_by_pair(buckets, terms, share):
    layer = DisentangledAttention(
        8,
        2,
        max_distance=7,
        num_buckets=buckets,
        content_to_position=terms[0],
        position_to_content=terms[1],
        share_projections=share,
        key=jr.key(0),
    )
    half = 7 if buckets is None else buckets
    x, relative = jr.normal(jr.key(1), (10, 8)), jr.normal(jr.key(2), (2 * half, 8))
    layer = eqx.tree_at(lambda m: m.relative, layer, relative, is_leaf=lambda x: x is None)

    def heads(projection, x):
        return np.asarray(projection(x)).reshape(len(x), 2, 4)

    q, k, v = (heads(p, x) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    pos_k = heads(layer.k_proj if share else layer.pos_k_proj, relative) if terms[0] else None
    pos_q = heads(layer.q_proj if share else layer.pos_q_proj, relative) if terms[1] else None
    scores = np.zeros((2, 10, 10))
    for h, i, j in np.ndindex(scores.shape):
        distance = i - j if buckets is None else bucket(i - j, buckets, 7)
        row = np.clip(distance + half, 0, 2 * half - 1)
        scores[h, i, j] = q[i, h] @ k[j, h]
        scores[h, i, j] += q[i, h] @ pos_k[row, h] if terms[0] else 0
        scores[h, i, j] += k[j, h] @ pos_q[row, h] if terms[1] else 0
    weights = np.exp(scores / np.sqrt(4 * (1 + sum(terms))))
    weights /= weights.sum(axis=2, keepdims=True)
    want = np.einsum("hij,jhd->ihd", weights, v).reshape(10, 8)
    close(layer(x), layer.o_proj(jnp.asarray(want, jnp.float32)))


def test_the_first_layer_has_a_convolution_beside_it():
    model = build()
    layers = list(model.layers())
    assert len(layers) == 3
    start = model.embedding(TOKENS)
    x = layers[0](start)
    x = model.convolution_norm(x + jnp.tanh(model.convolution(start)))
    close(run(model, TOKENS), layers[2](layers[1](x)))
    relative = model.relative_norm(model.relative.weight)
    assert relative.shape == (8, 8)
    for layer in layers:
        close(layer.attention.relative, relative)


def test_padding_reaches_nobody():
    model = build()
    # An id that does not exist has vectors of NaN.
    poisoned = TOKENS.at[6:].set(99)
    close(run(model, poisoned, VALID)[:6], run(model, TOKENS[:6]))
    known = build(TINY.replace(transformer=TINY.transformer.replace(pad_token_id=0)))
    close(run(known, TOKENS.at[6:].set(0))[:6], run(model, TOKENS[:6]))


CHANGES = {
    "max_distance": 6,
    "num_buckets": None,
    "content_to_position": False,
    "position_to_content": False,
    "share_projections": True,
    "relative_norm": False,
    "convolution_size": None,
    "convolution_activation": "gelu",
}


@functools.cache
def program(config):
    model = eqx.filter_eval_shape(DeBERTa, config, key=jr.key(0))
    return str(eqx.filter_make_jaxpr(lambda model: model(TOKENS))(model)[0])


@pytest.mark.parametrize("field", CHANGES)
def test_field_changes_the_program(field):
    assert program(TINY.replace(**{field: CHANGES[field]})) != program(TINY)
    assert CHANGES.keys() == TINY.to_dict().keys() - {"transformer"}


def test_derivatives(x64):
    model = jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, build())
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    tangent = jax.tree.map(jnp.cos, arrays)
    weight = jnp.sin(jnp.arange(8 * 8.0)).reshape(8, 8)

    def loss(arrays):
        return (weight * eqx.combine(arrays, static)(TOKENS, valid=VALID)).sum()

    @jax.jit
    def everything(arrays, tangent):
        gradient = jax.grad(loss)(arrays)
        slope = jax.jvp(loss, (arrays,), (tangent,))[1]
        step = 1e-5
        near = jax.tree.map(lambda x, t: jnp.stack([x + step * t, x - step * t]), arrays, tangent)
        above, below = jax.lax.map(loss, near)
        return gradient, slope, (above - below) / (2 * step)

    gradient, slope, difference = everything(arrays, tangent)
    dot = sum(
        jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, tangent)), strict=True)
    )
    np.testing.assert_allclose(slope, dot, rtol=1e-9)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)
    for part in (gradient.relative, gradient.relative_norm, gradient.convolution):
        assert all((x != 0).any() for x in jax.tree.leaves(part))


def test_wrong_input():
    model = build()
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        model(TOKENS[None])
    layer = model.stack[0].attention
    with pytest.raises(ValueError, match="no vectors of distances"):
        layer(jnp.ones((3, 8)))
    with pytest.raises(ValueError, match="positions must not be given"):
        layer(jnp.ones((3, 8)), positions=jnp.arange(3))
    with pytest.raises(ValueError, match="has no cache"):
        layer.init_cache(3)
    with pytest.raises(ValueError, match="num_buckets=12 must be at least 2"):
        DisentangledAttention(8, 2, max_distance=7, num_buckets=12, key=jr.key(0))
    with pytest.raises(ValueError, match="max_distance=0 must be at least 1"):
        DisentangledAttention(8, 2, max_distance=0, key=jr.key(0))
    for name, value in (
        ("layout", "pre"),
        ("positions", "rope"),
        ("window", 3),
        ("qk_norm", True),
        ("attention", "linear"),
        ("drop_path_rate", 0.1),
        ("pooler", True),
    ):
        with pytest.raises(ValueError, match=name):
            TINY.replace(transformer=TINY.transformer.replace(**{name: value}))
    with pytest.raises(ValueError, match="both False"):
        TINY.replace(content_to_position=False, position_to_content=False)
    sizes = {"in_features": 3, "out_features": 4}
    for name, value in (("size", 2), ("stride", 0), ("in_features", 0), ("out_features", -1)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Convolution(**{**sizes, name: value}, key=jr.key(0))
