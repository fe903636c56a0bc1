"""Paged attention against attention in one piece."""

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
from eqx_transformer.attention._paged import PagedKV, paged_attention

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
    kv = [sequence(5 + i, length) for i, length in enumerate(lengths)]
    order = iter(np.random.default_rng(0).permutation(NUM_PAGES))
    pools = np.full((2, NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM), np.nan, np.float32)
    tables = np.full((3, MAX_PAGES), -1, np.int32)
    for table, length, pair in zip(tables, lengths, kv, strict=True):
        for i in range(length):
            if i % PAGE_SIZE == 0:
                table[i // PAGE_SIZE] = next(order)
            for pool, x in zip(pools, pair, strict=True):
                pool[table[i // PAGE_SIZE], i % PAGE_SIZE] = x[i]
    pages = PagedKV(*map(jnp.asarray, pools))
    q = jax.random.normal(jax.random.key(6), (3, 2, HEADS, HEAD_DIM))

    def one(q, table, length):
        return paged_attention(q, pages, table, length, mask=SlidingWindow(5, 0))

    args = (q, jnp.asarray(tables), jnp.asarray(lengths))
    out = jax.jit(jax.vmap(one))(*args)
    for i, length in enumerate(lengths):
        positions = jnp.arange(length - 2, length)
        close(out[i], plain(q[i], *kv[i], mask=SlidingWindow(5, 0), q_positions=positions))
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
