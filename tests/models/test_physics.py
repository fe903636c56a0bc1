"""Models of points: Transolver, UPT, AnchorTransformer."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Padding
from eqx_transformer.models import (
    UPT,
    AnchorTransformer,
    AnchorTransformerConfig,
    Transolver,
    TransolverConfig,
    UPTConfig,
)
from eqx_transformer.stacks import Source

POINTS, DIMS = 9, 2
SMALL = {"d_model": 8, "num_layers": 2, "num_heads": 2, "d_ff": 8}
TRANSOLVER = TransolverConfig(num_features=3, out_features=2, num_slices=3, **SMALL)
UPT_CONFIG = UPTConfig(
    num_dims=DIMS, out_features=2, num_features=1, num_neighbours=3, wavelength_base=10.0, **SMALL
)
ANCHOR = AnchorTransformerConfig(
    num_dims=DIMS,
    branches=("surface", "volume"),
    out_features=(1, 3),
    wavelength_base=10.0,
    **SMALL,
)
SUPERNODES = np.asarray([0, 3, 5])


def anchors_and_queries(key, dtype=None):
    sizes = (3, 4, 5, 2)
    points = [jr.normal(k, (n, DIMS), dtype) for n, k in zip(sizes, jr.split(key, 4), strict=True)]
    names = ANCHOR.branches
    return dict(zip(names, points[:2], strict=True)), dict(zip(names, points[2:], strict=True))


def built(model, config):
    """Everything a model is, but for its configuration."""
    made = eqx.filter_eval_shape(model, config, key=jr.key(0))
    parts = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name != "config"}
    leaves, structure = jax.tree.flatten(parts)
    return leaves, structure


def test_transolver_treats_points_alike(getkey):
    model = Transolver(TRANSOLVER, key=getkey())
    x = jr.normal(getkey(), (2, POINTS, 3))
    run = eqx.filter_jit(model)
    out = eqx.filter_jit(eqx.filter_vmap(model))(x)
    assert out.shape == (2, POINTS, 2)
    np.testing.assert_allclose(out[1], run(x[1]), rtol=1e-4, atol=1e-5)
    order = np.random.default_rng(0).permutation(POINTS)
    np.testing.assert_allclose(run(x[0][order]), out[0][order], rtol=1e-4, atol=1e-5)
    valid = jnp.arange(POINTS) < 6
    padded = jnp.where(valid[:, None], x[0], jnp.nan)
    short = run(x[0][:6])
    np.testing.assert_allclose(run(padded, mask=Padding(valid))[:6], short, rtol=1e-4, atol=1e-5)


def test_transolver_is_deterministic_in_inference(getkey):
    plus = {"adaptive_temperature": True, "gumbel": True, "separate_values": False}
    model = Transolver(TRANSOLVER.replace(**plus), key=getkey())
    x = jr.normal(getkey(), (POINTS, 3))
    run, sure = eqx.filter_jit(model), eqx.filter_jit(eqx.nn.inference_mode(model))
    assert not jnp.allclose(run(x, key=jr.key(0)), run(x, key=jr.key(1)))
    np.testing.assert_array_equal(sure(x), sure(x, key=jr.key(1)))


def test_upt_reads_places_one_by_one(getkey):
    model = UPT(UPT_CONFIG, key=getkey())
    where, queries = jr.normal(getkey(), (POINTS, DIMS)), jr.normal(getkey(), (5, DIMS))
    features = jr.normal(getkey(), (POINTS, 1))
    run, decode = eqx.filter_jit(model), eqx.filter_jit(model.decode)
    out = run(where, jnp.asarray(SUPERNODES), queries, features)
    source = eqx.filter_jit(model.encode)(where, jnp.asarray(SUPERNODES), features)
    chunks = [decode(source, queries[:2]), decode(source, queries[2:])]
    np.testing.assert_allclose(jnp.concatenate(chunks), out, rtol=1e-4, atol=1e-5)
    # Neither the order of points nor that of supernodes means anything.
    order = np.random.default_rng(0).permutation(POINTS)
    places = jnp.asarray(np.argsort(order)[SUPERNODES][::-1].copy())
    again = run(where[order], places, queries, features[order])
    np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-5)
    # Padding, of which a supernode is a part, changes nothing.
    valid = jnp.arange(POINTS + 2) < POINTS
    padded, known = (
        jnp.pad(x, ((0, 2), (0, 0)), constant_values=jnp.nan) for x in (where, features)
    )
    supernodes = jnp.asarray([*SUPERNODES, POINTS])
    again = run(padded, supernodes, queries, known, mask=Padding(valid))
    np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patterns", [("self", "cross"), ("joint",)])
def test_anchors_once_and_queries_in_chunks(patterns, getkey, x64):
    config = ANCHOR.replace(patterns=patterns, d_geometry=6, qk_norm=True)
    model = AnchorTransformer(config, key=getkey())
    anchors, queries = anchors_and_queries(getkey())
    geometry = Source(jr.normal(getkey(), (4, 6)))
    run, encode, decode = map(eqx.filter_jit, (model, model.encode, model.decode))
    at_anchors, at_queries = run(anchors, queries, geometry=geometry)
    assert {k: x.shape for k, x in at_queries.items()} == {"surface": (5, 1), "volume": (2, 3)}
    encoded, state = encode(anchors, geometry=geometry)
    for name in anchors:
        np.testing.assert_allclose(encoded[name], at_anchors[name], rtol=1e-9, atol=1e-10)
    for chunk in (slice(0, 1), slice(1, 5)):
        out = decode(state, {"surface": queries["surface"][chunk]})["surface"]
        np.testing.assert_allclose(out, at_queries["surface"][chunk], rtol=1e-9, atol=1e-10)
    out = decode(state, queries)
    np.testing.assert_allclose(out["volume"], at_queries["volume"], rtol=1e-9, atol=1e-10)


def test_anchor_padding_and_order(getkey, x64):
    model = AnchorTransformer(ANCHOR, key=getkey())
    anchors, queries = anchors_and_queries(getkey())
    run, encode, decode = map(eqx.filter_jit, (model, model.encode, model.decode))
    at_anchors, at_queries = run(anchors, queries)
    order = np.asarray([2, 0, 1])
    shuffled = {**anchors, "surface": anchors["surface"][order]}
    again, others = run(shuffled, queries)
    np.testing.assert_allclose(again["surface"], at_anchors["surface"][order], rtol=1e-9)
    np.testing.assert_allclose(others["volume"], at_queries["volume"], rtol=1e-9)
    rows = ((0, 2), (0, 0))
    padded = {**anchors, "volume": jnp.pad(anchors["volume"], rows, constant_values=jnp.nan)}
    valid = {"volume": jnp.arange(6) < 4}
    _, state = encode(padded, valid=valid)
    for out in (run(padded, queries, valid=valid)[1], decode(state, queries)):
        for name in queries:
            np.testing.assert_allclose(out[name], at_queries[name], rtol=1e-9, atol=1e-10)

    def loss(model, anchors, valid):
        _, out = model(anchors, queries, valid=valid)
        return sum(jnp.sum(x**2) for x in out.values())

    grad = eqx.filter_jit(eqx.filter_grad(loss))
    a, b = (grad(model, *x) for x in ((anchors, None), (padded, valid)))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9)


def test_derivatives_by_query_coordinates(getkey, x64):
    """What a physics residual needs: Jacobians of the cached prediction, and their gradients."""
    model = AnchorTransformer(ANCHOR, key=getkey())
    anchors, queries = anchors_and_queries(getkey())
    _, state = eqx.filter_jit(model.encode)(anchors)

    @jax.jit
    def field(where):
        return model.decode(state, {"volume": jnp.asarray(where)[None]})["volume"][0]

    where = queries["volume"][0]
    forward, reverse = jax.jit(jax.jacfwd(field))(where), jax.jit(jax.jacrev(field))(where)
    np.testing.assert_allclose(forward, reverse, rtol=1e-9, atol=1e-10)
    step = 1e-5 * jnp.eye(DIMS)
    differences = [(field(where + s) - field(where - s)) / 2e-5 for s in step]
    np.testing.assert_allclose(forward, jnp.stack(differences, axis=1), rtol=1e-6, atol=1e-8)
    together = jax.jit(jax.vmap(jax.jacfwd(field)))(queries["volume"])
    np.testing.assert_allclose(together[0], forward, rtol=1e-9, atol=1e-10)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        def at(where):
            return model.decode(state, {"volume": where[None]})["volume"][0]

        return (jax.jacfwd(at)(where) ** 2).sum()

    parts = gradient(model)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(parts))
    assert (parts.heads["volume"].weight != 0).any()


FIELDS = {
    TransolverConfig: [
        *({"num_features": 4}, {"out_features": 3}, {"d_model": 4}, {"num_layers": 3}),
        *({"num_heads": 1}, {"num_slices": 4}, {"d_ff": None}, {"adaptive_temperature": True}),
        *({"gumbel": True}, {"separate_values": False}, {"norm_eps": 0.1}, {"dropout_rate": 0.5}),
        *({"remat": "full"}, {"unroll": 2}),
    ],
    UPTConfig: [
        *({"num_dims": 3}, {"out_features": 3}, {"num_features": 0}, {"d_model": 12}),
        *({"num_layers": 3}, {"num_decoder_layers": 2}, {"num_heads": 1}, {"d_ff": None}),
        *({"num_neighbours": 2}, {"radius": 0.5}, {"wavelength_base": 20.0}, {"norm_eps": 0.1}),
        *({"dropout_rate": 0.5}, {"remat": "full"}, {"unroll": 2}),
    ],
    AnchorTransformerConfig: [
        *({"num_dims": 1}, {"branches": ("surface", "inlet")}, {"out_features": (1, 4)}),
        *({"d_model": 16}, {"num_layers": 4}, {"patterns": ("self",)}, {"num_heads": 1}),
        *({"d_ff": None}, {"d_geometry": 6}, {"wavelength_base": 20.0}, {"rope_theta": 10.0}),
        *({"rope_scale": 2.0}, {"qk_norm": True}, {"norm_eps": 0.1}, {"dropout_rate": 0.5}),
        *({"remat": "full"}, {"unroll": 2, "patterns": ("joint",)}),
    ],
}
PLAIN = {
    TransolverConfig: (Transolver, TRANSOLVER),
    UPTConfig: (UPT, UPT_CONFIG),
    AnchorTransformerConfig: (AnchorTransformer, ANCHOR),
}


@pytest.mark.parametrize("config", FIELDS)
def test_every_field_changes_what_is_built(config):
    model, plain = PLAIN[config]
    assert {k for change in FIELDS[config] for k in change} == {
        field.name for field in dataclasses.fields(config)
    }
    for change in FIELDS[config]:
        before = plain if "unroll" not in change else plain.replace(**{**change, "unroll": 1})
        after = plain.replace(**change)
        assert config.from_json(after.to_json()) == after
        assert built(model, before) != built(model, after), change


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TRANSOLVER.replace(num_slices=0), "num_slices=0"),
        (lambda: TRANSOLVER.replace(num_heads=3), "not a multiple of num_heads=3"),
        (lambda: UPT_CONFIG.replace(num_features=-1), "num_features=-1"),
        (lambda: UPT_CONFIG.replace(radius=-1.0), "radius=-1.0"),
        (lambda: ANCHOR.replace(num_dims=3), r"head_dim=4 must be even and at least .* 6"),
        (lambda: ANCHOR.replace(out_features=(1,)), r"out_features=\(1,\) must be 2 numbers"),
        (lambda: ANCHOR.replace(num_layers=3), "num_layers=3 must be a multiple of the 2"),
        (lambda: ANCHOR.replace(branches=("a", "a")), "must be one or more different names"),
        (lambda: ANCHOR.replace(branches=("a",), out_features=(1,)), "has 'cross'"),
    ],
)
def test_config_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_anchor_errors(getkey):
    model = AnchorTransformer(ANCHOR, key=getkey())
    anchors, queries = anchors_and_queries(getkey())
    for call, message in [
        (lambda: model({"surface": anchors["surface"]}), r"anchors of \['surface'\]"),
        (lambda: model(anchors, {"inlet": queries["volume"]}), "queries of 'inlet'"),
        (lambda: model(anchors, valid={"inlet": jnp.ones(3, bool)}), "flags of 'inlet'"),
        (lambda: model(anchors, geometry=Source(jnp.ones((2, 6)))), "d_geometry=None"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    model = AnchorTransformer(ANCHOR.replace(d_geometry=6), key=getkey())
    with pytest.raises(ValueError, match=r"geometry=Source"):
        model(anchors)
