"""MixtureOfExperts against a slow loop in NumPy, and against computing every expert."""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from eqx_transformer.attention import Causal
from eqx_transformer.nn import (
    MLP,
    Attention,
    GatedMLP,
    Linear,
    MixtureOfExperts,
    RMSNorm,
)
from eqx_transformer.stacks import Residual, Stack, TransformerBlock

# Most programs here run once, so time is spent on compiling them.
quick_jit = partial(eqx.filter_jit, compiler_options={"xla_backend_optimization_level": 0})

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
    # Of eight experts, in four groups of two or in two groups of four.
    "groups": {"num_experts": 8, "num_groups": 4, "top_groups": 2, "renormalize": False},
    "best two": {
        "num_experts": 8,
        "num_groups": 2,
        "group_score": "top2",
        "scores": "sigmoid",
        "selection_bias": True,
        "top_k": 3,
    },
    "best two scores": {"num_experts": 8, "num_groups": 2, "group_score": "top2"},
    "router bias": {"router_bias": True},
}


def build(make_layer):
    """A Module with random parameters, none of them zero; nothing is compiled for that."""
    rng = np.random.default_rng(7)

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(fill, eqx.filter_eval_shape(make_layer, key=jr.key(0)))


def make(expert="mlp", **options):
    options = {"num_experts": EXPERTS, **options}

    def make_layer(*, key):
        return MixtureOfExperts(D_MODEL, make_expert=MAKE[expert], key=key, **options)

    layer = build(make_layer)
    if layer.selection_bias is not None:
        layer = layer.with_selection_bias(normal(layer.num_experts, dtype="f4") * 0.3)
    return layer


def normal(*shape, seed=3, dtype=None):
    array = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(array, jnp.result_type(float) if dtype is None else dtype)


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


def _in_best_groups(layer, scores):
    """The scores, and minus infinity in the groups that are not chosen, one group at a time."""
    groups = np.split(scores, layer.num_groups)
    best = [sum(sorted(g)[-2:]) if layer.group_score == "top2" else max(g) for g in groups]
    chosen = np.argsort(best)[-layer.top_groups :]
    parts = [g if i in chosen else np.full(len(g), -np.inf) for i, g in enumerate(groups)]
    return np.concatenate(parts)


def slow(layer, x, valid=None, dropping=True):
    """What the layer computes, choice by choice, in float64; and its statistics."""
    seq, k, num_experts = len(x), layer.top_k, layer.num_experts
    valid = np.ones(seq, bool) if valid is None else np.asarray(valid)
    bias = 0 if layer.selection_bias is None else _f64(layer.selection_bias)
    limit = math.inf
    if layer.capacity_factor is not None and dropping:
        limit = math.ceil(layer.capacity_factor * seq * k / num_experts)
    accepted, chosen = np.zeros(num_experts, int), np.zeros(num_experts, int)
    y, probability, z, entropy, dropped = np.zeros(x.shape), np.zeros(num_experts), 0, 0, 0
    for t in range(seq):
        if not valid[t]:
            continue
        logits = _f64(x[t]) @ _f64(layer.router.weight)
        logits = logits + (0 if layer.router.bias is None else _f64(layer.router.bias))
        if layer.scores == "softmax":
            scores = np.exp(logits) / np.exp(logits).sum()
        else:
            scores = 1 / (1 + np.exp(-logits))
        experts = np.argsort(-_in_best_groups(layer, scores + bias))[:k]
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
    if layer.top_groups < layer.num_groups:
        groups = ranked.reshape(len(x), layer.num_groups, -1)
        best = jnp.sort(groups, axis=-1)[:, :, -2:].sum(-1)
        cut = jnp.sort(best, axis=-1)[:, -layer.top_groups, None]
        kept = jnp.broadcast_to((best >= cut)[:, :, None], groups.shape)
        ranked = jnp.where(kept.reshape(ranked.shape), ranked, -jnp.inf)
    cut = jnp.sort(ranked, axis=-1)[:, -layer.top_k, None]
    scores = jnp.where(ranked >= cut, scores, 0)
    if layer.renormalize:
        scores = scores / scores.sum(-1, keepdims=True)
    every = eqx.filter_vmap(lambda expert: expert(x))(layer.experts)
    return layer.route_scale * jnp.einsum("esd,se->sd", every, scores)


def apply_with_stats(layer, x, valid=None, key=None):
    # All valid if not given, which saves compilations; derivatives are taken without `valid`.
    valid = np.ones(len(x), bool) if valid is None else valid
    return _compiled(layer, x, jnp.asarray(valid), key)


@quick_jit
def _compiled(layer, x, valid, key):
    return layer.apply_with_stats(x, valid=valid, key=key)


@quick_jit
def value_and_grad(layer, x, weight, function=lambda layer, x: layer(x)):
    """Of a random projection, in the layer and in `x`."""

    def loss(args):
        return (function(*args) * weight).sum()

    return eqx.filter_value_and_grad(loss)((layer, x))


def assert_close(got, expected, **tolerance):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def assert_stats(stats, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(stats, name), value, err_msg=name, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_slow_loop(name):
    layer = make("gated" if "sigmoid" in name else "mlp", **OPTIONS[name])
    x = normal(SEQ, D_MODEL)
    for valid in (np.ones(SEQ, bool), np.arange(SEQ) % 4 != 1, np.zeros(SEQ, bool)):
        y, stats = apply_with_stats(layer, x, valid)
        expected, expected_stats = slow(layer, x, valid)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        assert_stats(stats, expected_stats)
        if valid.all():
            assert (stats.dropped > 0) == (name in ("capacity", "capacity sigmoid"))


def routed(choices, **options):
    """A layer, and a sequence of which position `t` chooses `choices[t]`, in this order."""
    choices = np.asarray(choices)
    seq, top_k = choices.shape

    def make_layer(*, key):
        expert = eqx.Partial(MLP, EXPERTS, D_FF, activation=jnp.tanh)
        return MixtureOfExperts(EXPERTS, EXPERTS, expert, top_k=top_k, key=key, **options)

    layer = eqx.tree_at(lambda m: m.router.weight, build(make_layer), jnp.eye(EXPERTS))
    x = np.random.default_rng(1).uniform(size=(seq, EXPERTS))
    for i, column in enumerate(choices.T):
        x[np.arange(seq), column] = 5.0 - i
    return layer, jnp.asarray(x, jnp.float32)


def test_capacity_is_for_the_earliest_positions():
    # Two rows an expert: ceil(1.1 * 6 * 2 / 7). A second choice is as good as a first.
    layer, x = routed([[0, 1], [2, 0], [0, 3], [4, 2], [2, 0], [3, 5]], capacity_factor=1.1)
    everything, _ = slow(layer, x, dropping=False)
    y, stats = apply_with_stats(layer, x)
    np.testing.assert_allclose(stats.dropped, 3 / 12, rtol=1e-6)
    np.testing.assert_allclose(y[:2], everything[:2], rtol=1e-5)
    np.testing.assert_allclose(y[3], everything[3], rtol=1e-5)
    weight = 1 / (1 + np.e)
    np.testing.assert_allclose(y[2], weight * _expert(layer.experts, 3, _f64(x[2])), rtol=1e-5)
    assert not y[4].any()
    # What is padding takes no place.
    y, stats = apply_with_stats(layer, x, np.arange(6) != 1)
    np.testing.assert_allclose(y[2], everything[2], rtol=1e-5)
    np.testing.assert_allclose(stats.dropped, 1 / 10, rtol=1e-6)
    # Nothing depends on what comes later.
    changed, _ = apply_with_stats(layer, x.at[4:].set(1.0))
    np.testing.assert_allclose(changed[:4], apply_with_stats(layer, x)[0][:4], rtol=1e-5)


def test_any_routing_is_exact():
    """All to the same experts, evenly spread, and blocks of rows that are filled to the brim."""
    seq = 48
    t = np.arange(seq)[:, None]
    for choices in (
        np.where(t < seq, [[3, 0]], 0),
        np.concatenate([t, t + 1], axis=1) % EXPERTS,
        np.where(t < 32, [[6, 2]], [[2, 5]]),
    ):
        layer, x = routed(choices)
        y, _ = apply_with_stats(layer, x)
        np.testing.assert_allclose(y, slow(layer, x)[0], rtol=1e-5, atol=1e-5)


def test_shared_experts():
    def shared(x, *, key):
        return 3 * x if key is None else jr.normal(key, x.shape)

    layer, x, valid = make(shared_experts=shared), normal(SEQ, D_MODEL), np.arange(SEQ) < 9
    y, _ = apply_with_stats(layer, x, valid)
    expected = slow(layer, x, valid)[0] + 3 * _f64(x) * valid[:, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    one, other = (apply_with_stats(layer, x, None, jr.key(i))[0] for i in (0, 1))
    assert (np.asarray(one) != np.asarray(other)).all()


def test_shared_gate(x64):
    layer = make(shared_experts=build(MAKE["mlp"]), shared_gate=True)
    x, weight = normal(2, SEQ, D_MODEL)

    def expected(layer, x):
        gate = jax.nn.sigmoid((x @ layer.shared_gate.weight)[:, 0])[:, None]
        return dense(layer, x) + layer.shared_experts(x) * jnp.broadcast_to(gate, x.shape)

    got = value_and_grad(layer, x, weight)
    assert_close(got, value_and_grad(layer, x, weight, expected), rtol=1e-9, atol=1e-12)


def test_jitter():
    layer, x = make(jitter=0.5), normal(SEQ, D_MODEL)
    stats = [apply_with_stats(layer, x, None, jr.key(i))[1].z_loss for i in (0, 0, 1)]
    assert stats[0] == stats[1] != stats[2]
    with pytest.raises(RuntimeError, match=r"jitter=0\.5 needs a key"):
        layer(x)
    y, stats = apply_with_stats(eqx.nn.inference_mode(layer), x)
    expected, expected_stats = slow(layer, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert_stats(stats, expected_stats)
    # The mean over the noise is the input: it is neither scaled nor shifted.
    layer = eqx.tree_at(lambda m: m.router.weight, layer, jnp.ones((D_MODEL, EXPERTS)))
    route = jax.vmap(lambda key: layer._route(x, key).logits[:, 0])
    logits = quick_jit(route)(jr.split(jr.key(2), 500))
    noise = 0.5 / 3**0.5 * np.linalg.norm(x, axis=-1)
    deviation = (_f64(logits) - _f64(x.sum(-1))) / noise
    assert abs(deviation.mean()) < 0.05 and abs(deviation.std() - 1) < 0.05


def test_bfloat16():
    layer, x, weight = make(), normal(SEQ, D_MODEL, dtype="bfloat16"), normal(SEQ, D_MODEL, seed=4)
    y, stats = apply_with_stats(layer, x)
    expected, expected_stats = slow(layer, x.astype("f4"))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype("f4"), expected, rtol=0.05, atol=0.05)
    # The router does not notice.
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(stats))
    assert_stats(stats, expected_stats)

    narrow = jax.tree.map(lambda w: w.astype("bfloat16") if eqx.is_array(w) else w, layer)
    _, grads = value_and_grad(narrow, x, weight.astype("bfloat16"))
    _, expected = value_and_grad(layer, x.astype("f4"), weight, dense)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(_f64(got) - _f64(want)) < 0.05 * np.linalg.norm(want)


# Options, and whether second derivatives are compared too: those of what is made of JAX's own
# operations are JAX's.
DERIVED = {
    "softmax": ({}, True),
    "sigmoid": (OPTIONS["sigmoid"], False),
    "capacity": ({"capacity_factor": 1000, "top_k": 3}, False),
    "groups": ({**OPTIONS["best two"], "router_bias": True}, False),
}


@pytest.mark.parametrize("name", DERIVED)
def test_every_derivative_is_that_of_the_dense_layer(x64, name):
    options, second = DERIVED[name]
    layer = make("gated" if name == "sigmoid" else "mlp", **options)
    x, weight, dx = normal(3, SEQ, D_MODEL)
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)
    primals = (arrays, x)
    dots = jax.tree.map(lambda w: normal(*w.shape, seed=5), arrays), dx

    def derivatives(function):
        def loss(arrays, x):
            return (jnp.sin(function(eqx.combine(arrays, static), x)) * weight).sum()

        def tangent(*primals):
            return jax.jvp(loss, primals, dots)[1]

        def squares(*primals):
            grads = jax.grad(loss, (0, 1))(*primals)
            return sum((jnp.sin(g) ** 2).sum() for g in jax.tree.leaves(grads))

        def everything():
            yield jax.jvp(loss, primals, dots)
            yield jax.jvp(lambda x: loss(arrays, x), (x,), (dx,))[1]
            if not second:
                yield jax.grad(loss, (0, 1))(*primals)
                return
            yield jax.grad(loss, 1)(*primals)
            yield jax.jvp(jax.grad(loss, (0, 1)), primals, dots)
            yield jax.grad(tangent, (0, 1))(*primals)
            yield jax.grad(squares, (0, 1))(*primals)

        return quick_jit(lambda: list(everything()))()

    got, expected = derivatives(lambda layer, x: layer(x)), derivatives(dense)
    assert all(jnp.abs(y).max() > 0 for y in jax.tree.leaves(expected))
    assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_losses_have_gradients(x64):
    layer, x = make(scores="sigmoid"), normal(SEQ, D_MODEL)
    direction = normal(D_MODEL, EXPERTS, seed=4)

    def statistics(weight):
        changed = eqx.tree_at(lambda m: m.router.weight, layer, weight)
        return vars(changed.apply_with_stats(x)[1])

    weight = layer.router.weight
    compiled, jacobian = quick_jit(statistics), quick_jit(jax.jacrev(statistics))
    up, down = (compiled(weight + step * direction) for step in (1e-6, -1e-6))
    for name, slope in jacobian(weight).items():
        got = np.sum(_f64(slope) * _f64(direction), (-2, -1))
        expected = (up[name] - down[name]) / 2e-6
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9, err_msg=name)
        assert slope.any() == (name not in ("load", "dropped"))


def test_losses_at_their_limits():
    layer, x = routed([[e, (e + 1) % EXPERTS] for e in range(EXPERTS)])
    _, stats = apply_with_stats(layer, x)
    np.testing.assert_allclose(stats.load, 1 / EXPERTS, rtol=1e-6)
    np.testing.assert_allclose(stats.load_balance_loss, 1, rtol=1e-5)
    layer, x = routed([[2, 4]] * EXPERTS)
    weight = (100 * layer.router.weight).at[4, 4].set(125.0)
    _, stats = apply_with_stats(eqx.tree_at(lambda m: m.router.weight, layer, weight), x)
    np.testing.assert_allclose(stats.load_balance_loss, EXPERTS / 2, rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, np.log(2), rtol=1e-4)


def test_extreme_logits():
    layer, x = make(scores="sigmoid"), normal(SEQ, D_MODEL)
    layer = eqx.tree_at(lambda m: m.router.weight, layer, 1e4 * layer.router.weight)

    @quick_jit
    @eqx.filter_value_and_grad
    def loss(layer):
        y, stats = layer.apply_with_stats(x)
        return (y**2).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(stats))

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loss(layer)))


@pytest.mark.parametrize("capacity_factor", [None, 0.8])
def test_vmap_is_a_loop_over_sequences(x64, capacity_factor):
    layer = make(capacity_factor=capacity_factor)
    x, weight = normal(2, 4, SEQ, D_MODEL)
    valid = jnp.asarray(np.random.default_rng(0).random((4, SEQ)) < 0.8)

    def loss(layer, x, weight, valid):
        y, stats = layer.apply_with_stats(x, valid=valid)
        return (jnp.sin(y) * weight).sum() + stats.load_balance_loss

    single = eqx.filter_value_and_grad(loss)
    compiled = quick_jit(single)
    loop = [compiled(layer, *case) for case in zip(x, weight, valid, strict=True)]
    looped = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    if capacity_factor is None:
        each = quick_jit(eqx.filter_vmap(single, in_axes=(None, 0, 0, 0)))
        assert_close(each(layer, x, weight, valid), looped, rtol=1e-9, atol=1e-10)

    @quick_jit
    @eqx.filter_value_and_grad
    def total(layer):
        return jax.vmap(lambda *case: loss(layer, *case))(x, weight, valid).sum()

    expected = jax.tree.map(lambda leaf: leaf.sum(0), looped)
    assert_close(total(layer), expected, rtol=1e-9, atol=1e-10)


def test_vmap_over_layers(x64):
    """An ensemble, each member with its own batch or all with the same; and over tangents."""
    layers = [jax.tree.map(lambda w: w * f if eqx.is_array(w) else w, make()) for f in (1.0, 1.3)]
    stacked = jax.tree.map(lambda *w: jnp.stack(w) if eqx.is_array(w[0]) else w[0], *layers)
    x = normal(2, 3, SEQ, D_MODEL)

    @quick_jit
    def run(function):
        def batch(layer, x):
            return jax.vmap(lambda x: function(layer, x))(x)

        own = eqx.filter_vmap(batch)(stacked, x)
        shared = eqx.filter_vmap(lambda layer: batch(layer, x[0]))(stacked)
        jacobian = jax.jacfwd(lambda x: function(layers[0], x))(x[0, 0])
        of_weights = jax.jacfwd(
            lambda w: function(eqx.tree_at(lambda m: m.experts.up_proj.bias, layers[0], w), x[0, 0])
        )(layers[0].experts.up_proj.bias)
        return own, shared, jacobian, of_weights

    assert_close(run(lambda layer, x: layer(x)), run(dense), rtol=1e-9, atol=1e-10)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        params = list(equation.params.values())
        for inner in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def largest(function, *args):
    """How many numbers the largest array of a program has."""
    jaxpr = jax.make_jaxpr(function)(*args)
    return max(math.prod(v.aval.shape) for eqn in equations(jaxpr) for v in eqn.outvars)


def test_nothing_dense_and_no_copies_of_the_weights():
    """A batch shares the weights, and their gradient is summed over it where it goes."""
    d_model, d_ff, experts, seq, batch = 8, 32, 64, 16, 16

    def make_layer(*, key):
        return MixtureOfExperts(d_model, experts, eqx.Partial(GatedMLP, d_model, d_ff), key=key)

    arrays, static = eqx.partition(build(make_layer), eqx.is_array)
    x = np.ones((batch, seq, d_model), "f4")
    weights, logits = experts * d_model * d_ff, batch * seq * experts

    def run(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    gradient = jax.grad(lambda *args: (run(*args) ** 2).sum(), (0, 1))
    for function in (run, gradient):
        assert largest(function, arrays, x) < 2 * max(weights, logits)


def test_in_a_stack():
    """In the place of an MLP, with rematerialisation, as in any block."""

    def make_block(*, key):
        attention = Attention(D_MODEL, 2, mask=Causal(), key=key)
        moe = MixtureOfExperts(D_MODEL, EXPERTS, MAKE["gated"], selection_bias=True, key=key)
        residuals = (Residual(RMSNorm(D_MODEL)) for _ in range(2))
        return TransformerBlock(attention, moe, *residuals)

    stack = build(lambda *, key: Stack(make_block, 2, remat=True, key=key))
    bias = normal(2, EXPERTS, dtype="f4")
    moe = stack.blocks.mlp.with_selection_bias(bias)
    stack = eqx.tree_at(lambda s: s.blocks.mlp, stack, moe)
    np.testing.assert_array_equal(stack[1].mlp.selection_bias, bias[1])
    x, weight = normal(2, 3, SEQ, D_MODEL)

    def unstacked(stack, x):
        first, second = stack.unstack()
        return jax.vmap(lambda x: second(first(x)))(x)

    got = value_and_grad(stack, x, weight, lambda stack, x: jax.vmap(stack)(x))
    expected = value_and_grad(stack, x, weight, unstacked)
    assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("capacity_factor", [None, 0.9])
def test_padding_may_hold_anything(capacity_factor):
    layer = make(capacity_factor=capacity_factor, shared_experts=build(MAKE["mlp"]))
    x, weight = normal(2, SEQ, D_MODEL)
    valid = jnp.arange(SEQ) % 3 != 0

    @quick_jit
    @eqx.filter_value_and_grad
    def loss(args):
        layer, x = args
        y, stats = layer.apply_with_stats(x, valid=valid)
        return (y * weight).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(stats))

    clean = loss((layer, jnp.where(valid[:, None], x, 0)))
    dirty = loss((layer, jnp.where(valid[:, None], x, jnp.nan)))
    assert_close(dirty, clean, rtol=1e-5, atol=1e-6)
    assert not dirty[1][1][~valid].any()


def _dense_batch(layer, x):
    return jax.vmap(lambda x: dense(layer, x))(x)


def test_a_batch_on_several_devices():
    layer = make()
    x, weight = normal(2, 4, SEQ, D_MODEL)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def spread(layer, x):
        arrays, static = eqx.partition(layer, eqx.is_array)
        run = jax.shard_map(
            lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )
        return run(arrays, x)

    got = value_and_grad(layer, x, weight, spread)
    expected = value_and_grad(layer, x, weight, _dense_batch)
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_every_leaf_is_a_parameter():
    """Every floating array gets a gradient; the selection bias is none, but is in the PyTree."""
    layer = make(selection_bias=True, shared_experts=build(MAKE["mlp"]))
    bias = jnp.array([1e-30, -0.5, 0.1, 3.0, 0.0, -1e8, 7.25])
    np.testing.assert_array_equal(layer.with_selection_bias(bias).selection_bias, bias)
    _, (grads, _) = value_and_grad(layer, *normal(2, SEQ, D_MODEL))
    leaves = jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))
    assert len(leaves) == len(jax.tree.leaves(grads)) == 1 + 4 + 4
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match=r"\(3,\) but must have \(7,\)"):
        layer.with_selection_bias(jnp.zeros(3))
    with pytest.raises(ValueError, match="selection_bias=True"):
        make().with_selection_bias(bias)


def test_selection_bias_balances():
    """The rule in the docstring brings the loads together, without a loss."""
    layer = make(scores="sigmoid", selection_bias=True)
    layer = layer.with_selection_bias(jnp.zeros(EXPERTS))
    x = normal(200, D_MODEL) + 0.5

    @quick_jit
    def step(layer):
        _, stats = layer.apply_with_stats(x)
        bias = layer.selection_bias + 0.02 * jnp.sign(1 / EXPERTS - stats.load)
        return layer.with_selection_bias(bias), stats.load.max() * EXPERTS

    layer, before = step(layer)
    for _ in range(60):
        layer, after = step(layer)
    assert before > 1.5 and after < 1.2


def test_construction(getkey):
    class Scale(eqx.Module):
        factor: jax.Array

        def __init__(self, *, key):
            self.factor = jr.normal(key, (3,))

        def __call__(self, x):
            return x

    layer = MixtureOfExperts(D_MODEL, EXPERTS, Scale, key=getkey())
    assert layer.experts.factor.shape == (EXPERTS, 3)
    assert len(np.unique(layer.experts.factor)) == 3 * EXPERTS
    narrow = eqx.Partial(MixtureOfExperts, D_MODEL, EXPERTS, Scale, dtype=jnp.bfloat16)
    assert eqx.filter_eval_shape(narrow, key=getkey()).router.weight.dtype == jnp.bfloat16


class Odd(eqx.Module):
    """Nested, with an integer array, an activation, a scalar, and nothing."""

    layers: tuple[Linear, ...]
    permutation: jax.Array
    scale: jax.Array
    activation: object = jnp.tanh
    nothing: None = None

    def __call__(self, x):
        h = self.activation(self.layers[0](x))
        return x + self.scale * self.layers[1](h)[:, self.permutation]


def test_any_module_is_an_expert(x64):
    def make_odd(*, key):
        layers = Linear(D_MODEL, 3, key=key), Linear(3, D_MODEL, key=key)
        return Odd(layers, jnp.arange(D_MODEL), jnp.ones(()))

    def make_layer(*, key):
        return MixtureOfExperts(D_MODEL, EXPERTS, make_odd, key=key)

    layer = build(make_layer)
    permutations = np.argsort(np.random.default_rng(0).random((EXPERTS, D_MODEL)))
    layer = eqx.tree_at(lambda m: m.experts.permutation, layer, jnp.asarray(permutations))
    args = layer, *normal(2, SEQ, D_MODEL)
    assert_close(value_and_grad(*args), value_and_grad(*args, dense), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 8}, "top_k=8 .* at most num_experts=7"),
        ({"top_k": 1}, "renormalize=False"),
        ({"capacity_factor": 0}, "capacity_factor=0 must be positive"),
        ({"capacity_factor": -1.0}, r"capacity_factor=-1\.0 must be positive"),
        ({"capacity_factor": math.nan}, "capacity_factor=nan must be positive"),
        ({"route_scale": 0.0}, r"route_scale=0\.0 must be positive and finite"),
        ({"jitter": 1.0}, r"jitter=1\.0 must be at least 0 and below 1"),
        ({"scores": "tanh"}, "tanh"),
        ({"num_groups": 2}, "num_experts=7 is not a multiple of num_groups=2"),
        ({"top_groups": 2}, "top_groups=2 of num_groups=1"),
        ({"num_groups": 7, "top_groups": 1}, "must be at least 1 and have top_k=2"),
        ({"num_groups": 7, "top_groups": 2, "group_score": "top2"}, "groups of at least two"),
        ({"group_score": "mean"}, "mean"),
        ({"shared_gate": True}, "shared_gate=True needs shared_experts"),
    ],
)
def test_bad_options(getkey, options, message):
    options = {"num_experts": EXPERTS, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        MixtureOfExperts(D_MODEL, make_expert=MAKE["mlp"], key=getkey(), **options)


def test_bad_inputs():
    def call(layer, *shape, method="__call__"):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return eqx.filter_eval_shape(lambda x: getattr(layer, method)(x), x)

    for method in ("__call__", "apply_with_stats"):
        with pytest.raises(ValueError, match=r"x has 3 axes \(2, 3, 6\).*jax.vmap"):
            call(make(), 2, 3, D_MODEL, method=method)
        with pytest.raises((ValueError, TypeError), match="7"):
            call(make(), 3, D_MODEL + 1, method=method)
    for capacity_factor in (None, 2.0):

        def make_layer(*, key, capacity_factor=capacity_factor):
            expert = eqx.Partial(Linear, D_MODEL, 3)
            return MixtureOfExperts(
                D_MODEL, EXPERTS, expert, capacity_factor=capacity_factor, key=key
            )

        with pytest.raises(ValueError, match=r"float32\[\d+, 3\] for float32\[\d+, 6\]"):
            call(build(make_layer), 4, D_MODEL)


def test_a_sharded_batch_is_refused_or_works():
    """On an explicit mesh; see `test_a_batch_on_several_devices` for the way to do it."""
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4]
    )
    x = normal(4, SEQ, D_MODEL)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P("data")))
        with pytest.raises(ValueError, match=r"inside jax\.shard_map, or set capacity_factor"):
            jax.eval_shape(jax.vmap(make()), spread)
        y = quick_jit(lambda x: jax.vmap(make(capacity_factor=1000.0))(x))(spread)
    np.testing.assert_allclose(np.asarray(y)[1], slow(make(), x[1])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_short_sequences(capacity_factor):
    layer = make(capacity_factor=capacity_factor)
    for seq in (0, 1):
        x = normal(seq, D_MODEL)
        y, stats = apply_with_stats(layer, x)
        np.testing.assert_allclose(y, slow(layer, x)[0], rtol=1e-4, atol=1e-5)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))


def test_experts_with_options_in_a_partial(getkey):
    activation = eqx.Partial(jax.nn.gelu, approximate=False)
    make = eqx.Partial(MLP, 8, 12, activation=activation)
    layer, x = MixtureOfExperts(8, 4, make, key=getkey()), jr.normal(getkey(), (6, 8))
    gradient = eqx.filter_grad(lambda layer: (layer(x) ** 2).sum())(layer)
    assert (gradient.router.weight != 0).any()
