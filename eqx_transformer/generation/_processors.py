"""Changes to logits before a token is drawn, which may depend on the tokens so far."""

import math
from collections.abc import Callable, Mapping, Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._sampling import Number


class History(eqx.Module):
    """The tokens so far: a prompt and what has been generated.

    - `tokens`: the first `length` of them count.
    - `length`: how many there are.
    - `prompt_length`: how many of them are the prompt.
    """

    tokens: Int[Array, " max_len"]
    length: Int[Array, ""]
    prompt_length: Int[Array, ""]

    def counts(self, vocab_size: int, *, prompt: bool = True) -> Int[Array, " vocab"]:
        """How often each token occurs, in the prompt too or only in what was generated."""
        places = jnp.arange(self.tokens.shape[0], dtype=jnp.int32)
        counted = (places < self.length) & (prompt | (places >= self.prompt_length))
        zeros = jnp.zeros((vocab_size,), jnp.int32)
        return zeros.at[self.tokens].add(counted.astype(jnp.int32))

    def last(self, count: int) -> Int[Array, " count"]:
        """The last `count` tokens, with -1 for those that do not exist."""
        places = self.length - count + jnp.arange(count, dtype=jnp.int32)
        return jnp.where(places >= 0, self.tokens[jnp.maximum(places, 0)], -1)


Processor = Callable[[Float[Array, " vocab"], History], Float[Array, " vocab"]]
"""`(logits, history) -> logits`: a function or a Module. `-inf` forbids a token."""


def _positive(penalty: Number) -> Array:
    if isinstance(penalty, int | float) and not 0 < penalty < math.inf:
        raise ValueError(
            f"RepetitionPenalty: penalty={penalty} must be positive and finite; 1 changes nothing."
        )
    return jnp.asarray(penalty)


class RepetitionPenalty(eqx.Module):
    """Makes tokens that have occurred less probable, those of the prompt included.

    Positive logits are divided by the penalty, negative ones multiplied. (Keskar et al., CTRL,
    2019, section 4.1.)

    Arguments:

    - `penalty`: 1 changes nothing.

    Raises:

    - `ValueError` if `penalty` is a number that is not positive and finite.
    """

    penalty: Number = eqx.field(converter=_positive)

    def __call__(self, logits: Float[Array, " vocab"], history: History) -> Float[Array, " vocab"]:
        """The logits with the penalty."""
        penalty = jnp.asarray(self.penalty).astype(logits.dtype)
        changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.where(history.counts(logits.shape[0]) > 0, changed, logits)


class PresencePenalty(eqx.Module):
    """Subtracts a number from the logits of tokens that were generated already.

    Arguments:

    - `penalty`: subtracted once for each token, however often it occurred.
    """

    penalty: Number = eqx.field(converter=jnp.asarray)

    def __call__(self, logits: Float[Array, " vocab"], history: History) -> Float[Array, " vocab"]:
        """The logits with the penalty."""
        penalty = jnp.asarray(self.penalty).astype(logits.dtype)
        return logits - penalty * (history.counts(logits.shape[0], prompt=False) > 0).astype(
            logits.dtype
        )


class FrequencyPenalty(eqx.Module):
    """Subtracts a number from the logits of tokens for each time they were generated.

    Arguments:

    - `penalty`: subtracted once for each occurrence.
    """

    penalty: Number = eqx.field(converter=jnp.asarray)

    def __call__(self, logits: Float[Array, " vocab"], history: History) -> Float[Array, " vocab"]:
        """The logits with the penalty."""
        penalty = jnp.asarray(self.penalty).astype(logits.dtype)
        return logits - penalty * history.counts(logits.shape[0], prompt=False).astype(logits.dtype)


class LogitBias(eqx.Module):
    """Adds numbers to the logits of some tokens."""

    tokens: Int[Array, " count"]
    bias: Float[Array, " count"]

    def __init__(self, bias: Mapping[int, float | int]):
        """Arguments:

        - `bias`: what to add, by token; `-inf` forbids it.

        Raises:

        - `ValueError` if a token is negative.
        """
        if min(bias, default=0) < 0:
            raise ValueError(f"LogitBias: token {min(bias)} must be an id, which is at least 0.")
        self.tokens = jnp.asarray(list(bias), jnp.int32)
        self.bias = jnp.asarray([float(x) for x in bias.values()], jnp.float32)

    def __call__(self, logits: Float[Array, " vocab"], history: History) -> Float[Array, " vocab"]:
        """The logits with the bias added."""
        return logits.at[self.tokens].add(self.bias.astype(logits.dtype))


class ForbidRepeats(eqx.Module):
    """Forbids tokens that would complete a run of `size` tokens that has occurred already.

    (Paulus et al., 2018, section 2.5.)

    Arguments:

    - `size`: how many tokens a run has, at least 1.
    """

    size: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"ForbidRepeats: size={self.size} must be at least 1.")

    def __call__(self, logits: Float[Array, " vocab"], history: History) -> Float[Array, " vocab"]:
        """The logits, with `-inf` for forbidden tokens."""
        follows = follows_run(history, history.last(self.size - 1))
        seen = jnp.zeros(logits.shape, jnp.int32).at[history.tokens].add(follows.astype(jnp.int32))
        return jnp.where(seen > 0, -jnp.inf, logits)


class AllowTokens(eqx.Module):
    """Forbids all tokens but those that a function allows, e.g. those that a grammar permits.

    Arguments:

    - `allowed`: `history -> mask`, with `True` for tokens that may come next. It is traced: a state
        that depends on all tokens so far is best computed from a table of transitions, by a scan
        over `history.tokens`.
    """

    allowed: Callable[[History], Bool[Array, " vocab"]]

    def __call__(self, logits: Float[Array, " vocab"], history: History) -> Float[Array, " vocab"]:
        """The logits, with `-inf` for tokens that are not allowed."""
        return jnp.where(self.allowed(history), logits, -jnp.inf)


def follows_run(history: History, run: Int[Array, " size"]) -> Bool[Array, " max_len"]:
    """Which of the tokens so far come right after an occurrence of `run`."""
    places = jnp.arange(history.tokens.shape[0], dtype=jnp.int32)
    follows = (places >= run.shape[0]) & (places < history.length)
    for back, token in enumerate(run[::-1], start=1):
        follows = follows & (jnp.roll(history.tokens, back) == token)
    return follows


def process(
    processors: Sequence[Processor], logits: Float[Array, " vocab"], history: History
) -> Float[Array, " vocab"]:
    """Applies processors in order."""
    for processor in processors:
        logits = processor(logits, history)
    return logits
