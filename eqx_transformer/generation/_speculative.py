from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..nn import truncate
from ._generate import check_counts, sampling_key, sampling_options
from ._processors import History, Processor, follows_run, process
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
from ._sampling import Number, filter_logits


class PromptLookup(eqx.Module):
    """Proposes what followed the last occurrence of the last few tokens.

    It costs next to nothing, and is often right where a text repeats itself: summaries, edits of
    code. (Saxena, Prompt Lookup Decoding, 2023.)

    Arguments:

    - `size`: how many of the last tokens to look for; fewer if they have not occurred before.
    """

    size: int = eqx.field(static=True, default=3)

    def __check_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"PromptLookup: size={self.size} must be at least 1.")

    def propose(self, history: History, count: int) -> Int[Array, " count"]:
        """The next `count` tokens; the last token again where nothing is found."""
        places = jnp.arange(history.tokens.shape[0], dtype=jnp.int32)
        best = history.length - 1
        for size in range(1, self.size + 1):
            place = jnp.max(jnp.where(follows_run(history, history.last(size)), places, -1))
            best = jnp.where(place >= 0, place, best)
        wanted = best + jnp.arange(count, dtype=jnp.int32)
        # Proposals beyond the end repeat those before it.
        period = jnp.maximum(history.length - best, 1)
        return history.tokens[jnp.where(wanted < history.length, wanted, wanted - period)]


class Speculation(NamedTuple):
    """What `generate_speculatively` returns.

    - `tokens`: the new tokens; the last one that counts is repeated to the end.
    - `length`: how many of them count, a stop token included.
    - `num_calls`: how often the model was called, not counting the prompt.
    """

    tokens: Int[Array, " max_new_tokens"]
    length: Int[Array, ""]
    num_calls: Int[Array, ""]


@unbatched(prompt="seq")
def generate_speculatively(
    model: AbstractDecoder,
    draft: AbstractDecoder | PromptLookup,
    prompt: Int[Array, " seq"],
    *,
    max_new_tokens: int,
    num_draft_tokens: int = 4,
    temperature: Number = 1.0,
    top_k: Number | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    typical_p: Number | None = None,
    processors: Sequence[Processor] = (),
    stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (),
    prompt_length: int | Int[Array, ""] | None = None,
    key: PRNGKeyArray | None = None,
) -> Speculation:
    """Generates what `model` would, several tokens at a time.

    The draft proposes tokens, the model scores all of them at once, and the first few are accepted
    so that the new tokens have exactly the distribution of `generate` with these options (not the
    same tokens for the same key). At temperature 0 they are the same tokens. (Leviathan et al.,
    2023, algorithm 1.)

    It is worth it where a call of the model costs about the same for one token as for a few, as at
    batch size one, and the draft is much cheaper and often right.

    Arguments:

    - `model`: the decoder to sample from.
    - `draft`: a smaller decoder with the same tokens, or `PromptLookup()`.
    - `num_draft_tokens`: how many tokens are proposed at a time.
    - `prompt`, `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`,
        `processors`, `stop_tokens`, `stop_sequences`, `prompt_length`, `key`: see `generate`.

    Raises:

    - `ValueError` like `generate`, with room for `num_draft_tokens` more; for `num_draft_tokens`
        below 1; or for caches from which tokens cannot be taken back (see `truncate`).
    """
    owner = "generate_speculatively"
    check_counts(owner, 0, max_new_tokens)
    if num_draft_tokens < 1:
        raise ValueError(f"{owner}: num_draft_tokens={num_draft_tokens} must be at least 1.")
    room = max_new_tokens + num_draft_tokens
    prompt_, cache_len = make_prompt(owner, model, prompt, prompt_length, room=room, cache=None)
    if not isinstance(draft, PromptLookup):
        make_prompt(f"{owner}: draft", draft, prompt, None, room=room, cache=None)
    options = sampling_options(
        owner,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
    )
    return _run(
        eqx.nn.inference_mode(model),
        eqx.nn.inference_mode(draft),
        prompt_,
        options,
        tuple(processors),
        make_stops(owner, stop_tokens, stop_sequences),
        sampling_key(owner, key, temperature),
        max_new_tokens,
        num_draft_tokens,
        cache_len,
    )


class _State(NamedTuple):
    tokens: Array  # the prompt, then the new ones
    end: Array  # how many tokens there are in all
    done: Array
    calls: Array
    caches: tuple[Any, Any]  # of all tokens but the last


@eqx.filter_jit
def _run(
    model: AbstractDecoder,
    draft: AbstractDecoder | PromptLookup,
    prompt: Prompt,
    options: dict[str, Any],
    processors: tuple[Processor, ...],
    stops: Stops,
    key: PRNGKeyArray,
    max_new_tokens: int,
    num_draft: int,
    cache_len: int | None,
) -> Speculation:
    prompt = checked("generate_speculatively", prompt)
    bucket = prompt.tokens.shape[0]

    def probabilities(logits: Array, tokens: Array, end: Array) -> Array:
        """The distribution that `generate` would draw from after `tokens[:end]`."""
        logits = logits.astype(accumulation_dtype(logits.dtype))
        history = History(tokens, end, prompt.length)
        return jax.nn.softmax(filter_logits(process(processors, logits, history), **options))

    def proposed(state: _State, key: PRNGKeyArray) -> tuple[Array, Array | None, Any]:
        """The tokens with proposals added, their distributions, and the draft's cache."""
        if isinstance(draft, PromptLookup):
            history = History(state.tokens, state.end, prompt.length)
            tokens = draft.propose(history, num_draft)
            return jax.lax.dynamic_update_slice(state.tokens, tokens, (state.end,)), None, None
        decoder = draft

        def step(carry: tuple[Array, Array, Any], noise: Array) -> tuple[Any, Array]:
            tokens, end, cache = carry
            logits, cache = decoder.extend(tokens[end - 1][None], cache)
            q = probabilities(logits[0], tokens, end)
            token = jnp.argmax(jnp.log(q) + noise).astype(jnp.int32)
            return (tokens.at[end].set(token), end + 1, cache), q

        # One more than is proposed, which is overwritten, to have the last one in the cache. Random
        # numbers for all at once: each call of the generator may cost as much as a small draft.
        logits, _ = eqx.filter_eval_shape(decoder.extend, state.tokens[:1], state.caches[1])
        shape = (num_draft + 1, logits.shape[-1])
        noise = jax.random.gumbel(key, shape, accumulation_dtype(logits.dtype))
        start = (state.tokens, state.end, state.caches[1])
        (tokens, _, cache), q = jax.lax.scan(step, start, noise)
        return tokens, q, cache

    def body(state: _State) -> _State:
        draft_key, accept_key, last_key = jax.random.split(jax.random.fold_in(key, state.calls), 3)
        tokens, q, draft_cache = proposed(state, draft_key)
        known = jax.lax.dynamic_slice(tokens, (state.end - 1,), (num_draft + 1,))
        logits, cache = model.extend(known, state.caches[0])
        ends = state.end + jnp.arange(num_draft + 1, dtype=jnp.int32)
        p = jax.vmap(probabilities, in_axes=(0, None, 0))(logits, tokens, ends)
        if q is None:
            q = jax.nn.one_hot(known[1:], p.shape[1], dtype=p.dtype)
        # Nothing is proposed after the last proposal: a token there is drawn from p.
        q = q.astype(p.dtype)[:num_draft]
        places = jnp.arange(num_draft)
        ratio = p[places, known[1:]] / jnp.maximum(q[places, known[1:]], jnp.finfo(p.dtype).tiny)
        taken = jax.random.uniform(accept_key, (num_draft,), p.dtype) < ratio
        count = jnp.sum(jnp.cumprod(taken.astype(jnp.int32)))
        rest = jnp.maximum(p - jnp.pad(q, ((0, 1), (0, 0))), 0)[count]
        # If p and q are equal up to rounding, nothing may be left, and either will do.
        rest = jnp.where(rest.sum() > 0, rest, p[count])
        last = jax.random.categorical(last_key, jnp.log(rest)).astype(jnp.int32)
        tokens = tokens.at[state.end + count].set(last)

        # Up to the first stop, and at most `max_new_tokens`.
        new = state.end + 1 + jnp.arange(num_draft + 1, dtype=jnp.int32)
        stopped = jax.vmap(lambda end: stops.after(tokens, prompt.length, end))(new)
        stopped = stopped & (new <= state.end + count + 1)
        end = jnp.min(jnp.where(stopped, new, state.end + count + 1))
        end = jnp.minimum(end, prompt.length + max_new_tokens)
        done = stopped.any() | (end == prompt.length + max_new_tokens)
        # Examples that are done keep their state while others of a batch continue.
        end = jnp.where(state.done, state.end, end)
        caches = (truncate(cache, end - 1), truncate(draft_cache, end - 1))
        calls = state.calls + jnp.where(state.done, 0, 1).astype(jnp.int32)
        tokens = jnp.where(state.done, state.tokens, tokens)
        return _State(tokens, end, state.done | done, calls, caches)

    cache, _ = prefill(model, prompt, model.init_cache(cache_len))
    draft_cache = None
    if not isinstance(draft, PromptLookup):
        draft_cache, _ = prefill(draft, prompt, draft.init_cache(cache_len))
    room = max_new_tokens + num_draft + 1
    state = _State(
        jnp.zeros((bucket + room,), jnp.int32).at[:bucket].set(prompt.tokens),
        prompt.length,
        jnp.asarray(False),
        jnp.int32(0),
        (cache, draft_cache),
    )
    state = jax.lax.while_loop(lambda state: anywhere(~state.done), body, state)
    length = state.end - prompt.length
    places = jnp.minimum(jnp.arange(max_new_tokens, dtype=jnp.int32), length - 1)
    return Speculation(state.tokens[prompt.length + places], length, state.calls)
