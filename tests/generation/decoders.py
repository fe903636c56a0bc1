"""Decoders whose distribution is known without a computation."""

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Seen(eqx.Module):
    """A cache that holds the tokens themselves, and complains where a real one would."""

    tokens: Int[Array, " max_len"]
    length: Int[Array, ""]

    def truncate(self, length: Any) -> "Seen":
        length = eqx.error_if(jnp.asarray(length), length > self.length, "truncate: too long")
        return Seen(self.tokens, length)


class Markov(eqx.Module):
    """The next token depends on the last two: logits are a row of a table."""

    table: Float[Array, "vocab vocab vocab"]

    @property
    def config(self) -> Any:
        return SimpleNamespace(max_len=512)

    def init_cache(self, max_len: int | None = None, dtype: Any = None) -> Seen:
        assert max_len is not None
        return Seen(jnp.zeros((max_len,), jnp.int32), jnp.int32(0))

    def extend(
        self, tokens: Int[Array, " seq"], cache: Seen, *, mask: Any = None, length: Any = None
    ) -> tuple[Float[Array, "seq vocab"], Seen]:
        seq = tokens.shape[0]
        count = jnp.asarray(seq if length is None else length, jnp.int32)
        end = cache.length + count
        end = eqx.error_if(end, end > cache.tokens.shape[0], "Seen: full")
        places = cache.length + jnp.arange(seq, dtype=jnp.int32)
        kept = jnp.where(jnp.arange(seq) < count, places, cache.tokens.shape[0])
        new = cache.tokens.at[kept].set(tokens, mode="drop")
        before = jnp.where(places > 0, new[places - 1], 0)
        return self.table[before, tokens], Seen(new, end)


def markov(vocab: int, seed: int, scale: float = 1.5) -> Markov:
    """One with random logits."""
    return Markov(scale * jax.random.normal(jax.random.key(seed), (vocab,) * 3))
