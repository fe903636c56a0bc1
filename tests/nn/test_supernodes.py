"""Supernodes, and the points around them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

from eqx_transformer.attention import Padding
from eqx_transformer.nn import SupernodePooling, nearest_neighbours

POINTS, DIMS, D_MODEL, FEATURES = 11, 2, 8, 3
SUPERNODES = np.asarray([0, 4, 7])

# Eagerly, every operation would be compiled on its own.
call = eqx.filter_jit(lambda layer, *args, **options: layer(*args, **options))


@pytest.fixture
def cloud(getkey):
    return jr.normal(getkey(), (POINTS, DIMS)), jr.normal(getkey(), (POINTS, FEATURES))


def make(key, **options):
    return SupernodePooling(DIMS, D_MODEL, num_features=FEATURES, key=key, **options)


@pytest.mark.parametrize("radius", [None, 0.9])
def test_neighbours(radius, getkey):
    points, centres = jr.normal(getkey(), (30, 3)), jr.normal(getkey(), (5, 3))
    valid = jr.bernoulli(getkey(), 0.8, (30,))
    index, near = nearest_neighbours(points, centres, 6, radius=radius, valid=valid)
    distance = np.linalg.norm(np.asarray(centres)[:, None] - np.asarray(points)[None], axis=-1)
    for i in range(5):
        order = [j for j in np.argsort(distance[i]) if valid[j]]
        expected = [j for j in order if radius is None or distance[i, j] <= radius][:6]
        assert list(np.asarray(index[i])[np.asarray(near[i])]) == expected
    # There may be fewer points than neighbours are asked for.
    index, near = nearest_neighbours(points[:4], centres, 6)
    assert index.shape == (5, 4) and near.all()


def by_hand(layer, where, features, valid):
    """The mean of an MLP of both ends, pair by pair, in float64 NumPy."""
    layer = jax.tree.map(lambda y: np.asarray(y) if eqx.is_array(y) else y, layer)
    where, features = np.asarray(where, np.float64), np.asarray(features, np.float64)
    e = np.asarray(layer.embedding(jnp.asarray(where))) @ layer.coordinate_proj.weight
    e = e + layer.coordinate_proj.bias + features @ layer.feature_proj.weight
    weight = np.concatenate([layer.point_proj.weight, layer.centre_proj.weight])
    out = []
    for s in SUPERNODES:
        distance = np.linalg.norm(where - where[s], axis=-1)
        order = [j for j in np.argsort(distance) if valid[j]][: layer.num_neighbours]
        around = [j for j in order if layer.radius is None or distance[j] <= layer.radius]
        messages = [
            np.tanh(np.concatenate([e[j], e[s]]) @ weight + layer.point_proj.bias)
            @ layer.down_proj.weight
            + layer.down_proj.bias
            for j in around
        ]
        out.append(np.mean(messages, axis=0) if valid[s] else np.zeros(D_MODEL))
    return np.stack(out)


@pytest.mark.parametrize(("radius", "num_neighbours"), [(None, 4), (1.0, 32), (1.0, 2)])
def test_equals_the_formula(radius, num_neighbours, getkey, x64):
    where, features = jr.normal(getkey(), (POINTS, DIMS)), jr.normal(getkey(), (POINTS, FEATURES))
    layer = make(getkey(), radius=radius, num_neighbours=num_neighbours, activation=jnp.tanh)
    for valid in (np.ones(POINTS, bool), ~np.isin(np.arange(POINTS), (4, 5, 9))):
        out = call(
            layer, where, jnp.asarray(SUPERNODES), features, mask=Padding(jnp.asarray(valid))
        )
        expected = by_hand(layer, where, features, valid)
        np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_derivatives(getkey, x64):
    where, features = jr.normal(getkey(), (POINTS, DIMS)), jr.normal(getkey(), (POINTS, FEATURES))
    layer = make(getkey(), num_neighbours=4)

    @jax.jit
    def pool(where, features):
        return layer(jnp.asarray(where), jnp.asarray(SUPERNODES), jnp.asarray(features))

    check_grads(
        pool,
        (where, features),
        order=2,
        rtol=1e-4,
    )
    gradient = eqx.filter_grad(lambda m: (m(where, jnp.asarray(SUPERNODES), features) ** 2).sum())(
        layer
    )
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


def test_order_means_nothing_and_vmap_is_a_loop(cloud, getkey):
    layer = make(getkey(), num_neighbours=4)
    where, features = cloud
    out = call(layer, where, jnp.asarray(SUPERNODES), features)
    order = np.random.default_rng(0).permutation(POINTS)
    places = jnp.asarray(np.argsort(order)[SUPERNODES])
    np.testing.assert_allclose(call(layer, where[order], places, features[order]), out, atol=1e-5)
    batch = jnp.stack([jnp.asarray(SUPERNODES), jnp.asarray([1, 2, 3])])
    loop = jnp.stack([call(layer, where, each, features) for each in batch])
    mapped = jax.vmap(lambda each: layer(where, each, features))(batch)
    np.testing.assert_allclose(mapped, loop, rtol=1e-5, atol=1e-6)


def test_padding_reaches_nobody(cloud, getkey):
    where, features = cloud
    valid = jnp.arange(POINTS) < 8
    layer, supernodes = make(getkey(), num_neighbours=10), jnp.asarray(SUPERNODES)
    bad = [jnp.where(valid[:, None], x, jnp.nan) for x in cloud]
    short = call(layer, where[:8], supernodes, features[:8])
    out = call(layer, bad[0], supernodes, bad[1], mask=Padding(valid))
    np.testing.assert_allclose(out, short, rtol=1e-5, atol=1e-6)

    def loss(layer, where, features, mask):
        return (call(layer, where, supernodes, features, mask=mask) ** 2).sum()

    gradient = eqx.filter_grad(loss)(layer, *bad, Padding(valid))
    expected = eqx.filter_grad(loss)(layer, where[:8], features[:8], None)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_errors(cloud, getkey):
    where, features = cloud
    layer, supernodes = make(getkey()), jnp.asarray(SUPERNODES)
    plain = SupernodePooling(DIMS, D_MODEL, key=getkey())
    assert plain(where, supernodes).shape == (3, D_MODEL)
    for bad, message in [
        (lambda: layer(where, supernodes), "features are missing"),
        (lambda: plain(where, supernodes, features), "num_features=0"),
        (lambda: make(getkey(), radius=0.0), "radius=0.0 must be positive"),
        (lambda: make(getkey(), num_neighbours=0), "num_neighbours=0"),
        (lambda: nearest_neighbours(where, features, 2), "points have 2 coordinates, centres 3"),
        (lambda: nearest_neighbours(where, where, 0), "num_neighbours=0"),
        (lambda: layer(where[None], supernodes, features), r"jax\.vmap"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
