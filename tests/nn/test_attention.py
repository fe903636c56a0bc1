import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import (
    And,
    Causal,
    Dense,
    Padding,
    SlidingWindow,
    SoftCap,
    dot_product_attention,
)
from eqx_transformer.nn import Attention, DynamicScaling, LongRoPEScaling, RMSNorm, RoPE

SEQ, D_MODEL = 7, 12


def _randomised(layer, getkey):
    """Biases and norm weights begin at zero and one, where mistakes with them do not show."""
    fill = lambda w: w + jr.normal(getkey(), w.shape, w.dtype) / 4  # noqa: E731
    return jax.tree.map(lambda w: fill(w) if eqx.is_inexact_array(w) else w, layer)


def _layer(getkey, **options):
    options = {"num_kv_heads": 2, "rope": RoPE(theta=100.0), "mask": Causal(), **options}
    return _randomised(Attention(D_MODEL, 4, head_dim=4, key=getkey(), **options), getkey)


def _reference(layer, x, allowed, positions):
    x, heads = np.asarray(x, np.float64), []

    def linear(m, x):
        y = x @ np.asarray(m.weight, np.float64)
        return y if m.bias is None else y + np.asarray(m.bias, np.float64)

    def rms(m, x):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + m.eps)
        return x / scale * (m.offset + np.asarray(m.weight, np.float64))

    def turn(x):
        half = x.shape[-1] // 2
        angle = positions[:, None] * layer.rope.theta ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (linear(p, x) for p in projections)
    if layer.clip is not None:
        q, k, v = (np.clip(y, -layer.clip, layer.clip) for y in (q, k, v))
    if layer.q_norm is not None and layer.qk_norm_over == "projection":
        q, k = rms(layer.q_norm, q), rms(layer.k_norm, k)
    q, k, v = (y.reshape(len(x), -1, layer.head_dim) for y in (q, k, v))
    if layer.q_norm is not None and layer.qk_norm_over == "head":
        q, k = rms(layer.q_norm, q), rms(layer.k_norm, k)
    if layer.rope is not None:
        q, k = turn(q), turn(k)
    scale = layer.head_dim**-0.5 if layer.scale is None else layer.scale
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        weights = np.where(allowed, np.exp(scale * q[:, h] @ k[:, g].T), 0)
        sink = 0 if layer.sinks is None else np.exp(np.float64(layer.sinks[h]))
        heads.append(weights / (weights.sum(-1, keepdims=True) + sink) @ v[:, g])
    return linear(layer.o_proj, np.concatenate(heads, -1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 4, "rope": None},
        {"num_kv_heads": 1, "qk_norm": True, "norm_eps": 0.1},
        {"use_bias": True, "scale": 0.3, "mask": None},
        {"qkv_bias": True, "sinks": True},
        {"use_bias": True, "k_bias": False, "clip": 0.6},
        {"qk_norm": eqx.Partial(RMSNorm, eps=0.1, offset=1), "qk_norm_over": "projection"},
        {"mask": Causal() & SlidingWindow(left=2, right=0)},
        {"attention_fn": eqx.Partial(dot_product_attention, implementation="chunked")},
    ],
)
def test_equals_reference(getkey, options):
    layer = _layer(getkey, **options)
    x = jr.normal(getkey(), (SEQ, D_MODEL))
    positions = np.arange(SEQ)
    mask = layer.mask
    allowed = np.ones((SEQ, SEQ), bool)
    if mask is not None:
        distance = positions[:, None] - positions[None]
        allowed = (distance >= 0) & (distance <= (2 if isinstance(mask, And) else SEQ))
    expected = _reference(layer, x, allowed, positions)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_positions_reach_rope_and_masks(getkey):
    layer = _layer(getkey, mask=SlidingWindow(left=3, right=0))
    x, positions = jr.normal(getkey(), (SEQ, D_MODEL)), np.array([0, 2, 4, 6, 7, 8, 9])
    distance = positions[:, None] - positions[None]
    expected = _reference(layer, x, (distance >= 0) & (distance <= 3), positions)
    np.testing.assert_allclose(
        layer(x, positions=jnp.asarray(positions)), expected, rtol=1e-4, atol=1e-5
    )


def test_caller_mask_is_combined(getkey):
    layer, x = _layer(getkey), jr.normal(getkey(), (SEQ, D_MODEL))
    dense = jr.bernoulli(getkey(), 0.5, (SEQ, SEQ)) | jnp.eye(SEQ, dtype=bool)
    allowed = np.asarray(dense) & np.tril(np.ones((SEQ, SEQ), bool))
    expected = _reference(layer, x, allowed, np.arange(SEQ))
    np.testing.assert_allclose(layer(x, mask=Dense(dense)), expected, rtol=1e-4, atol=1e-5)


def test_default_positions_stay_static(getkey):
    seen = []

    def spy(*args, **options):
        seen.append(options)
        return dot_product_attention(*args, **options)

    cap = SoftCap(3.0)
    layer = _layer(getkey, attention_fn=spy, score_mod=cap)
    layer(jnp.ones((SEQ, D_MODEL)))
    assert seen[0]["q_positions"] is None and seen[0]["kv_positions"] is None
    assert seen[0]["mask"] == Causal() and seen[0]["score_mod"] == cap


def test_vmap_is_a_loop(getkey):
    layer = _layer(getkey, qk_norm=True)
    x = jr.normal(getkey(), (3, SEQ, D_MODEL))
    valid = jr.bernoulli(getkey(), 0.7, (3, SEQ)).at[:, 0].set(True)
    out = jax.vmap(lambda x, valid: layer(x, mask=Padding(valid)))(x, valid)
    for i in range(3):
        expected = layer(x[i], mask=Padding(valid[i]))
        np.testing.assert_allclose(out[i], expected, rtol=1e-4, atol=1e-5)


def test_dropout(getkey):
    layer, x, key = _layer(getkey, dropout_rate=0.4), jr.normal(getkey(), (SEQ, D_MODEL)), getkey()
    with pytest.raises(RuntimeError, match=r"dropout_rate=0.4 needs a key"):
        layer(x)
    with pytest.raises(RuntimeError, match="inference_mode"):
        layer.extend(x, layer.init_cache(SEQ))
    assert (layer(x, key=key) == layer(x, key=key)).all()
    assert (layer(x, key=key) != layer(x, key=getkey())).any()
    off = eqx.nn.inference_mode(layer)
    assert (off(x, key=key) == off(x)).all()
    assert (off(x) != layer(x, key=key)).any()
    # Attention is linear in its weights, so dropout leaves it right on average.
    draws = jax.vmap(lambda key: layer(x, key=key))(jr.split(key, 4000))
    error = jnp.abs(draws.mean(0) - off(x)) / (draws.std(0) / 4000**0.5 + 1e-6)
    assert float(error.max()) < 6


def test_static_numbers_are_not_leaves(getkey):
    layer = _layer(getkey, qk_norm=True, use_bias=True, dropout_rate=0.1)
    leaves = jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))
    assert len(leaves) == 4 * 2 + 2


def test_which_projections_have_biases(getkey):
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    for options, expected in (
        ({}, [0, 0, 0, 0]),
        ({"use_bias": True}, [1, 1, 1, 1]),
        ({"qkv_bias": True}, [1, 1, 1, 0]),
        ({"use_bias": True, "qkv_bias": False}, [0, 0, 0, 1]),
        ({"use_bias": True, "k_bias": False}, [1, 0, 1, 1]),
    ):
        layer = Attention(8, 2, key=getkey(), **options)
        assert [getattr(layer, name).bias is not None for name in names] == expected


def test_derivatives_with_sinks_and_clip(x64):
    """Those of the tiled implementation against those of the dense one, up to the second."""
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.normal(size=(2, SEQ, D_MODEL)))
    options = {"qk_norm": True, "sinks": True, "clip": 1.0, "score_mod": SoftCap(1.5)}

    def derivatives(implementation):
        fn = eqx.Partial(dot_product_attention, implementation=implementation)
        layer = Attention(D_MODEL, 4, mask=Causal(), attention_fn=fn, key=jr.key(0), **options)
        arrays, static = eqx.partition(layer, eqx.is_inexact_array)
        rng = np.random.default_rng(1)
        point, dots = (
            jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), arrays) for _ in range(2)
        )

        def loss(arrays):
            return jnp.vdot(jnp.sin(eqx.combine(arrays, static)(x)), weight)

        return jax.jit(lambda p, t: jax.jvp(jax.value_and_grad(loss), (p,), (t,)))(point, dots)

    got, expected = derivatives("chunked"), derivatives("reference")
    assert (expected[0][1].sinks != 0).all() and (expected[1][1].sinks != 0).all()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_errors(getkey):
    for sizes, message in (
        ({"num_heads": 5}, "d_model=12 is not a multiple of num_heads=5"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 4, "head_dim": 0}, "Attention: head_dim=0 must be at least 1"),
        ({"num_heads": 4, "dropout_rate": 1.0}, "dropout_rate=1.0"),
        ({"num_heads": 4, "clip": 0}, "clip=0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Attention(12, key=getkey(), **sizes)
    with pytest.raises(ValueError, match=r"Attention takes one example.*jax.vmap"):
        _layer(getkey)(jnp.ones((2, SEQ, D_MODEL)))


# What follows is the cache. Each chunk is (tokens given, tokens that count).
CHUNKINGS = {
    "whole": [(7, None)],
    "tokens": [(1, None)] * 7,
    "mixed": [(3, None), (1, None), (3, None)],
    "padded": [(4, 2), (4, 3), (4, 0), (4, 2)],
}


def _extend(layer, x, chunks, max_len=SEQ, mask=None, garbage=0.0):
    cache, outs, start = layer.init_cache(max_len), [], 0
    for given, length in chunks:
        count = given if length is None else length
        chunk = jnp.full((given, x.shape[1]), garbage).at[:count].set(x[start : start + count])
        out, cache = layer.extend(chunk, cache, mask=mask, length=length)
        outs.append(out[:count])
        start += count
    return jnp.concatenate(outs), cache


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True, "use_bias": True},
        {"num_kv_heads": 1, "mask": Causal() & SlidingWindow(left=2, right=0)},
        {"attention_fn": eqx.Partial(dot_product_attention, implementation="chunked")},
        {"sinks": True, "clip": 0.6, "qk_norm": True, "qk_norm_over": "projection"},
    ],
    ids=["gqa", "window", "chunked", "sinks"],
)
def test_cache_is_the_forward(getkey, options, chunking):
    layer, x = _layer(getkey, **options), jr.normal(getkey(), (SEQ, D_MODEL))
    # Padding may hold anything; max_len is exactly full at the end, where slices would be shifted.
    out, cache = _extend(layer, x, CHUNKINGS[chunking], garbage=jnp.nan)
    np.testing.assert_allclose(out, layer(x), rtol=1e-5, atol=1e-5)
    assert cache.length == SEQ


def test_empty_slots_are_not_attended_without_a_causal_mask(getkey):
    layer, x = _layer(getkey, mask=None), jr.normal(getkey(), (SEQ, D_MODEL))
    out, _ = _extend(layer, x, [(SEQ, None)], max_len=20)
    np.testing.assert_allclose(out, layer(x), rtol=1e-5, atol=1e-5)


LENGTH_SCALINGS = {
    "dynamic": DynamicScaling(factor=4.0, original_max_len=4),
    "longrope": LongRoPEScaling(
        short_factors=(1.0, 1.5), long_factors=(3.0, 7.0), factor=4.0, original_max_len=4
    ),
}


@pytest.mark.parametrize("name", LENGTH_SCALINGS)
def test_angles_that_depend_on_the_length(getkey, name):
    """After every chunk, all cached keys are turned by the angles of the length so far."""
    layer = _layer(getkey, rope=RoPE(theta=30.0, scaling=LENGTH_SCALINGS[name]))
    x, cache = jr.normal(getkey(), (SEQ, D_MODEL)), layer.init_cache(SEQ)
    for start, given, count in ((0, 3, 2), (2, 2, 2), (4, 1, 1), (5, 2, 2)):
        length, end = jnp.array(count), start + count
        chunk = jnp.full((given, D_MODEL), jnp.nan).at[:count].set(x[start:end])
        out, cache = layer.extend(chunk, cache, length=length)
        np.testing.assert_allclose(out[:count], layer(x[:end])[start:], rtol=1e-4, atol=1e-5)
    # The length matters, and is one more than the last position.
    assert jnp.abs(layer(x)[:4] - layer(x[:4])).max() > 1e-3
    out = layer(x, positions=jnp.arange(SEQ))
    np.testing.assert_allclose(out, layer(x), rtol=1e-4, atol=1e-5)


def test_caller_mask_with_a_cache(getkey):
    layer, x = _layer(getkey), jr.normal(getkey(), (SEQ, D_MODEL))
    valid = jnp.array([1, 1, 0, 1, 0, 1, 1], bool)
    mask = Padding(jnp.pad(valid, (0, 3), constant_values=True))
    out, _ = _extend(layer, x, CHUNKINGS["mixed"], max_len=10, mask=mask)
    np.testing.assert_allclose(out, layer(x, mask=Padding(valid)), rtol=1e-5, atol=1e-5)


def test_cache_under_vmap_scan_and_grad(getkey):
    layer, x = _layer(getkey), jr.normal(getkey(), (3, SEQ, D_MODEL))
    ct = jr.normal(getkey(), x.shape)

    def decode(layer, x):
        def step(cache, x):
            y, cache = layer.extend(x[None], cache)
            return cache, y[0]

        return jax.lax.scan(step, layer.init_cache(SEQ), x)[1]

    def grad(f):
        loss = lambda layer: jnp.vdot(jax.vmap(lambda x: f(layer, x))(x), ct)  # noqa: E731
        return eqx.filter_jit(eqx.filter_value_and_grad(loss))(layer)

    for a, b in zip(
        jax.tree.leaves(grad(decode)), jax.tree.leaves(grad(lambda m, x: m(x))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_cache_dtype(getkey):
    layer, x = _layer(getkey), jr.normal(getkey(), (SEQ, D_MODEL))
    cache = layer.init_cache(SEQ, jnp.bfloat16)
    out, cache = layer.extend(x, cache)
    assert cache.k.dtype == jnp.bfloat16 and out.dtype == jnp.float32
    np.testing.assert_allclose(out, layer(x), rtol=0.05, atol=0.05)
    assert layer.init_cache(SEQ).k.dtype == jnp.float32
