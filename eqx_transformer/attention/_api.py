"""`dot_product_attention`: what it computes, what it checks, and which implementation runs it."""

from typing import Any, Final, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from . import _cudnn, _kernels
from ._chunked import chunked
from ._inputs import Inputs, make_inputs
from ._masks import AbstractMask
from ._reference import reference, weights
from ._score_mods import ScoreMod

Implementation = Literal["reference", "chunked", "cudnn", "pallas"]
"""Which code computes attention. All give the same result, and every derivative of it.

- `"reference"`: dense, the specification. Memory `O(heads * q_seq * kv_seq)`.
- `"chunked"`: tile by tile, skipping what the mask excludes. Memory `O(seq)`.
- `"cudnn"`: NVIDIA's fused kernels, on GPUs from Ampere on and for plain patterns only. Forward
    mode and second derivatives are computed by `"chunked"`.
- `"pallas"`: our own fused kernels for GPUs and TPUs, for every mask and nearly every score mod;
    on other platforms they are interpreted, which is slow and meant for tests. They have not been
    run on a GPU or a TPU yet, so they are used only on request.
"""

FEW_QUERIES: Final = 8
"""Up to this many queries, dense computation is faster and its memory still linear."""

_IMPLEMENTATIONS: Final[dict[Implementation, Any]] = {
    "reference": reference,
    "chunked": chunked,
    "cudnn": _cudnn.cudnn,
    "pallas": _kernels.pallas,
}


def dot_product_attention(
    q: Float[Array, "q_seq heads head_dim"],
    k: Float[Array, "kv_seq kv_heads head_dim"],
    v: Float[Array, "kv_seq kv_heads v_dim"],
    *,
    mask: AbstractMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    q_positions: Int[Array, " q_seq"] | None = None,
    kv_positions: Int[Array, " kv_seq"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
    block_size: int | None = None,
) -> Float[Array, "q_seq heads v_dim"]:
    """Scaled dot-product attention of one example.

    For every query `i` and head `h`, with the key head `g` that `h` belongs to,

        score[j] = score_mod(scale * q[i, h] . k[j, g], i, j, h)    where mask(i, j)
        out[i, h] = sum_j softmax(score)[j] * v[j, g]

    A query that may attend to nothing gives zeros. Sums are accumulated in float32 or wider.
    For batches, and any other leading axes, use `jax.vmap`. (Vaswani et al., 2017; grouped queries:
    Ainslie et al., 2023.)

    Arguments:

    - `q`, `k`, `v`: queries, keys and values, of one dtype. `heads` must be a multiple of
        `kv_heads`; consecutive query heads share a key head, without copies of the keys.
    - `mask`: who may attend to whom, on absolute positions; `None` means everyone to everyone.
    - `score_mod`: an elementwise function `(score, q_pos, kv_pos, head) -> score`. Arrays it holds
        or closes over get gradients.
    - `scale`: factor on the scores; `1 / sqrt(head_dim)` if not given.
    - `q_positions`, `kv_positions`: absolute positions, for masks and score mods;
        `0, 1, 2, ...` if not given. Leave them out where the default is right: then what the mask
        excludes is known at trace time.
    - `sinks`: a learnable score for each head that takes part in the softmax but carries no value
        (Xiao et al., 2024; GPT-OSS, 2025).
    - `dropout_rate`, `dropout_key`: the probability with which an attention weight is dropped.
        The same key drops the same weights in every implementation.
    - `implementation`: which implementation to use. `None` chooses one (see `explain_attention`);
        a named one runs or raises.
    - `block_size`: how many queries, and how many keys, a tile of scores has, for `"chunked"` and
        `"pallas"`. It affects only speed and memory; chosen by length and mask if not given.
        `"pallas"` rounds it up: to a power of two from 16 to 128 on GPUs, to a multiple of 128 up
        to 512 on TPUs.

    Returns:

    The output, in the dtype of the inputs.

    Raises:

    - `ValueError` for shapes, dtypes, masks or options that do not fit together, and for a named
        implementation that cannot compute this call.
    """
    inputs = make_inputs(
        q,
        k,
        v,
        mask=mask,
        score_mod=score_mod,
        scale=scale,
        q_positions=q_positions,
        kv_positions=kv_positions,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        block_size=block_size,
    )
    return compute(inputs, implementation)


def compute(
    inputs: Inputs, implementation: Implementation | None
) -> Float[Array, "q_seq heads v_dim"]:
    """The output of attention whose arguments have been checked."""
    out, _ = _IMPLEMENTATIONS[_choose(inputs, implementation).chosen](inputs)
    return out


def attention_and_lse(
    q: Float[Array, "q_seq heads head_dim"],
    k: Float[Array, "kv_seq kv_heads head_dim"],
    v: Float[Array, "kv_seq kv_heads v_dim"],
    *,
    mask: AbstractMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    q_positions: Int[Array, " q_seq"] | None = None,
    kv_positions: Int[Array, " kv_seq"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
    block_size: int | None = None,
) -> tuple[Float[Array, "q_seq heads v_dim"], Float[Array, "q_seq heads"]]:
    """Like `dot_product_attention`, but also returns the log of the softmax's denominator.

    Two results over disjoint keys can be merged exactly by their log-sum-exps, which is how
    attention is split over devices or over a cache. Both outputs are differentiable.

    Returns:

    The output, and the log-sum-exp of the scores (sinks included) in float32 or wider; `-inf` for
    a query that may attend to nothing.
    """
    inputs = make_inputs(
        q,
        k,
        v,
        mask=mask,
        score_mod=score_mod,
        scale=scale,
        q_positions=q_positions,
        kv_positions=kv_positions,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        block_size=block_size,
    )
    return _IMPLEMENTATIONS[_choose(inputs, implementation, lse=True).chosen](inputs)


def attention_weights(
    q: Float[Array, "q_seq heads head_dim"],
    k: Float[Array, "kv_seq kv_heads head_dim"],
    *,
    mask: AbstractMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    q_positions: Int[Array, " q_seq"] | None = None,
    kv_positions: Int[Array, " kv_seq"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "heads q_seq kv_seq"]:
    """The attention weights themselves, for inspection: dense, in float32 or wider.

    Arguments are those of `dot_product_attention`. Rows sum to one; to less with sinks, and to
    zero where a query may attend to nothing.
    """
    inputs = make_inputs(
        q,
        k,
        jnp.zeros((*k.shape[:2], 0), k.dtype),
        mask=mask,
        score_mod=score_mod,
        scale=scale,
        q_positions=q_positions,
        kv_positions=kv_positions,
        sinks=sinks,
    )
    return weights(inputs)[0]


class Explanation(NamedTuple):
    """Which implementation an attention call uses, and why."""

    chosen: Implementation
    reasons: dict[str, str]
    """One sentence for every implementation."""

    def __str__(self) -> str:
        lines = [f"{name:<10} {reason}" for name, reason in self.reasons.items()]
        return "\n".join([f"attention by {self.chosen!r}:", *lines])


def explain_attention(
    q: Float[Array, "q_seq heads head_dim"],
    k: Float[Array, "kv_seq kv_heads head_dim"],
    v: Float[Array, "kv_seq kv_heads v_dim"],
    *,
    mask: AbstractMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    q_positions: Int[Array, " q_seq"] | None = None,
    kv_positions: Int[Array, " kv_seq"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
    block_size: int | None = None,
) -> Explanation:
    """Says which implementation `dot_product_attention` uses for these arguments, and why.

    The decision depends only on shapes, dtypes and kinds of mask, never on values, and nothing is
    run. Print the result, or read its `chosen` and `reasons`.
    """
    inputs = make_inputs(
        q,
        k,
        v,
        mask=mask,
        score_mod=score_mod,
        scale=scale,
        q_positions=q_positions,
        kv_positions=kv_positions,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        block_size=block_size,
    )
    return _choose(inputs, implementation)


def _choose(
    inputs: Inputs, implementation: Implementation | None, *, lse: bool = False
) -> Explanation:
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"attention: implementation={implementation!r} is not one of "
            f"{get_args(Implementation)}."
        )
    no_cudnn = _cudnn.unavailable() or _refusal("cudnn", inputs, lse)
    if implementation is not None:
        why = no_cudnn if implementation == "cudnn" else _refusal(implementation, inputs, lse)
        if why is not None:
            raise ValueError(
                f"attention: implementation={implementation!r} cannot compute this call: {why}. "
                "Leave implementation out to use one that can."
            )
        reasons = dict.fromkeys(_IMPLEMENTATIONS, "not asked for")
        return Explanation(implementation, reasons | {implementation: "asked for by name"})
    few = inputs.q_seq <= FEW_QUERIES
    chosen: Implementation = "reference" if few else "cudnn" if no_cudnn is None else "chunked"
    scores = inputs.heads * inputs.q_seq * inputs.kv_seq * inputs.dtype.itemsize
    reasons: dict[str, str] = {
        "reference": f"q_seq={inputs.q_seq} is at most {FEW_QUERIES}: one row of tiles, computed "
        "at once"
        if few
        else f"q_seq={inputs.q_seq} is more than {FEW_QUERIES}: scores alone would take "
        f"{scores / 2**20:.1f} MiB",
        "chunked": "would only add a loop"
        if few
        else "skips what the mask excludes, in memory linear in the sequence",
        "cudnn": no_cudnn or ("nothing to gain" if few else "the fastest for plain patterns"),
        "pallas": "has not been run on a GPU yet; ask for it by name",
    }
    return Explanation(chosen, reasons)


def refusals(inputs: Inputs, *, lse: bool = False) -> dict[Implementation, str | None]:
    """Why implementations cannot compute a call on any machine; `None` for those that can."""
    return {name: _refusal(name, inputs, lse) for name in _IMPLEMENTATIONS}


def _refusal(implementation: Implementation, inputs: Inputs, lse: bool) -> str | None:
    if implementation == "cudnn":
        lse_is_rounded = "rounds the log-sum-exp to the dtype of the output" if lse else None
        return _cudnn.refusal(inputs) or lse_is_rounded
    return _kernels.refusal(inputs) if implementation == "pallas" else None
