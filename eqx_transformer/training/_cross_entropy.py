"""The cross-entropy of tokens, without the logits of all of them at once."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._precision import accumulation_dtype
from .._scan import filter_scan

_LOGITS_AT_A_TIME = 2**24


def cross_entropy_from_hidden(
    head: Callable[[Array], Array],
    hidden: Float[Array, "*rows d_model"],
    targets: Int[Array, "*rows"],
    *,
    valid: Bool[Array, "*rows"] | None = None,
    label_smoothing: float | int = 0.0,
    z_loss: float | int = 0.0,
    chunk_size: int | None = None,
) -> Float[Array, "*rows"]:
    """The cross-entropy of every token, in nats, from what the model computes before its head.

        logits = head(hidden)        lse = logsumexp(logits)        e = label_smoothing
        loss   = lse - (1 - e) * logits[target] - e * mean(logits) + z_loss * lse**2

    The logits of a language model, `[tokens, vocab_size]`, are often the largest array of a
    training step. Here only those of one chunk of tokens exist at a time, and reverse mode
    recomputes them. Derivatives of every order exist.

        hidden = jax.vmap(model.hidden)(tokens[:, :-1])
        losses = cross_entropy_from_hidden(model.logits, hidden, tokens[:, 1:])

    (Label smoothing: Szegedy et al., 2015, section 7; z-loss: Chowdhery et al., PaLM, 2022, section
    5.)

    Arguments:

    - `head`: from `[rows, d_model]` to `[rows, vocab_size]`, row by row: a model's `logits`, a
        `Linear`, the `attend` of an `Embedding`, any function. A soft cap is a part of it.
    - `hidden`: one vector per token, in the dtype that logits are to be computed in. Pass a batch
        as it is: under `vmap` a chunk would be `chunk_size` tokens of every sequence.
    - `targets`: the ids of the tokens to predict. An id outside the vocabulary gives NaN.
    - `valid`: which tokens count; others have loss 0 and give no gradient, whatever they hold. All
        if not given.
    - `label_smoothing`: the probability that is spread evenly over all ids.
    - `z_loss`: the coefficient of `lse**2`, which keeps logits close to log-probabilities, e.g.
        1e-4.
    - `chunk_size`: how many tokens at a time; as many as make 2**24 logits if not given.

    Returns:

    The losses, in float32 or wider. Sum them and divide by how many count.

    Raises:

    - `ValueError` for numbers out of range, if there is not one target for each vector, or if
        `head` does not map row by row.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"cross_entropy_from_hidden: label_smoothing={label_smoothing} must be at least 0 and "
            "below 1."
        )
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"cross_entropy_from_hidden: z_loss={z_loss} must not be negative.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"cross_entropy_from_hidden: chunk_size={chunk_size} must be at least 1.")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"cross_entropy_from_hidden: hidden has shape {hidden.shape} and targets has "
            f"{targets.shape}; there must be one target for each vector, e.g. "
            "model.hidden(tokens[:-1]) and tokens[1:]."
        )
    shape, x = targets.shape, hidden.reshape(-1, hidden.shape[-1])
    logits = eqx.filter_eval_shape(head, x)
    if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        raise ValueError(
            f"cross_entropy_from_hidden: head returned {logits.shape} for {x.shape}; it must map "
            "[rows, d_model] to [rows, vocab_size]."
        )
    vocab_size, dtype = logits.shape[1], accumulation_dtype(logits.dtype)
    if chunk_size is None:
        chunk_size = max(1, _LOGITS_AT_A_TIME // vocab_size)
    chunks = max(1, math.ceil(x.shape[0] / chunk_size))
    valid = jnp.ones(shape, bool) if valid is None else valid
    rows = [_chunked(x, chunks), _chunked(targets.ravel(), chunks), _chunked(valid.ravel(), chunks)]
    restored = _wide(head)

    def of_chunk(_: None, rows: list[Array]) -> tuple[None, Array]:
        x, target, valid = rows
        # Vectors that do not count, even NaN, must not reach the gradient of the head.
        logits = restored()(jnp.where(valid[:, None], x, 0)).astype(dtype)
        target = jnp.where(valid, target, 0)
        lse = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.arange(vocab_size, dtype=target.dtype)[None, :] == target[:, None]
        # Not a gather, whose transpose would be a scatter into zeros of the size of the logits.
        score = jnp.where(chosen, logits, 0).sum(axis=-1)
        loss = lse - (1 - label_smoothing) * score + z_loss * jnp.square(lse)
        if label_smoothing:
            loss = loss - label_smoothing * logits.mean(axis=-1)
        known = (target >= 0) & (target < vocab_size)
        return None, jnp.where(valid, jnp.where(known, loss, jnp.nan), 0)

    _, losses = filter_scan(of_chunk, None, rows, chunks, remat=chunks > 1)
    return losses.ravel()[: x.shape[0]].reshape(shape)


def _chunked(x: Array, chunks: int) -> Array:
    """Cut into chunks of equal size, the last one padded with zeros."""
    size = math.ceil(x.shape[0] / chunks)
    x = jnp.pad(x, [(0, chunks * size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])
    return x.reshape(chunks, size, *x.shape[1:])


def _wide(head: Callable[[Array], Array]) -> Callable[[], Callable[[Array], Array]]:
    """A function that restores the head, with gradients summed in float32 or wider.

    A loop sums gradients over chunks in the dtype that parameters have outside it.
    """
    params, rest = eqx.partition(head, eqx.is_inexact_array)
    wide = jax.tree.map(lambda p: p.astype(accumulation_dtype(p.dtype)), params)

    def restored() -> Callable[[Array], Array]:
        narrow = jax.tree.map(lambda w, p: w.astype(p.dtype), wide, params)
        return eqx.combine(narrow, rest)

    return restored
