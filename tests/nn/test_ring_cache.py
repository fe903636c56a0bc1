"""Layers with a window keep the window, and give what they would give without a cache."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.attention import Causal, Padding, SlidingWindow
from eqx_transformer.nn import Attention, KVCache, RingCache, RoPE, truncate
from eqx_transformer.nn._ring_cache import _SPARE

WINDOW = 4
SLOTS = WINDOW + _SPARE
CAUSAL_WINDOW = Causal() & SlidingWindow(WINDOW - 1, 0)


def rows(start, count):
    return jnp.arange(start, start + count, dtype=jnp.float32)[:, None, None] * jnp.ones((1, 2, 3))


# The most that can be read where they are written, and one more.
FITS, TOO_MANY = _SPARE + 1, _SPARE + 2


@pytest.mark.parametrize(
    "parts",
    [[1] * 80, [30, 50], [80], [3, 1, 40, 1, 1, 34], [SLOTS, 7], [40, FITS, TOO_MANY, FITS]],
)
def test_the_last_positions_are_kept(parts):
    cache = RingCache.init(WINDOW, 2, 3)
    extended = eqx.filter_jit(lambda cache, x: cache.extended(x, -x))
    done = 0
    for count in parts:
        before = done
        cache, k, v, positions = extended(cache, rows(done, count))
        done += count
        np.testing.assert_array_equal(v, -k)
        seen = np.asarray(positions)
        # All that any of the new positions may look at is there, once.
        wanted = np.arange(max(0, before - WINDOW + 1), done)
        assert set(wanted) <= set(seen) and len(set(seen) - {-1}) == (seen >= 0).sum()
        there = seen >= 0
        np.testing.assert_array_equal(np.asarray(k)[there, 0, 0], seen[there])
    held = np.asarray(cache.positions)
    assert set(held) - {-1} == set(range(max(0, done - SLOTS), done))
    assert cache.k.shape == (2, SLOTS, 3)


@pytest.mark.parametrize("seq", [1, 5, 60])
def test_padding_is_not_stored(seq):
    for count in {0, 1, seq}:
        cache, *_ = RingCache.init(WINDOW, 2, 3).extended(rows(0, 3), rows(0, 3))
        new = rows(3, seq).at[count:].set(jnp.nan)
        cache, k, _, positions = cache.extended(new, new, jnp.asarray(count))
        assert int(cache.length) == 3 + count
        assert set(np.asarray(cache.positions)) - {-1} == set(
            range(max(0, 3 + count - SLOTS), 3 + count)
        )
        assert set(np.asarray(positions)) - {-1} >= set(range(max(0, count), 3 + count))
        assert not jnp.isnan(k).any() and not jnp.isnan(cache.k).any()


def layer(**options):
    options = {"num_kv_heads": 2, "rope": RoPE(), "mask": CAUSAL_WINDOW, **options}
    return Attention(16, 4, key=jax.random.key(0), **options)


def test_which_layers_have_one():
    assert isinstance(layer().init_cache(200), RingCache)
    assert isinstance(layer().init_cache(SLOTS), KVCache)  # no smaller
    assert isinstance(layer(mask=Causal()).init_cache(200), KVCache)
    assert isinstance(
        layer(mask=Causal() & (SlidingWindow(3, 0) | SlidingWindow(0, 5))).init_cache(200),
        RingCache,
    )
    assert isinstance(layer(mask=Causal() & ~SlidingWindow(3, 0)).init_cache(200), KVCache)


@pytest.mark.parametrize("parts", [[1] * 60, [6, FITS - 2, 1, 1, 10, 9, 2], [26, TOO_MANY]])
@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_is_the_forward(parts, padded):
    attention = layer()
    x = jax.random.normal(jax.random.key(1), (60, 16))
    mask = Padding(jax.random.bernoulli(jax.random.key(2), 0.7, (200,))) if padded else None
    wanted = eqx.filter_jit(attention)(x, mask=mask)
    cache, done, got = attention.init_cache(200), 0, []
    extend = eqx.filter_jit(attention.extend)
    for count in parts:
        # Some padding behind what counts.
        part = jnp.pad(x[done : done + count], ((0, 2), (0, 0)), constant_values=jnp.nan)
        y, cache = extend(part, cache, mask=mask, length=jnp.asarray(count))
        got.append(y[:count])
        done += count
    np.testing.assert_allclose(jnp.concatenate(got), wanted, atol=2e-6)


def test_tokens_are_taken_back():
    attention = layer()
    x = jax.random.normal(jax.random.key(1), (70, 16))
    extend = eqx.filter_jit(attention.extend)
    _, cache = extend(x[:50], attention.init_cache(200))
    wanted, _ = extend(x[50:53], cache)
    for count in (1, 20, _SPARE + 1):
        _, longer = extend(x[:count], cache)
        got, _ = extend(x[50:53], truncate(longer, 50))
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    _, longer = extend(x[: _SPARE + 2], cache)
    with pytest.raises(RuntimeError, match="at most 33 positions"):
        truncate(longer, 50)
    with pytest.raises(RuntimeError, match="at most 33 positions"):
        truncate(truncate(longer, 60), 50)  # in two steps neither
    with pytest.raises(RuntimeError, match="from 0 to that of the cache"):
        truncate(cache, 51)


def test_a_stack_of_caches_is_truncated():
    caches = jax.vmap(lambda x: RingCache.init(WINDOW, 2, 3).extended(x, x)[0])(
        jnp.stack([rows(0, 9)] * 3)
    )
    shorter = truncate((caches, {"other": jnp.ones(2)}), 5)[0]
    assert shorter.length.tolist() == [5, 5, 5]
    assert set(np.asarray(shorter.positions[1])) == {-1, 0, 1, 2, 3, 4}
