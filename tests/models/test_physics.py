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
from eqx_transformer.nn import DropPath, LayerScale, Modulation
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
        *({"num_conditions": 2}, {"layer_scale": 1e-4}, {"drop_path_rate": 0.5}),
        *({"remat": "full"}, {"unroll": 2}),
    ],
    UPTConfig: [
        *({"num_dims": 3}, {"out_features": 3}, {"num_features": 0}, {"d_model": 12}),
        *({"num_layers": 3}, {"num_decoder_layers": 2}, {"num_heads": 1}, {"d_ff": None}),
        *({"num_neighbours": 2}, {"radius": 0.5}, {"wavelength_base": 20.0}, {"norm_eps": 0.1}),
        *({"dropout_rate": 0.5}, {"num_conditions": 2}, {"layer_scale": 1e-4}),
        *({"drop_path_rate": 0.5}, {"remat": "full"}, {"unroll": 2}),
    ],
    AnchorTransformerConfig: [
        *({"num_dims": 1}, {"branches": ("surface", "inlet")}, {"out_features": (1, 4)}),
        *({"d_model": 16}, {"num_layers": 4}, {"patterns": ("self",)}, {"num_heads": 1}),
        *({"d_ff": None}, {"d_geometry": 6}, {"wavelength_base": 20.0}, {"rope_theta": 10.0}),
        *({"rope_scale": 2.0}, {"qk_norm": True}, {"norm_eps": 0.1}, {"dropout_rate": 0.5}),
        *({"num_conditions": 2}, {"layer_scale": 1e-4}),
        {"drop_path_rate": 0.5, "patterns": ("joint",)},
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
        field = next(iter(change))  # the others are what it needs
        before = plain.replace(**{**change, field: getattr(plain, field)})
        after = plain.replace(**change)
        assert config.from_json(after.to_json()) == after
        assert built(model, before) != built(model, after), change


def conditioned(model, key):
    """Modulations that do something: they begin as zero."""
    return jax.tree.map(
        lambda x: (
            eqx.tree_at(lambda m: m.proj.weight, x, 0.3 * jr.normal(key, x.proj.weight.shape))
            if isinstance(x, Modulation)
            else x
        ),
        model,
        is_leaf=lambda x: isinstance(x, Modulation),
    )


def _is_drop_path(x):
    return isinstance(x, DropPath)


@pytest.mark.parametrize("config", PLAIN)
def test_conditions_modulate(config, getkey):
    made, plain = PLAIN[config]
    key = getkey()
    changes = {"num_conditions": 2, "layer_scale": 0.5, "drop_path_rate": 0.5}
    if config is AnchorTransformerConfig:
        changes["patterns"] = ("joint",)
    fresh = eqx.nn.inference_mode(made(plain.replace(**changes), key=key))
    paths = [x for x in jax.tree.leaves(fresh, is_leaf=_is_drop_path) if _is_drop_path(x)]
    for path in paths:
        np.testing.assert_allclose(path.rate, [0, 0.5])
    where, known = jr.normal(jr.key(1), (POINTS, DIMS)), jr.normal(jr.key(2), (POINTS, 3))

    @eqx.filter_jit
    def run(model, conditions):
        if config is TransolverConfig:
            return model(known, conditions=conditions)
        if config is UPTConfig:
            supernodes = jnp.asarray(SUPERNODES)
            return model(where, supernodes, where[:4], known[:, :1], conditions=conditions)
        anchors, _ = anchors_and_queries(jr.key(3))
        return model(anchors, conditions=conditions)[0]["volume"]

    a, b = jnp.asarray([1.0, 2.0]), jnp.asarray([1.0, 2.5])
    model = conditioned(fresh, key)
    assert not jnp.allclose(run(model, a), run(model, b), atol=1e-3)
    # adaLN-Zero: to begin with, every block is the identity.
    np.testing.assert_array_equal(run(fresh, a), run(fresh, b))
    for bad, count in ((None, 0), (a[:1], 1)):
        with pytest.raises(ValueError, match=f"{count} conditions, but num_conditions=2"):
            run(model, bad)
    with pytest.raises(ValueError, match="2 conditions, but num_conditions=0"):
        run(eqx.filter_eval_shape(made, plain, key=key), a)


def test_branches_are_scaled_and_dropped(getkey):
    config = TRANSOLVER.replace(layer_scale=0.5, drop_path_rate=0.5)
    model, x = Transolver(config, key=getkey()), jr.normal(getkey(), (POINTS, 3))
    run = eqx.filter_jit(lambda model, key=None: model(x, key=key))
    with pytest.raises(RuntimeError, match="DropPath: a key is needed"):
        run(model)
    dropped = [run(model, jr.key(i)) for i in range(4)]
    assert any(not jnp.allclose(dropped[0], y, atol=1e-4) for y in dropped[1:])
    sure = run(eqx.nn.inference_mode(model))
    # Without a scale there is nothing to drop.
    nothing = jax.tree.map(
        lambda x: jax.tree.map(jnp.zeros_like, x) if isinstance(x, LayerScale) else x,
        model,
        is_leaf=lambda x: isinstance(x, LayerScale),
    )
    np.testing.assert_array_equal(run(nothing, jr.key(0)), run(nothing, jr.key(1)))
    assert not jnp.allclose(run(nothing, jr.key(0)), sure, atol=1e-3)


def test_conditions_are_cached(getkey, x64):
    """Anchors know the conditions, and so do queries that come later."""
    config = ANCHOR.replace(num_conditions=1, patterns=("joint",), num_layers=1)
    model = conditioned(AnchorTransformer(config, key=getkey()), getkey())
    anchors, queries = anchors_and_queries(getkey())

    @eqx.filter_jit
    def both(model, conditions):
        _, state = model.encode(anchors, conditions=conditions)
        return model(anchors, queries, conditions=conditions)[1], model.decode(state, queries)

    expected, out = both(model, jr.normal(getkey(), (1,)))
    other, _ = both(model, jr.normal(getkey(), (1,)))
    for name in queries:
        np.testing.assert_allclose(out[name], expected[name], rtol=1e-9, atol=1e-10)
        assert not jnp.allclose(other[name], expected[name], atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TRANSOLVER.replace(num_slices=0), "num_slices=0"),
        (lambda: TRANSOLVER.replace(num_heads=3), "not a multiple of num_heads=3"),
        (lambda: UPT_CONFIG.replace(num_features=-1), "num_features=-1"),
        (lambda: UPT_CONFIG.replace(radius=-1.0), "radius=-1.0"),
        (lambda: UPT_CONFIG.replace(num_conditions=-1), "num_conditions=-1"),
        (lambda: TRANSOLVER.replace(num_conditions=-1), "num_conditions=-1"),
        (lambda: ANCHOR.replace(num_conditions=-1), "num_conditions=-1"),
        (lambda: ANCHOR.replace(layer_scale=0.0), r"layer_scale=0\.0 must be positive"),
        (lambda: TRANSOLVER.replace(drop_path_rate=1.0), r"drop_path_rate=1\.0 must be"),
        (lambda: ANCHOR.replace(num_dims=3), r"head_dim=4 must be even and at least .* 6"),
        (lambda: ANCHOR.replace(out_features=(1,)), r"out_features=\(1,\) must be 2 numbers"),
        (lambda: ANCHOR.replace(num_layers=3), "num_layers=3 must be a multiple of the 2"),
        (lambda: ANCHOR.replace(drop_path_rate=0.1), "at least twice the 2 patterns"),
        (lambda: ANCHOR.replace(branches=("a", "a")), "must be one or more different names"),
        (lambda: ANCHOR.replace(branches=("a", "")), "must be one or more different names"),
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
