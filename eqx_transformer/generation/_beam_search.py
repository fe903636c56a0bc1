import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ._generate import check_counts
from ._prompt import AbstractDecoder, Prompt, checked, make_prompt, prefill
from ._sampling import Number


class Hypotheses(NamedTuple):
    """What `beam_search` found, best first.

    - `tokens`: the new tokens. After a stop token, that stop token is repeated.
    - `scores`: what they are ordered by, `log_probs` divided by the length penalty.
    - `log_probs`: the logarithms of their probabilities, given the prompt.
    - `lengths`: how many tokens count, a stop token included.

    Where fewer were found than there are rows, the last rows have score and log-probability
    `-inf`, length 0 and zeros for tokens.
    """

    tokens: Int[Array, "num_beams max_new_tokens"]
    scores: Float[Array, " num_beams"]
    log_probs: Float[Array, " num_beams"]
    lengths: Int[Array, " num_beams"]


@unbatched(prompt="seq")
def beam_search(
    model: AbstractDecoder,
    prompt: Int[Array, " seq"],
    *,
    num_beams: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    stop_tokens: Sequence[int] = (),
    length_penalty: Number = 0.0,
    early_stopping: bool = True,
    prompt_length: int | Int[Array, ""] | None = None,
    cache: Any = None,
) -> Hypotheses:
    """Looks for the most probable continuations of a prompt, in one compiled program.

    At every step each of the `num_beams` live hypotheses is continued by every token. Of all
    these, the `num_beams` best that do not end in a stop token stay live. Those that end in one are
    finished if they are among the `num_beams` best of all, and the `num_beams` finished ones with
    the highest scores are kept. Hypotheses that reach `max_new_tokens` are finished as they are.
    One beam without a length penalty is greedy decoding.

    Live hypotheses, which are equally long, are compared by log-probability; finished ones by their
    score `log_prob / ((5 + length) / 6) ** length_penalty`, where the length counts the stop token.
    (Wu et al., 2016, equation 14.)

    For a batch, `jax.vmap` over prompts (padded on the right to one length, with `prompt_length`)
    and caches. As in `generate`, prompts of similar lengths share one compilation.

    Arguments:

    - `model`: a decoder, such as `Llama`. Dropout is switched off.
    - `prompt`: the tokens to continue, at least one.
    - `num_beams`: how many hypotheses live at a time, and how many are returned.
    - `max_new_tokens`, `min_new_tokens`: the most and the fewest tokens of a hypothesis, a stop
        token included. Stop tokens that come too early are excluded; the probabilities of the
        others are not renormalised.
    - `stop_tokens`: tokens that finish a hypothesis.
    - `length_penalty`: the exponent; 0 for no penalty, more favours longer hypotheses. A new value
        does not trigger a compilation.
    - `early_stopping`: when to end before `max_new_tokens`. At best a live hypothesis keeps its
        log-probability, and reaches the length with the most favourable penalty. If `True`, the
        search ends as soon as none could thus score higher than the best finished one: the first
        row is that of a full search, the others are those that have finished by then. If `False`,
        it ends as soon as none could get into the rows: all of them are those of a full search.
    - `prompt_length`: how many tokens of the prompt count; the rest is padding. All if not given.
    - `cache`: a cache to extend, if not an empty one: e.g. with the projected memory of an encoder,
        or with an earlier part of the prompt. Any PyTree, with room for the prompt and
        `max_new_tokens - 1` more. The prompt is then not padded, because the room is not known.

    Leaves of the cache that do not depend on the tokens (memory, lengths) are shared by the beams;
    the others are copied when a hypothesis forks.

    Returns:

    The best hypotheses found; see `Hypotheses`.

    Raises:

    - `ValueError` if the prompt is empty, or it and the new tokens are more than the model's
        `max_len`; or for numbers out of range.
    - An error, at run time under `jax.jit`, if `prompt_length` is out of range, or if the model
        raises one because a `cache` is full.
    """
    if num_beams < 1:
        raise ValueError(f"beam_search: num_beams={num_beams} must be at least 1.")
    check_counts("beam_search", min_new_tokens, max_new_tokens)
    if isinstance(length_penalty, int | float) and not math.isfinite(length_penalty):
        raise ValueError(f"beam_search: length_penalty={length_penalty} must be finite.")
    prompt_, cache_len = make_prompt(
        "beam_search", model, prompt, prompt_length, room=max_new_tokens, cache=cache
    )
    return _run(
        eqx.nn.inference_mode(model),
        prompt_,
        jnp.asarray(stop_tokens, jnp.int32),
        jnp.asarray(length_penalty, float),
        jnp.asarray(min_new_tokens, jnp.int32),
        jnp.asarray(early_stopping, bool),
        cache,
        num_beams,
        max_new_tokens,
        cache_len,
    )


class _State(NamedTuple):
    tokens: Array  # of the live hypotheses, [num_beams, max_new_tokens]
    log_probs: Array  # [num_beams], -inf where there is none
    finished: Hypotheses
    index: Array  # how many tokens they have
    settled: Array  # whether the live ones no longer matter


@eqx.filter_jit
def _run(
    model: AbstractDecoder,
    prompt: Prompt,
    stop_tokens: Int[Array, " stops"],
    length_penalty: Float[Array, ""],
    min_new_tokens: Int[Array, ""],
    early_stopping: Bool[Array, ""],
    cache: Any,
    num_beams: int,
    max_new_tokens: int,
    cache_len: int | None,
) -> Hypotheses:
    prompt = checked("beam_search", prompt)
    if cache is None:
        cache = model.init_cache(cache_len)
    cache, _ = prefill(model, prompt, cache)
    logits, cache = model.extend(prompt.tokens[prompt.length - 1][None], cache)
    logits = logits[0]
    dtype, vocab = accumulation_dtype(logits.dtype), logits.shape[0]
    # At most this many of a beam's tokens can be among the best, stop tokens left out or not.
    width = min(vocab, num_beams + stop_tokens.shape[0])

    def scored(log_probs: Array, length: Array | int) -> Array:
        return log_probs / ((5 + jnp.asarray(length, dtype)) / 6) ** length_penalty.astype(dtype)

    def advance(state: _State, logits: Array) -> tuple[_State, Array]:
        """Adds a token to every hypothesis; also returns which ones are continued."""
        log_probs = jax.nn.log_softmax(logits.astype(dtype))
        # A beam's tokens are ordered by its logits: sums of log-probabilities may round to equal
        # values, and then the first is taken.
        _, tokens = lax.top_k(logits, width)
        sums = state.log_probs[:, None] + jnp.take_along_axis(log_probs, tokens, axis=1)
        length, stops = state.index + 1, jnp.isin(tokens, stop_tokens)
        sums = jnp.where(stops & (length < min_new_tokens), -jnp.inf, sums)

        def best(sums: Array) -> tuple[Array, Array, Array, Array]:
            log_probs, places = lax.top_k(sums.reshape(-1), num_beams)
            parents, chosen = places // width, tokens.reshape(-1)[places]
            return log_probs, parents, chosen, state.tokens[parents].at[:, state.index].set(chosen)

        ended, _, chosen, rows = best(sums)
        ended = jnp.where(jnp.isin(chosen, stop_tokens), ended, -jnp.inf)
        finished = _merged(state.finished, rows, scored(ended, length), ended, length)
        live, parents, _, rows = best(jnp.where(stops, -jnp.inf, sums))
        # The penalty is monotonic in the length, so the best length is the next or the last.
        attainable = jnp.maximum(scored(live, length + 1), scored(live, max_new_tokens))
        to_beat = jnp.where(early_stopping, finished.scores[0], finished.scores[-1])
        settled = to_beat >= attainable.max()
        return _State(rows, live, finished, length, settled), parents

    extend, leaves = _flat_extend(model, cache)
    axes = _beam_axes(extend, leaves, num_beams)
    leaves = [
        leaf if axis is None else jnp.broadcast_to(leaf, (num_beams, *leaf.shape))
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    extend = jax.vmap(extend, in_axes=(0, axes), out_axes=(0, axes))

    def body(carry: tuple[_State, list[Array]]) -> tuple[_State, list[Array]]:
        state, leaves = carry
        logits, leaves = extend(state.tokens[:, state.index - 1], leaves)
        state, parents = advance(state, logits)
        return state, [
            leaf if axis is None else leaf[parents] for leaf, axis in zip(leaves, axes, strict=True)
        ]

    def unsettled(carry: tuple[_State, list[Array]]) -> Array:
        return (carry[0].index < max_new_tokens) & ~carry[0].settled

    none = jnp.full((num_beams,), -jnp.inf, dtype)
    tokens = jnp.zeros((num_beams, max_new_tokens), jnp.int32)
    finished = Hypotheses(tokens, none, none, jnp.zeros((num_beams,), jnp.int32))
    # One hypothesis, without tokens; the others appear as it forks.
    start = _State(tokens, none.at[0].set(0), finished, jnp.int32(0), jnp.asarray(False))
    start, _ = advance(start, jnp.broadcast_to(logits, (num_beams, vocab)))
    state, _ = lax.while_loop(unsettled, body, (start, leaves))

    live = jnp.where(state.index == max_new_tokens, state.log_probs, -jnp.inf)
    found = _merged(state.finished, state.tokens, scored(live, max_new_tokens), live, state.index)
    missing = found.scores == -jnp.inf
    lengths = jnp.where(missing, 0, found.lengths)
    generated = jnp.arange(max_new_tokens, dtype=jnp.int32)[None] < lengths[:, None]
    last = jnp.take_along_axis(found.tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    tokens = jnp.where(missing[:, None], 0, jnp.where(generated, found.tokens, last))
    return Hypotheses(tokens, found.scores, found.log_probs, lengths)


def _merged(
    old: Hypotheses, tokens: Array, scores: Array, log_probs: Array, length: Array
) -> Hypotheses:
    """The best of old and new hypotheses, in order; among equals, old ones come first."""
    new = Hypotheses(tokens, scores, log_probs, jnp.broadcast_to(length, scores.shape))
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), old, new)
    _, places = lax.top_k(both.scores, old.scores.shape[0])
    return jax.tree.map(lambda x: x[places], both)


Extend = Callable[[Array, list[Array]], tuple[Array, list[Array]]]


def _flat_extend(model: AbstractDecoder, cache: Any) -> tuple[Extend, list[Array]]:
    """The model as a function of one token and the arrays of its cache, and these arrays."""
    arrays, static = eqx.partition(cache, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    def extend(token: Array, leaves: list[Array]) -> tuple[Array, list[Array]]:
        cache = eqx.combine(jax.tree.unflatten(structure, leaves), static)
        logits, cache = model.extend(token[None], cache)
        arrays, rest = eqx.partition(cache, eqx.is_array)
        if jax.tree.structure(arrays) != structure or not eqx.tree_equal(rest, static):
            raise ValueError(
                "beam_search: model.extend returned a cache whose structure, or leaves that are "
                "not arrays, differ from those it was given; whatever changes must be an array."
            )
        return logits[0], jax.tree.leaves(arrays)

    return extend, leaves


def _beam_axes(extend: Extend, leaves: list[Array], num_beams: int) -> list[int | None]:
    """0 for leaves that come to differ between beams, `None` for leaves that all beams share."""
    batched = [False] * len(leaves)

    @jax.custom_batching.custom_vmap
    def watch(token: Array, leaves: list[Array]) -> Array:
        return token

    @watch.def_vmap
    def _(axis_size: int, in_batched: Any, token: Array, leaves: list[Array]) -> Any:
        nonlocal batched
        batched = [old or new for old, new in zip(batched, in_batched[1], strict=True)]
        return token, True

    def step(token: Array, leaves: list[Array]) -> Array:
        # The token always has the axis of beams: without any, the rule would not be called.
        return watch(token, extend(token, leaves)[1])

    token = jax.ShapeDtypeStruct((num_beams,), jnp.int32)
    while True:
        # A leaf may make another one differ at the next step: repeat until nothing changes.
        axes = [0 if x else None for x in batched]
        shapes = [
            jax.ShapeDtypeStruct((num_beams, *x.shape) if b else x.shape, x.dtype)
            for x, b in zip(leaves, batched, strict=True)
        ]
        jax.eval_shape(jax.vmap(step, in_axes=(0, axes)), token, shapes)
        if axes == [0 if x else None for x in batched]:
            return axes
