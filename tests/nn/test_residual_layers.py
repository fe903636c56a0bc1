"""Layers on residual branches and absolute positions: LayerScale, DropPath, positions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import (
    DropPath,
    DynamicTanh,
    LayerScale,
    LearnedPositions,
    SinusoidalPositions,
)


def test_layer_scale():
    layer, x = LayerScale(3, init=0.5), jnp.ones((2, 3))
    np.testing.assert_allclose(layer(x), 0.5 * x)
    np.testing.assert_allclose(jax.grad(lambda m: m(x).sum())(layer).weight, [2, 2, 2])
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="size=0"):
        LayerScale(0)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.9999999])
def test_drop_path(rate):
    layer, x = DropPath(rate), jnp.arange(1.0, 4)
    np.testing.assert_allclose(layer.rate, rate, rtol=1e-6)
    keys = jr.split(jr.key(0), 4000)
    outs = np.asarray(jax.jit(jax.vmap(lambda key: layer(x, key=key)))(keys))
    kept = (outs != 0).all(axis=1)
    # All of a branch or nothing of it, as often as was asked for, and right on average.
    assert ((outs == 0).all(axis=1) | kept).all()
    assert abs(kept.mean() - (1 - rate)) < 4 * np.sqrt(max(rate * (1 - rate), 1e-12) / 4000)
    if kept.any():
        np.testing.assert_allclose(outs[kept][0], x / (1 - rate), rtol=1e-3)


def test_drop_path_has_no_parameters_and_is_off_in_inference():
    layer = DropPath(0.5)
    assert not jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))
    np.testing.assert_allclose(eqx.nn.inference_mode(layer)(jnp.ones(2)), jnp.ones(2))
    with pytest.raises(RuntimeError, match="inference_mode"):
        layer(jnp.ones(2))
    with pytest.raises(ValueError, match=r"rate=1\.0"):
        DropPath(1.0)
    assert layer(jnp.ones(2, jnp.bfloat16), key=jr.key(0)).dtype == jnp.bfloat16
    rates = eqx.filter_vmap(DropPath)(jnp.asarray([0.0, 0.5])).rate
    np.testing.assert_allclose(rates, [0.0, 0.5])


def test_dynamic_tanh(x64):
    layer, x = DynamicTanh(3, alpha=0.7), jr.normal(jr.key(0), (4, 3))
    layer = eqx.tree_at(lambda m: m.bias, layer, jnp.asarray([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(layer(x), np.tanh(0.7 * np.asarray(x)) + np.arange(1, 4))
    gradient = jax.grad(lambda m: m(x).sum())(layer)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


def test_sinusoidal_positions(x64):
    layer = SinusoidalPositions(6, theta=50.0)
    positions = jnp.asarray([0, 3, 100_000])
    out = np.asarray(layer(positions, jnp.float64))
    for i in range(3):
        angle = np.asarray(positions) / 50.0 ** (2 * i / 6)
        np.testing.assert_allclose(out[:, 2 * i], np.sin(angle), atol=1e-10)
        np.testing.assert_allclose(out[:, 2 * i + 1], np.cos(angle), atol=1e-10)
    assert not jax.tree.leaves(layer)
    # Computed in float32 at least: bfloat16 would take 1001 for 1000.
    narrow = layer(jnp.asarray([1000, 1001]), jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16 and not jnp.array_equal(narrow[0], narrow[1])
    with pytest.raises(ValueError, match="d_model=5"):
        SinusoidalPositions(5)
    for theta in (0.0, np.inf):
        with pytest.raises(ValueError, match=f"theta={theta} must be positive and finite"):
            SinusoidalPositions(4, theta=theta)


def test_learned_positions(getkey):
    layer = LearnedPositions(5, 4, key=getkey())
    positions = jnp.asarray([4, 0, 2])
    np.testing.assert_allclose(layer(positions), layer.table.weight[positions])
    assert jnp.isnan(layer(jnp.asarray([5]))).all()
    np.testing.assert_array_equal(layer(jnp.asarray([-1, -7])), 0)
    assert layer(positions, jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="max_len=0"):
        LearnedPositions(0, 4, key=getkey())
