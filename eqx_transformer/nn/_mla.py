from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask, ScoreMod, dot_product_attention
from ._attention import WRITTEN, AbstractAttention, split_heads
from ._cache import KVCache
from ._checks import check_rate
from ._linear import AbstractLinear, Linear
from ._norm import RMSNorm
from ._paged_cache import PagedKVCache
from ._rope import RoPE
from ._rope_scaling import YaRNScaling


class LatentAttention(AbstractAttention):
    """Multi-head latent attention: one short vector per position gives all heads' keys and values.

        latent, r  = kv_down_proj(x)                       split into kv_rank and rope_head_dim
        k[h], v[h] = kv_up_proj(kv_norm(latent))           for every head h
        q[h], p[h] = q_up_proj(q_norm(q_down_proj(x)))     or q_proj(x), for every head h
        score      = scale * (q[h] . k[h] + rope(p[h]) . rope(r))
        y          = o_proj(attention)

    Positions enter through `p` and `r` alone, and `r` is the same for all heads. So a cache holds
    `kv_norm(latent)` and `rope(r)`, which is all that later positions need: `kv_rank +
    rope_head_dim` numbers per position, whatever the number of heads. (DeepSeek-AI, DeepSeek-V2,
    2024, section 2.1.)

    When few positions are appended, scores and sums are computed with the latents themselves:
    `q . (U c) = (U' q) . c`, so the keys and values of heads are never materialised.
    """

    q_proj: AbstractLinear | None
    q_down_proj: AbstractLinear | None
    q_norm: RMSNorm | None
    q_up_proj: AbstractLinear | None
    kv_down_proj: AbstractLinear
    kv_norm: RMSNorm
    kv_up_proj: AbstractLinear
    o_proj: AbstractLinear
    rope: RoPE
    mask: AbstractMask | None
    score_mod: ScoreMod | None
    attention_fn: Callable[..., Array]
    inference: bool
    num_heads: int = eqx.field(static=True)
    nope_head_dim: int = eqx.field(static=True)
    rope_head_dim: int = eqx.field(static=True)
    v_head_dim: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        kv_rank: int,
        nope_head_dim: int,
        rope_head_dim: int,
        v_head_dim: int,
        q_rank: int | None = None,
        rope: RoPE | None = None,
        norm_eps: float = 1e-6,
        mask: AbstractMask | None = None,
        score_mod: ScoreMod | None = None,
        scale: float | None = None,
        use_bias: bool = False,
        qkv_bias: bool | None = None,
        dropout_rate: float = 0.0,
        attention_fn: Callable[..., Array] = dot_product_attention,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `num_heads`: how many heads.
        - `kv_rank`: size of the latent vectors of keys and values.
        - `nope_head_dim`, `rope_head_dim`: sizes of the two parts of a query, without and with
            rotary positions.
        - `v_head_dim`: size of a value.
        - `q_rank`: size of the latent vectors of queries; if not given, there are none.
        - `rope`: rotary positions; interleaved ones if not given. Its scaling must not depend on
            the length of the sequence.
        - `norm_eps`: the `eps` of the norms of the latent vectors.
        - `mask`, `score_mod`: what the architecture imposes; see `dot_product_attention`.
        - `scale`: factor on the scores; if not given, `1 / sqrt(nope_head_dim + rope_head_dim)`,
            times the `score_factor` of a `YaRNScaling`.
        - `use_bias`: whether the maps to the latent vectors, and that of the output, have biases.
        - `qkv_bias`: whether the maps to the latent vectors have biases; `use_bias` if not given.
        - `dropout_rate`, `attention_fn`, `dtype`, `key`: see `Attention`.

        Raises:

        - `ValueError` for sizes out of range.
        """
        rope = RoPE(interleaved=True) if rope is None else rope
        sizes = {
            "num_heads": num_heads,
            "kv_rank": kv_rank,
            "nope_head_dim": nope_head_dim,
            "rope_head_dim": rope_head_dim,
            "v_head_dim": v_head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"LatentAttention: {name}={size} must be at least 1.")
        if rope.needs_length:
            raise ValueError(
                f"LatentAttention: {type(rope.scaling).__name__} depends on the length of the "
                "sequence, but the cache holds keys already rotated; use another scaling."
            )
        check_rate("LatentAttention", "dropout_rate", dropout_rate)
        qkv_bias = use_bias if qkv_bias is None else qkv_bias
        head_dim = nope_head_dim + rope_head_dim
        keys = jax.random.split(key, 5)
        self.q_proj = self.q_down_proj = self.q_norm = self.q_up_proj = None
        if q_rank is None:
            self.q_proj = Linear(d_model, num_heads * head_dim, dtype=dtype, key=keys[0])
        else:
            self.q_down_proj = Linear(d_model, q_rank, use_bias=qkv_bias, dtype=dtype, key=keys[0])
            self.q_norm = RMSNorm(q_rank, eps=norm_eps, dtype=dtype)
            self.q_up_proj = Linear(q_rank, num_heads * head_dim, dtype=dtype, key=keys[1])
        self.kv_down_proj = Linear(
            d_model, kv_rank + rope_head_dim, use_bias=qkv_bias, dtype=dtype, key=keys[2]
        )
        self.kv_norm = RMSNorm(kv_rank, eps=norm_eps, dtype=dtype)
        up = num_heads * (nope_head_dim + v_head_dim)
        self.kv_up_proj = Linear(kv_rank, up, dtype=dtype, key=keys[3])
        out = num_heads * v_head_dim
        self.o_proj = Linear(out, d_model, use_bias=use_bias, dtype=dtype, key=keys[4])
        factor = rope.scaling.score_factor if isinstance(rope.scaling, YaRNScaling) else 1.0
        self.rope = rope
        self.mask = mask
        self.score_mod = score_mod
        self.attention_fn = attention_fn
        self.inference = False
        self.num_heads = num_heads
        self.nope_head_dim = nope_head_dim
        self.rope_head_dim = rope_head_dim
        self.v_head_dim = v_head_dim
        self.scale = factor * head_dim**-0.5 if scale is None else scale
        self.dropout_rate = dropout_rate

    @jax.named_scope("eqx_transformer.nn.LatentAttention")
    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Attends within one sequence; see `AbstractAttention`.

        A `key` is needed if there is dropout, unless `inference` is set.
        """
        at = jnp.arange(x.shape[0], dtype=jnp.int32) if positions is None else positions
        q, latents = self._project(x, at)
        k, v = self._expand(latents)
        return self._output(self._attend(q, k, v, mask, positions, positions, key))

    def init_cache(self, max_len: int, dtype: DTypeLike | None = None) -> KVCache:
        """An empty cache for `max_len` positions, stored in `dtype` or that of the weights.

        Its keys are the normalised latent vectors, followed by the rotary part of the keys; its
        values are empty.

        Raises:

        - `ValueError` for int8: the two parts would share a scale, and the larger would drown the
            other.
        """
        weight = self.kv_down_proj.weight
        dtype = weight.dtype if dtype is None else dtype
        if jnp.dtype(dtype) == jnp.int8:
            raise ValueError(
                "LatentAttention: dtype=int8 has one scale for the latent vector and the rotary "
                "part of the keys, whose sizes differ; use bfloat16."
            )
        return KVCache.init(max_len, 1, weight.shape[-1], dtype, v_dim=0)

    @jax.named_scope("eqx_transformer.nn.LatentAttention.extend")
    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: KVCache | PagedKVCache,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], KVCache | PagedKVCache]:
        """Attends from the next positions of a sequence to all of it so far.

        Arguments, results and errors are those of `Attention.extend`.
        """
        positions = cache.length + jnp.arange(x.shape[0], dtype=jnp.int32)
        q, new = self._project(x, positions)
        cache, latents, _, kv_positions = cache.extended(new, new[..., :0], length)
        mask = WRITTEN if mask is None else WRITTEN & mask
        where = (mask, positions, kv_positions, None)
        rank, seq = self.kv_norm.weight.shape[0], x.shape[0]
        head_dims = self.nope_head_dim + self.v_head_dim
        # Multiplications per cached position and head: with latents, and with keys expanded.
        cheaper = seq * 2 * rank <= seq * head_dims + rank * head_dims
        # An attention function that inspects or changes heads must see the same as in `__call__`.
        if cheaper and not getattr(self.attention_fn, "needs_heads", False):
            w = self.kv_up_proj.weight.astype(x.dtype).reshape(rank, self.num_heads, head_dims)
            w_k, w_v = w[..., : self.nope_head_dim], w[..., self.nope_head_dim :]
            absorbed = jnp.einsum("shn,chn->shc", q[..., : self.nope_head_dim], w_k)
            q = jnp.concatenate([absorbed, q[..., self.nope_head_dim :]], axis=-1)
            # The keys serve as values, of which the last features are ignored: no copy is needed.
            out = self._attend(q, latents, latents, *where)[..., :rank]
            return self._output(jnp.einsum("shc,chv->shv", out, w_v)), cache
        k, v = self._expand(latents)
        return self._output(self._attend(q, k, v, *where)), cache

    def _project(
        self, x: Float[Array, "seq d_model"], positions: Int[Array, " seq"]
    ) -> tuple[Array, Array]:
        """Queries, and what is cached of a position: one key head."""
        if self.q_proj is not None:
            q = self.q_proj(x)
        else:
            assert self.q_down_proj is not None and self.q_norm is not None
            assert self.q_up_proj is not None
            q = self.q_up_proj(self.q_norm(self.q_down_proj(x)))
        q = split_heads(q, q.shape[1] // self.num_heads)
        turned = self.rope(q[..., self.nope_head_dim :], positions)
        q = jnp.concatenate([q[..., : self.nope_head_dim], turned], axis=-1)
        kv, rank = self.kv_down_proj(x), self.kv_norm.weight.shape[0]
        shared = self.rope(kv[:, None, rank:], positions)
        return q, jnp.concatenate([self.kv_norm(kv[:, None, :rank]), shared], axis=-1)

    def _expand(self, latents: Float[Array, "kv_seq 1 latent"]) -> tuple[Array, Array]:
        """The keys and values of every head."""
        rank = self.kv_norm.weight.shape[0]
        kv = self.kv_up_proj(latents[:, 0, :rank])
        kv = split_heads(kv, kv.shape[1] // self.num_heads)
        shape = (*kv.shape[:2], self.rope_head_dim)
        shared = jnp.broadcast_to(latents[..., rank:], shape)
        k = jnp.concatenate([kv[..., : self.nope_head_dim], shared], axis=-1)
        return k, kv[..., self.nope_head_dim :]

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: AbstractMask | None,
        q_positions: Array | None,
        kv_positions: Array | None,
        key: PRNGKeyArray | None,
    ) -> Array:
        dropout_rate = 0.0 if self.inference else self.dropout_rate
        if dropout_rate > 0 and key is None:
            raise RuntimeError(
                f"LatentAttention: dropout_rate={dropout_rate} needs a key; pass key=, or switch "
                "dropout off with eqx.nn.inference_mode(model)."
            )
        if self.mask is not None:
            mask = self.mask if mask is None else self.mask & mask
        return self.attention_fn(
            q,
            k,
            v,
            mask=mask,
            score_mod=self.score_mod,
            scale=self.scale,
            q_positions=q_positions,
            kv_positions=kv_positions,
            dropout_rate=dropout_rate,
            dropout_key=key if dropout_rate > 0 else None,
        )

    def _output(self, out: Float[Array, "seq heads v_head_dim"]) -> Float[Array, "seq d_model"]:
        return self.o_proj(jax.lax.collapse(out, 1))
