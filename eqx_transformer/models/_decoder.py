from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask, Padding
from ..nn import AbstractLinear, Embedding, truncate
from ..nn._along_last import along_last
from ._checks import check_arguments, check_cache
from ._encoder import encode
from ._token_embedding import TokenEmbedding
from ._transformer_config import TransformerConfig
from ._transformer_parts import (
    AnyStack,
    check_no_encoder_fields,
    make_head,
    make_norm,
    make_stack,
)


class TokenCache(eqx.Module):
    """What a decoder keeps of the tokens it has seen: its layers' caches, and which are valid."""

    layers: Any
    valid: Bool[Array, " max_len"] | None
    length: Int[Array, ""]

    def truncate(self, length: int | Int[Array, ""]) -> "TokenCache":
        """The cache of the first `length` tokens; see `eqx_transformer.nn.truncate`."""
        layers = truncate(self.layers, length)
        return TokenCache(layers, self.valid, jnp.asarray(length, jnp.int32))


class TransformerDecoder(eqx.Module):
    """A transformer that reads tokens from left to right: logits of the next at every position.

    Padding tokens are not attended to. (Radford et al., GPT, 2018.)
    """

    config: TransformerConfig = eqx.field(static=True)
    embedding: TokenEmbedding
    stack: AnyStack
    norm: Any
    head: AbstractLinear | None
    logit_bias: Float[Array, " vocab"] | None

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("TransformerDecoder", config, TransformerConfig, key)
        check_no_encoder_fields("TransformerDecoder", config)
        embedding_key, stack_key, head_key = jax.random.split(key, 3)
        self.config = config
        self.embedding = TokenEmbedding(config, key=embedding_key)
        self.stack = make_stack(config, config.num_layers, causal=True, key=stack_key)
        self.norm = make_norm(config, config.d_model) if config.final_norm else None
        self.head, self.logit_bias = make_head(config, key=head_key)

    @jax.named_scope("eqx_transformer.models.TransformerDecoder")
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
        - `mask`: who may attend to whom, combined by `&` with causality and padding.
        - `positions`: absolute positions; `0, 1, 2, ...` if not given.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.

        Raises:

        - `ValueError` if there are more than `max_len` tokens.
        """
        options = {"mask": mask, "positions": positions, "key": key}
        return self.apply_with_stats(tokens, **options)[0]

    @unbatched(tokens="seq")
    def apply_with_stats(
        self,
        tokens: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq vocab"], Any]:
        """What `__call__` returns, and the `RouterStats` of each layer if there are experts."""
        parts = (self.embedding, self.stack, self.norm)
        x, stats = encode(*parts, tokens, mask=mask, positions=positions, key=key)
        return self._logits(x), stats

    def init_cache(self, max_len: int | None = None, dtype: DTypeLike | None = None) -> TokenCache:
        """An empty cache.

        Arguments:

        - `max_len`: how many tokens fit; `cache_max_len` or `max_len` of the configuration if not
            given.
        - `dtype`: what keys and values are stored in; that of the weights if not given.

        Raises:

        - `ValueError` if `max_len` is more than that of the configuration.
        """
        return init_token_cache(self.config, self.embedding, self.stack, max_len, dtype)

    @jax.named_scope("eqx_transformer.models.TransformerDecoder.extend")
    @unbatched(tokens="seq")
    def extend(
        self,
        tokens: Int[Array, " seq"],
        cache: TokenCache,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq vocab"], TokenCache]:
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
        parts = (self.embedding, self.stack, self.norm)
        x, cache = extend(*parts, tokens, cache, mask=mask, length=length)
        return self._logits(x), cache

    def _logits(self, x: Array) -> Array:
        table = self.embedding.embedding
        return logits(table, self.head, self.logit_bias, x, scaled=self.config.scale_output)


def logits(
    table: Embedding,
    head: AbstractLinear | None,
    bias: Float[Array, " vocab"] | None,
    x: Float[Array, "seq d_model"],
    *,
    scaled: bool = False,
) -> Float[Array, "seq vocab"]:
    """The logits of all tokens, by the head or, where there is none, by the embedding."""
    if scaled:
        x = x * x.shape[-1] ** -0.5
    scores = table.attend(x) if head is None else head(x)
    if bias is not None:
        scores = scores + along_last("head", bias, scores)
    return scores


def init_token_cache(
    config: TransformerConfig,
    embedding: TokenEmbedding,
    stack: Any,
    max_len: int | None,
    dtype: DTypeLike | None,
    context: Any = None,
) -> TokenCache:
    """An empty cache of `max_len` tokens, or as many as the configuration says."""
    if max_len is None:
        max_len = config.max_len if config.cache_max_len is None else config.cache_max_len
    embedding.check_length("the cache's max_len", max_len)
    layers = stack.init_cache(max_len, dtype, context=context)
    valid = None if embedding.pad_token_id is None else jnp.zeros(max_len, bool)
    return TokenCache(layers, valid, jnp.zeros((), jnp.int32))


def extend(
    embedding: TokenEmbedding,
    stack: Any,
    norm: Any,
    tokens: Int[Array, " seq"],
    cache: TokenCache,
    *,
    mask: AbstractMask | None,
    length: int | Int[Array, ""] | None,
) -> tuple[Float[Array, "seq d_model"], TokenCache]:
    """`encode` at the next positions, given a cache of the earlier ones."""
    check_cache("Decoder", cache, TokenCache)
    seq = tokens.shape[0]
    index = cache.length + jnp.arange(seq, dtype=jnp.int32)
    valid, new = cache.valid, embedding.valid(tokens)
    if valid is not None and new is not None:
        # Nothing is written past the end of the cache; the layers raise the error for that.
        valid = valid.at[index].set(new, mode="drop")
        mask = Padding(valid) if mask is None else Padding(valid) & mask
    x, layers = stack.extend(embedding(tokens, index), cache.layers, mask=mask, length=length)
    count = jnp.asarray(seq if length is None else length, jnp.int32)
    return x if norm is None else norm(x), TokenCache(layers, valid, cache.length + count)
