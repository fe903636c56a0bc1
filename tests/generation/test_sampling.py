"""The filters keep exactly what they say, and sampling follows the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformer.generation import filter_min_p, filter_top_k, filter_top_p, sample

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = jnp.asarray(np.log(PROBABILITIES), jnp.float32)


def kept(logits):
    return set(np.flatnonzero(np.isfinite(np.asarray(logits))))


@pytest.mark.parametrize(
    ("k", "expected"), [(1, {1}), (3, {1, 3, 4}), (5, set(range(5))), (9, set(range(5)))]
)
def test_top_k(k, expected):
    assert kept(filter_top_k(LOGITS, k)) == expected


def test_top_k_of_equal_logits_keeps_k():
    assert kept(filter_top_k(jnp.zeros(6), 2)) == {0, 1}


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.0, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.64, {1, 3}),
        (0.8, {1, 3, 4}),
        (1.0, set(range(5))),
    ],
)
def test_top_p(p, expected):
    assert kept(filter_top_p(LOGITS, p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, set(range(5))), (0.2, {1, 2, 3, 4}), (0.5, {1, 3, 4}), (1.0, {1})]
)
def test_min_p(p, expected):
    assert kept(filter_min_p(LOGITS, p)) == expected


def test_kept_logits_are_unchanged():
    for filtered in (filter_top_k(LOGITS, 2), filter_top_p(LOGITS, 0.5), filter_min_p(LOGITS, 0.5)):
        finite = np.isfinite(np.asarray(filtered))
        assert np.array_equal(np.asarray(filtered)[finite], np.asarray(LOGITS)[finite])


def draws(count=20_000, **options):
    keys = jax.random.split(jax.random.key(7), count)
    tokens = jax.jit(jax.vmap(lambda key: sample(LOGITS, key, **options)))(keys)
    return np.bincount(np.asarray(tokens), minlength=5) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"top_k": 2}, PROBABILITIES * [0, 1, 0, 1, 0]),
        ({"top_p": 0.7}, PROBABILITIES * [0, 1, 0, 1, 1]),
        ({"min_p": 0.24}, PROBABILITIES * [0, 1, 1, 1, 1]),
        # The nucleus is that of the distribution after the temperature.
        ({"temperature": 0.5, "top_p": 0.8}, (PROBABILITIES * [0, 1, 0, 1, 0]) ** 2),
        ({"temperature": 0.0}, np.array([0, 1, 0, 0, 0])),
    ],
)
def test_distribution(options, expected):
    expected = expected / expected.sum()
    got, count = draws(**options), 20_000
    assert (got[expected == 0] == 0).all()
    # Pearson's statistic; with four degrees of freedom it exceeds 23.5 once in ten thousand.
    some = expected > 0
    assert (count * (got - expected)[some] ** 2 / expected[some]).sum() < 23.5


def test_numbers_do_not_compile_anew():
    traces = 0

    @jax.jit
    def run(logits, key, temperature, k):
        nonlocal traces
        traces += 1
        return sample(logits, key, temperature=temperature, top_k=k)

    for temperature, k in ((0.0, 1), (0.5, 2), (1.5, 4)):
        run(LOGITS, jax.random.key(0), temperature, k)
    assert traces == 1
