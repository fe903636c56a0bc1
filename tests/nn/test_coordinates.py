"""Positions that are places in space: coordinates, sinusoids of them, rotations by them."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import Attention, AxialRoPE, SinusoidalCoordinates, grid_coordinates


def test_grid_coordinates_are_centres_of_cells():
    np.testing.assert_allclose(grid_coordinates((2,)), [[-0.5], [0.5]])
    places = grid_coordinates((2, 4))
    assert places.shape == (8, 2)
    np.testing.assert_allclose(places[1], [-0.5, -0.25])
    np.testing.assert_allclose(places.mean(axis=0), 0, atol=1e-7)
    assert grid_coordinates((2, 3, 4), jnp.bfloat16).shape == (24, 3)


def test_sinusoids_of_each_coordinate():
    layer, places = SinusoidalCoordinates(2, 8), jnp.asarray([[3.0, 0.0], [0.5, -2.0]])
    out = layer(places)
    for i, (a, b) in enumerate(np.asarray(places)):
        expected = [f(c * w) for c in (a, b) for f in (math.sin, math.cos) for w in (1, 0.01)]
        np.testing.assert_allclose(out[i], expected, rtol=1e-5, atol=1e-6)
    odd = SinusoidalCoordinates(3, 8)(jnp.ones((1, 3)))
    assert odd.shape == (1, 8) and (odd[0, 6:] == 0).all() and (odd[0, :6] != 0).all()
    assert not jax.tree.leaves(eqx.filter(layer, eqx.is_array))
    assert layer(places, jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"at least 2 \* num_dims = 6"):
        SinusoidalCoordinates(3, 4)
    with pytest.raises(ValueError, match=r"so 3 for each position, but num_dims=2"):
        layer(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="theta=0"):
        SinusoidalCoordinates(2, 8, theta=0.0)
    # The first wavelength would be NaN.
    with pytest.raises(ValueError, match="theta=inf must be positive and finite"):
        SinusoidalCoordinates(2, 8, theta=math.inf)
    with pytest.raises(ValueError, match="num_dims=0 must be at least 1"):
        SinusoidalCoordinates(0, 8)
    for sizes in ((), (2, 0)):
        with pytest.raises(ValueError, match="must be one or more of at least 1"):
            grid_coordinates(sizes)


def _reference(x, coordinates, theta, scale):
    """The pairs as complex numbers."""
    x, coordinates = np.asarray(x), np.asarray(coordinates)
    half, dims = x.shape[-1] // 2, coordinates.shape[1]
    count = half // dims
    angle = np.zeros((len(x), half))
    for axis in range(dims):
        for k in range(count):
            frequency = scale * theta ** (-k / count)
            angle[:, axis * count + k] = coordinates[:, axis] * frequency
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize(("dims", "head_dim"), [(1, 8), (2, 8), (3, 16), (2, 10)])
def test_rotation(x64, getkey, dims, head_dim):
    rope = AxialRoPE(dims, theta=50.0, scale=3.0)
    x, places = jr.normal(getkey(), (7, 2, head_dim)), jr.normal(getkey(), (7, dims))
    expected = _reference(x, places, 50.0, 3.0)
    np.testing.assert_allclose(rope(x, places), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(rope(x, 0 * places), x)


def test_scores_depend_on_differences_only(x64, getkey):
    rope = AxialRoPE(2)
    q, k = jr.normal(getkey(), (2, 1, 1, 16))
    a, b, shift = jr.normal(getkey(), (3, 1, 2))

    def score(a, b):
        return jnp.vdot(rope(q, a), rope(k, b))

    np.testing.assert_allclose(score(a, b), score(a + shift, b + shift), rtol=1e-10)
    assert abs(score(a, b) - score(a + shift, b)) > 1e-3


def test_low_precision_is_turned_in_float32(getkey):
    x, places = jr.normal(getkey(), (3, 1, 16)).astype(jnp.bfloat16), 100 * jnp.ones((3, 2))
    out = AxialRoPE()(x, places)
    assert out.dtype == jnp.bfloat16
    expected = _reference(x.astype(jnp.float32), places, 100.0, 2 * math.pi)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=1e-2, atol=2e-2)


def test_no_parameters_and_values():
    assert jax.tree.leaves(eqx.filter(AxialRoPE(), eqx.is_array)) == []
    assert AxialRoPE(2) == AxialRoPE(2) != AxialRoPE(3)
    for options in ({"num_dims": 0}, {"theta": 0.0}, {"scale": -1.0}, {"scale": math.inf}):
        with pytest.raises(ValueError, match="must be positive"):
            AxialRoPE(**options)
    with pytest.raises(ValueError, match=r"head_dim=4 features by 3 coordinates"):
        AxialRoPE(3)(jnp.ones((1, 1, 4)), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="num_dims=2"):
        AxialRoPE(2)(jnp.ones((1, 1, 8)), jnp.ones((1, 3)))


def test_attention_turns_queries_and_keys_to_their_places(x64, getkey):
    layer = Attention(8, 2, rope=AxialRoPE(2), key=getkey())
    x, places = jr.normal(getkey(), (5, 8)), jr.normal(getkey(), (5, 2))
    out = layer(x, coordinates=places)
    moved = layer(x, coordinates=places + 3.0)
    np.testing.assert_allclose(out, moved, rtol=1e-9, atol=1e-9)
    assert not jnp.allclose(out, layer(x, coordinates=2 * places), atol=1e-3)
    cache, outs = layer.init_cache(5), []
    for i in (slice(0, 3), slice(3, 5)):
        part, cache = layer.extend(x[i], cache, coordinates=places[i])
        seen = layer(x[: i.stop], coordinates=places[: i.stop])[i]
        np.testing.assert_allclose(part, seen, rtol=1e-9, atol=1e-9)
        outs.append(part)
    with pytest.raises(ValueError, match="coordinates must be given"):
        layer(x)
    with pytest.raises(ValueError, match="no AxialRoPE to make use of them"):
        Attention(8, 2, key=getkey())(x, coordinates=places)


def test_derivatives_with_respect_to_places(x64, getkey):
    layer = Attention(8, 2, rope=AxialRoPE(2), key=getkey())
    x, places = jr.normal(getkey(), (10, 8)), jr.normal(getkey(), (10, 2))
    cotangent, direction = jr.normal(getkey(), (10, 8)), jr.normal(getkey(), (10, 2))

    def loss(places):
        return (layer(x, coordinates=places) * cotangent).sum()

    gradient, hvp = jax.jvp(jax.grad(loss), (places,), (direction,))
    step = 1e-5
    ahead, behind = (places + s * direction for s in (step, -step))
    slope = (loss(ahead) - loss(behind)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=1e-7)
    bend = (jax.grad(loss)(ahead) - jax.grad(loss)(behind)) / (2 * step)
    np.testing.assert_allclose(hvp, bend, rtol=1e-6, atol=1e-7)
