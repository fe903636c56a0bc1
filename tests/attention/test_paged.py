"""Paged attention against attention in one piece, and the pool against a model of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.attention import (
    ALiBi,
    Causal,
    Padding,
    Segments,
    SlidingWindow,
    dot_product_attention,
)
from eqx_transformer.attention._paged import PagedKV, PagedKVCache, paged_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES, MAX_PAGES = 4, 2, 8, 4, 13, 5
LENGTHS = (1, 11, 20)
IDS = np.array([0] * 4 + [1] * 3 + [2] * 10 + [3] * 3)

attend = eqx.filter_jit(paged_attention)
plain = eqx.filter_jit(dot_product_attention)


def close(x, y, dtype=jnp.float32):
    tolerance = {"float32": 2e-6, "float64": 1e-12}[jnp.dtype(dtype).name]
    np.testing.assert_allclose(x, y, atol=tolerance * max(1, np.abs(y).max()), rtol=0)


def sequence(seed, length, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed))
    return tuple(jax.random.normal(x, (length, KV_HEADS, HEAD_DIM), dtype) for x in keys)


def scattered(seed, k, v, dtype=jnp.float32):
    """`k` and `v` in random pages, and NaN everywhere else."""
    order = np.random.default_rng(seed).permutation(NUM_PAGES)[:MAX_PAGES]
    used = -(-len(k) // PAGE_SIZE)
    table = np.where(np.arange(MAX_PAGES) < used, order, -1)
    pages = []
    for x in (k, v):
        pool = np.full((NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM), np.nan, dtype)
        for i in range(len(x)):
            pool[table[i // PAGE_SIZE], i % PAGE_SIZE] = x[i]
        pages.append(jnp.asarray(pool))
    return PagedKV(*pages), jnp.asarray(table, jnp.int32)


OPTIONS = {
    "nothing": {},
    "causal": {"mask": Causal()},
    "window": {"mask": SlidingWindow(3, 0)},
    "segments": {"mask": Causal() & Segments(jnp.asarray(IDS))},
    "padding, ALiBi": {
        "mask": Padding(jnp.asarray(np.arange(20) >= 1)),
        "score_mod": ALiBi(HEADS),
    },
    "sinks, scale": {"sinks": jnp.arange(4.0), "scale": 0.7},
}


CASES = [*((name, "reference") for name in OPTIONS), ("segments", "chunked")]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_equals_attention_in_one_piece(name, implementation):
    for length in LENGTHS:
        k, v = sequence(length, length)
        pages, table = scattered(length, k, v)
        q = jax.random.normal(jax.random.key(length), (min(3, length), HEADS, HEAD_DIM))
        options = OPTIONS[name] | {"implementation": implementation}
        got = attend(q, pages, table, jnp.asarray(length), **options)
        positions = jnp.arange(length - len(q), length)
        close(got, plain(q, k, v, q_positions=positions, **options))


def test_given_positions():
    k, v = sequence(1, 11)
    pages, table = scattered(1, k, v)
    q = jax.random.normal(jax.random.key(2), (2, HEADS, HEAD_DIM))
    positions = jnp.array([3, 7])
    got = attend(q, pages, table, jnp.asarray(11), mask=Causal(), q_positions=positions)
    close(got, plain(q, k, v, mask=Causal(), q_positions=positions))


def test_stale_table_entries_are_not_read():
    k, v = sequence(3, 6)
    pages, table = scattered(3, k, v)
    q = jax.random.normal(jax.random.key(4), (1, HEADS, HEAD_DIM))
    clean = attend(q, pages, table, jnp.asarray(6))
    for stale in (0, NUM_PAGES - 1, NUM_PAGES + 5, -7):
        dirty = jnp.where(jnp.arange(MAX_PAGES) < 2, table, stale).astype(jnp.int32)
        np.testing.assert_array_equal(clean, attend(q, pages, dirty, jnp.asarray(6)))
    np.testing.assert_array_equal(attend(q, pages, table, jnp.asarray(0)), np.zeros_like(clean))


def test_vmap_over_sequences_shares_the_pool():
    lengths = (11, 3, 9)
    cache = PagedKVCache(
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_seqs=3,
        max_len=20,
    )
    kv = [sequence(5 + i, 11) for i in range(3)]
    k, v = (jnp.stack(x) for x in zip(*kv, strict=True))
    cache = eqx.filter_jit(lambda *x: cache.append(*x))(k, v, jnp.array(lengths))
    q = jax.random.normal(jax.random.key(6), (3, 2, HEADS, HEAD_DIM))

    def one(q, table, length):
        return paged_attention(q, cache.pages, table, length, mask=SlidingWindow(5, 0))

    args = (q, cache.page_table, cache.lengths)
    out = jax.jit(jax.vmap(one))(*args)
    for i, length in enumerate(lengths):
        positions = jnp.arange(length - 2, length)
        k, v = (x[:length] for x in kv[i])
        close(out[i], plain(q[i], k, v, mask=SlidingWindow(5, 0), q_positions=positions))
    text = str(jax.make_jaxpr(jax.vmap(one))(*args))
    assert f"[3,{MAX_PAGES},{PAGE_SIZE}," in text
    assert f"[3,{NUM_PAGES}," not in text


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_derivatives_for_queries_and_pages(implementation):
    with jax.enable_x64(True):
        k, v = sequence(7, 11, jnp.float64)
        pages, table = scattered(7, k, v, np.float64)
        q = jax.random.normal(jax.random.key(8), (3, HEADS, HEAD_DIM), jnp.float64)
        cotangent = jax.random.normal(jax.random.key(9), q.shape, jnp.float64)
        dq = jax.random.normal(jax.random.key(10), q.shape, jnp.float64)
        dk, dv = sequence(11, 11, jnp.float64)
        dpages, _ = scattered(7, dk, dv, np.float64)
        dpages = jax.tree.map(lambda x: jnp.nan_to_num(x, nan=1.0), dpages)

        def paged(q, pages):
            out = paged_attention(
                q, pages, table, jnp.asarray(11), mask=Causal(), implementation=implementation
            )
            return jnp.sum(jnp.sin(out) * cotangent)

        def whole(q, k, v):
            positions = jnp.arange(8, 11)
            out = dot_product_attention(
                q, k, v, mask=Causal(), q_positions=positions, implementation="reference"
            )
            return jnp.sum(jnp.sin(out) * cotangent)

        (gq, gpages), (hq, hpages) = jax.jit(
            lambda: jax.jvp(jax.grad(paged, (0, 1)), (q, pages), (dq, dpages))
        )()
        wanted, hvp = jax.jit(
            lambda: jax.jvp(jax.grad(whole, (0, 1, 2)), (q, k, v), (dq, dk, dv))
        )()
        found = (gq, gpages.k_pages, gpages.v_pages, hq, hpages.k_pages, hpages.v_pages)
        for x, got in zip((*wanted, *hvp), found, strict=True):
            if x.shape[0] == 11:
                close(got[table[:3]].reshape(-1, KV_HEADS, HEAD_DIM)[:11], x, jnp.float64)
                # Nothing but the sequence's own positions has a gradient.
                close(jnp.abs(got).sum(), jnp.abs(x).sum(), jnp.float64)
            else:
                close(got, x, jnp.float64)


NUM_SEQS, NEW = 4, 6


@eqx.filter_jit
def step(cache, k, v, counts, ended, forks, source, target):
    """One of everything, as a decoding loop would do it under `jit`."""
    cache = cache.free(ended)
    cache = jax.lax.cond(forks, lambda x: x.fork(source, target), lambda x: x, cache)
    return cache.append(k, v, counts)


def test_the_pool_against_a_model_of_it():
    rng = np.random.default_rng(0)
    cache = PagedKVCache(
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=1,
        head_dim=1,
        num_seqs=NUM_SEQS,
        max_len=MAX_PAGES * PAGE_SIZE,
    )
    model: list[list[float]] = [[] for _ in range(NUM_SEQS)]
    number, forked = 0.0, 0
    for _ in range(60):
        ended = rng.random(NUM_SEQS) < 0.15
        for i in np.nonzero(ended)[0]:
            model[i] = []
        source, target = rng.permutation(NUM_SEQS)[:2]
        pages = sum(-(-len(x) // PAGE_SIZE) for x in model)
        forks = not model[target] and bool(model[source]) and pages < NUM_PAGES - 1
        if forks:
            model[target] = list(model[source])
            forked += 1
        k = np.zeros((NUM_SEQS, NEW, 1, 1), np.float32)
        counts = np.zeros(NUM_SEQS, np.int32)
        for i in range(NUM_SEQS):
            # Counting a shared page for every user keeps well clear of the limit.
            pages = sum(-(-len(x) // PAGE_SIZE) for x in model)
            room = min(NEW, (NUM_PAGES - pages) * PAGE_SIZE, MAX_PAGES * PAGE_SIZE - len(model[i]))
            counts[i] = rng.integers(0, max(room, 0) + 1)
            new = number + np.arange(1, NEW + 1)
            k[i, :, 0, 0], number = new, number + NEW
            model[i] += list(new[: counts[i]])
        new = (jnp.asarray(k), -jnp.asarray(k), jnp.asarray(counts))
        cache = step(
            cache,
            *new,
            jnp.asarray(ended),
            jnp.asarray(forks),
            jnp.asarray(source, jnp.int32),
            jnp.asarray(target, jnp.int32),
        )

        table, users = np.asarray(cache.page_table), np.zeros(NUM_PAGES, int)
        np.testing.assert_array_equal(cache.lengths, [len(x) for x in model])
        for i, values in enumerate(model):
            used = -(-len(values) // PAGE_SIZE)
            assert np.all(table[i, :used] >= 0) and np.all(table[i, used:] == -1)
            np.add.at(users, table[i, :used], 1)
            for pool, sign in ((cache.pages.k_pages, 1), (cache.pages.v_pages, -1)):
                held = np.asarray(pool)[table[i, :used]].reshape(-1)[: len(values)]
                np.testing.assert_array_equal(held, sign * np.asarray(values, np.float32))
        np.testing.assert_array_equal(cache.users, users)
    assert forked > 3


def small(**changes):
    options = {"num_pages": 3, "page_size": 2, "num_kv_heads": 1, "head_dim": 1}
    return PagedKVCache(**(options | {"num_seqs": 2, "max_len": 4} | changes))


@eqx.filter_jit
def appended(cache, new, counts):
    return cache.append(new, new, counts)


def grow(cache, *counts):
    return appended(cache, jnp.ones((2, 4, 1, 1)), jnp.array(counts))


def test_reserved_pages_are_used_first():
    cache = small().allocate(jnp.array([3, 0]))
    reserved = cache.page_table
    assert int(jnp.sum(reserved >= 0)) == 2 and int(cache.lengths.sum()) == 0
    np.testing.assert_array_equal(grow(cache, 3, 0).page_table, reserved)
    assert int(cache.free(jnp.array([True, False])).users.sum()) == 0


def test_running_out_is_an_error():
    with pytest.raises(Exception, match="outgrows its 2 pages of 2"):
        grow(grow(small(), 3, 0), 2, 0)
    with pytest.raises(Exception, match="fewer of the 3 pages are free"):
        grow(small(), 3, 4)
    with pytest.raises(Exception, match="between 0 and 4"):
        grow(small(), 5, 0)
    with pytest.raises(Exception, match="target of a fork is in use"):
        grow(small(), 1, 1).fork(jnp.array(0), jnp.array(1))
    with pytest.raises(ValueError, match="page_size=0"):
        small(page_size=0)
    with pytest.raises(ValueError, match="dtype=int8 must be floating"):
        small(dtype=jnp.int8)


def test_a_fork_shares_full_pages_and_goes_its_own_way():
    cache = grow(small(num_pages=4), 3, 0).fork(jnp.array(0), jnp.array(1))
    assert cache.page_table[0, 0] == cache.page_table[1, 0]
    assert cache.page_table[0, 1] != cache.page_table[1, 1]
    new = jnp.array([5.0, 7.0])[:, None, None, None]
    cache = appended(cache, new, jnp.array([1, 1]))
    held = cache.pages.k_pages[cache.page_table].reshape(2, 4)
    np.testing.assert_array_equal(held, [[1, 1, 1, 5], [1, 1, 1, 7]])
