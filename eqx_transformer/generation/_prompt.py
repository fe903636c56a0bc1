"""What all generation loops begin with."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_SMALLEST_BUCKET = 16


@runtime_checkable
class AbstractDecoder(Protocol):
    """What `generate` requires of a model."""

    @property
    def config(self) -> Any:
        """A configuration with `max_len`, the longest sequence."""
        ...

    def init_cache(self, max_len: int | None = None, dtype: Any = None) -> Any:
        """An empty cache."""
        ...

    def extend(
        self, tokens: Int[Array, " seq"], cache: Any, *, mask: Any = None, length: Any = None
    ) -> tuple[Float[Array, "seq vocab"], Any]:
        """The logits at the next positions, and the cache with them added."""
        ...


class Prompt(NamedTuple):
    """A prompt padded to a bucket, so that prompts of similar lengths share one compilation."""

    tokens: Int[Array, " bucket"]
    length: Int[Array, ""]
    given: Int[Array, ""]
    """How many tokens there were before it was padded."""


def make_prompt(
    owner: str,
    model: AbstractDecoder,
    tokens: Int[Array, " seq"],
    length: int | Int[Array, ""] | None,
    *,
    room: int,
    cache: Any,
) -> tuple[Prompt, int | None]:
    """A prompt, and how many positions a new cache needs if there is none yet.

    Arguments:

    - `owner`: the caller, for messages.
    - `room`: how many positions are needed after the prompt.
    - `cache`: an existing cache; the room in it is not known, so the prompt is not padded then.

    Raises:

    - `ValueError` if the prompt is empty, or it and `room` are more than the model's `max_len`.
    """
    if not hasattr(model, "extend"):
        raise ValueError(
            f"{owner}: {type(model).__name__} has no init_cache and extend, so it cannot continue "
            "a text; use a decoder, such as Llama."
        )
    seq = tokens.shape[0]
    if seq < 1:
        raise ValueError(f"{owner}: the prompt has {seq} tokens; it must have at least 1.")
    if isinstance(length, int) and not 1 <= length <= seq:
        raise ValueError(
            f"{owner}: prompt_length={length} must be from 1 to the {seq} tokens of the prompt."
        )
    bucket, cache_len = seq, None
    if cache is None:
        max_len = model.config.max_len
        if seq + room > max_len:
            raise ValueError(
                f"{owner}: {seq} tokens of prompt and {room} more exceed max_len={max_len}; "
                "shorten the prompt or generate fewer tokens."
            )
        bucket = min(max_len, max(_SMALLEST_BUCKET, 2 ** math.ceil(math.log2(seq))))
        cache_len = min(max_len, bucket + room)
    padded = jnp.pad(tokens, (0, bucket - seq))
    length = jnp.asarray(seq if length is None else length, jnp.int32)
    return Prompt(padded, length, jnp.asarray(seq, jnp.int32)), cache_len


def checked(owner: str, prompt: Prompt) -> Prompt:
    """The prompt, with an error at run time if its length is impossible."""
    length = eqx.error_if(
        prompt.length,
        (prompt.length < 1) | (prompt.length > prompt.given),
        f"{owner}: prompt_length must be from 1 to the length of the prompt.",
    )
    return prompt._replace(length=length)


def prefill(model: AbstractDecoder, prompt: Prompt, cache: Any) -> tuple[Any, Any]:
    """The cache with all of the prompt but its last token.

    That one is left to the loop: then no logits are used here, and the product with the vocabulary,
    for every token of the prompt, is never computed. The dtype of logits is returned with the
    cache.
    """
    logits, cache = model.extend(prompt.tokens, cache, length=prompt.length - 1)
    return cache, logits.dtype


def anywhere(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """`flag`; under `jax.vmap`, whether it is set for any example of the batch.

    A loop whose condition differs between examples would copy its state at every step, to keep that
    of examples that are done. With this as its condition it runs until the last example is done,
    and its body must keep the state of the others.
    """
    return _anywhere(flag)


@jax.custom_batching.custom_vmap
def _anywhere(flag: Array) -> Array:
    return flag


@_anywhere.def_vmap
def _(axis_size: int, in_batched: Any, flag: Array) -> tuple[Array, bool]:
    (batched,) = in_batched
    return (_anywhere(flag.any(axis=0)) if batched else _anywhere(flag)), False


class Stops(NamedTuple):
    """Sequences of tokens after which nothing more is generated."""

    sequences: Int[Array, "count longest"]
    """Padded with -1 on the left."""
    tokens: Int[Array, " single"]
    """Those of one token."""

    def after(self, tokens: Int[Array, " max_len"], start: Array, end: Array) -> Bool[Array, ""]:
        """Whether `tokens[start:end]` ends in one of them."""
        count, longest = self.sequences.shape
        if not count:
            return jnp.asarray(False)
        places = end - longest + jnp.arange(longest, dtype=jnp.int32)
        last = jnp.where(places >= start, tokens[jnp.maximum(places, 0)], -2)
        wanted = self.sequences
        return jnp.any(jnp.all((wanted == -1) | (wanted == last[None, :]), axis=1))


def make_stops(owner: str, tokens: Sequence[int], sequences: Sequence[Sequence[int]]) -> Stops:
    """Stop tokens and stop sequences.

    Raises:

    - `ValueError` for a sequence without tokens.
    """
    every = [[token] for token in tokens] + [list(sequence) for sequence in sequences]
    if not all(every):
        raise ValueError(f"{owner}: a stop sequence must have at least one token.")
    longest = max([len(sequence) for sequence in every], default=1)
    padded = [[-1] * (longest - len(sequence)) + sequence for sequence in every]
    single = [sequence[0] for sequence in every if len(sequence) == 1]
    return Stops(
        jnp.asarray(np.asarray(padded, np.int32).reshape(-1, longest)),
        jnp.asarray(single, jnp.int32),
    )
