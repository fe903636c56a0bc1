"""Caches in other dtypes: what is kept of the numbers, and what attention makes of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.attention import Causal, SlidingWindow, dot_product_attention
from eqx_transformer.nn import (
    Attention,
    AttentionPattern,
    CrossAttention,
    Int8Vectors,
    KVCache,
    LatentAttention,
    LinearAttention,
    MixedAttention,
    RingCache,
    TokenSpec,
)
from eqx_transformer.nn._cache_storage import as_floats, heads_last, stored

SEQ, HEAD_DIM = 9, 8
KEY = jax.random.key(0)


def rows(seed, heads, dtype=np.float32):
    """Keys or values of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-3, 3, (SEQ, heads, 1))
    return (sizes * rng.standard_normal((SEQ, heads, HEAD_DIM))).astype(dtype)


def test_no_number_is_further_off_than_half_a_step():
    x = rows(0, 3)
    x[4, 1] = 0
    kept = stored(jnp.asarray(x), jnp.int8)
    assert isinstance(kept, Int8Vectors) and kept.dtype == jnp.int8 and kept.shape == x.shape
    assert kept.scales.shape == (SEQ, 3, 1) and kept.scales.dtype == jnp.float32
    most = np.abs(x).max(-1, keepdims=True)
    error = np.abs(np.asarray(as_floats(kept, jnp.float32)) - x)
    assert (error <= most / 254 * (1 + 1e-4)).all() and (error.max() > 0)
    assert (error[4, 1] == 0).all()
    # The greatest number of a vector is kept as it is.
    np.testing.assert_allclose(np.abs(as_floats(kept, jnp.float32)).max(-1), most[..., 0], 1e-6)
    for dtype in (jnp.bfloat16, jnp.float16):
        assert as_floats(kept, dtype).dtype == dtype


def test_a_vector_with_nan_stays_one():
    x = rows(0, 2)
    x[3, 1, 5] = np.nan
    back = np.asarray(as_floats(stored(jnp.asarray(x), jnp.int8), jnp.float32))
    assert np.isnan(back[3, 1]).all() and np.isnan(back).sum() == HEAD_DIM


@pytest.mark.parametrize(
    ("dtype", "heads", "ring"),
    [
        (jnp.bfloat16, 1, False),
        (jnp.bfloat16, 3, True),
        (jnp.int8, 1, True),
        (jnp.int8, 3, False),
    ],
)
def test_parts_and_what_is_taken_back(dtype, heads, ring):
    @eqx.filter_jit
    def extended(cache, start, part, count):
        draft, *_ = cache.extended(wrong, wrong)
        return draft.truncate(start).extended(*part, count)

    k, v = jnp.asarray(rows(0, heads)), jnp.asarray(rows(1, heads))
    wrong = jnp.full((1, heads, HEAD_DIM), 1e6)
    empty = RingCache.init(4, heads, HEAD_DIM, dtype)
    cache = empty if ring else KVCache.init(SEQ, heads, HEAD_DIM, dtype)
    start = 0
    for count in (1, 4, 1, 3):
        part = np.full((2, 4, heads, HEAD_DIM), np.nan, np.float32)
        part[:, :count] = k[start : start + count], v[start : start + count]
        cache, got_k, got_v, at = extended(
            cache, jnp.asarray(start), tuple(map(jnp.asarray, part)), jnp.asarray(count)
        )
        start += count
        there = np.asarray(at) >= 0
        for got, x in ((got_k, k), (got_v, v)):
            wanted = as_floats(stored(x, dtype), jnp.float32)
            np.testing.assert_array_equal(np.asarray(got)[there], wanted[np.asarray(at)[there]])
    assert int(cache.length) == SEQ and cache.k.dtype == dtype
    assert set(range(SEQ)) <= set(np.asarray(at).tolist())
    assert cache.k.shape[:-2] == (() if heads == 1 else (heads,))


@pytest.mark.parametrize("seed", range(2))
def test_attention_to_int8_is_off_by_what_is_said(seed, x64):
    """The bound, from half a step for every number of keys and values."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, 64, 2, 16))
    exact = dot_product_attention(*map(jnp.asarray, (q, k, v)), mask=Causal())
    kept = [stored(jnp.asarray(x), jnp.int8) for x in (k, v)]
    got = dot_product_attention(
        jnp.asarray(q), *(as_floats(x, jnp.float64) for x in kept), mask=Causal()
    )
    # Scores are off by at most `e`, so weights by a factor between exp(-2e) and exp(2e).
    steps_k, steps_v = (np.abs(x).max(-1, keepdims=True).max() / 127 for x in (k, v))
    e = np.abs(q).sum(-1).max() * steps_k / 2 / np.sqrt(16)
    bound = np.expm1(2 * e) * np.abs(v).max() + steps_v / 2
    assert np.abs(got - exact).max() <= bound
    # What the documentation says of numbers from a normal distribution.
    relative = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 1e-3 < relative < 1e-2


def layers(dtype):
    """The same positions through a layer and, in parts, through its cache."""
    options = {"num_kv_heads": 2, "key": KEY}
    x = jax.random.normal(KEY, (SEQ, 16))
    for mask, max_len in ((Causal(), SEQ), (Causal() & SlidingWindow(2, 0), 99)):
        layer = Attention(16, 4, mask=mask, **options)
        parts, cache = [], layer.init_cache(max_len, dtype)
        for start in range(0, SEQ, 3):
            part, cache = eqx.filter_jit(layer.extend)(x[start : start + 3], cache)
            parts.append(part)
        yield layer(x), jnp.concatenate(parts), cache
    cross = CrossAttention(16, 4, **options)
    memory = cross.project(x).astype(dtype)
    yield cross(x, x), cross.attend(x, memory), memory
    if dtype == jnp.int8:
        return
    patterns = [AttentionPattern(("anchor", "query"), ("anchor",))]
    mixed = MixedAttention(16, 4, patterns, **options)
    tokens = [TokenSpec("anchor", 4), TokenSpec("query", 5)]
    _, cache = mixed.extend(x[:4], mixed.init_cache(dtype=dtype), tokens=tokens[:1])
    later = [TokenSpec("anchor", None), tokens[1]]
    out, _ = mixed.extend(x[4:], cache, tokens=later)
    yield mixed(x, tokens=tokens)[4:], out, cache


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_every_layer_takes_the_dtype(dtype):
    kinds = {jnp.dtype(dtype), jnp.dtype(jnp.int32)}
    kinds |= {jnp.dtype(jnp.float32)} if dtype == jnp.int8 else set()
    for wanted, got, cache in layers(dtype):
        error = jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)
        assert got.dtype == jnp.float32
        assert 1e-4 < error < 0.02  # it makes a difference, a small one
        assert {x.dtype for x in jax.tree.leaves(cache)} <= kinds


def test_latents_take_bfloat16(x64):
    sizes = {"kv_rank": 6, "nope_head_dim": 4, "rope_head_dim": 4, "v_head_dim": 4}
    layer = LatentAttention(16, 4, **sizes, mask=Causal(), key=KEY)
    x = jax.random.normal(KEY, (SEQ, 16))
    out, cache = layer.extend(x, layer.init_cache(SEQ, jnp.bfloat16))
    assert cache.k.dtype == jnp.bfloat16 and out.dtype == jnp.float64
    assert 1e-4 < jnp.linalg.norm(out - layer(x)) / jnp.linalg.norm(layer(x)) < 0.02
    with pytest.raises(ValueError, match=r"dtype=int8.*use bfloat16"):
        layer.init_cache(SEQ, jnp.int8)


def test_what_makes_no_sense_is_refused():
    mixed = MixedAttention(16, 4, [AttentionPattern(("a",), ("a",))], key=KEY)
    for layer in (LinearAttention(16, 4, mask=Causal(), key=KEY), mixed):
        with pytest.raises(ValueError, match="dtype=int8 must be floating"):
            layer.init_cache(SEQ, jnp.int8)
    for cache in (KVCache, RingCache):
        with pytest.raises(ValueError, match="dtype=int32 must be a floating dtype, or int8"):
            cache.init(4, 2, HEAD_DIM, jnp.int32)


def test_derivatives_of_what_is_rounded_are_refused():
    def through(x, dtype):
        cache = KVCache.init(SEQ, 2, HEAD_DIM, dtype).append(x, x)
        return heads_last(as_floats(cache.k, jnp.float32))[:3].sum()

    x = jnp.asarray(rows(0, 2))
    gradient = jax.grad(through)(x, jnp.bfloat16)
    assert (gradient[:3] == 1).all() and (gradient[3:] == 0).all()
    with pytest.raises(ValueError, match="no derivative"):
        jax.grad(through)(x, jnp.int8)
