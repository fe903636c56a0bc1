"""MixtureOfExperts against a slow loop in NumPy, and against computing every expert."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import (
    MLP,
    GatedMLP,
    MixtureOfExperts,
    RouterStats,
)

SEQ, D_MODEL, D_FF, EXPERTS = 13, 6, 5, 7
MAKE = {
    "mlp": eqx.Partial(MLP, D_MODEL, D_FF, activation=jnp.tanh),
    "gated": eqx.Partial(GatedMLP, D_MODEL, D_FF),
}
OPTIONS = {
    "softmax": {},
    "softmax raw": {"renormalize": False, "top_k": 3},
    "sigmoid": {"scores": "sigmoid", "route_scale": 2.5, "selection_bias": True},
    "sigmoid raw": {"scores": "sigmoid", "renormalize": False, "top_k": 1},
    "softmax bias": {"selection_bias": True, "top_k": 4},
    "all": {"top_k": EXPERTS},
    "capacity": {"capacity_factor": 0.9},
    "capacity sigmoid": {"scores": "sigmoid", "capacity_factor": 0.3, "top_k": 3},
    "room for all": {"capacity_factor": 1000},
}


def make(getkey, expert="mlp", **options):
    """A layer none of whose parameters is zero, with its selection bias set."""
    layer = MixtureOfExperts(D_MODEL, EXPERTS, MAKE[expert], key=getkey(), **options)
    layer = jax.tree.map(
        lambda w: w + 0.3 * jr.normal(getkey(), w.shape) if eqx.is_inexact_array(w) else w, layer
    )
    if layer.selection_bias is not None:
        layer = layer.with_selection_bias(0.3 * jr.normal(getkey(), (EXPERTS,), jnp.float32))
    return layer


def _f64(x):
    return np.asarray(x, np.float64)


def _expert(experts, e, row):
    """One expert for one row, in NumPy."""

    def linear(layer, row):
        bias = 0 if layer.bias is None else _f64(layer.bias[e])
        return row @ _f64(layer.weight[e]) + bias

    if isinstance(experts, MLP):
        return linear(experts.down_proj, np.tanh(linear(experts.up_proj, row)))
    gate = linear(experts.gate_proj, row)
    return linear(experts.down_proj, gate / (1 + np.exp(-gate)) * linear(experts.up_proj, row))


def slow(layer, x, valid=None):
    """What the layer computes, choice by choice, in float64; and its statistics."""
    seq, k, num_experts = len(x), layer.top_k, layer.num_experts
    valid = np.ones(seq, bool) if valid is None else np.asarray(valid)
    bias = 0 if layer.selection_bias is None else _f64(layer.selection_bias)
    limit = math.inf
    if layer.capacity_factor is not None:
        limit = math.ceil(layer.capacity_factor * seq * k / num_experts)
    accepted, chosen = np.zeros(num_experts, int), np.zeros(num_experts, int)
    y, probability, z, entropy, dropped = np.zeros(x.shape), np.zeros(num_experts), 0, 0, 0
    for t in range(seq):
        if not valid[t]:
            continue
        logits = _f64(x[t]) @ _f64(layer.router.weight)
        if layer.scores == "softmax":
            scores = np.exp(logits) / np.exp(logits).sum()
        else:
            scores = 1 / (1 + np.exp(-logits))
        experts = np.argsort(-(scores + bias))[:k]
        total = scores[experts].sum() if layer.renormalize else 1
        for e in experts:
            chosen[e] += 1
            if accepted[e] == limit:
                dropped += 1
                continue
            accepted[e] += 1
            weight = layer.route_scale * scores[e] / total
            y[t] += weight * _expert(layer.experts, e, _f64(x[t]))
        p = scores / scores.sum()
        probability += p
        entropy -= (p * np.log(p)).sum()
        z += np.log(np.exp(logits).sum()) ** 2
    count = max(valid.sum(), 1)
    load, probability = chosen / (count * k), probability / count
    return y, {
        "load_balance_loss": num_experts * load @ probability,
        "z_loss": z / count,
        "entropy": entropy / count,
        "load": load,
        "probability": probability,
        "dropped": dropped / (count * k),
    }


def dense(layer, x):
    """Every expert for every position; nothing dropped. For derivatives."""
    scores = layer.router(x)
    scores = jax.nn.sigmoid(scores) if layer.scores == "sigmoid" else jax.nn.softmax(scores)
    bias = 0.0 if layer.selection_bias is None else layer.selection_bias.astype(x.dtype)[None]
    ranked = scores + bias
    cut = jnp.sort(ranked, axis=-1)[:, -layer.top_k, None]
    scores = jnp.where(ranked >= cut, scores, 0)
    if layer.renormalize:
        scores = scores / scores.sum(-1, keepdims=True)
    every = eqx.filter_vmap(lambda expert: expert(x))(layer.experts)
    return layer.route_scale * jnp.einsum("esd,se->sd", every, scores)


@eqx.filter_jit
def apply_with_stats(layer, x, valid=None, key=None):
    return layer.apply_with_stats(x, valid=valid, key=key)


def check_stats(stats, expected, **tolerance):
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(stats, name), value, err_msg=name, **tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_slow_loop(getkey, name):
    layer = make(getkey, "gated" if "sigmoid" in name else "mlp", **OPTIONS[name])
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    for valid in (None, jnp.arange(SEQ) % 4 != 1, jnp.zeros(SEQ, bool)):
        y, stats = apply_with_stats(layer, x, valid)
        expected, expected_stats = slow(layer, x, valid)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        check_stats(stats, expected_stats, rtol=1e-5, atol=1e-6)
        if valid is None:
            assert (stats.dropped > 0) == (name in ("capacity", "capacity sigmoid"))


def test_call_is_apply_without_stats(getkey):
    layer, x = make(getkey), jr.normal(getkey(), (SEQ, D_MODEL))
    valid = jnp.arange(SEQ) < 9
    y, stats = layer.apply_with_stats(x, valid=valid)
    np.testing.assert_array_equal(layer(x, valid=valid), y)
    assert isinstance(stats, RouterStats) and not y[9:].any()


# Which expert a position goes to, in the tests where that is prescribed.
def routed(getkey, choices, **options):
    """A layer, and a sequence of which position `t` chooses `choices[t]`, in this order."""
    choices = np.asarray(choices)
    layer = MixtureOfExperts(
        EXPERTS,
        EXPERTS,
        eqx.Partial(MLP, EXPERTS, D_FF),
        top_k=choices.shape[1],
        key=getkey(),
        **options,
    )
    layer = eqx.tree_at(lambda m: m.router.weight, layer, jnp.eye(EXPERTS))
    x = jr.uniform(getkey(), (len(choices), EXPERTS))
    for i, column in enumerate(choices.T):
        x = x.at[jnp.arange(len(choices)), column].set(5.0 - i)
    return layer, x


def test_capacity_is_for_the_earliest_positions(getkey):
    # Two rows an expert: ceil(1.1 * 6 * 2 / 7). A second choice is as good as a first.
    choices = [[0, 1], [2, 0], [0, 3], [4, 2], [2, 0], [3, 5]]
    layer, x = routed(getkey, choices, capacity_factor=1.1)
    unlimited, _ = routed(getkey, choices)
    unlimited = eqx.tree_at(lambda m: m.experts, unlimited, layer.experts)
    y, stats = layer.apply_with_stats(x)
    np.testing.assert_allclose(stats.dropped, 3 / 12, rtol=1e-6)
    full = unlimited(x)
    np.testing.assert_allclose(y[jnp.array([0, 1, 3, 5])], full[jnp.array([0, 1, 3, 5])], rtol=1e-5)
    weight = jax.nn.softmax(jnp.array([5.0, 4.0]))
    expected = weight[1] * layer_expert(layer, 3)(x[2:3])
    np.testing.assert_allclose(y[2:3], expected, rtol=1e-5, atol=1e-6)
    assert not y[4].any()
    # What is padding takes no place.
    valid = jnp.array([True, False, True, True, True, True])
    y, stats = layer.apply_with_stats(x, valid=valid)
    np.testing.assert_allclose(y[2], full[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.dropped, 1 / 10, rtol=1e-6)
    # Nothing depends on later positions.
    np.testing.assert_allclose(layer(x.at[4:].set(1.0))[:4], layer(x)[:4], rtol=1e-5, atol=1e-6)


def layer_expert(layer, e):
    return jax.tree.map(lambda w: w[e] if eqx.is_array(w) else w, layer.experts)


@pytest.mark.parametrize("capacity_factor", [None, 100.0])
def test_any_routing_is_exact(getkey, capacity_factor):
    """One expert for all, one each, and more rows of an expert than fit a block."""
    seq = 50
    for choices in (
        np.tile([[3, 0]], (seq, 1)),
        np.stack([np.arange(seq) % EXPERTS, (np.arange(seq) + 1) % EXPERTS], 1),
        np.where(np.arange(seq)[:, None] < 33, [[6, 2]], [[2, 5]]),
    ):
        layer, x = routed(getkey, choices, capacity_factor=capacity_factor)
        y, stats = apply_with_stats(layer, x)
        expected = np.zeros(x.shape)
        weights = _f64(jax.nn.softmax(jnp.array([5.0, 4.0])))
        for e in range(EXPERTS):
            of_expert = _f64(layer_expert(layer, e)(x))
            for i in range(2):
                expected += weights[i] * of_expert * (choices[:, i] == e)[:, None]
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert stats.dropped == 0


def test_shared_experts_and_jitter(getkey):
    layer, x = make(getkey), jr.normal(getkey(), (SEQ, D_MODEL))
    shared = MLP(D_MODEL, 3, key=getkey())
    both = eqx.tree_at(lambda m: m.shared_experts, layer, shared, is_leaf=lambda m: m is None)
    np.testing.assert_allclose(both(x), layer(x) + shared(x), rtol=1e-5, atol=1e-6)
    valid = jnp.arange(SEQ) < 5
    assert not both(x, valid=valid)[5:].any()

    noisy = make(getkey, jitter=0.5)
    key = getkey()
    _, stats = noisy.apply_with_stats(x, key=key)
    _, same = noisy.apply_with_stats(x, key=key)
    _, other = noisy.apply_with_stats(x, key=getkey())
    assert stats.z_loss == same.z_loss != other.z_loss
    with pytest.raises(RuntimeError, match=r"jitter=0\.5 needs a key"):
        noisy(x)
    quiet = eqx.nn.inference_mode(noisy)
    expected, _expected_stats = slow(noisy, x)
    np.testing.assert_allclose(quiet(x), expected, rtol=1e-4, atol=1e-5)
    # The mean over the noise is the input: it is neither scaled nor shifted.
    wide = eqx.tree_at(lambda m: m.router.weight, noisy, jnp.ones((D_MODEL, EXPERTS)))
    keys = jr.split(getkey(), 500)
    logits = jax.vmap(lambda key: wide._route(x, key).logits)(keys)
    noise = 0.5 / 3**0.5 * jnp.linalg.norm(x, axis=-1, keepdims=True)
    deviation = (logits - x.sum(-1, keepdims=True)[None]) / noise[None]
    assert abs(deviation.mean()) < 0.05 and abs(deviation.std() - 1) < 0.05


def test_shared_experts_get_a_key(getkey):
    class Noise(eqx.Module):
        def __call__(self, x, *, key):
            return jr.normal(key, x.shape)

    layer = make(getkey, shared_experts=Noise())
    x = jnp.ones((3, D_MODEL))
    assert (layer(x, key=jr.key(0)) != layer(x, key=jr.key(1))).all()


def test_router_is_float32(getkey):
    layer, x = make(getkey), jr.normal(getkey(), (SEQ, D_MODEL), jnp.bfloat16)
    y, stats = apply_with_stats(layer, x)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stats))
    expected, expected_stats = slow(layer, x.astype(jnp.float32))
    check_stats(stats, expected_stats, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0.05, atol=0.05)

    def loss(layer, x):
        return (layer(x).astype(jnp.float32) ** 2).sum()

    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16) if eqx.is_inexact_array(w) else w, layer)
    grads = eqx.filter_jit(eqx.filter_grad(loss))(narrow, x)
    wide = eqx.filter_jit(eqx.filter_grad(loss))(layer, x.astype(jnp.float32))
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wide), strict=True):
        assert got.dtype == jnp.bfloat16
        error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert error < 0.05


DERIVED = {
    "softmax": {},
    "sigmoid": OPTIONS["sigmoid"],
    "capacity": {"capacity_factor": 1000, "top_k": 3},
}


@pytest.mark.parametrize("name", DERIVED)
def test_every_derivative_is_that_of_the_dense_layer(getkey, x64, name):
    layer = make(getkey, "gated" if name == "sigmoid" else "mlp", **DERIVED[name])
    x, weight, dx = jr.normal(getkey(), (3, SEQ, D_MODEL))
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)
    dots = jax.tree.map(lambda w: jr.normal(getkey(), w.shape), arrays), dx

    def derivatives(function):
        def loss(arrays, x):
            return (jnp.sin(function(eqx.combine(arrays, static), x)) * weight).sum()

        def squares(arrays, x):
            grads = jax.grad(loss, (0, 1))(arrays, x)
            return sum((jnp.sin(g) ** 2).sum() for g in jax.tree.leaves(grads))

        primals = (arrays, x)
        return jax.jit(
            lambda: {
                "value and jvp": jax.jvp(loss, primals, dots),
                "jvp in x": jax.jvp(lambda x: loss(arrays, x), (x,), (dx,))[1],
                "grad and hvp": jax.jvp(jax.grad(loss, (0, 1)), primals, dots),
                "grad in x": jax.grad(loss, 1)(arrays, x),
                "reverse over forward": jax.grad(
                    lambda *primals: jax.jvp(loss, primals, dots)[1], (0, 1)
                )(*primals),
                "reverse over reverse": jax.grad(squares, (0, 1))(*primals),
            }
        )()

    got, expected = derivatives(lambda layer, x: layer(x)), derivatives(dense)
    for key, value in expected.items():
        leaves = zip(jax.tree.leaves(got[key]), jax.tree.leaves(value), strict=True)
        for x, y in leaves:
            assert jnp.abs(y).max() > 0
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10, err_msg=key)


def test_losses_have_gradients(getkey, x64):
    layer, x = make(getkey, scores="sigmoid"), jr.normal(getkey(), (SEQ, D_MODEL))
    router = layer.router

    def of(name):
        def loss(weight):
            changed = eqx.tree_at(lambda m: m.router.weight, layer, weight)
            return getattr(changed.apply_with_stats(x)[1], name).sum()

        return jax.jit(jax.value_and_grad(loss))

    direction = jr.normal(getkey(), router.weight.shape)
    for name in ("load_balance_loss", "z_loss", "entropy"):
        _, grad = of(name)(router.weight)
        step = 1e-6 * direction
        up, down = of(name)(router.weight + step)[0], of(name)(router.weight - step)[0]
        np.testing.assert_allclose(jnp.vdot(grad, direction), (up - down) / 2e-6, rtol=1e-5)
    for name in ("load", "dropped"):
        assert not of(name)(router.weight)[1].any()


def test_losses_at_their_limits(getkey):
    balanced = [[e, (e + 1) % EXPERTS] for e in range(EXPERTS)]
    layer, x = routed(getkey, balanced)
    _, stats = layer.apply_with_stats(x)
    np.testing.assert_allclose(stats.load, 1 / EXPERTS, rtol=1e-6)
    np.testing.assert_allclose(stats.load_balance_loss, 1, rtol=1e-5)
    layer, x = routed(getkey, [[2, 4]] * 5)
    sharp = eqx.tree_at(lambda m: m.router.weight, layer, 100 * layer.router.weight)
    sharp = eqx.tree_at(lambda m: m.router.weight, sharp, sharp.router.weight.at[4, 4].set(125.0))
    _, stats = sharp.apply_with_stats(x)
    np.testing.assert_allclose(stats.load_balance_loss, EXPERTS / 2, rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, np.log(2), rtol=1e-4)


def test_extreme_logits(getkey):
    for scores in ("softmax", "sigmoid"):
        layer = make(getkey, scores=scores)
        layer = eqx.tree_at(lambda m: m.router.weight, layer, 1e4 * layer.router.weight)
        x = jr.normal(getkey(), (SEQ, D_MODEL))

        def loss(layer):
            return (
                sum(leaf.sum() for leaf in jax.tree.leaves(layer.apply_with_stats(x)[1]))
                + (layer(x) ** 2).sum()
            )

        value, grads = eqx.filter_jit(eqx.filter_value_and_grad(loss))(layer)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads)))


@pytest.mark.parametrize("capacity_factor", [None, 0.8])
def test_vmap_is_a_loop_over_sequences(getkey, x64, capacity_factor):
    layer = make(getkey, capacity_factor=capacity_factor)
    x, weight = jr.normal(getkey(), (2, 4, SEQ, D_MODEL))
    valid = jr.bernoulli(getkey(), 0.8, (4, SEQ))

    def loss(layer, x, weight, valid):
        y, stats = layer.apply_with_stats(x, valid=valid)
        return (jnp.sin(y) * weight).sum() + stats.load_balance_loss

    single = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    loop = [single(layer, *case) for case in zip(x, weight, valid, strict=True)]
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    each = eqx.filter_jit(eqx.filter_vmap(single, in_axes=(None, 0, 0, 0)))
    got = each(layer, x, weight, valid)

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)

    jax.tree.map(close, got, looped)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def total(layer):
        return jax.vmap(lambda *case: loss(layer, *case))(x, weight, valid).sum()

    jax.tree.map(close, total(layer), jax.tree.map(lambda leaf: leaf.sum(0), looped))


def test_vmap_over_layers(getkey, x64):
    """An ensemble, each member with its own batch or all with the same."""
    key, x = getkey(), jr.normal(getkey(), (2, 3, SEQ, D_MODEL))
    layers = [make(lambda: jr.fold_in(key, i)) for i in range(2)]
    stacked = jax.tree.map(lambda *w: jnp.stack(w) if eqx.is_inexact_array(w[0]) else w[0], *layers)
    run = eqx.filter_vmap(lambda layer, x: jax.vmap(layer)(x))
    shared = eqx.filter_vmap(lambda layer: jax.vmap(layer)(x[0]))
    expected = jnp.stack(
        [jnp.stack([dense(layer, y) for y in z]) for layer, z in zip(layers, x, strict=False)]
    )
    np.testing.assert_allclose(eqx.filter_jit(run)(stacked, x), expected, rtol=1e-9)
    expected = jnp.stack([jnp.stack([dense(layer, y) for y in x[0]]) for layer in layers])
    np.testing.assert_allclose(eqx.filter_jit(shared)(stacked), expected, rtol=1e-9)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jax.core.jaxprs_in_params(eqn.params):
            yield from equations(sub)
