"""Attention of one sequence to another, and gates on self-attention."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Padding
from eqx_transformer.nn import Attention, CrossAttention

SEQ, KV_SEQ, D_MODEL, D_MEMORY = 5, 7, 8, 6


@pytest.fixture
def sequences(getkey):
    return jr.normal(getkey(), (SEQ, D_MODEL)), jr.normal(getkey(), (KV_SEQ, D_MEMORY))


def _make(key, **options):
    return CrossAttention(D_MODEL, 4, d_memory=D_MEMORY, num_kv_heads=2, key=key, **options)


def _by_hand(layer, x, memory, valid):
    x, memory = np.asarray(x, np.float64), np.asarray(memory, np.float64)
    q, k, v = (
        h @ np.asarray(p.weight, np.float64)
        for h, p in ((x, layer.q_proj), (memory, layer.k_proj), (memory, layer.v_proj))
    )
    heads = []
    for i in range(4):
        mine, others = slice(2 * i, 2 * i + 2), slice(2 * (i // 2), 2 * (i // 2) + 2)
        scores = q[:, mine] @ k[:, others].T / np.sqrt(2)
        weights = np.exp(scores) * valid
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, others])
    return np.concatenate(heads, -1) @ np.asarray(layer.o_proj.weight, np.float64)


def test_equals_the_formula(sequences, getkey):
    layer = _make(getkey())
    valid = jnp.arange(KV_SEQ) < 4
    out = layer(*sequences, mask=Padding(valid))
    expected = _by_hand(layer, *sequences, np.asarray(valid))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_projecting_once_is_the_same(sequences, getkey):
    layer = _make(getkey(), qk_norm=True, use_bias=True)
    x, memory = sequences
    projected = layer.project(memory)
    assert projected.k.shape == (KV_SEQ, 2, 2)
    parts = [layer.attend(x[i : i + 1], projected) for i in range(SEQ)]
    np.testing.assert_allclose(jnp.concatenate(parts), layer(x, memory), rtol=1e-5, atol=1e-6)


def test_every_parameter_has_a_gradient(sequences, getkey):
    layer = _make(getkey(), qk_norm=True)
    gradient = eqx.filter_grad(lambda m: (m(*sequences) ** 2).sum())(layer)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


def test_dropout_and_errors(sequences, getkey):
    layer = _make(getkey(), dropout_rate=0.5)
    with pytest.raises(RuntimeError, match="needs a key"):
        layer(*sequences)
    a, b = (layer(*sequences, key=jr.key(i)) for i in range(2))
    assert not jnp.allclose(a, b)
    assert jnp.isfinite(eqx.nn.inference_mode(layer)(*sequences)).all()
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        layer(sequences[0][None], sequences[1])
    with pytest.raises(ValueError, match=r"CrossAttention: num_heads=4 is not a multiple"):
        CrossAttention(D_MODEL, 4, num_kv_heads=3, key=getkey())
    with pytest.raises(ValueError, match=r"CrossAttention: dropout_rate=1"):
        _make(getkey(), dropout_rate=1.0)


@pytest.mark.parametrize("gate", ["output", "value"])
def test_gates(gate, getkey):
    layer = Attention(D_MODEL, 4, num_kv_heads=2, gate=gate, key=getkey())
    plain = eqx.tree_at(lambda m: (m.gate_proj,), layer, (None,), is_leaf=lambda x: x is None)
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    # A gate without weights is sigmoid(0) = 1/2 everywhere.
    half = eqx.tree_at(lambda m: m.gate_proj.weight, layer, jnp.zeros_like(layer.gate_proj.weight))
    np.testing.assert_allclose(half(x), plain(x) / 2, rtol=1e-5, atol=1e-6)
    assert not jnp.allclose(layer(x), half(x), atol=1e-4)
    gradient = eqx.filter_grad(lambda m: (m(x) ** 2).sum())(layer)
    assert (gradient.gate_proj.weight != 0).any()
    first, cache = layer.extend(x[:3], layer.init_cache(SEQ))
    rest, _ = layer.extend(x[3:], cache)
    np.testing.assert_allclose(rest[-1], layer(x)[-1], rtol=1e-5, atol=1e-6)
    assert first.shape == (3, D_MODEL)
    with pytest.raises((ValueError, TypeError), match="gate"):
        Attention(D_MODEL, 4, gate="both", key=getkey())
