import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask, Prefix, ScoreMod, dot_product_attention, lookback
from ._axial_rope import AxialRoPE
from ._cache import KVCache
from ._checks import check_rate
from ._linear import AbstractLinear, Linear
from ._norm import RMSNorm
from ._paged_cache import PagedKVCache
from ._ring_cache import RingCache
from ._rope import RoPE

Norm = Callable[[Array], Array]

# Empty slots of a cache are at position -1. This mask excludes them without holding an array: masks
# with arrays make attention rewrite keys and values, here the whole cache at every token.
WRITTEN = ~Prefix(0)


class AbstractAttention(eqx.Module):
    """What a block requires of a self-attention layer."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Attends within one sequence.

        Arguments:

        - `x`: the sequence.
        - `mask`: who may attend to whom, combined by `&` with the layer's own mask.
        - `positions`: absolute positions; `0, 1, 2, ...` if not given.
        - `key`: for dropout.
        """

    @abc.abstractmethod
    def init_cache(self, max_len: int, dtype: DTypeLike | None = None) -> Any:
        """An empty cache for `max_len` positions."""

    @abc.abstractmethod
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """Attends from the next positions of a sequence to all of it so far.

        Arguments:

        - `x`: the next positions.
        - `cache`: what is kept of the earlier ones.
        - `mask`: as in `__call__`, on absolute positions.
        - `length`: how many positions of `x` count; the rest is padding. All if not given.

        Returns:

        What `__call__` would give at these positions, and the cache with them added.
        """


class Attention(AbstractAttention):
    """Multi-head self-attention with grouped queries.

        q, k, v = q_proj(x), k_proj(x), v_proj(x)              clipped with clip, split into heads
        q, k = rope(q_norm(q)), rope(k_norm(k))                 where given
        v = v * sigmoid(gate_proj(x))                           with gate="value"
        h = attention(q, k, v)                                  with sinks
        h = h * sigmoid(gate_proj(x))                           with gate="output"
        y = o_proj(h)

    `mask` and `score_mod` belong to the architecture (`Causal()` makes a decoder); what depends on
    the data (padding, documents) is passed in the call and combined with `&`. (Vaswani et al.,
    2017; grouped queries: Ainslie et al., 2023; normalised queries and keys: Henry et al., 2020;
    gates: Qiu et al., Gated Attention for Large Language Models, 2025; sinks: Xiao et al., 2024.)

    With a `rope` whose angles depend on the length of the sequence (see `RoPE`), cached keys are
    rotated when they are read, all of them by the angles for the length so far.
    """

    q_proj: AbstractLinear
    k_proj: AbstractLinear
    v_proj: AbstractLinear
    o_proj: AbstractLinear
    gate_proj: AbstractLinear | None
    q_norm: Norm | None
    k_norm: Norm | None
    sinks: Float[Array, " heads"] | None
    rope: RoPE | AxialRoPE | None
    mask: AbstractMask | None
    score_mod: ScoreMod | None
    attention_fn: Callable[..., Array]
    inference: bool
    head_dim: int = eqx.field(static=True)
    scale: float | None = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)
    gate: Literal["output", "value"] | None = eqx.field(static=True)
    qk_norm_over: Literal["head", "projection"] = eqx.field(static=True)
    clip: float | int | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: RoPE | AxialRoPE | None = None,
        qk_norm: bool | Callable[[int], Norm] = False,
        qk_norm_over: Literal["head", "projection"] = "head",
        norm_eps: float = 1e-5,
        mask: AbstractMask | None = None,
        score_mod: ScoreMod | None = None,
        scale: float | None = None,
        gate: Literal["output", "value"] | None = None,
        sinks: bool = False,
        clip: float | int | None = None,
        use_bias: bool = False,
        qkv_bias: bool | None = None,
        k_bias: bool | None = None,
        dropout_rate: float = 0.0,
        attention_fn: Callable[..., Array] = dot_product_attention,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `num_heads`: how many query heads.
        - `num_kv_heads`: how many key and value heads, each shared by `num_heads / num_kv_heads`
            query heads; `num_heads` if not given.
        - `head_dim`: size of a head; `d_model / num_heads` if not given.
        - `rope`: rotary positions for queries and keys; an `AxialRoPE` for coordinates in space,
            which every call must then be given as `coordinates`.
        - `qk_norm`: whether to normalise queries and keys, by an `RMSNorm` or by the layer that
            `qk_norm(size)` returns.
        - `qk_norm_over`: whether each head is normalised on its own, with one weight for all, or
            the whole projection before it is split into heads (OLMo 2, 2025).
        - `norm_eps`: the `eps` of these norms, where they are `RMSNorm`s.
        - `mask`, `score_mod`: what the architecture imposes; see `dot_product_attention`.
        - `scale`: factor on the scores; `1 / sqrt(head_dim)` if not given.
        - `gate`: an elementwise sigmoid gate, computed from the input: on the output of attention
            or on the values.
        - `sinks`: whether every head has a learned score, initially zero, that takes part in the
            softmax but has no value; see `dot_product_attention`.
        - `clip`: queries, keys and values are clipped to `[-clip, clip]` after projection.
        - `use_bias`: whether the projections have biases.
        - `qkv_bias`: whether those of queries, keys and values have; `use_bias` if not given.
        - `k_bias`: whether that of keys has one; like that of queries if not given.
        - `dropout_rate`: the probability with which an attention weight is dropped.
        - `attention_fn`: `dot_product_attention`, or a function with its signature. Choose how it
            is computed with `eqx.Partial(dot_product_attention, implementation="chunked")`.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weights.

        Raises:

        - `ValueError` for sizes that do not divide each other.
        """
        num_kv_heads, head_dim = head_sizes("Attention", d_model, num_heads, num_kv_heads, head_dim)
        check_rate("Attention", "dropout_rate", dropout_rate)
        if gate not in (None, "output", "value"):
            raise ValueError(f"Attention: gate={gate!r} must be None, 'output' or 'value'.")
        if qk_norm_over not in ("head", "projection"):
            raise ValueError(
                f"Attention: qk_norm_over={qk_norm_over!r} must be 'head' or 'projection'."
            )
        if clip is not None and not clip > 0:
            raise ValueError(f"Attention: clip={clip} must be positive; None is no limit.")
        qkv_bias = use_bias if qkv_bias is None else qkv_bias
        k_bias = qkv_bias if k_bias is None else k_bias
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        keys = jax.random.split(key, 5)
        self.q_proj = Linear(d_model, q_size, use_bias=qkv_bias, dtype=dtype, key=keys[0])
        self.k_proj = Linear(d_model, kv_size, use_bias=k_bias, dtype=dtype, key=keys[1])
        self.v_proj = Linear(d_model, kv_size, use_bias=qkv_bias, dtype=dtype, key=keys[2])
        self.o_proj = Linear(q_size, d_model, use_bias=use_bias, dtype=dtype, key=keys[3])
        gated = {None: None, "output": q_size, "value": kv_size}[gate]
        self.gate_proj = None
        if gated is not None:
            self.gate_proj = Linear(d_model, gated, use_bias=use_bias, dtype=dtype, key=keys[4])
        self.q_norm = self.k_norm = None
        if qk_norm:
            make_norm = eqx.Partial(RMSNorm, eps=norm_eps, dtype=dtype)
            make_norm = make_norm if qk_norm is True else qk_norm
            per_head = qk_norm_over == "head"
            self.q_norm = make_norm(head_dim if per_head else q_size)
            self.k_norm = make_norm(head_dim if per_head else kv_size)
        self.sinks = None
        if sinks:
            self.sinks = jnp.zeros((num_heads,), jnp.result_type(float) if dtype is None else dtype)
        self.rope = rope
        self.mask = mask
        self.score_mod = score_mod
        self.attention_fn = attention_fn
        self.inference = False
        self.head_dim = head_dim
        self.scale = scale
        self.dropout_rate = dropout_rate
        self.gate = gate
        self.qk_norm_over = qk_norm_over
        self.clip = clip

    @jax.named_scope("eqx_transformer.nn.Attention")
    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        coordinates: Float[Array, "seq dims"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Attends within one sequence.

        Arguments:

        - `x`: the sequence.
        - `mask`: who may attend to whom, combined by `&` with the layer's own mask.
        - `positions`: absolute positions, for `rope`, masks and score mods; `0, 1, 2, ...` if not
            given. Leave them out where the default is right.
        - `coordinates`: where the tokens are in space, for an `AxialRoPE`.
        - `key`: for dropout; needed if there is any, unless `inference` is set.
        """
        q, k, v = self._project(x)
        q, k = self._place(q, k, coordinates)
        if isinstance(self.rope, RoPE):
            at = jnp.arange(x.shape[0], dtype=jnp.int32) if positions is None else positions
            length = x.shape[0] if positions is None else None
            q, k = self.rope(q, at, length=length), self.rope(k, at, length=length)
        return self._attend(x, q, k, v, mask, positions, positions, key)

    def init_cache(self, max_len: int, dtype: DTypeLike | None = None) -> KVCache | RingCache:
        """An empty cache for `max_len` positions, stored in `dtype` or that of the weights.

        If `mask` is a window smaller than that, the cache holds only the window. A `dtype`
        of int8 takes the least memory; see `Int8Vectors`.
        """
        dtype = self.k_proj.weight.dtype if dtype is None else dtype
        num_kv_heads = self.k_proj.weight.shape[-1] // self.head_dim
        before = lookback(self.mask)
        if before is not None and RingCache.saves_memory(before + 1, max_len):
            return RingCache.init(before + 1, num_kv_heads, self.head_dim, dtype)
        return KVCache.init(max_len, num_kv_heads, self.head_dim, dtype)

    @jax.named_scope("eqx_transformer.nn.Attention.extend")
    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: KVCache | RingCache | PagedKVCache,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
        coordinates: Float[Array, "seq dims"] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], KVCache | RingCache | PagedKVCache]:
        """Attends from the next positions of a sequence to all of it so far.

        Arguments:

        - `x`: the next positions: a prompt, a part of one, or one token.
        - `cache`: the keys and values of the earlier ones.
        - `mask`: as in `__call__`, on absolute positions `0..max_len-1`.
        - `length`: how many positions of `x` count; the rest is padding, whose output is
            meaningless. All if not given.
        - `coordinates`: as in `__call__`, of these positions.

        Returns:

        What `__call__` would give at these positions, and the cache with them added.

        Raises:

        - An error if they do not fit; see `KVCache.append`.
        """
        positions = cache.length + jnp.arange(x.shape[0], dtype=jnp.int32)
        q, k, v = self._project(x)
        q, k = self._place(q, k, coordinates)
        on_read = isinstance(self.rope, RoPE) and self.rope.needs_length
        if isinstance(self.rope, RoPE) and not on_read:
            q, k = self.rope(q, positions), self.rope(k, positions)
        cache, k, v, kv_positions = cache.extended(k, v, length)
        if isinstance(self.rope, RoPE) and on_read:
            q = self.rope(q, positions, length=cache.length)
            k = self.rope(k, kv_positions, length=cache.length)
        mask = WRITTEN if mask is None else WRITTEN & mask
        attention_fn = None
        if isinstance(cache, PagedKVCache) and not on_read:
            attention_fn = cache.read_in_place(self.attention_fn, k.dtype)
        where = (mask, positions, kv_positions, None)
        return self._attend(x, q, k, v, *where, attention_fn=attention_fn), cache

    def _project(self, x: Float[Array, "seq d_model"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values, not yet rotated to their positions."""
        q, k, v = (p(x) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.clip is not None:
            q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
        if self.gate_proj is not None and self.gate == "value":
            v = v * jax.nn.sigmoid(self.gate_proj(x))
        if self.qk_norm_over != "head" and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (split_heads(y, self.head_dim) for y in (q, k, v))
        if self.qk_norm_over == "head" and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _place(
        self, q: Array, k: Array, coordinates: Float[Array, "seq dims"] | None
    ) -> tuple[Array, Array]:
        """Rotates queries and keys to their coordinates in space, if there is an `AxialRoPE`."""
        if (coordinates is not None) != isinstance(self.rope, AxialRoPE):
            raise ValueError(
                "Attention: there are coordinates, but no AxialRoPE to make use of them; leave "
                "them out, or build the layer with rope=AxialRoPE(...)."
                if coordinates is not None
                else "Attention: rope is an AxialRoPE, so coordinates must be given: in a stack, "
                "by context=Condition(coordinates=...)."
            )
        if isinstance(self.rope, AxialRoPE) and coordinates is not None:
            return self.rope(q, coordinates), self.rope(k, coordinates)
        return q, k

    def _attend(
        self,
        x: Array,
        q: Array,
        k: Array,
        v: Array,
        mask: AbstractMask | None,
        q_positions: Array | None,
        kv_positions: Array | None,
        key: PRNGKeyArray | None,
        *,
        attention_fn: Callable[..., Array] | None = None,
    ) -> Array:
        dropout_rate = 0.0 if self.inference else self.dropout_rate
        if dropout_rate > 0 and key is None:
            raise RuntimeError(
                f"Attention: dropout_rate={dropout_rate} needs a key; pass key=, or switch dropout "
                "off with eqx.nn.inference_mode(model)."
            )
        if self.mask is not None:
            mask = self.mask if mask is None else self.mask & mask
        # Not every attention function accepts sinks.
        sinks = {} if self.sinks is None else {"sinks": self.sinks}
        out = (self.attention_fn if attention_fn is None else attention_fn)(
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
            **sinks,
        )
        out = jax.lax.collapse(out, 1)
        if self.gate_proj is not None and self.gate == "output":
            out = out * jax.nn.sigmoid(self.gate_proj(x))
        return self.o_proj(out)


def head_sizes(
    owner: str, d_model: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """`num_kv_heads` and `head_dim`, completed and checked."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = {"d_model": d_model, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    if head_dim is not None:
        sizes["head_dim"] = head_dim
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{owner}: {name}={size} must be at least 1.")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{owner}: num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}; "
            "every key head must serve the same number of query heads."
        )
    if head_dim is None:
        if d_model % num_heads:
            raise ValueError(
                f"{owner}: d_model={d_model} is not a multiple of num_heads={num_heads}; "
                "pass head_dim explicitly."
            )
        head_dim = d_model // num_heads
    return num_kv_heads, head_dim


def split_heads(
    x: Float[Array, "seq features"], head_dim: int
) -> Float[Array, "seq heads head_dim"]:
    """The vector of each head."""
    # Not -1 for their number, which an empty sequence would leave open.
    return x.reshape(x.shape[0], x.shape[1] // head_dim, head_dim)
