import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import AbstractMask, ALiBi, Causal, Compose, Segments, SlidingWindow, SoftCap
from ..nn import (
    MLP,
    AbstractAttention,
    AbstractLinear,
    Attention,
    Embedding,
    GatedMLP,
    LatentAttention,
    LayerNorm,
    LearnedPositions,
    Linear,
    MixtureOfExperts,
    RMSNorm,
    RoPE,
    truncate,
)
from ..nn._dropout import apply_dropout
from ..stacks import (
    AbstractBlock,
    ParallelBlock,
    Residual,
    Stack,
    StackSequence,
    TransformerBlock,
    stack_of_kinds,
)
from ._checks import check_arguments, check_cache
from ._llama_config import LayerKind, LlamaConfig
from ._vocabulary import ACTIVATIONS, GATED, REMAT, attention_fn_of


class LlamaCache(eqx.Module):
    """What a `Llama` keeps of the tokens it has seen.

    Like all caches it is immutable: `extend` returns a new one and leaves the old one valid.
    """

    layers: Any
    """The caches of the layers, as returned by their stack."""
    documents: Int[Array, " max_len"] | None
    """The number of the document at every position, if `document_start_id` is set."""
    length: Int[Array, ""]
    """How many tokens there were."""

    def truncate(self, length: int | Int[Array, ""]) -> "LlamaCache":
        """The cache of the first `length` tokens; see `eqx_transformer.nn.truncate`."""
        layers = truncate(self.layers, length)
        return LlamaCache(layers, self.documents, jnp.asarray(length, jnp.int32))


class Llama(eqx.Module):
    """Decoder-only language models, for one sequence of tokens.

    By default the blocks are those of Llama: pre-norm, with RMSNorm, rotary positions, grouped
    queries and SwiGLU (Touvron et al., 2023). Mistral is this with a `window`, Qwen 3 with
    `qk_norm`; GPT-2, Gemma, DeepSeek and others differ in a few fields each, which their `presets`
    show.

    Layers that are all alike are one `Stack`; of several kinds, a `StackSequence`.
    """

    config: LlamaConfig = eqx.field(static=True)
    embedding: Embedding
    positions: LearnedPositions | None
    embedding_norm: RMSNorm | LayerNorm | None
    embedding_dropout: eqx.nn.Dropout
    stack: Stack | StackSequence
    norm: RMSNorm | LayerNorm
    head: AbstractLinear | None

    def __init__(self, config: LlamaConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.

        Weights have standard deviation `1 / sqrt(fan_in)`; those that write to the residual stream
        are smaller by `1 / sqrt(2 * num_layers)`, so that its variance does not grow with depth.
        """
        check_arguments("Llama", config, LlamaConfig, key)
        embedding_key, stack_key, head_key = jax.random.split(key, 3)
        d_model, dtype = config.d_model, config.param_dtype
        self.config = config
        self.embedding = Embedding(config.vocab_size, d_model, dtype=dtype, key=embedding_key)
        self.positions = None
        if config.positions == "learned":
            positions_key = jax.random.fold_in(embedding_key, 0)
            self.positions = LearnedPositions(
                config.max_len, d_model, dtype=dtype, key=positions_key
            )
        self.embedding_norm = _make_norm(config, d_model) if config.embedding_norm else None
        self.embedding_dropout = eqx.nn.Dropout(config.embedding_dropout_rate)
        self.stack = stack_of_kinds(
            eqx.Partial(_make_block, config),
            config.layer_kinds,
            remat=REMAT[config.remat],
            unroll=config.unroll,
            key=stack_key,
        )
        self.norm = _make_norm(config, d_model)
        self.head = None
        if not config.tie_embeddings:
            self.head = Linear(
                d_model, config.vocab_size, use_bias=config.head_bias, dtype=dtype, key=head_key
            )

    @jax.named_scope("eqx_transformer.models.Llama")
    @unbatched(tokens="seq")
    def __call__(
        self,
        tokens: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq vocab"]:
        """The logits of the next token at every position.

        Arguments:

        - `tokens`: their ids.
        - `mask`: who may attend to whom, combined by `&` with causality: padding, packed documents.
        - `positions`: absolute positions; `0, 1, 2, ...` if not given. Leave them out where the
            default is right.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.

        Raises:

        - `ValueError` if there are more than `max_len` tokens.
        """
        return self.logits(self.hidden(tokens, mask=mask, positions=positions, key=key))

    @unbatched(tokens="seq")
    def hidden(
        self,
        tokens: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """The vectors from which `logits` computes logits. Arguments are those of `__call__`."""
        x, options = self._begin(tokens, mask, positions, key)
        return self._normed(self.stack(x, **options))

    @unbatched(hidden="seq d_model")
    def logits(self, hidden: Float[Array, "seq d_model"]) -> Float[Array, "seq vocab"]:
        """The logits at every position, from what `hidden` returns."""
        logits = self.embedding.attend(hidden) if self.head is None else self.head(hidden)
        cap = self.config.logit_soft_cap
        if cap is None:
            return logits
        wide = logits.astype(accumulation_dtype(logits.dtype))
        return (cap * jnp.tanh(wide / cap)).astype(logits.dtype)

    @jax.named_scope("eqx_transformer.models.Llama.apply_with_stats")
    @unbatched(tokens="seq")
    def apply_with_stats(
        self,
        tokens: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq vocab"], Any]:
        """What `__call__` returns, and the `RouterStats` of the layers that have experts."""
        x, options = self._begin(tokens, mask, positions, key)
        x, stats = self.stack.apply_with_stats(x, **options)
        return self.logits(self._normed(x)), stats

    def init_cache(self, max_len: int | None = None, dtype: DTypeLike | None = None) -> LlamaCache:
        """An empty cache.

        Arguments:

        - `max_len`: how many tokens fit; that of the configuration if not given.
        - `dtype`: what keys and values are stored in; what the model computes in if not given.

        Raises:

        - `ValueError` if `max_len` is more than that of the configuration, or the model is not
            causal.
        """
        if not self.config.causal:
            raise ValueError(
                "Llama: with causal=False earlier positions depend on later ones, so they cannot "
                "be cached; call the model on the whole sequence."
            )
        max_len = self.config.max_len if max_len is None else max_len
        self._check_length("the cache's max_len", max_len)
        layers = self.stack.init_cache(max_len, self.config.dtype if dtype is None else dtype)
        documents = None
        if self.config.document_start_id is not None:
            documents = jnp.zeros(max_len, jnp.int32)
        return LlamaCache(layers, documents, jnp.zeros((), jnp.int32))

    @jax.named_scope("eqx_transformer.models.Llama.extend")
    @unbatched(tokens="seq")
    def extend(
        self,
        tokens: Int[Array, " seq"],
        cache: LlamaCache,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq vocab"], LlamaCache]:
        """The logits at the next positions of a sequence, for prefill (also in parts) and decoding.

        Arguments:

        - `tokens`: the next tokens.
        - `cache`: what `init_cache`, or the last `extend`, returned.
        - `mask`: as in `__call__`, on absolute positions.
        - `length`: how many of the tokens count; the rest is padding, whose logits are meaningless.
            All if not given.

        Returns:

        What `__call__` would give at these positions, and the cache with them added.

        Raises:

        - An error if they do not fit; see `KVCache.append`.
        """
        check_cache("Llama", cache, LlamaCache)
        seq = tokens.shape[0]
        at = cache.length + jnp.arange(seq, dtype=jnp.int32)
        documents = cache.documents
        if documents is not None:
            before = jnp.where(cache.length > 0, documents[cache.length - 1], 0)
            # Nothing is written past the end of the cache; the layers raise the error for that.
            documents = documents.at[at].set(before + self._documents(tokens), mode="drop")
            mask = _both(Segments(documents), mask)
        x, layers = self.stack.extend(
            self._embed(tokens, at, None), cache.layers, mask=mask, length=length
        )
        count = jnp.asarray(seq if length is None else length, jnp.int32)
        return self.logits(self._normed(x)), LlamaCache(layers, documents, cache.length + count)

    def _begin(
        self,
        tokens: Array,
        mask: AbstractMask | None,
        positions: Array | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Array, dict[str, Any]]:
        """The input of the first block, and what else every block is given."""
        self._check_length("seq", tokens.shape[0])
        if self.config.embedding_dropout_rate > 0 and key is not None:
            embedding_key, key = jax.random.split(key)
        else:
            embedding_key = None
        if self.config.document_start_id is not None:
            ids = self._documents(tokens)
            # Masks are indexed by position, which is not the index if positions are given.
            if positions is not None:
                ids = jnp.full(self.config.max_len, -1, jnp.int32).at[positions].set(ids)
            mask = _both(Segments(ids), mask)
        at = jnp.arange(tokens.shape[0], dtype=jnp.int32) if positions is None else positions
        options = {"mask": mask, "positions": positions, "key": key}
        return self._embed(tokens, at, embedding_key), options

    def _embed(self, tokens: Array, positions: Array, key: PRNGKeyArray | None) -> Array:
        x = self.embedding(tokens)
        if self.config.dtype is not None:
            x = x.astype(self.config.dtype)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.positions is not None:
            x = x + self.positions(positions, x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return apply_dropout("Llama", self.embedding_dropout, x, key)

    def _documents(self, tokens: Int[Array, " seq"]) -> Int[Array, " seq"]:
        """How many documents have begun, at every token."""
        return jnp.cumsum(tokens == self.config.document_start_id, dtype=jnp.int32)

    def _normed(self, x: Float[Array, "seq d_model"]) -> Float[Array, "seq d_model"]:
        x = self.norm(x)
        return x if self.config.logits_dtype is None else x.astype(self.config.logits_dtype)

    def _check_length(self, what: str, length: int) -> None:
        if length > self.config.max_len:
            raise ValueError(
                f"Llama: {what}={length} is more than max_len={self.config.max_len}; shorten it, "
                "or raise max_len in the configuration."
            )


def _both(mask: AbstractMask, other: AbstractMask | None) -> AbstractMask:
    return mask if other is None else mask & other


def _make_norm(config: LlamaConfig, size: int) -> RMSNorm | LayerNorm:
    eps, dtype = config.norm_eps, config.param_dtype
    if config.norm == "rms":
        return RMSNorm(size, eps=eps, offset=config.norm_offset, dtype=dtype)
    return LayerNorm(size, eps=eps, use_bias=config.norm_bias, dtype=dtype)


def _make_block(config: LlamaConfig, kind: LayerKind, *, key: PRNGKeyArray) -> AbstractBlock:
    attention_key, mlp_key = jax.random.split(key)
    attention = _make_attention(config, kind, key=attention_key)
    mlp = _make_experts(config, key=mlp_key) if kind.experts else _make_mlp(config, key=mlp_key)
    scale = 1 / math.sqrt(2 * config.num_layers)
    attention, mlp = eqx.tree_at(
        _to_the_residual_stream, (attention, mlp), replace_fn=lambda weight: scale * weight
    )
    d_model, dropout_rate = config.d_model, config.dropout_rate

    def norm(wanted: bool) -> RMSNorm | LayerNorm | None:
        return _make_norm(config, d_model) if wanted else None

    if config.parallel_residual != "none":
        shared = config.parallel_residual == "one_norm"
        residual = Residual(norm(shared), dropout_rate=dropout_rate)
        return ParallelBlock(
            attention,
            mlp,
            residual,
            attention_norm=norm(not shared),
            mlp_norm=norm(not shared),
        )

    def residual_of(post_norm: bool) -> Residual:
        return Residual(
            norm(config.pre_norm), branch_norm=norm(post_norm), dropout_rate=dropout_rate
        )

    return TransformerBlock(
        attention,
        mlp,
        residual_of(config.post_attention_norm),
        residual_of(config.post_mlp_norm),
    )


def _to_the_residual_stream(layers: tuple[Any, Any]) -> list[Any]:
    attention, mlp = layers
    if not isinstance(mlp, MixtureOfExperts):
        return [attention.o_proj.weight, mlp.down_proj.weight]
    experts: Any = mlp.experts
    weights = [attention.o_proj.weight, experts.down_proj.weight]
    shared: Any = mlp.shared_experts
    return weights if shared is None else [*weights, shared.down_proj.weight]


def _make_attention(
    config: LlamaConfig, kind: LayerKind, *, key: PRNGKeyArray
) -> AbstractAttention:
    mask: AbstractMask | None = Causal() if config.causal else None
    if kind.sliding:
        assert config.window is not None
        side = config.window - 1
        mask = _both(SlidingWindow(side, 0 if config.causal else side), mask)
    rope = None
    if config.positions == "rope":
        local = config.rope_local_theta if kind.sliding else None
        rope = RoPE(
            theta=config.rope_theta if local is None else local,
            rotary_dim=None if config.mla is not None else config.rotary_dim,
            interleaved=config.rope_interleaved,
            scaling=config.rope_scaling if local is None else None,
        )
    score_mod = None
    if config.positions == "alibi":
        score_mod = ALiBi(config.num_heads, config.alibi_scale)
    if config.attention_soft_cap is not None:
        cap = SoftCap(config.attention_soft_cap)
        score_mod = cap if score_mod is None else Compose((cap, score_mod))
    bias = config.use_bias
    qkv_bias = bias if config.qkv_bias is None else config.qkv_bias
    o_bias = bias if config.o_bias is None else config.o_bias
    options: dict[str, Any] = {
        "rope": rope,
        "mask": mask,
        "score_mod": score_mod,
        "scale": config.query_scale,
        "qkv_bias": qkv_bias,
        "use_bias": o_bias,
        "dropout_rate": config.dropout_rate,
        "attention_fn": attention_fn_of(config.attention_implementation),
        "dtype": config.param_dtype,
        "key": key,
    }
    if config.mla is not None:
        mla = config.mla
        return LatentAttention(
            config.d_model,
            config.num_heads,
            kv_rank=mla.kv_rank,
            nope_head_dim=mla.nope_head_dim,
            rope_head_dim=mla.rope_head_dim,
            v_head_dim=mla.v_head_dim,
            q_rank=mla.q_rank,
            norm_eps=mla.norm_eps,
            **options,
        )
    return Attention(
        config.d_model,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        qk_norm=eqx.Partial(_make_norm, config) if config.qk_norm else False,
        qk_norm_over=config.qk_norm_over,
        clip=config.clip_qkv,
        sinks=config.sinks,
        **options,
    )


def _make_mlp(config: LlamaConfig, d_ff: int | None = None, *, key: PRNGKeyArray) -> MLP | GatedMLP:
    options: dict[str, Any] = {
        "activation": ACTIVATIONS[config.activation],
        "use_bias": config.use_bias if config.mlp_bias is None else config.mlp_bias,
        "dtype": config.param_dtype,
        "key": key,
    }
    sizes = (config.d_model, config.mlp_dim if d_ff is None else d_ff)
    if config.activation not in GATED:
        return MLP(*sizes, **options)
    return GatedMLP(*sizes, clip=config.mlp_clip, up_offset=config.mlp_up_offset, **options)


def _make_experts(config: LlamaConfig, *, key: PRNGKeyArray) -> MixtureOfExperts:
    moe = config.moe
    assert moe is not None
    d_expert = config.mlp_dim if moe.d_expert is None else moe.d_expert
    shared: Callable[..., Array] | None = None
    if moe.num_shared_experts:
        shared_key = jax.random.fold_in(key, 0)
        shared = _make_mlp(config, moe.num_shared_experts * d_expert, key=shared_key)
    return MixtureOfExperts(
        config.d_model,
        moe.num_experts,
        eqx.Partial(_make_mlp, config, d_expert),
        top_k=moe.experts_per_token,
        scores=moe.scores,
        renormalize=moe.renormalize,
        route_scale=moe.route_scale,
        selection_bias=moe.selection_bias,
        num_groups=moe.num_groups,
        top_groups=moe.top_groups,
        group_score=moe.group_score,
        router_bias=moe.router_bias,
        shared_experts=shared,
        shared_gate=moe.shared_gate,
        dtype=config.param_dtype,
        key=key,
    )
