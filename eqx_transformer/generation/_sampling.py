"""From logits to a token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

Number = float | int | Float[Array, ""] | Int[Array, ""]
"""A number, or an array of one, which can change without a new compilation."""


def filter_top_k(logits: Float[Array, " vocab"], k: Number) -> Float[Array, " vocab"]:
    """Keeps the `k` largest logits, the first ones among equals; the others become `-inf`."""
    return jnp.where(_ranks(logits) < jnp.asarray(k).astype(jnp.int32), logits, -jnp.inf)


def filter_top_p(logits: Float[Array, " vocab"], p: Number) -> Float[Array, " vocab"]:
    """Keeps the fewest tokens whose probabilities sum to at least `p`; at least one.

    (Nucleus sampling: Holtzman et al., 2020.)
    """
    return _smallest_set(logits, -logits, p)


def filter_typical_p(logits: Float[Array, " vocab"], p: Number) -> Float[Array, " vocab"]:
    """Keeps the tokens whose surprisal is nearest to the entropy, until they sum to at least `p`.

    At least one. (Locally typical sampling: Meister et al., 2023, equation 10.)
    """
    log_p = jax.nn.log_softmax(logits)
    # Tokens that an earlier filter removed have no finite surprisal, and come last.
    kept = jnp.isfinite(log_p)
    surprise = -jnp.where(kept, log_p, 0)
    entropy = jnp.sum(jnp.exp(log_p) * surprise)
    return _smallest_set(logits, jnp.where(kept, jnp.abs(surprise - entropy), jnp.inf), p)


def filter_min_p(logits: Float[Array, " vocab"], p: Number) -> Float[Array, " vocab"]:
    """Keeps tokens at least `p` times as probable as the most probable one.

    (Nguyen et al., 2024.)
    """
    least = logits.max() + jnp.log(jnp.asarray(p).astype(logits.dtype))
    return jnp.where(logits >= least, logits, -jnp.inf)


def filter_logits(
    logits: Float[Array, " vocab"],
    *,
    temperature: Number = 1.0,
    top_k: Number | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    typical_p: Number | None = None,
) -> Float[Array, " vocab"]:
    """Logits of the distribution that `sample` draws from.

    They are divided by `temperature` and then filtered, in the order of the arguments. Temperature
    0 keeps only the most probable token.
    """
    temperature = jnp.asarray(temperature).astype(logits.dtype)
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    if top_k is not None:
        scaled = filter_top_k(scaled, top_k)
    if top_p is not None:
        scaled = filter_top_p(scaled, top_p)
    if min_p is not None:
        scaled = filter_min_p(scaled, min_p)
    if typical_p is not None:
        scaled = filter_typical_p(scaled, typical_p)
    best = jnp.arange(logits.shape[0], dtype=jnp.int32) == _most_probable(logits)
    greedy = jnp.where(best, jnp.zeros((), logits.dtype), -jnp.inf)
    return jnp.where(temperature > 0, scaled, greedy)


def sample(
    logits: Float[Array, " vocab"],
    key: PRNGKeyArray,
    *,
    temperature: Number = 1.0,
    top_k: Number | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    typical_p: Number | None = None,
) -> Int[Array, ""]:
    """Draws a token from the distribution whose logits `filter_logits` returns."""
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}

    def drawn() -> Array:
        filtered = filter_logits(logits, temperature=temperature, **options)
        return jax.random.categorical(key, filtered).astype(jnp.int32)

    # Random numbers for a whole vocabulary take longer than everything else here.
    return jax.lax.cond(jnp.asarray(temperature) > 0, drawn, lambda: _most_probable(logits))


def _most_probable(logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """The first of the largest: `jnp.argmax`, which XLA on CPU computes one entry at a time."""
    places = jnp.arange(logits.shape[0], dtype=jnp.int32)
    largest = (logits == logits.max()) | jnp.isnan(logits)
    return jnp.min(jnp.where(largest, places, logits.shape[0] - 1))


def _smallest_set(
    logits: Float[Array, " vocab"], cost: Float[Array, " vocab"], p: Number
) -> Float[Array, " vocab"]:
    """Keeps the fewest tokens, in order of cost, whose probabilities sum to at least `p`."""
    order = jnp.argsort(cost, stable=True)
    probabilities = jax.nn.softmax(logits)[order]
    before = jnp.cumsum(probabilities) - probabilities
    # The first one is kept even where rounding, or `p = 0`, would drop it.
    kept = (before < jnp.asarray(p).astype(before.dtype)).at[0].set(True)
    return jnp.where(kept[_ranks(-cost)], logits, -jnp.inf)


def _ranks(logits: Float[Array, " vocab"]) -> Int[Array, " vocab"]:
    """The place of every logit in descending order."""
    return jnp.argsort(jnp.argsort(-logits, stable=True), stable=True)
