"""`beam_search` finds what an exhaustive search and a slow one over full forward passes find."""

import functools
import itertools
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.generation import beam_search, generate
from eqx_transformer.generation._beam_search import _beam_axes, _flat_extend, _run
from eqx_transformer.models import Llama, LlamaConfig

VOCAB, MAX_LEN = 5, 24
# As many stop tokens everywhere, so that tests share compilations; these never come.
NO_STOPS = (VOCAB, VOCAB)


@functools.cache
def llama(seed):
    config = LlamaConfig(
        vocab_size=VOCAB, d_model=8, num_layers=1, num_heads=2, d_ff=8, max_len=MAX_LEN
    )
    model = Llama(config, key=jax.random.key(seed))
    # Initial weights give nearly uniform probabilities, which are no test of a search.
    return eqx.tree_at(lambda m: m.head.weight, model, replace_fn=lambda w: 4 * w)


@eqx.filter_jit
def forward(model, tokens):
    return model(tokens)


def full_forward(model, prompt):
    """Log-probabilities of the next token from forward passes without a cache."""

    @functools.cache
    def log_probs(new):
        tokens = [*prompt, *new]
        padded = jnp.asarray(tokens + [0] * (MAX_LEN - len(tokens)), jnp.int32)
        return log_softmax(np.asarray(forward(model, padded)[len(tokens) - 1], np.float64))

    return log_probs


def log_softmax(logits):
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def score(log_prob, length, alpha):
    return log_prob / ((5 + length) / 6) ** alpha


def ranked(found, alpha):
    return sorted(found, key=lambda y: -score(y[1], len(y[0]), alpha))


def exhaustively(log_probs, count, stops, alpha=0.0, least=0):
    """Every hypothesis there is, best first."""
    found = []
    for length in range(1, count + 1):
        for y in itertools.product(range(VOCAB), repeat=length):
            stopped = y[-1] in stops
            complete = length >= least if stopped else length == count
            if complete and not any(t in stops for t in y[:-1]):
                found.append((y, sum(log_probs(y[:i])[y[i]] for i in range(length))))
    return ranked(found, alpha)


def slowly(log_probs, num_beams, count, stops=(), alpha=0.0, least=0):
    """A beam search with lists, which never ends early."""
    live, finished = [((), 0.0)], []
    for length in range(1, count + 1):
        candidates = [
            ((*y, token), total + value)
            for y, total in live
            for token, value in enumerate(log_probs(y))
            if not (token in stops and length < least)
        ]
        candidates.sort(key=lambda y: -y[1])
        finished += [y for y in candidates[:num_beams] if y[0][-1] in stops]
        live = [y for y in candidates if y[0][-1] not in stops][:num_beams]
    return ranked(finished + live, alpha)[:num_beams]


def assert_rows(got, expected, alpha=0.0, rtol=1e-5):
    """Rows of the result, and nothing in those that are left."""
    got = jax.tree.map(np.asarray, got)
    count = got.tokens.shape[1]
    for i, (y, log_prob) in enumerate(expected):
        assert got.tokens[i].tolist() == [*y, *[y[-1]] * (count - len(y))], i
        assert got.lengths[i] == len(y)
        # Near probability 1 what is left is the rounding of the logits.
        np.testing.assert_allclose(got.log_probs[i], log_prob, rtol, rtol / 10)
        np.testing.assert_allclose(got.scores[i], score(log_prob, len(y), alpha), rtol, rtol / 10)
    rest = jax.tree.map(lambda x: x[len(expected) :], got)
    assert (rest.scores == -np.inf).all() and (rest.log_probs == -np.inf).all()
    assert not rest.lengths.any() and not rest.tokens.any()


def assert_full_search(search, expected, alpha=0.0, rtol=1e-5):
    """All rows without early stopping, the first one with it; the others are finished ones."""
    assert_rows(search(early_stopping=False), expected, alpha, rtol)
    early = search(early_stopping=True)
    assert_rows(jax.tree.map(lambda x: x[:1], early), expected[:1], alpha, rtol)
    assert (np.diff(early.scores[early.lengths > 0]) <= 0).all()


@pytest.mark.parametrize(("alpha", "least"), [(0.0, 0), (0.9, 0), (3.0, 3), (-1.0, 0)])
def test_wide_beams_find_every_hypothesis_in_order(alpha, least):
    """There are 2 * (1 + 3 + 9 + 27) that end in a stop token, and 81 that do not."""
    model, prompt, stops = llama(1), (3, 0, 1), (2, 4)
    expected = exhaustively(full_forward(model, prompt), 4, stops, alpha, least)
    assert len(expected) == 161 - (8 if least else 0)
    search = functools.partial(
        beam_search,
        model,
        jnp.asarray(prompt),
        num_beams=170,
        max_new_tokens=4,
        min_new_tokens=least,
        stop_tokens=stops,
        length_penalty=alpha,
    )
    assert_full_search(search, expected, alpha)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    ("stops", "alpha", "least"),
    [(NO_STOPS, 0.0, 0), ((1, 1), 0.0, 0), ((1, 3), 0.8, 0), ((0, 4), 2.0, 3), ((2, 9), -0.7, 6)],
)
def test_equals_a_slow_search(num_beams, stops, alpha, least):
    for seed in range(4):
        model, prompt = llama(seed), (seed, 4, 2, 0)
        expected = slowly(full_forward(model, prompt), num_beams, 6, stops, alpha, least)
        search = functools.partial(
            beam_search,
            model,
            jnp.asarray(prompt),
            num_beams=num_beams,
            max_new_tokens=6,
            min_new_tokens=least,
            stop_tokens=stops,
            length_penalty=alpha,
        )
        assert_full_search(search, expected, alpha)


def test_one_beam_is_greedy():
    for seed in range(4):
        model, prompt = llama(seed), jnp.asarray([seed, 1, 4])
        for stops in (NO_STOPS, (seed, 3)):
            options = {"max_new_tokens": 6, "stop_tokens": stops}
            greedy = generate(model, prompt, temperature=0, **options)
            got = beam_search(model, prompt, num_beams=1, **options)
            assert got.tokens[0].tolist() == greedy.tolist()


# Hypotheses of a Markov chain have probabilities that can be multiplied by hand.


class Chain(eqx.Module):
    """A decoder whose next token depends on the last one only."""

    config: Any = eqx.field(static=True)
    probabilities: jax.Array

    def __init__(self, rows, dtype=jnp.float32):
        self.config = types.SimpleNamespace(max_len=64)
        self.probabilities = jnp.asarray(rows, dtype)

    def init_cache(self, max_len=None, dtype=None):
        return {"room": jnp.asarray(max_len, jnp.int32), "length": jnp.zeros((), jnp.int32)}

    def extend(self, tokens, cache, *, mask=None, length=None):
        length = cache["length"] + jnp.int32(tokens.shape[0] if length is None else length)
        logits = jnp.log(self.probabilities[tokens])
        logits = eqx.error_if(logits, length > cache["room"], "no room")
        return logits, cache | {"length": length}


def test_a_worse_first_step_can_win():
    model = Chain([[0, 0.5, 0.4, 0.1], [0.25] * 4, [0, 0.05, 0.05, 0.9], [0.25] * 4])
    got = beam_search(model, jnp.zeros(1, int), num_beams=2, max_new_tokens=5, stop_tokens=(3,))
    assert_rows(jax.tree.map(lambda x: x[:1], got), [((2, 3), np.log(0.4 * 0.9))])


# From 0: stops at once with 0.4, or goes on, along a path of probability 0.6 * 0.8 * 0.8.
SHORT_OR_LONG = [[0, 0.6, 0, 0.4], [0, 0, 0.8, 0.2], [0.1, 0.1, 0, 0.8], [1.0, 0, 0, 0]]


def test_the_penalty_changes_the_winner():
    # Where `log .384 / (8 / 6)**alpha == log .4 / (6 / 6)**alpha`.
    turning = np.log(np.log(0.384) / np.log(0.4)) / np.log(8 / 6)
    for alpha, y, probability in (
        (0.0, (3,), 0.4),
        (turning - 0.01, (3,), 0.4),
        (turning + 0.01, (1, 2, 3), 0.384),
    ):
        got = beam_search(
            Chain(SHORT_OR_LONG),
            jnp.zeros(1, int),
            num_beams=2,
            max_new_tokens=5,
            stop_tokens=(3,),
            length_penalty=alpha,
        )
        expected = [(y, np.log(probability))]
        assert_rows(jax.tree.map(lambda x: x[:1], got), expected, alpha)


def test_ends_as_soon_as_nothing_can_be_better():
    """The number of tokens a search needs is the room below which its cache is full."""
    model, count = Chain(SHORT_OR_LONG), 12

    def needed(**options):
        for room in range(1, count + 1):
            try:
                found = beam_search(
                    model,
                    jnp.zeros(1, int),
                    num_beams=2,
                    max_new_tokens=count,
                    stop_tokens=(3,),
                    cache=model.init_cache(room),
                    **options,
                )
                return room, jax.block_until_ready(found)
            except Exception as error:
                assert "no room" in str(error)
        raise AssertionError("there is room for all tokens")

    # Step 1: .4 has stopped, .6 lives. Step 2: .12 has stopped, .48 lives. Step 3: .384 has
    # stopped, .048 lives.
    for early_stopping in (True, False):
        room, found = needed(early_stopping=early_stopping)
        assert room == 3
        assert_rows(found, [((3,), np.log(0.4)), ((1, 2, 3), np.log(0.384))])
    # Where it counts to be short, .6 is already too little at two tokens; .48 can still become the
    # second row, until it has stopped, at three.
    room, found = needed(length_penalty=-6.0)
    assert room == 1
    assert_rows(found, [((3,), np.log(0.4))], -6.0)
    room, found = needed(length_penalty=-6.0, early_stopping=False)
    assert room == 3
    assert_rows(found, [((3,), np.log(0.4)), ((1, 3), np.log(0.12))], -6.0)


def check_dtypes(dtype, expected, rtol):
    rows = np.random.default_rng(0).dirichlet(np.ones(VOCAB), VOCAB)
    model = Chain(rows, dtype)
    logits = np.asarray(jnp.log(model.probabilities), np.float64)
    got = beam_search(model, jnp.zeros(1, int), num_beams=3, max_new_tokens=4, length_penalty=0.7)
    assert got.scores.dtype == got.log_probs.dtype == expected
    reference = slowly(lambda y: log_softmax(logits[(0, *y)[-1]]), 3, 4, alpha=0.7)
    assert_rows(got, reference, 0.7, rtol)


def test_bfloat16_is_added_up_in_float32():
    check_dtypes(jnp.bfloat16, jnp.float32, 1e-5)


def test_float64_stays_float64(x64):
    check_dtypes(jnp.float64, jnp.float64, 1e-13)


def test_rounding_does_not_change_the_greedy_choice():
    """Token 1 is always the best, by less than what sums of so many steps can resolve."""
    model = Chain([[0.25, 0.25 * (1 + 1e-6), 0.25, 0.25]] * 4)
    got = beam_search(model, jnp.zeros(1, int), num_beams=1, max_new_tokens=50)
    assert got.tokens[0].tolist() == [1] * 50


# A cache can be anything, and filled already.

WIDTH, MEMORY = 8, 7


class Translator(eqx.Module):
    """A recurrent decoder that reads a memory, dislikes to repeat itself, and is not steady.

    Its cache has floats, integers and keys that depend on the tokens, and memory, a length and a
    string that do not.
    """

    config: Any = eqx.field(static=True)
    embedding: jax.Array
    mixing: jax.Array
    head: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.config = None
        self.embedding = jax.random.normal(keys[0], (VOCAB, WIDTH))
        self.mixing = jax.random.normal(keys[1], (WIDTH, WIDTH)) / 2
        self.head = jax.random.normal(keys[2], (WIDTH, VOCAB))

    def init_cache(self, max_len=None, dtype=None):
        raise AssertionError("the memory would be missing")

    def read(self, memory):
        return {
            "memory": memory,
            "state": jnp.zeros(WIDTH),
            "counts": jnp.zeros(VOCAB, jnp.int32),
            "key": jax.random.wrap_key_data(jnp.asarray([0, 1], jnp.uint32)),
            "length": jnp.zeros((), jnp.int32),
            "language": "en",
        }

    def extend(self, tokens, cache, *, mask=None, length=None):
        seq, memory, start = tokens.shape[0], cache["memory"], cache["length"]
        other = jax.random.wrap_key_data(jnp.asarray([0, 2], jnp.uint32))

        def step(carry, xs):
            token, valid, position = xs
            state = jnp.tanh(carry["state"] @ self.mixing + self.embedding[token])
            new = {
                "state": state,
                "counts": carry["counts"].at[token].add(1),
                "key": jnp.where(token == 3, other, carry["key"]),
            }
            read = jax.nn.softmax(memory @ state) @ memory
            logits = (state + read) @ self.head - new["counts"].astype(jnp.float32)
            logits = logits * (1 + 0.1 * position.astype(jnp.float32))
            logits = logits / jax.random.key_data(new["key"])[1].astype(jnp.float32)
            return jax.tree.map(lambda x, y: jnp.where(valid, x, y), new, carry), logits

        count = jnp.asarray(seq if length is None else length, jnp.int32)
        index = jnp.arange(seq, dtype=jnp.int32)
        carry = {name: cache[name] for name in ("state", "counts", "key")}
        carry, logits = jax.lax.scan(step, carry, (tokens, index < count, start + index))
        return logits, cache | carry | {"length": start + count}


@eqx.filter_jit
def translate(model, tokens, memory, length):
    return model.extend(tokens, model.read(memory), length=length)


def full_translation(model, memory, prompt):
    def log_probs(new):
        tokens = [*prompt, *new]
        padded = jnp.asarray(tokens + [0] * (12 - len(tokens)), jnp.int32)
        logits, _ = translate(model, padded, memory, jnp.asarray(len(tokens)))
        return log_softmax(np.asarray(logits[len(tokens) - 1], np.float64))

    return log_probs


def test_starts_from_a_cache_that_can_be_any_pytree(getkey):
    model, memories = Translator(getkey()), jax.random.normal(getkey(), (3, MEMORY, WIDTH))
    prompts, lengths = jnp.asarray([[0, 3], [1, 0], [4, 2]]), jnp.asarray([2, 1, 2])
    options = {"num_beams": 3, "max_new_tokens": 6, "stop_tokens": (2,), "early_stopping": False}

    def search(prompt, length, memory):
        cache = model.read(memory)
        return beam_search(model, prompt, prompt_length=length, cache=cache, **options)

    # Alone, and in a batch of different lengths.
    together = jax.jit(jax.vmap(search))(prompts, lengths, memories)
    for i, (prompt, length) in enumerate(zip(prompts.tolist(), lengths.tolist(), strict=True)):
        log_probs = full_translation(model, memories[i], prompt[:length])
        expected = slowly(log_probs, 3, 6, (2,))
        assert_rows(search(prompts[i], lengths[i], memories[i]), expected)
        assert_rows(jax.tree.map(lambda x: x[i], together), expected)

    # A prompt in two parts is a prompt.
    _, cache = translate(model, jnp.zeros(12, int), memories[0], jnp.asarray(1))
    got = beam_search(model, jnp.asarray([3, 9]), prompt_length=1, cache=cache, **options)
    assert_rows(got, slowly(full_translation(model, memories[0], (0, 3)), 3, 6, (2,)))


def test_what_beams_share_is_not_copied(getkey):
    model = Translator(getkey())
    cache = model.read(jnp.zeros((MEMORY, WIDTH)))
    extend, leaves = _flat_extend(model, cache)
    # In the order of the names: counts, key, length, memory, state.
    assert _beam_axes(extend, leaves, 3) == [0, 0, None, None, 0]

    def search(cache):
        return beam_search(model, jnp.zeros(1, int), num_beams=3, max_new_tokens=6, cache=cache)

    arrays, static = eqx.partition(cache, eqx.is_array)
    jaxpr = str(jax.make_jaxpr(lambda arrays: search(eqx.combine(arrays, static)))(arrays))
    assert f"f32[3,{WIDTH}]" in jaxpr
    assert f"f32[{MEMORY},{WIDTH}]" in jaxpr
    assert f"f32[3,{MEMORY},{WIDTH}]" not in jaxpr


def test_the_lengths_of_a_stack_are_shared():
    model = llama(0)
    cache = model.init_cache(9)
    extend, leaves = _flat_extend(model, cache)
    # Keys, values, and how many there are, by layer and in all.
    assert [x.ndim for x in leaves] == [4, 4, 1, 0]
    assert _beam_axes(extend, leaves, 3) == [0, 0, None, None]


def test_a_leaf_that_differs_late_is_found():
    """What one step writes to a leaf, the next one hands on to another."""

    def extend(token, leaves):
        a, b, c, d = leaves
        return token, [d + 1, a + token, b + c, d]

    leaves = [jnp.zeros((), jnp.int32)] * 4
    assert _beam_axes(extend, leaves, 2) == [None, 0, 0, None]


class Counter(eqx.Module):
    """Keeps a Python number where there should be an array."""

    config: Any = eqx.field(static=True, default=None)

    def init_cache(self, max_len=None, dtype=None):
        return {"steps": 0}

    def extend(self, tokens, cache, *, mask=None, length=None):
        return jnp.zeros((tokens.shape[0], VOCAB)), {"steps": cache["steps"] + 1}


def test_a_cache_that_changes_without_arrays_is_refused():
    model = Counter()
    with pytest.raises(ValueError, match="must be an array"):
        beam_search(
            model, jnp.zeros(1, int), num_beams=2, max_new_tokens=2, cache=model.init_cache()
        )


OPTIONS = {"num_beams": 3, "max_new_tokens": 6, "stop_tokens": (1, 2), "length_penalty": 0.5}


def test_a_batch_is_a_loop(getkey):
    """Prompts of different lengths; the longest one fills the model to the brim.

    Its bucket would be 32, more than `max_len`.
    """
    model = llama(2)
    prompts = jax.random.randint(getkey(), (3, 18), 0, VOCAB)
    lengths, alphas = [2, 18, 5], [0.0, 0.5, 3.0]

    def one(prompt, length, alpha):
        options = OPTIONS | {"length_penalty": alpha, "early_stopping": False}
        return beam_search(model, prompt, prompt_length=length, **options)

    together = jax.vmap(one)(prompts, jnp.asarray(lengths), jnp.asarray(alphas))
    for i, (length, alpha) in enumerate(zip(lengths, alphas, strict=True)):
        row = jax.tree.map(lambda x: x[i], together)
        prompt = prompts[i, :length]
        assert_rows(row, slowly(full_forward(model, prompt.tolist()), 3, 6, (1, 2), alpha), alpha)
        if length <= 16:
            alone = one(prompt, None, alpha)
            assert row.tokens.tolist() == alone.tokens.tolist()
            np.testing.assert_allclose(row.scores, alone.scores, 1e-5)


def test_one_compilation_for_a_bucket():
    def compilations():
        return _run._cached._cache_size()

    model = llama(0)
    beam_search(model, jnp.arange(3), **OPTIONS)
    before = compilations()
    for seq in (2, 7, 16):
        other = {"length_penalty": 0.1 * seq, "stop_tokens": (3, seq), "min_new_tokens": seq % 5}
        prompt = jnp.arange(seq) % VOCAB
        beam_search(model, prompt, **(OPTIONS | other), early_stopping=seq > 5)
    assert compilations() == before


def test_dropout_is_off():
    """It would ask for a key."""
    dropping = Llama(llama(0).config.replace(dropout_rate=0.5), key=jax.random.key(0))
    with pytest.raises(RuntimeError, match="needs a key"):
        dropping.extend(jnp.arange(3), dropping.init_cache(9))
    jax.eval_shape(lambda prompt: beam_search(dropping, prompt, **OPTIONS), jnp.arange(3))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (jnp.zeros((2, 3), int), {}, "jax.vmap"),
        (jnp.zeros(0, int), {}, "0 tokens"),
        (jnp.zeros(19, int), {}, "19 tokens of prompt and 6 more .* max_len=24"),
        (jnp.zeros(3, int), {"max_new_tokens": 0}, "max_new_tokens=0"),
        (jnp.zeros(3, int), {"num_beams": 0}, "num_beams=0 must be at least 1"),
        (jnp.zeros(3, int), {"min_new_tokens": 7}, "min_new_tokens=7 .* max_new_tokens=6"),
        (jnp.zeros(3, int), {"min_new_tokens": -1}, "min_new_tokens=-1"),
        (jnp.zeros(3, int), {"length_penalty": float("inf")}, "length_penalty=inf"),
        (jnp.zeros(3, int), {"length_penalty": float("nan")}, "length_penalty=nan"),
    ],
)
def test_errors(prompt, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        beam_search(llama(0), prompt, **(OPTIONS | options))


@pytest.mark.parametrize("length", [0, 4])
def test_prompt_length_outside_of_the_prompt(length):
    with pytest.raises(ValueError, match=f"prompt_length={length} .* 3 tokens"):
        beam_search(llama(0), jnp.arange(3), prompt_length=length, **OPTIONS)
    with pytest.raises(Exception, match="prompt_length must be"):
        beam_search(llama(0), jnp.arange(3), prompt_length=jnp.asarray(length), **OPTIONS)
