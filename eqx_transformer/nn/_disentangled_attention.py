from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask, dot_product_attention
from ._attention import AbstractAttention, head_sizes, split_heads
from ._checks import check_rate
from ._linear import AbstractLinear, Linear


class DisentangledAttention(AbstractAttention):
    """Self-attention to content and to relative positions, each with vectors of its own.

        score[i, j] = scale * (q[i] . k[j] + q[i] . pos_k[i - j] + k[j] . pos_q[i - j])
        pos_k, pos_q = pos_k_proj(relative), pos_q_proj(relative)

    One of the last two terms, or both, can be left out; `scale` is `1 / sqrt(terms * head_dim)`.
    There is a row of `relative` for every distance `-max_distance, ..., max_distance - 1`, or for
    every bucket `-num_buckets, ..., num_buckets - 1`: half of them hold exact distances, the rest
    grow logarithmically.

    All layers of a model share `relative`, which the model puts here. (He et al., DeBERTa, 2021,
    equation 4; buckets: version 2 of its code.)
    """

    q_proj: AbstractLinear
    k_proj: AbstractLinear
    v_proj: AbstractLinear
    o_proj: AbstractLinear
    pos_k_proj: AbstractLinear | None
    pos_q_proj: AbstractLinear | None
    relative: Float[Array, "distances d_model"] | None
    attention_fn: Callable[..., Array]
    inference: bool
    head_dim: int = eqx.field(static=True)
    max_distance: int = eqx.field(static=True)
    num_buckets: int | None = eqx.field(static=True)
    content_to_position: bool = eqx.field(static=True)
    position_to_content: bool = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        max_distance: int,
        num_buckets: int | None = None,
        content_to_position: bool = True,
        position_to_content: bool = True,
        share_projections: bool = False,
        dropout_rate: float = 0.0,
        attention_fn: Callable[..., Array] = dot_product_attention,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input, the output and the vectors of distances.
        - `num_heads`: how many heads.
        - `max_distance`: distances from here on are not told apart, or share the last bucket.
        - `num_buckets`: how many buckets there are on each side; one for each distance if not
            given.
        - `content_to_position`, `position_to_content`: which terms there are.
        - `share_projections`: whether the vectors of distances share the projections of the input.
        - `dropout_rate`: the probability with which an attention weight is dropped.
        - `attention_fn`: `dot_product_attention`, or a function with its signature.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weights.

        Raises:

        - `ValueError` for sizes that do not divide each other, or a bad number of buckets.
        """
        _, self.head_dim = head_sizes("DisentangledAttention", d_model, num_heads, None, None)
        check_rate("DisentangledAttention", "dropout_rate", dropout_rate)
        if max_distance < 1:
            raise ValueError(
                f"DisentangledAttention: max_distance={max_distance} must be at least 1."
            )
        if num_buckets is not None and not 2 <= num_buckets <= 2 * (max_distance - 2):
            raise ValueError(
                f"DisentangledAttention: num_buckets={num_buckets} must be at least 2, and half of "
                f"it less than max_distance={max_distance} - 1."
            )
        keys = jax.random.split(key, 6)

        def linear(key: PRNGKeyArray) -> Linear:
            return Linear(d_model, d_model, use_bias=True, dtype=dtype, key=key)

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(key) for key in keys[:4])
        own = not share_projections
        self.pos_k_proj = linear(keys[4]) if own and content_to_position else None
        self.pos_q_proj = linear(keys[5]) if own and position_to_content else None
        self.relative = None
        self.attention_fn = attention_fn
        self.inference = False
        self.max_distance = max_distance
        self.num_buckets = num_buckets
        self.content_to_position = content_to_position
        self.position_to_content = position_to_content
        self.dropout_rate = dropout_rate

    @jax.named_scope("eqx_transformer.nn.DisentangledAttention")
    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Attends within one sequence; see `AbstractAttention`. `positions` must not be given."""
        if positions is not None:
            raise ValueError(
                "DisentangledAttention: positions must not be given; they are 0, 1, 2, ..."
            )
        if self.relative is None:
            raise ValueError(
                "DisentangledAttention: there are no vectors of distances; put them in its field "
                "`relative`, as DeBERTa does."
            )
        dropout_rate = 0.0 if self.inference else self.dropout_rate
        if dropout_rate > 0 and key is None:
            raise RuntimeError(
                f"DisentangledAttention: dropout_rate={dropout_rate} needs a key; pass key=, or "
                "switch dropout off with eqx.nn.inference_mode(model)."
            )
        q, k, v = (self._heads(p, x) for p in (self.q_proj, self.k_proj, self.v_proj))
        terms = 1 + self.content_to_position + self.position_to_content
        scale = (terms * self.head_dim) ** -0.5
        relative = self.relative.astype(x.dtype)
        of_q = of_k = None
        if self.content_to_position:
            pos_k = self._heads(self.pos_k_proj or self.k_proj, relative)
            of_q = jnp.einsum("shd,phd->hsp", q, pos_k) * scale
        if self.position_to_content:
            pos_q = self._heads(self.pos_q_proj or self.q_proj, relative)
            of_k = jnp.einsum("shd,phd->hsp", k, pos_q) * scale
        out = self.attention_fn(
            q,
            k,
            v,
            mask=mask,
            score_mod=_DistanceScores(of_q, of_k, self.max_distance, self.num_buckets),
            scale=scale,
            dropout_rate=dropout_rate,
            dropout_key=key if dropout_rate > 0 else None,
        )
        return self.o_proj(out.reshape(x.shape))

    def init_cache(self, max_len: int, dtype: DTypeLike | None = None) -> Any:
        """There is none: scores depend on keys yet to come."""
        raise ValueError("DisentangledAttention has no cache; it is for encoders.")

    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """There is no cache; see `init_cache`."""
        raise ValueError("DisentangledAttention has no cache; it is for encoders.")

    def _heads(self, projection: AbstractLinear, x: Array) -> Array:
        return split_heads(projection(x), self.head_dim)


class _DistanceScores(eqx.Module):
    """Adds the scores of queries, and of keys, against distances."""

    of_q: Float[Array, "heads q_seq distances"] | None
    of_k: Float[Array, "heads kv_seq distances"] | None
    max_distance: int = eqx.field(static=True)
    num_buckets: int | None = eqx.field(static=True)

    def __call__(
        self,
        score: Float[Array, "..."],
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        head: Int[Array, "..."],
    ) -> Float[Array, "..."]:
        half = self.max_distance if self.num_buckets is None else self.num_buckets
        row = jnp.clip(self._bucket(q_pos - kv_pos) + half, 0, 2 * half - 1)
        if self.of_q is not None:
            score = score + self.of_q[head, q_pos, row].astype(score.dtype)
        if self.of_k is not None:
            score = score + self.of_k[head, kv_pos, row].astype(score.dtype)
        return score

    def _bucket(self, distance: Int[Array, "..."]) -> Int[Array, "..."]:
        if self.num_buckets is None:
            return distance
        exact = self.num_buckets // 2
        size = jnp.abs(distance)
        # Both logarithms in float32, so that they agree exactly where the last bucket ends.
        far = jnp.log(jnp.maximum(size, exact).astype(jnp.float32) / exact)
        far = far / jnp.log(jnp.asarray((self.max_distance - 1) / exact, jnp.float32))
        far = exact + jnp.ceil(far * (exact - 1)).astype(distance.dtype)
        return jnp.where(size <= exact, distance, jnp.sign(distance) * far)
