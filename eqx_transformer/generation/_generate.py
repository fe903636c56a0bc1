import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ._processors import History, Processor, process
from ._prompt import (
    AbstractDecoder,
    Prompt,
    Stops,
    anywhere,
    checked,
    make_prompt,
    make_stops,
    prefill,
)
from ._sampling import Number, sample


class Generation(NamedTuple):
    """What `generate_with_log_probs` returns.

    - `tokens`: the new tokens; the last one that counts is repeated to the end.
    - `length`: how many of them count, a stop token included.
    - `log_probs`: their log-probabilities in the model's own distribution, before temperature,
        filters and processors; 0 for those that do not count.
    - `cache`: the cache of all tokens but the last. To continue, pass it to the next call, with a
        prompt that begins with that token.
    """

    tokens: Int[Array, " max_new_tokens"]
    length: Int[Array, ""]
    log_probs: Float[Array, " max_new_tokens"]
    cache: Any


@unbatched(prompt="seq")
def generate(
    model: AbstractDecoder,
    prompt: Int[Array, " seq"],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: Number = 1.0,
    top_k: Number | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    typical_p: Number | None = None,
    processors: Sequence[Processor] = (),
    stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    prompt_length: int | Int[Array, ""] | None = None,
    cache: Any = None,
    key: PRNGKeyArray | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Int[Array, " max_new_tokens"]:
    """Continues a prompt, one token at a time, in one compiled program.

    Prompts are padded to the next power of two, so prompts of similar lengths share one
    compilation; new sampling parameters do not trigger one either. For a batch, `jax.vmap` over
    prompts (padded on the right to one length, with `prompt_length`) and keys: an example's
    tokens do not depend on the others. For several samples of one prompt, `jax.vmap` over keys
    alone: the prompt is then read once.

    Arguments:

    - `model`: a decoder, such as `Llama`. Dropout is switched off.
    - `prompt`: the tokens to continue, at least one.
    - `max_new_tokens`, `min_new_tokens`: the most and the fewest tokens to generate. Stop tokens
        that would come too early are forbidden, stop sequences ignored.
    - `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`: see `filter_logits`. Temperature 0 is
        greedy.
    - `processors`: changes to the logits before that, in order, which may depend on the tokens so
        far: `RepetitionPenalty`, `LogitBias`, `AllowTokens`, any function `(logits, history) ->
        logits`.
    - `stop_tokens`, `stop_sequences`: nothing more is generated after these.
    - `prompt_length`: how many tokens of the prompt count; the rest is padding. All if not given.
    - `cache`: a cache to extend, if not an empty one: e.g. with the projected memory of an encoder,
        or with an earlier part of a conversation. It needs room for the prompt and
        `max_new_tokens - 1` more. The prompt is then not padded, because the room is not known,
        and processors do not see the tokens in the cache.
    - `key`: for sampling; not needed at temperature 0.
    - `on_token`: called on the host with each token as it is generated, e.g. to display it. Not
        available under `jax.vmap`. A new function triggers a compilation.

    Returns:

    The new tokens. After a stop token, that stop token is repeated.

    Raises:

    - `ValueError` if the prompt is empty, or it and the new tokens are more than the model's
        `max_len`; or for numbers out of range, or a missing key.
    - An error, at run time under `jax.jit`, if `prompt_length` is out of range, or if the model
        raises one because a `cache` is full.
    """
    return generate_with_log_probs(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        processors=processors,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
        prompt_length=prompt_length,
        cache=cache,
        key=key,
        on_token=on_token,
    ).tokens


@unbatched(prompt="seq")
def generate_with_log_probs(
    model: AbstractDecoder,
    prompt: Int[Array, " seq"],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: Number = 1.0,
    top_k: Number | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    typical_p: Number | None = None,
    processors: Sequence[Processor] = (),
    stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    prompt_length: int | Int[Array, ""] | None = None,
    cache: Any = None,
    key: PRNGKeyArray | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """What `generate` returns, with log-probabilities, and the cache to continue from.

    Arguments and errors are those of `generate`.
    """
    check_counts("generate", min_new_tokens, max_new_tokens)
    prompt_, cache_len = make_prompt(
        "generate", model, prompt, prompt_length, room=max_new_tokens, cache=cache
    )
    options = sampling_options(
        "generate",
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
    )
    return _run(
        eqx.nn.inference_mode(model),
        prompt_,
        cache,
        options,
        tuple(processors),
        make_stops("generate", stop_tokens, stop_sequences),
        jnp.asarray(min_new_tokens, jnp.int32),
        sampling_key("generate", key, temperature),
        max_new_tokens,
        cache_len,
        on_token,
    )


class _State(NamedTuple):
    tokens: Array  # the prompt, then the new ones
    log_probs: Array
    index: Array  # of the next token
    length: Array  # how many tokens are new; lags behind `index` once done
    done: Array
    cache: Any


@eqx.filter_jit
def _run(
    model: AbstractDecoder,
    prompt: Prompt,
    cache: Any,
    options: dict[str, Any],
    processors: tuple[Processor, ...],
    stops: Stops,
    min_new_tokens: Int[Array, ""],
    key: PRNGKeyArray,
    max_new_tokens: int,
    cache_len: int | None,
    on_token: Callable[[int], None] | None,
) -> Generation:
    prompt = checked("generate", prompt)
    if cache is None:
        cache = model.init_cache(cache_len)
    cache, dtype = prefill(model, prompt, cache)
    bucket = prompt.tokens.shape[0]

    def body(state: _State) -> _State:
        end = prompt.length + state.index
        # Examples that are done keep their state.
        count = jnp.where(state.done, 0, 1).astype(jnp.int32)
        logits, cache = model.extend(state.tokens[end - 1][None], state.cache, length=count)
        logits = logits[0].astype(accumulation_dtype(logits.dtype))
        history = History(state.tokens, end, prompt.length)
        wanted = process(processors, logits, history)
        early = state.index + 1 < min_new_tokens
        wanted = jnp.where(early, wanted.at[stops.tokens].set(-jnp.inf), wanted)
        # Keys by index, not by splitting, so that they do not depend on when others stop.
        token = sample(wanted, jax.random.fold_in(key, state.index), **options)
        if on_token is not None:
            jax.debug.callback(_tell, on_token, token, ordered=True)
        log_prob = jnp.where(state.done, 0, jax.nn.log_softmax(logits)[token])
        tokens = state.tokens.at[end].set(token)
        stopped = ~early & stops.after(tokens, prompt.length, end + 1)
        return _State(
            tokens,
            state.log_probs.at[state.index].set(log_prob),
            state.index + 1,
            state.length + count,
            state.done | stopped,
            cache,
        )

    def unfinished(state: _State) -> Array:
        return (state.index < max_new_tokens) & anywhere(~state.done)

    state = _State(
        jnp.zeros((bucket + max_new_tokens,), jnp.int32).at[:bucket].set(prompt.tokens),
        jnp.zeros((max_new_tokens,), accumulation_dtype(dtype)),
        jnp.int32(0),
        jnp.int32(0),
        jnp.asarray(False),
        cache,
    )
    state = jax.lax.while_loop(unfinished, body, state)
    # Tokens computed for examples that were done, while others were not, do not count.
    places = jnp.minimum(jnp.arange(max_new_tokens, dtype=jnp.int32), state.length - 1)
    return Generation(
        state.tokens[prompt.length + places], state.length, state.log_probs, state.cache
    )


def check_counts(owner: str, min_new_tokens: int, max_new_tokens: int) -> None:
    """Checks the numbers of tokens to generate."""
    if max_new_tokens < 1:
        raise ValueError(f"{owner}: max_new_tokens={max_new_tokens} must be at least 1.")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            f"{owner}: min_new_tokens={min_new_tokens} must be between 0 and "
            f"max_new_tokens={max_new_tokens}."
        )


def sampling_options(
    owner: str,
    *,
    temperature: Number,
    top_k: Number | None,
    top_p: Number | None,
    min_p: Number | None,
    typical_p: Number | None,
) -> dict[str, Array | None]:
    """The numbers as arrays, so that new ones do not recompile, checked where they are known."""

    def checked(name: str, value: Number | None, least: float, most: float) -> Array | None:
        # Only Python numbers are checked; an array may be traced.
        if isinstance(value, int | float) and not least <= value <= most:
            raise ValueError(f"{owner}: {name}={value} must be between {least:g} and {most:g}.")
        return None if value is None else jnp.asarray(value, jnp.float32)

    return {
        "temperature": checked("temperature", temperature, 0.0, math.inf),
        "top_k": checked("top_k", top_k, 1.0, math.inf),
        "top_p": checked("top_p", top_p, 0.0, 1.0),
        "min_p": checked("min_p", min_p, 0.0, 1.0),
        "typical_p": checked("typical_p", typical_p, 0.0, 1.0),
    }


def sampling_key(owner: str, key: PRNGKeyArray | None, temperature: Number) -> PRNGKeyArray:
    """The key, or an arbitrary one where none is needed."""
    if key is not None:
        return key
    if not (isinstance(temperature, int | float) and temperature == 0):
        raise ValueError(f"{owner}: sampling needs a key; pass key=, or temperature=0.")
    return jax.random.key(0)


def _tell(on_token: Callable[[int], None], token: Any) -> None:
    on_token(int(token))
