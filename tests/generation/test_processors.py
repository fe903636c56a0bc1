"""Processors do what they say, by themselves and in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation.decoders import markov

from eqx_transformer.generation import (
    AllowTokens,
    ForbidRepeats,
    FrequencyPenalty,
    History,
    LogitBias,
    PresencePenalty,
    RepetitionPenalty,
    filter_logits,
    filter_typical_p,
    generate,
)

LOGITS = jnp.asarray([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])


def history(prompt, new, room=4):
    tokens = [*prompt, *new]
    padded = jnp.asarray(tokens + [5] * room, jnp.int32)  # what does not count is not looked at
    return History(padded, jnp.int32(len(tokens)), jnp.int32(len(prompt)))


def test_counts_and_last():
    seen = history([0, 1, 1], [3, 1])
    assert seen.counts(6).tolist() == [1, 3, 0, 1, 0, 0]
    assert seen.counts(6, prompt=False).tolist() == [0, 1, 0, 1, 0, 0]
    assert seen.last(2).tolist() == [3, 1]
    assert seen.last(7).tolist() == [-1, -1, 0, 1, 1, 3, 1]


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (RepetitionPenalty(2.0), [0.5, -4.0, 0.5, 1.5, 0.0, -1.0]),
        (RepetitionPenalty(1), [1.0, -2.0, 0.5, 3.0, 0.0, -1.0]),
        (PresencePenalty(0.25), [1.0, -2.25, 0.5, 2.75, 0.0, -1.0]),
        (FrequencyPenalty(0.25), [1.0, -2.5, 0.5, 2.75, 0.0, -1.0]),
        (LogitBias({2: 1.5, 4: -np.inf}), [1.0, -2.0, 2.0, 3.0, -np.inf, -1.0]),
        # What came after 1 before: 1, 3 and 1 again.
        (ForbidRepeats(2), [1.0, -np.inf, 0.5, -np.inf, 0.0, -1.0]),
        (ForbidRepeats(3), [1.0, -2.0, 0.5, -np.inf, 0.0, -1.0]),
        (ForbidRepeats(5), [1.0, -2.0, 0.5, 3.0, 0.0, -1.0]),
        (ForbidRepeats(1), [-np.inf, -np.inf, 0.5, -np.inf, 0.0, -1.0]),
        (
            AllowTokens(lambda seen: jnp.arange(6) > seen.tokens[seen.length - 1]),
            [-np.inf, -np.inf, 0.5, 3.0, 0.0, -1.0],
        ),
    ],
)
def test_processors(processor, expected):
    got = processor(LOGITS, history([0, 1, 1, 3], [1, 3, 1]))
    np.testing.assert_allclose(got, expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_run_occurs_twice(size):
    model, vocab = markov(6, 0), 6
    count = 20 if size > 1 else 5
    got = generate(
        model,
        jnp.asarray([2]),
        max_new_tokens=count,
        temperature=0,
        processors=[ForbidRepeats(size)],
    )
    tokens = [2, *got.tolist()]
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    assert len(set(runs)) == len(runs) <= vocab**size


def test_a_grammar():
    """Brackets that close: the state is computed from all tokens so far."""
    opening, closing = 1, 2

    def allowed(seen):
        counts = seen.counts(4)
        depth = counts[opening] - counts[closing]
        return jnp.stack([jnp.asarray(True), depth < 3, depth > 0, jnp.asarray(False)])

    keys = jax.random.split(jax.random.key(0), 20)
    model, prompt = markov(4, 1), jnp.asarray([1])
    rows = jax.vmap(
        lambda key: generate(
            model, prompt, max_new_tokens=30, processors=[AllowTokens(allowed)], key=key
        )
    )(keys)
    steps = np.select([np.asarray(rows) == opening, np.asarray(rows) == closing], [1, -1], 0)
    depth = 1 + np.cumsum(steps, axis=1)
    assert depth.min() == 0 and depth.max() == 3
    assert not (np.asarray(rows) == 3).any()


def test_a_new_penalty_does_not_compile_anew():
    from eqx_transformer.generation._generate import _run

    model, prompt = markov(4, 1), jnp.asarray([1])

    def tokens(penalty):
        processors = [RepetitionPenalty(penalty), LogitBias({1: penalty})]
        return generate(model, prompt, max_new_tokens=8, temperature=0, processors=processors)

    tokens(1.5)
    before = _run._cached._cache_size()
    tokens(2.5)
    assert _run._cached._cache_size() == before


def test_typical_p_keeps_what_is_near_the_entropy():
    p = np.array([0.6, 0.2, 0.1, 0.06, 0.04])
    logits = jnp.asarray(np.log(p), jnp.float32)
    entropy = -(p * np.log(p)).sum()
    order = np.argsort(np.abs(-np.log(p) - entropy))
    for mass in (0.1, 0.25, 0.5, 0.9):
        count = int(np.searchsorted(np.cumsum(p[order]), mass)) + 1
        kept = np.flatnonzero(np.isfinite(np.asarray(filter_typical_p(logits, mass))))
        assert set(kept) == set(order[:count])
    assert order[0] != 0  # not the most probable one
    # What an earlier filter took out stays out.
    both = filter_logits(logits, top_k=2, typical_p=0.99)
    assert set(np.flatnonzero(np.isfinite(np.asarray(both)))) == {0, 1}


def test_numbers_are_checked():
    for penalty in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"penalty={penalty} must be positive"):
            RepetitionPenalty(penalty)
    with pytest.raises(ValueError, match="token -1 must be an id"):
        LogitBias({3: 1.0, -1: 2.0})
    with pytest.raises(ValueError, match="size=0"):
        ForbidRepeats(0)
