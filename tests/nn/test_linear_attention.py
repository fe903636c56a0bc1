from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Causal, Padding, RandomFeatures, Segments, SlidingWindow
from eqx_transformer.attention._linear import LinearState
from eqx_transformer.nn import LinearAttention, RoPE

SEQ, D_MODEL = 9, 12
VALID = np.array([0, 1, 0, 1, 1, 0, 1, 1, 1], bool)
IDS = np.array([0, 0, -1, 2, 2, 2, 3, -1, 3], np.int32)

# Eagerly, every operation would be compiled on its own.
call = eqx.filter_jit(lambda layer, x, **options: layer(x, **options))
step = eqx.filter_jit(lambda layer, x, cache, **options: layer.extend(x, cache, **options))


def _normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _layer(seed=0, **options):
    """A layer whose every parameter is drawn: where biases are zero, mistakes do not show."""
    options = {"num_kv_heads": 2, "rope": RoPE(theta=100.0), "mask": Causal(), **options}

    def build():
        return LinearAttention(D_MODEL, 4, head_dim=4, chunk_size=4, key=jr.key(0), **options)

    rng = np.random.default_rng(seed)

    def draw(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=leaf.shape) / 3, leaf.dtype)
        return leaf

    layer = jax.tree.map(draw, eqx.filter_eval_shape(build))
    features = options.get("feature_map", layer.feature_map)
    return eqx.tree_at(lambda x: x.feature_map, layer, features)


def _reference(layer, x, allowed, positions):
    """The definition in NumPy and float64, head by head."""
    x, heads = np.asarray(x, np.float64), []

    def linear(m, x):
        y = x @ np.asarray(m.weight, np.float64)
        return y if m.bias is None else y + np.asarray(m.bias, np.float64)

    def rms(m, x):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + m.eps)
        return x / scale * np.asarray(m.weight, np.float64)

    def turn(x):
        half = x.shape[-1] // 2
        angle = positions[:, None] * layer.rope.theta ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    def features(x):
        if isinstance(layer.feature_map, RandomFeatures):
            w = eqx.filter_jit(layer.feature_map.projection)(x.shape[-1])
            w = np.asarray(w, np.float64)
            x = x / x.shape[-1] ** 0.25
            return np.exp(x @ w.T - (x**2).sum(-1, keepdims=True) / 2)
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (linear(p, x).reshape(len(x), -1, layer.head_dim) for p in projections)
    if layer.q_norm is not None:
        q, k = rms(layer.q_norm, q), rms(layer.k_norm, k)
    if layer.rope is not None:
        q, k = turn(q), turn(k)
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        weights = np.where(allowed, features(q[:, h]) @ features(k[:, g]).T, 0)
        total = weights.sum(-1, keepdims=True)
        heads.append(weights / np.where(total == 0, 1, total) @ v[:, g])
    return linear(layer.o_proj, np.concatenate(heads, -1))


def _allowed(mask, positions):
    i, j = positions[:, None], positions[None, :]
    return np.broadcast_to(mask(jnp.asarray(i), jnp.asarray(j)), (len(positions),) * 2)


OPTIONS = {
    "gqa": ({}, None),
    "norm bias": ({"qk_norm": True, "norm_eps": 0.1, "use_bias": True, "num_kv_heads": 1}, None),
    "everyone": ({"mask": None, "num_kv_heads": None}, Padding(VALID)),
    "random": ({"feature_map": RandomFeatures(6, key=jr.key(5)), "rope": None}, None),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_reference(name):
    options, mask = OPTIONS[name]
    layer, x, positions = _layer(**options), _normal(1, SEQ, D_MODEL), np.arange(SEQ)
    if layer.mask is None:
        # Only a causal mask asks for an order.
        positions = np.array([4, 3, 3, 8, 0, 1, 7, 6, 5])
    allowed = np.ones((SEQ, SEQ), bool)
    for part in (layer.mask, mask):
        if part is not None:
            allowed = allowed & _allowed(part, positions)
    expected = _reference(layer, x, allowed, positions)
    given = None if layer.mask is not None else jnp.asarray(positions, jnp.int32)
    out = call(layer, x, mask=mask, positions=given)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_positions_reach_rope_and_masks():
    layer, x = _layer(), _normal(1, SEQ, D_MODEL)
    positions = np.array([0, 1, 3, 4, 5, 8, 9, 11, 14], np.int32)
    # The last position is outside of both masks.
    mask = Padding(np.arange(12) % 4 != 3) & Segments(np.arange(12, dtype=np.int32) // 5)
    expected = _reference(layer, x, _allowed(Causal() & mask, positions), positions)
    out = call(layer, x, mask=mask, positions=jnp.asarray(positions))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


# What follows is the cache. Each chunk is (tokens given, tokens that count).
CHUNKINGS = {
    "whole": [(9, None)],
    "tokens": [(1, None)] * 9,
    "parts": [(3, None)] * 3,
    "padded": [(4, 3), (4, 4), (4, 0), (4, 2)],
}


def _extend(layer, x, chunks, max_len=SEQ, mask=None):
    cache, outs, start = layer.init_cache(max_len), [], 0
    for given, length in chunks:
        count = given if length is None else length
        # Padding may hold anything.
        chunk = np.full((given, x.shape[1]), np.nan, x.dtype)
        chunk[:count] = x[start : start + count]
        length = None if length is None else jnp.asarray(length, jnp.int32)
        out, cache = step(layer, jnp.asarray(chunk), cache, mask=mask, length=length)
        outs.append(np.asarray(out)[:count])
        start += count
    return np.concatenate(outs), cache


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_cache_is_the_forward(chunking):
    options = OPTIONS["norm bias" if chunking == "parts" else "gqa"][0]
    layer, x = _layer(**options), _normal(1, SEQ, D_MODEL)
    out, cache = _extend(layer, x, CHUNKINGS[chunking])
    expected = call(layer, x, mask=None, positions=None)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert cache.length == SEQ


@st.composite
def sequences(draw):
    """A seed, flags of padding, ordered segments with padding among them, and a chunking."""
    valid = draw(st.lists(st.booleans(), min_size=SEQ, max_size=SEQ))
    ids, document = [], 0
    for _ in range(SEQ):
        document += draw(st.sampled_from([0, 0, 0, 1, 3]))
        ids.append(draw(st.sampled_from([document, document, document, -1])))
    chunks, left = [], SEQ
    while left:
        count = min(left, draw(st.sampled_from([4, 3, 2, 1, 0])))
        # Every width is compiled, so there are two.
        chunks.append((1, None) if count == 1 else (4, count))
        left -= count
    return draw(st.integers(0, 2**16)), np.array(valid), np.array(ids, np.int32), chunks


@hypothesis.given(sequences())
@hypothesis.settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_cache_is_the_forward_for_any_chunking_and_mask(drawn):
    seed, valid, ids, chunks = drawn
    layer, x = _layer(seed), _normal(seed + 1, SEQ, D_MODEL)
    mask = Padding(valid) & Segments(ids)
    out, cache = _extend(layer, x, chunks, mask=mask)
    np.testing.assert_allclose(out, call(layer, x, mask=mask), rtol=1e-4, atol=1e-5)
    assert cache.length == SEQ


def test_a_mask_may_be_longer_than_the_sequence():
    layer, x = _layer(), _normal(1, SEQ, D_MODEL)
    mask = Padding(np.pad(VALID, (0, 5)))
    out, _ = _extend(layer, x, [(4, 4), (4, 3), (4, 2)], max_len=14, mask=mask)
    positions = np.arange(SEQ)
    allowed = _allowed(Causal() & Padding(VALID), positions)
    expected = _reference(layer, x, allowed, positions)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_without_segments_the_last_one_goes_on():
    layer, x = _layer(), _normal(1, SEQ, D_MODEL)
    mask = Padding(np.ones(SEQ, bool)) & Segments(np.array([0] * 2 + [1] * 7, np.int32))
    length = jnp.asarray(4, jnp.int32)
    _, cache = step(layer, x[:4], layer.init_cache(SEQ), mask=mask, length=length)
    out, _ = step(layer, x[4:8], cache, mask=None, length=length)
    np.testing.assert_allclose(out, call(layer, x, mask=mask)[4:8], rtol=1e-5, atol=1e-5)


def test_a_causal_mask_in_the_call_is_enough():
    layer, x = _layer(mask=None), _normal(1, SEQ, D_MODEL)
    out, _ = _extend(layer, x, CHUNKINGS["whole"], mask=Causal())
    expected = call(_layer(), x, mask=None, positions=None)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


class Features(eqx.Module):
    """A feature map with a parameter, and more features than it is given."""

    weight: jax.Array

    def __call__(self, x):
        return jax.nn.softplus(x @ self.weight)


def test_cache_under_scan_and_every_derivative(x64):
    features = Features(_normal(2, 4, 7, dtype=jnp.float64))
    layer = _layer(use_bias=True, dtype=jnp.float64, feature_map=features)
    mask = Padding(VALID) & Segments(IDS)
    x, dx, ct = _normal(1, 3, SEQ, D_MODEL, dtype=jnp.float64)
    weights, rest = eqx.partition(layer, eqx.is_inexact_array)
    dots = jax.tree.map(lambda w: _normal(w.size, *w.shape, dtype=w.dtype), weights)

    def decode(layer, x):
        def body(cache, x):
            y, cache = layer.extend(x, cache, mask=mask)
            return cache, y

        parts = x.reshape(3, 3, D_MODEL)
        return jax.lax.scan(body, layer.init_cache(SEQ), parts)[1].reshape(x.shape)

    @eqx.filter_jit
    def derivatives(function):
        def loss(weights, x):
            return jnp.vdot(jnp.sin(function(eqx.combine(weights, rest), x)), ct)

        # The value, the gradient, and how both change along a direction.
        return jax.jvp(jax.value_and_grad(loss, (0, 1)), (weights, x), (dots, dx))

    wanted = derivatives(lambda layer, x: layer(x, mask=mask))
    got = derivatives(decode)
    assert np.abs(wanted[0][1][0].feature_map.weight).max() > 1e-3
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_padding_of_batches_reaches_no_gradient():
    layer = _layer(use_bias=True)
    x, ct = _normal(1, 2, 3, 4, D_MODEL)
    lengths = jnp.array([2, 4, 0], jnp.int32)
    counted = (jnp.arange(4)[None] < lengths[:, None])[:, :, None]
    caches = jax.vmap(lambda _: layer.init_cache(SEQ))(lengths)

    def extended(layer, x):
        x = jnp.where(counted, x, jnp.nan)
        extend = lambda x, cache, length: layer.extend(x, cache, length=length)  # noqa: E731
        return jax.vmap(extend)(x, caches, lengths)

    def masked(layer, x):
        whole = lambda x, valid: layer(x, mask=Padding(valid))  # noqa: E731
        return jax.vmap(whole)(x, counted[..., 0]), None

    @eqx.filter_jit
    def gradient(function):
        def loss(arguments):
            out, after = function(*arguments)
            out = jnp.where(counted, out, 0)
            return jnp.vdot(out, ct), (out, after)

        grads, (out, after) = eqx.filter_grad(loss, has_aux=True)((layer, x))
        return (grads, out), after

    got, after = gradient(extended)
    wanted, _ = gradient(masked)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after.length, lengths)
    assert (after.state.sums[2] == 0).all() and after.state.segment[2] == -1


def test_narrow_inputs_are_summed_in_float32():
    layer, x = _layer(dtype=jnp.bfloat16), _normal(1, SEQ, D_MODEL, dtype=jnp.bfloat16)
    out, cache = _extend(layer, x, CHUNKINGS["padded"])
    assert out.dtype == jnp.bfloat16 and cache.state.sums.dtype == jnp.float32
    assert layer.init_cache(SEQ, jnp.bfloat16).state.sums.dtype == jnp.float32
    whole = call(layer, x)
    assert whole.dtype == jnp.bfloat16
    # The same to a rounding of the output, nowhere a rounding of the sums.
    out, whole = (np.asarray(y, np.float32) for y in (out, whole))
    np.testing.assert_allclose(out, whole, rtol=2**-7, atol=0.01)
    positions = np.arange(SEQ)
    expected = _reference(layer, x, _allowed(Causal(), positions), positions)
    np.testing.assert_allclose(whole, expected, rtol=0.05, atol=0.05)
    # What is added to a large sum is not rounded to bfloat16 either.
    empty, length = layer.init_cache(SEQ), jnp.asarray(4, jnp.int32)
    large = LinearState(empty.state.sums + 1024, jnp.zeros_like(empty.state.segment))
    large = eqx.tree_at(lambda cache: cache.state, empty, large)
    one, many = (step(layer, x[:4], cache, mask=None, length=length)[1] for cache in (empty, large))
    np.testing.assert_allclose(many.state.sums - 1024, one.state.sums, atol=1e-3)


def test_a_cache_may_be_wider_than_its_layer(x64):
    layer, x = _layer(dtype=jnp.float32), _normal(1, SEQ, D_MODEL)
    out, cache = step(layer, x, layer.init_cache(SEQ, jnp.float64))
    assert cache.state.sums.dtype == jnp.float64 and out.dtype == jnp.float32
    positions = np.arange(SEQ)
    expected = _reference(layer, x, _allowed(Causal(), positions), positions)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_the_cache_has_a_constant_size():
    layer = _layer(feature_map=RandomFeatures(6, key=jr.key(5)))
    short, long = (layer.init_cache(n) for n in (1, 10**9))
    assert short.state.sums.shape == long.state.sums.shape == (2, 6, 5)
    sizes = [sum(x.size for x in jax.tree.leaves(cache)) for cache in (short, long)]
    assert sizes == [2 * 6 * 5 + 2] * 2


def test_an_ensemble_has_an_ensemble_of_caches():
    alone, x = [_layer(seed) for seed in (0, 1)], _normal(1, SEQ, D_MODEL)
    layers = jax.tree.map(lambda *w: jnp.stack(w) if eqx.is_array(w[0]) else w[0], *alone)

    @eqx.filter_jit
    def extended(layers):
        extend = lambda layer, x, cache: layer.extend(x, cache)  # noqa: E731
        extend = eqx.filter_vmap(extend, in_axes=(eqx.if_array(0), None, eqx.if_array(0)))
        caches = eqx.filter_vmap(lambda layer: layer.init_cache(SEQ))(layers)
        return extend(layers, x, caches)[0]

    for layer, out in zip(alone, extended(layers), strict=True):
        expected = call(layer, x, mask=None, positions=None)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_static_numbers_are_not_leaves():
    layer = _layer(qk_norm=True, use_bias=True)
    assert len(jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))) == 4 * 2 + 2


def test_errors(getkey):
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_heads": 5}, "d_model=12 is not a multiple of num_heads=5"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_heads": 4, "chunk_size": 0}, "LinearAttention: chunk_size=0"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            LinearAttention(12, key=getkey(), **options)
    layer, x = _layer(), _normal(1, SEQ, D_MODEL)
    with pytest.raises(ValueError, match=r"LinearAttention takes one example.*jax.vmap"):
        layer(x[None])
    with pytest.raises(ValueError, match="no linear form because of SlidingWindow"):
        call(layer, x, mask=SlidingWindow(2, 0))
    with pytest.raises(Exception, match="positions must increase"):
        call(layer, x, positions=jnp.arange(SEQ) // 2)


def test_errors_of_the_cache():
    layer, x = _layer(), _normal(1, SEQ, D_MODEL)
    with pytest.raises(ValueError, match="max_len=0"):
        layer.init_cache(0)
    with pytest.raises(ValueError, match="9 positions cannot be added to a cache of max_len=5"):
        step(layer, x, layer.init_cache(5))
    empty = layer.init_cache(SEQ)
    nearly = eqx.tree_at(lambda cache: cache.length, empty, jnp.asarray(7, jnp.int32))
    for cache, length, fits in (
        (nearly, 2, True),
        (nearly, 3, False),
        (empty, 5, False),
        (empty, -1, False),
    ):
        length = jnp.asarray(length, jnp.int32)
        if fits:
            assert step(layer, x[:4], cache, mask=None, length=length)[1].length == SEQ
        else:
            with pytest.raises(Exception, match="more positions than max_len=9, or a length"):
                step(layer, x[:4], cache, mask=None, length=length)
    for mask in (None, Padding(VALID)):
        with pytest.raises(ValueError, match="needs a causal mask"):
            step(_layer(mask=None), x, empty, mask=mask)
    mask = Padding(np.ones(SEQ, bool)) & Segments(np.array([3] * 4 + [1] * 5, np.int32))
    length = jnp.asarray(4, jnp.int32)
    _, cache = step(layer, x[:4], empty, mask=mask, length=length)
    with pytest.raises(Exception, match="must not decrease"):
        step(layer, x[4:8], cache, mask=mask, length=length)
