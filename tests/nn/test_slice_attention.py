"""Attention between slices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

from eqx_transformer.attention import Causal, Padding
from eqx_transformer.nn import SliceAttention

SEQ, D_MODEL, HEADS, SLICES = 9, 8, 2, 3
PLUS = {"adaptive_temperature": True, "gumbel": True, "separate_values": False}

# Eagerly, every operation would be compiled on its own.
call = eqx.filter_jit(lambda layer, *args, **options: layer(*args, **options))


def make(key, **options):
    layer = SliceAttention(D_MODEL, HEADS, SLICES, key=key, **options)
    if layer.temperature_proj is not None:
        # It begins as zero, which would hide it.
        weight = 0.3 * jr.normal(jr.key(3), (D_MODEL // HEADS, 1), layer.temperature.dtype)
        layer = eqx.tree_at(lambda m: m.temperature_proj.weight, layer, weight)
    return layer


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(layer, x, valid):
    """Head by head, in float64 NumPy."""
    layer = jax.tree.map(lambda y: np.asarray(y) if eqx.is_array(y) else y, layer)
    x, size = np.asarray(x, np.float64), D_MODEL // HEADS
    out = np.zeros((SEQ, D_MODEL))
    for i in range(HEADS):
        mine = slice(i * size, (i + 1) * size)
        h = x @ layer.h_proj.weight[:, mine] + layer.h_proj.bias[mine]
        f = h
        if layer.f_proj is not None:
            f = x @ layer.f_proj.weight[:, mine] + layer.f_proj.bias[mine]
        tau = np.full((SEQ, 1), float(layer.temperature[i]))
        if layer.temperature_proj is not None:
            tau = tau + h @ layer.temperature_proj.weight
        w = softmax((h @ layer.slice_proj.weight + layer.slice_proj.bias) / np.log1p(np.exp(tau)))
        w = w * np.asarray(valid)[:, None]
        z = w.T @ f / (w.sum(0)[:, None] + 1e-5)
        q, k, v = (z @ p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        out[:, mine] = w @ (softmax(q @ k.T / np.sqrt(size)) @ v)
    return out @ layer.o_proj.weight + layer.o_proj.bias


@pytest.mark.parametrize("options", [{}, PLUS])
def test_equals_the_formula(options, getkey, x64):
    layer = eqx.nn.inference_mode(make(getkey(), **options))
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    valid = jnp.ones(SEQ, bool).at[2].set(False)
    np.testing.assert_allclose(
        call(layer, x), by_hand(layer, x, np.ones(SEQ)), rtol=1e-9, atol=1e-10
    )
    out = call(layer, x, mask=Padding(valid))
    np.testing.assert_allclose(out[valid], by_hand(layer, x, valid)[valid], rtol=1e-9, atol=1e-10)


def test_temperature_begins_as_one_half(getkey):
    layer = SliceAttention(D_MODEL, HEADS, SLICES, adaptive_temperature=True, key=getkey())
    np.testing.assert_allclose(jax.nn.softplus(layer.temperature), 0.5, rtol=1e-6)
    assert not layer.temperature_proj.weight.any()


def test_inference_is_deterministic(getkey):
    layer, x = make(getkey(), **PLUS), jr.normal(getkey(), (SEQ, D_MODEL))
    with pytest.raises(RuntimeError, match="gumbel=True and dropout_rate"):
        call(layer, x)
    a, b, again = (call(layer, x, key=jr.key(i)) for i in (0, 1, 0))
    assert not jnp.allclose(a, b)
    np.testing.assert_array_equal(a, again)
    sure = eqx.nn.inference_mode(layer)
    np.testing.assert_array_equal(call(sure, x), call(sure, x, key=jr.key(0)))


def test_dropout(getkey):
    layer, x = make(getkey(), dropout_rate=0.5), jr.normal(getkey(), (SEQ, D_MODEL))
    assert not jnp.allclose(call(layer, x, key=jr.key(0)), call(layer, x, key=jr.key(1)))


@pytest.mark.parametrize("options", [{}, PLUS])
def test_derivatives(options, getkey, x64):
    layer = eqx.nn.inference_mode(make(getkey(), **options))
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    x, ct = jr.normal(getkey(), (SEQ, D_MODEL)), jr.normal(getkey(), (SEQ, D_MODEL))

    @jax.jit
    def loss(params, x):
        return (eqx.combine(jax.tree.map(jnp.asarray, params), static)(jnp.asarray(x)) * ct).sum()

    check_grads(loss, (params, x), order=2, rtol=1e-4)
    gradient = jax.grad(loss)(params, x)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


def test_order_means_nothing_and_vmap_is_a_loop(getkey):
    layer = make(getkey(), adaptive_temperature=True)
    x = jr.normal(getkey(), (2, SEQ, D_MODEL))
    loop = jnp.stack([call(layer, each) for each in x])
    np.testing.assert_allclose(jax.vmap(layer)(x), loop, rtol=1e-5, atol=1e-6)
    order = np.random.default_rng(0).permutation(SEQ)
    np.testing.assert_allclose(call(layer, x[0][order]), loop[0][order], rtol=1e-5, atol=1e-6)


def test_padding_reaches_nobody(getkey):
    layer, x = make(getkey(), adaptive_temperature=True), jr.normal(getkey(), (SEQ, D_MODEL))
    valid = jnp.arange(SEQ) < 6

    def loss(layer, x):
        return (jnp.where(valid[:, None], call(layer, x, mask=Padding(valid)), 0) ** 2).sum()

    bad = jnp.where(valid[:, None], x, jnp.nan)
    # The same points without their padding.
    short = call(layer, x[:6])
    np.testing.assert_allclose(
        call(layer, bad, mask=Padding(valid))[:6], short, rtol=1e-5, atol=1e-6
    )
    expected, gradient = (jax.tree.leaves(eqx.filter_grad(loss)(layer, y)) for y in (x, bad))
    for a, b in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_errors(getkey):
    layer = make(getkey())
    x = jnp.ones((SEQ, D_MODEL))
    for bad, message in [
        (lambda: SliceAttention(D_MODEL, HEADS, 0, key=jr.key(0)), "num_slices=0"),
        (lambda: SliceAttention(D_MODEL, HEADS, 2, eps=-1.0, key=jr.key(0)), r"eps=-1\.0"),
        (lambda: SliceAttention(D_MODEL, 3, 2, key=jr.key(0)), "not a multiple of num_heads=3"),
        (lambda: layer(x, mask=Causal()), r"can only be Padding\(valid\)"),
        (lambda: layer(x, mask=Padding(jnp.ones(3, bool))), "has 3 flags, but the input 9"),
        (lambda: layer(x[None]), r"jax\.vmap"),
        (lambda: layer(x, positions=jnp.arange(SEQ)), "points have no order"),
        (lambda: layer.init_cache(3), "there is no cache"),
        (lambda: layer.extend(x, None), "there is no cache"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
