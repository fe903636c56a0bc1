import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.nn import KVCache

MAX_LEN = 6


def _rows(n, start=1):
    return jnp.arange(start, start + n, dtype=jnp.float32)[:, None, None] * jnp.ones((1, 2, 3))


def _filled(cache):
    return np.asarray(cache.k[0, : int(cache.length), 0])


def test_append():
    cache = KVCache.init(MAX_LEN, 2, 3)
    assert cache.max_len == MAX_LEN and (cache.positions() == -1).all()
    cache = cache.append(_rows(2), -_rows(2)).append(_rows(3, 3), -_rows(3, 3))
    np.testing.assert_array_equal(_filled(cache), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(cache.v, -cache.k)
    np.testing.assert_array_equal(cache.positions(), [0, 1, 2, 3, 4, -1])


@pytest.mark.parametrize("first", range(MAX_LEN + 1))
@pytest.mark.parametrize("given", [1, 4, 6])
def test_padding_is_not_stored_and_need_not_fit(first, given):
    for length in range(min(given, MAX_LEN - first) + 1):
        cache = KVCache.init(MAX_LEN, 2, 3)
        if first:
            cache = cache.append(_rows(first), _rows(first))
        rows = _rows(given, 11).at[length:].set(jnp.nan)
        cache = cache.append(rows, rows, length)
        expected = [*range(1, first + 1), *range(11, 11 + length)]
        np.testing.assert_array_equal(_filled(cache), expected)
        assert not jnp.isnan(cache.k).any()


def test_overflow_raises():
    cache = KVCache.init(MAX_LEN, 2, 3).append(_rows(4), _rows(4))
    append = eqx.filter_jit(lambda cache, x, length: cache.append(x, x, length))
    append(cache, _rows(2), None)
    append(cache, _rows(3), jnp.array(2))
    for seq, length in ((3, None), (3, jnp.array(3)), (2, jnp.array(3)), (2, jnp.array(-1))):
        with pytest.raises(RuntimeError, match="max_len=6"):
            append(cache, _rows(seq), length)
    with pytest.raises(ValueError, match=r"7 positions.*max_len=6"):
        cache.append(_rows(7), _rows(7))
    with pytest.raises(ValueError, match="max_len=0"):
        KVCache.init(0, 2, 3)


def test_overflow_raises_under_vmap():
    fill = lambda n: KVCache.init(MAX_LEN, 2, 3).append(_rows(5), _rows(5), n)  # noqa: E731
    caches = jax.vmap(fill)(jnp.array([1, 5, 3]))
    append = eqx.filter_jit(eqx.filter_vmap(lambda cache, x: cache.append(x, x)))
    out = append(caches, jnp.zeros((3, 1, 2, 3)))
    np.testing.assert_array_equal(out.length, [2, 6, 4])
    with pytest.raises(RuntimeError, match="max_len=6"):
        append(out, jnp.zeros((3, 1, 2, 3)))


def test_truncate_and_fork(getkey):
    cache = KVCache.init(MAX_LEN, 2, 3).append(_rows(4), _rows(4))
    fork = cache.truncate(1).append(_rows(2, 21), _rows(2, 21))
    np.testing.assert_array_equal(_filled(fork), [1, 21, 22])
    np.testing.assert_array_equal(_filled(cache), [1, 2, 3, 4])
    for length in (5, -1):
        with pytest.raises(RuntimeError, match="truncate"):
            eqx.filter_jit(KVCache.truncate)(cache, jnp.array(length))


def test_stores_in_its_dtype(getkey):
    cache = KVCache.init(MAX_LEN, 2, 3, jnp.bfloat16)
    x = jr.normal(getkey(), (2, 2, 3))
    assert cache.append(x, x).k.dtype == jnp.bfloat16
