import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ._sampling import Number, sample

_SMALLEST_BUCKET = 16


@runtime_checkable
class AbstractDecoder(Protocol):
    """What `generate` asks of a model."""

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


@unbatched(prompt="seq")
def generate(
    model: AbstractDecoder,
    prompt: Int[Array, " seq"],
    *,
    max_new_tokens: int,
    temperature: Number = 1.0,
    top_k: Number | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    stop_tokens: Sequence[int] = (),
    prompt_length: int | Int[Array, ""] | None = None,
    key: PRNGKeyArray | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Int[Array, " max_new_tokens"]:
    """Continues a prompt, one token at a time, in one compiled program.

    Prompts are padded to the next power of two, so prompts of similar lengths share one
    compilation; the sampling numbers do not compile anew either. For a batch, `jax.vmap` over
    prompts (padded on the right to one length, with `prompt_length`) and keys: an example's
    tokens do not depend on the others.

    Arguments:

    - `model`: a decoder, such as `Llama`. Dropout is switched off.
    - `prompt`: the tokens to continue, at least one.
    - `max_new_tokens`: how many tokens to generate.
    - `temperature`, `top_k`, `top_p`, `min_p`: see `sample`. Temperature 0 is greedy.
    - `stop_tokens`: tokens after which nothing more is generated.
    - `prompt_length`: how many tokens of the prompt count; the rest is padding. All if not given.
    - `key`: for sampling; not needed at temperature 0.
    - `on_token`: called on the host with each token as it appears, for people who watch. Not
        available under `jax.vmap`. A new function compiles anew.

    Returns:

    The new tokens. After a stop token the rest is that stop token again.

    Raises:

    - `ValueError` if the prompt is empty, or it and the new tokens are more than the model's
        `max_len`; or for numbers out of range, or a missing key.
    """
    seq, max_len = prompt.shape[0], model.config.max_len
    if seq < 1 or max_new_tokens < 1:
        raise ValueError(
            f"generate: the prompt has {seq} tokens and max_new_tokens={max_new_tokens}; both "
            "must be at least 1."
        )
    if seq + max_new_tokens > max_len:
        raise ValueError(
            f"generate: {seq} tokens of prompt and max_new_tokens={max_new_tokens} are more than "
            f"max_len={max_len}; shorten the prompt or generate fewer."
        )
    _check_range("temperature", temperature, 0, math.inf)
    _check_range("top_k", top_k, 1, math.inf)
    _check_range("top_p", top_p, 0, 1)
    _check_range("min_p", min_p, 0, 1)
    if key is None:
        if not (isinstance(temperature, int | float) and temperature == 0):
            raise ValueError("generate: sampling needs a key; pass key=, or temperature=0.")
        key = jax.random.key(0)
    bucket = min(max_len, max(_SMALLEST_BUCKET, 2 ** math.ceil(math.log2(seq))))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return _run(
        eqx.nn.inference_mode(model),
        jnp.pad(prompt, (0, bucket - seq)),
        jnp.asarray(seq if prompt_length is None else prompt_length, jnp.int32),
        {k: None if x is None else jnp.asarray(x, jnp.float32) for k, x in options.items()},
        jnp.asarray(stop_tokens, jnp.int32),
        key,
        max_new_tokens,
        min(max_len, bucket + max_new_tokens),
        on_token,
    )


@eqx.filter_jit
def _run(
    model: AbstractDecoder,
    prompt: Int[Array, " bucket"],
    prompt_length: Int[Array, ""],
    options: dict[str, Any],
    stop_tokens: Int[Array, " stops"],
    key: PRNGKeyArray,
    max_new_tokens: int,
    max_len: int,
    on_token: Callable[[int], None] | None,
) -> Int[Array, " max_new_tokens"]:
    def draw(logits: Array, index: Array) -> tuple[Array, Array]:
        # Keys by index and not by splitting: they do not depend on when others stop.
        token = sample(logits, jax.random.fold_in(key, index), **options)
        if on_token is not None:
            jax.debug.callback(_tell, on_token, token, ordered=True)
        return token, jnp.any(token == stop_tokens)

    def body(state: Any) -> Any:
        tokens, index, _, cache = state
        logits, cache = model.extend(tokens[index - 1][None], cache)
        token, stopped = draw(logits[0], index)
        return tokens.at[index].set(token), index + 1, stopped, cache

    def unfinished(state: Any) -> Array:
        _, index, stopped, _ = state
        return (index < max_new_tokens) & ~stopped

    prompt_length = eqx.error_if(
        prompt_length,
        (prompt_length < 1) | (prompt_length > prompt.shape[0]),
        "generate: prompt_length must be from 1 to the length of the prompt.",
    )
    logits, cache = model.extend(prompt, model.init_cache(max_len), length=prompt_length)
    token, stopped = draw(logits[prompt_length - 1], jnp.zeros((), jnp.int32))
    tokens = jnp.zeros((max_new_tokens,), jnp.int32).at[0].set(token)
    state = (tokens, jnp.ones((), jnp.int32), stopped, cache)
    tokens, index, _, _ = jax.lax.while_loop(unfinished, body, state)
    generated = jnp.arange(max_new_tokens, dtype=jnp.int32) < index
    return jnp.where(generated, tokens, tokens[index - 1])


def _tell(on_token: Callable[[int], None], token: Any) -> None:
    on_token(int(token))


def _check_range(name: str, value: Any, least: float | int, most: float | int) -> None:
    # Only numbers known ahead of time; an array may be traced.
    if isinstance(value, int | float) and not least <= value <= most:
        raise ValueError(f"generate: {name}={value} must be between {least} and {most}.")
