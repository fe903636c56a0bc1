from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import AbstractLinear
from ..stacks import Source
from ._checks import check_arguments
from ._decoder import TokenCache, extend, init_token_cache, logits
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


class EncoderDecoder(eqx.Module):
    """An encoder for a source, and a decoder that attends to its output.

    Padding is not attended to, in the source or in the target. Both have the same vocabulary and
    share the vectors of tokens; other parts of the embedding (learned positions, a norm) are
    separate. (Vaswani et al., 2017.)

    With settings of its configuration it is T5 (Raffel et al., 2020), BART (Lewis et al., 2020) or
    Marian (Junczys-Dowmunt et al., 2018). `generate` and `beam_search` continue a target from the
    cache that `init_cache(source)` returns.
    """

    config: TransformerConfig = eqx.field(static=True)
    embedding: TokenEmbedding
    encoder: AnyStack
    encoder_norm: Any
    decoder_embedding: TokenEmbedding
    """Without the vectors of tokens, which are those of `embedding`."""
    decoder: AnyStack
    decoder_norm: Any
    head: AbstractLinear | None
    logit_bias: Float[Array, " vocab"] | None

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers. The decoder has `num_decoder_layers`.
        - `key`: for the initial weights.
        """
        check_arguments("EncoderDecoder", config, TransformerConfig, key)
        check_no_encoder_fields("EncoderDecoder", config)
        keys = jax.random.split(key, 5)
        num_layers = config.num_layers
        if config.num_decoder_layers is not None:
            num_layers = config.num_decoder_layers
        self.config = config
        self.embedding = TokenEmbedding(config, key=keys[0])
        self.encoder = make_stack(config, config.num_layers, causal=False, key=keys[1])
        self.encoder_norm = make_norm(config, config.d_model) if config.final_norm else None
        table = self.embedding.embedding
        own = TokenEmbedding(config, table=table, key=keys[4])
        self.decoder_embedding = eqx.tree_at(lambda x: x.embedding, own, None)
        self.decoder = make_stack(config, num_layers, causal=True, cross=True, key=keys[2])
        self.decoder_norm = make_norm(config, config.d_model) if config.final_norm else None
        self.head, self.logit_bias = make_head(config, key=keys[3])

    @jax.named_scope("eqx_transformer.models.EncoderDecoder")
    @unbatched(source="source_seq", target="seq")
    def __call__(
        self,
        source: Int[Array, " source_seq"],
        target: Int[Array, " seq"],
        *,
        source_mask: AbstractMask | None = None,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq vocab"]:
        """The logits of the next target token at every position of the target.

        Arguments:

        - `source`: tokens the encoder reads.
        - `target`: tokens the decoder reads: the target shifted by one, after a token that begins
            it.
        - `source_mask`: who may attend to whom within the source, and from the target to the
            source, combined by `&` with that of padding: `Padding(valid)` if the configuration has
            no `pad_token_id`.
        - `mask`: who may attend to whom within the target, combined by `&` with causality and
            padding.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.

        Raises:

        - `ValueError` if there are more than `max_len` tokens.
        """
        options = {"source_mask": source_mask, "mask": mask, "key": key}
        return self.apply_with_stats(source, target, **options)[0]

    @unbatched(source="source_seq", target="seq")
    def apply_with_stats(
        self,
        source: Int[Array, " source_seq"],
        target: Int[Array, " seq"],
        *,
        source_mask: AbstractMask | None = None,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq vocab"], tuple[Any, Any]]:
        """What `__call__` returns, and the `RouterStats` of encoder and decoder, if any."""
        keys = (None, None) if key is None else jax.random.split(key)
        encoded, encoder_stats = self._encode(source, source_mask, keys[0])
        x, stats = encode(*self._target, target, context=encoded, mask=mask, key=keys[1])
        return self._logits(x), (encoder_stats, stats)

    @unbatched(source="source_seq")
    def encode(
        self,
        source: Int[Array, " source_seq"],
        *,
        source_mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Source:
        """The encoded source, and the mask of its padding."""
        return self._encode(source, source_mask, key)[0]

    def _encode(
        self, source: Array, mask: AbstractMask | None, key: PRNGKeyArray | None
    ) -> tuple[Source, Any]:
        parts = (self.embedding, self.encoder, self.encoder_norm)
        memory, stats = encode(*parts, source, mask=mask, key=key)
        return Source(memory, self.embedding.mask(source, mask)), stats

    @property
    def _target(self) -> tuple[TokenEmbedding, Any, Any]:
        """The layers that a target goes through."""
        embedding = eqx.tree_at(
            lambda x: x.embedding,
            self.decoder_embedding,
            self.embedding.embedding,
            is_leaf=lambda x: x is None,
        )
        return embedding, self.decoder, self.decoder_norm

    def _logits(self, x: Array) -> Array:
        table = self.embedding.embedding
        return logits(table, self.head, self.logit_bias, x, scaled=self.config.scale_output)

    @unbatched(source="source_seq")
    def init_cache(
        self,
        source: Int[Array, " source_seq"],
        max_len: int | None = None,
        dtype: DTypeLike | None = None,
        *,
        source_mask: AbstractMask | None = None,
    ) -> TokenCache:
        """An empty cache for the target. The source is encoded, and projected for every layer.

        Arguments:

        - `source`: tokens the encoder reads. Dropout is off.
        - `max_len`: how many target tokens fit; `cache_max_len` or `max_len` of the configuration
            if not given.
        - `dtype`: what keys and values are stored in; that of the weights if not given.
        - `source_mask`: as in `__call__`.
        """
        encoded = eqx.nn.inference_mode(self).encode(source, source_mask=source_mask)
        parts = (self.config, self.embedding, self.decoder)
        return init_token_cache(*parts, max_len, dtype, context=encoded)

    @jax.named_scope("eqx_transformer.models.EncoderDecoder.extend")
    @unbatched(tokens="seq")
    def extend(
        self,
        tokens: Int[Array, " seq"],
        cache: TokenCache,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq vocab"], TokenCache]:
        """The logits at the next positions of the target; see `TransformerDecoder.extend`."""
        x, cache = extend(*self._target, tokens, cache, mask=mask, length=length)
        return self._logits(x), cache
