"""Sequences in pages of one pool: each is its own forward pass, whatever the others do."""

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.decoders import Markov
from generation.test_cache_law import (
    HARD,
    MLA,
    TINY,
    TOLERANCE,
    VOCAB,
    configs,
    law,
    model_of,
    short_rings,
)
from hypothesis import example, given
from hypothesis import strategies as st
from jaxtyping import Array, Float, Int

from eqx_transformer.attention import paged_attention
from eqx_transformer.generation import PagedCache, generate
from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.nn import KVCache, _paged_cache

__all__ = ["short_rings"]  # a fixture
ROWS, NEW, PAGE_SIZE, MAX_LEN = 3, 4, 5, TINY["max_len"]


@eqx.filter_jit
def step(cache, model, tokens, counts, ended, forks, source, target, taken_back=None):
    """One of everything, as a loop would do it, with one compilation."""
    cache = cache.free(ended)
    cache = jax.lax.cond(forks, lambda x: x.fork(source, target), lambda x: x, cache)
    if taken_back is not None:
        cache = cache.truncate(cache.lengths - taken_back)
    return cache.extend(model, tokens, counts)


def check(fields, seed, cache_dtype=None, steps=12):
    """Rows that join, grow, fork and leave at random; every logit compared."""
    config = LlamaConfig(**TINY, num_layers=2, d_ff=24, **fields)
    with jax.enable_x64(config.param_dtype == "float64"):
        model = model_of(config, seed)
        return _check(model, np.random.default_rng(seed), cache_dtype, steps)


def _check(model, rng, cache_dtype, steps):
    if cache_dtype is None:
        forward = eqx.filter_jit(lambda model, tokens: model(tokens))
    else:

        @eqx.filter_jit
        def forward(model, tokens):
            return model.extend(tokens, model.init_cache(MAX_LEN, cache_dtype))[0]

    cache = PagedCache.init(
        model, num_sequences=ROWS, num_pages=9, page_size=PAGE_SIZE, dtype=cache_dtype
    )
    rows: list[list[int]] = [[] for _ in range(ROWS)]
    wanted: list = [None] * ROWS
    texts: list = [None] * ROWS
    compared = 0
    for i in range(steps):
        ended = np.array([bool(r) and (len(r) == MAX_LEN or rng.random() < 0.1) for r in rows])
        for row in np.nonzero(ended)[0]:
            rows[row] = []
        source, target = rng.permutation(ROWS)[:2]
        forks = bool(rows[source]) and not rows[target]
        if forks:
            rows[target] = list(rows[source])
        counts = np.zeros(ROWS, np.int32)
        tokens = np.zeros((ROWS, NEW), np.int32)
        for row, old in enumerate(rows):
            if not old or (row == target and forks):
                text = [*old, *rng.integers(0, VOCAB, MAX_LEN - len(old))]
                texts[row] = np.asarray(text, np.int32)
                wanted[row] = np.asarray(forward(model, texts[row]), np.float64)
            # All of it at first: angles that depend on the length must not change on the way.
            room = min(NEW, MAX_LEN - len(old))
            counts[row] = room if i == 0 else rng.integers(0, room + 1)
            new = texts[row][len(old) : len(old) + counts[row]]
            tokens[row, : counts[row]] = new
        logits, cache = step(
            cache,
            model,
            jnp.asarray(tokens),
            jnp.asarray(counts),
            jnp.asarray(ended),
            jnp.asarray(forks),
            jnp.asarray(source),
            jnp.asarray(target),
        )
        for row, old in enumerate(rows):
            got = np.asarray(logits[row, : counts[row]], np.float64)
            expected = wanted[row][len(old) : len(old) + counts[row]]
            tolerance = TOLERANCE[model.config.param_dtype] * np.abs(wanted[row]).max()
            np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)
            rows[row] = old + list(texts[row][len(old) : len(old) + counts[row]])
            compared += counts[row]
        np.testing.assert_array_equal(cache.lengths, [len(x) for x in rows])
    assert compared > 2 * MAX_LEN


def fit(fields):
    """Without what is drawn that rows of changing lengths cannot have, or that has no pages."""
    scaling = fields.get("rope_scaling")
    if scaling is not None and scaling.needs_length:
        fields = fields | {"rope_scaling": None}
    if fields.get("layer_types") == "sliding" or "window" in fields:
        fields = fields | {"layer_types": ("sliding", "global") if fields["window"] else None}
    return fields


@pytest.mark.parametrize("dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_pages_are_the_forward(dtype):
    @law(1)
    @given(configs(dtype), st.integers(1, 1000))
    @example(HARD[dtype] | {"param_dtype": dtype}, 0)
    def run(fields, seed):
        check(fit(fields), seed)

    run()


@pytest.mark.slow
def test_pages_are_the_forward_in_more_cases():
    @law(10)
    @given(configs("float64"), st.integers(1, 1000), st.sampled_from([None, jnp.int8]))
    @example({"mla": MLA, "param_dtype": "float64"}, 0, None)
    @example({"num_kv_heads": 1, "param_dtype": "float64"}, 0, jnp.int8)
    def run(fields, seed, cache_dtype):
        fields = fit(fields) | ({} if cache_dtype is None else {"mla": None})
        check(fields, seed, cache_dtype)

    run()


class Recorder(eqx.Module):
    """Not a language model: keys are the tokens, and the logits are all keys so far."""

    @property
    def config(self):
        return SimpleNamespace(max_len=20)

    def init_cache(self, max_len: int | None = None, dtype: Any = None) -> KVCache:
        assert max_len is not None
        return KVCache.init(max_len, 1, 1)

    def extend(
        self, tokens: Int[Array, " seq"], cache: Any, *, mask: Any = None, length: Any = None
    ) -> tuple[Float[Array, "seq vocab"], Any]:
        new = tokens[:, None, None].astype(jnp.float32)
        cache, k, v, positions = cache.extended(new, -new, length)
        seen = jnp.where(positions >= 0, (k - v)[:, 0, 0] / 2, 0)
        return jnp.broadcast_to(seen[None], (tokens.shape[0], seen.shape[0])), cache


def test_the_pool_against_a_model_of_it():
    """What rows hold, who uses which page, and that no more are used than are needed."""
    rng = np.random.default_rng(0)
    num_rows, num_pages, page_size, new = 4, 13, 4, 6
    model = Recorder()
    cache = PagedCache.init(model, num_sequences=num_rows, num_pages=num_pages, page_size=page_size)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    number, happened = 0, np.zeros(3, int)
    for _ in range(60):
        ended = rng.random(num_rows) < 0.15
        for i in np.nonzero(ended)[0]:
            rows[i] = []
        source, target = rng.permutation(num_rows)[:2]
        # Counting a shared page for every user keeps well clear of the limit.
        pages = sum(-(-len(x) // page_size) for x in rows)
        forks = not rows[target] and bool(rows[source]) and pages < num_pages - 4
        if forks:
            rows[target] = list(rows[source])
        back = np.array([rng.integers(0, min(len(x), 4) + 1) for x in rows]) * rng.integers(2)
        rows = [x[: len(x) - n] for x, n in zip(rows, back, strict=True)]
        tokens, counts = np.zeros((num_rows, new), np.int32), np.zeros(num_rows, np.int32)
        for i, row in enumerate(rows):
            pages = sum(-(-len(x) // page_size) for x in rows)
            room = min(new, (num_pages - pages) * page_size, 20 - len(row))
            counts[i] = rng.integers(0, max(room, 0) + 1)
            tokens[i] = number + np.arange(1, new + 1)
            rows[i], number = row + list(tokens[i, : counts[i]]), number + new
        happened += [forks, ended.any(), back.any()]
        seen, cache = step(
            cache,
            model,
            *(jnp.asarray(x) for x in (tokens, counts, ended, forks, source, target)),
            jnp.asarray(back, jnp.int32),
        )

        table, users = np.asarray(cache.page_table), np.zeros(num_pages, int)
        np.testing.assert_array_equal(cache.lengths, [len(x) for x in rows])
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(seen[i, 0], row + [0] * (20 - len(row)))
            used = -(-len(row) // page_size)
            assert np.all(table[i, :used] >= 0) and np.all(table[i, used:] == -1)
            np.add.at(users, table[i, :used], 1)
            if len(row) % page_size:  # which is written to
                assert cache.users[table[i, used - 1]] == 1
        np.testing.assert_array_equal(cache.users, users)
        assert cache.num_free_pages == (users == 0).sum()
    assert (happened > 3).all()


def recorded(num_sequences=2, num_pages=3, page_size=2, max_len=4):
    return PagedCache.init(
        Recorder(),
        num_sequences=num_sequences,
        num_pages=num_pages,
        page_size=page_size,
        max_len=max_len,
    )


@eqx.filter_jit
def grow(cache, *counts):
    tokens = jnp.ones((len(counts), 4), jnp.int32)
    return cache.extend(Recorder(), tokens, jnp.stack(counts))[1]


def test_running_out_and_misuse_are_errors():
    def grown(cache, *counts):
        return grow(cache, *(jnp.asarray(x) for x in counts))

    with pytest.raises(Exception, match="longer than max_len=4"):
        grown(grown(recorded(), 3, 0), 2, 0)
    with pytest.raises(Exception, match="fewer of the 3 pages are free"):
        grown(recorded(), 3, 4)
    with pytest.raises(Exception, match="from 0 to the 4 tokens"):
        grown(recorded(), -1, 0)
    full = grown(recorded(), 1, 1)
    for source, target in ((0, 1), (0, 2), (-1, 1)):
        with pytest.raises(Exception, match="one of the 2 rows to a free one"):
            full.fork(source, target)
    for rows in ([0, 0], [1, 2], [-1, 0]):
        with pytest.raises(Exception, match="different ones from 0 to 1"):
            full.extend(Recorder(), jnp.ones((2, 1), jnp.int32), rows=jnp.array(rows))
    with pytest.raises(Exception, match="rows"):  # the hook for annotations is here before it
        full.extend(Recorder(), jnp.ones((2, 1), jnp.int32), rows=jnp.array([0]))
    with pytest.raises(Exception, match="lengths from 0 to those"):
        full.truncate(jnp.array([2, 0]))
    with pytest.raises(
        ValueError, match=r"free\(which\) got bool\[1\] but takes one flag for each"
    ):
        full.free(jnp.array([True]))
    with pytest.raises(ValueError, match="one length for each of the 2 rows"):
        full.truncate(jnp.array([1]))
    with pytest.raises(ValueError, match="page_size=0 must be at least 1"):
        recorded(page_size=0)
    with pytest.raises(ValueError, match="for 3 rows, but there are 2"):
        full.extend(Recorder(), jnp.ones((3, 1), jnp.int32))
    with pytest.raises(ValueError, match="no layer of Markov keeps all positions"):
        model = Markov(jnp.zeros((3, 3, 3)))
        PagedCache.init(model, num_sequences=1, num_pages=1, max_len=4)
    # The last page and the last position are there to be used.
    assert grown(grown(recorded(), 4, 1), 0, 1).num_free_pages == 0


def test_the_last_row_to_leave_a_page_keeps_it():
    """Rows that share a page and all take back need no more pages than there are rows."""

    @eqx.filter_jit
    def taken_back(cache, lengths):
        cache = cache.truncate(jnp.array([3, 0, 0])).fork(0, 1).fork(0, 2)
        return cache.users, cache.truncate(lengths)

    cache = recorded(num_sequences=3, num_pages=3, page_size=3, max_len=6)
    cache = grow(cache, jnp.asarray(4), jnp.asarray(0), jnp.asarray(0))
    for lengths in ([2, 3, 1], [2, 2, 1]):  # row 1 has the page still, or not
        before, after = taken_back(cache, jnp.array(lengths))
        assert before.tolist() == [3, 0, 0]
        assert after.users.tolist() == [1, 1, 1]
        np.testing.assert_array_equal(after.pools.k[after.page_table[:, 0], 0, 0, 0], 1)


TEXT = jnp.arange(8, dtype=jnp.int32)


@pytest.fixture(scope="module")
def llama():
    return Llama(LlamaConfig(**TINY, num_layers=2, d_ff=24), key=jax.random.key(0))


def paged(model, num_pages=6):
    return PagedCache.init(model, num_sequences=3, num_pages=num_pages, page_size=4)


def test_some_rows_at_a_time(llama):
    """The prompts of some rows are read without the others, who keep what they have."""
    prompts = jnp.stack([TEXT, TEXT + 5, TEXT + 9])
    wanted = jax.vmap(llama)(prompts)

    @eqx.filter_jit
    def extend(cache, rows, first, counts):
        tokens = jnp.roll(prompts[rows], -first, axis=1)
        return cache.extend(llama, tokens, counts, rows=rows)

    cache = paged(llama, num_pages=7)
    for rows, first, counts, lengths in [
        ([2, 0], 0, [8, 0], [0, 0, 8]),
        ([1, 0], 0, [3, 6], [6, 3, 8]),
        ([0, 2], 6, [2, 0], [8, 3, 8]),
        ([1, 0], 3, [5, 0], [8, 8, 8]),
    ]:
        logits, cache = extend(cache, *map(jnp.asarray, (rows, first, counts)))
        assert cache.lengths.tolist() == lengths
        for row, found, count in zip(rows, logits, counts, strict=True):
            expected = wanted[row, first : first + count]
            np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-5)


def test_what_a_row_leaves_behind_reaches_no_other(llama):
    """Not even NaN: pages are shared, sequences are not."""
    cache = paged(llama, num_pages=2)
    cache = eqx.tree_at(lambda x: x.pools, cache, jax.tree.map(lambda x: x * jnp.nan, cache.pools))
    tokens = jnp.stack([TEXT[:5]] * 3)
    logits, cache = cache.extend(llama, tokens, jnp.array([0, 5, 0]))
    np.testing.assert_allclose(logits[1], llama(TEXT[:5]), atol=1e-5)
    assert cache.num_free_pages == 0


def test_memory_is_that_of_the_pages(llama):
    cache = PagedCache.init(llama, num_sequences=50, num_pages=6, page_size=4)
    one = jax.tree.leaves(eqx.filter(llama.init_cache(12).layers, eqx.is_inexact_array))
    assert sum(x.size for x in jax.tree.leaves(cache.pools)) == 6 * 4 / 12 * sum(
        x.size for x in one
    )
    assert sum(x.size for x in jax.tree.leaves((cache.states, cache.empty))) == 51
    # Five samples of one prompt: its two full pages once, and a copy of the last for each.
    cache = eqx.filter_jit(lambda x: x.extend(llama, TEXT[None, :6], rows=jnp.array([0])))(cache)[1]
    fork = eqx.filter_jit(lambda x, i: x.fork(0, i))
    for i in range(1, 4):
        cache = fork(cache, jnp.asarray(i))
    assert cache.num_free_pages == 6 - 1 - 4
    assert cache.users.tolist() == [4, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [None, jnp.int8])
def test_keys_are_read_in_their_pages(llama, dtype, monkeypatch):
    """By what the configuration says; those that are stored otherwise are gathered."""
    called = []

    def recorded(*args, **options):
        called.append(options["implementation"])
        return paged_attention(*args, **options)

    monkeypatch.setattr(_paged_cache, "paged_attention", recorded)
    config = llama.config.replace(attention_implementation="reference")
    model = Llama(config, key=jax.random.key(0))
    cache = PagedCache.init(model, num_sequences=3, num_pages=6, page_size=4, dtype=dtype)
    eqx.filter_eval_shape(cache.extend, model, jnp.ones((3, 1), jnp.int32))
    assert called == ([] if dtype == jnp.int8 else ["reference"])


@pytest.mark.parametrize("second", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_derivatives_go_through_pages(second):
    """Reverse, and forward over reverse, with respect to the weights: as of the forward pass."""
    with jax.enable_x64(True):
        config = LlamaConfig(**TINY, num_layers=2, d_ff=24, num_kv_heads=2, param_dtype="float64")
        model = model_of(config, 0)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        tokens = jnp.stack([TEXT, TEXT + 3, TEXT + 7])
        weights = jax.random.normal(jax.random.key(1), (3, 8, VOCAB), jnp.float64)
        keys = iter(jax.random.split(jax.random.key(2), 100))
        tangent = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), params)

        def whole(params):
            logits = jax.vmap(eqx.combine(params, static))(tokens)
            return jnp.sum(jnp.sin(logits) * weights)

        def in_parts(params):
            model = eqx.combine(params, static)

            def part(cache, part):
                logits, cache = cache.extend(model, part)
                return cache, logits

            parts = jnp.swapaxes(tokens.reshape(3, 2, 4), 0, 1)
            _, logits = jax.lax.scan(part, paged(model), parts)
            logits = jnp.swapaxes(logits, 0, 1).reshape(weights.shape)
            return jnp.sum(jnp.sin(logits) * weights)

        def derivative(f):
            if not second:
                return jax.grad(f)(params)
            return jax.jvp(jax.grad(f), (params,), (tangent,))[1]

        wanted, got = (jax.jit(lambda f=f: derivative(f))() for f in (whole, in_parts))
    for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-11 * np.abs(x).max(), rtol=0)


def test_a_batch_that_others_join_and_leave(llama):
    """Every text is the one that is generated alone; the step is compiled once."""
    width, traces = 2, []

    @eqx.filter_jit
    def run(cache, tokens, counts, ended):
        traces.append(1)
        logits, cache = cache.free(ended).extend(llama, tokens, counts)
        last = jnp.maximum(counts - 1, 0)[:, None, None]
        return jnp.argmax(jnp.take_along_axis(logits, last, axis=1)[:, 0], axis=-1), cache

    prompts = [TEXT[:5], TEXT[2:4], TEXT[3:4], TEXT[1:6], TEXT[5:8]]
    lengths = [4, 6, 3, 5, 2]
    waiting = list(range(len(prompts)))
    texts = [list(map(int, x)) for x in prompts]
    slots: list[int | None] = [None] * 3
    read, ended, cache = [0] * 3, np.zeros(3, bool), paged(llama)
    while waiting or any(x is not None for x in slots):
        for slot, number in enumerate(slots):
            if number is None and waiting:
                slots[slot], read[slot] = waiting.pop(0), 0
        tokens, counts = np.zeros((3, width), np.int32), np.zeros(3, np.int32)
        for slot, number in enumerate(slots):
            if number is not None:
                part = texts[number][read[slot] : read[slot] + width]
                tokens[slot, : len(part)], counts[slot] = part, len(part)
        new, cache = run(cache, jnp.asarray(tokens), jnp.asarray(counts), jnp.asarray(ended))
        ended = np.zeros(3, bool)
        for slot, number in enumerate(slots):
            if number is not None:
                read[slot] += counts[slot]
                if read[slot] == len(texts[number]):
                    texts[number].append(int(new[slot]))
                if len(texts[number]) == len(prompts[number]) + lengths[number]:
                    slots[slot], ended[slot] = None, True
    assert len(traces) == 1
    for prompt, length, text in zip(prompts, lengths, texts, strict=True):
        alone = generate(llama, prompt, max_new_tokens=max(lengths), temperature=0)
        np.testing.assert_array_equal(text[len(prompt) :], alone[:length])
