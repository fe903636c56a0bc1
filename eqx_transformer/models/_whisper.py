import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import AbstractLinear, Convolution, LearnedPositions, SinusoidalPositions
from ..nn._dropout import apply_dropout
from ..stacks import Source
from ._checks import check_arguments, check_sizes
from ._config import AbstractConfig
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
from ._vocabulary import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhisperConfig(AbstractConfig):
    """The numbers that make a `Whisper`.

    Arguments:

    - `num_mel_bins`: how many features a frame of sound has.
    - `max_source_len`: how many positions the encoder has, each of two frames.
    - `transformer`: of the encoder and the decoder, as for an `EncoderDecoder`; its positions,
        `max_len` and embeddings are the decoder's.
    """

    num_mel_bins: int = 80
    max_source_len: int = 1500
    transformer: TransformerConfig

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(self, "num_mel_bins", "max_source_len")
        check_no_encoder_fields("WhisperConfig", self.transformer)
        if self.transformer.positions not in ("learned", "sinusoidal", "sinusoidal_halves", "none"):
            raise ValueError(
                f"WhisperConfig: positions={self.transformer.positions!r} would change attention "
                "of the encoder, whose positions are vectors; use 'learned'."
            )

    @property
    def max_len(self) -> int:
        """The longest sequence of the decoder."""
        return self.transformer.max_len


class Whisper(eqx.Module):
    """Speech to text: an encoder for sound, and a decoder of tokens that attends to its output.

        x = gelu(conv2(gelu(conv1(features)))) + positions      half as many positions as frames
        memory = encoder_norm(encoder(x))

    Sound is a log-mel spectrogram `[num_mel_bins, frames]` of exactly `2 * max_source_len` frames,
    padded with silence: there is no mask. (Radford et al., Robust Speech Recognition via
    Large-Scale Weak Supervision, 2022.)

    `generate` and `beam_search` continue a target from the cache that `init_cache(features)`
    returns.
    """

    config: WhisperConfig = eqx.field(static=True)
    conv1: Convolution
    conv2: Convolution
    positions: LearnedPositions
    encoder_dropout: eqx.nn.Dropout
    encoder: AnyStack
    encoder_norm: Any
    embedding: TokenEmbedding
    decoder: AnyStack
    decoder_norm: Any
    head: AbstractLinear | None
    logit_bias: Float[Array, " vocab"] | None

    def __init__(self, config: WhisperConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights. The positions of the encoder begin as sines and cosines.
        """
        check_arguments("Whisper", config, WhisperConfig, key)
        keys = jax.random.split(key, 7)
        numbers = config.transformer
        d_model = numbers.d_model
        num_layers = numbers.num_layers
        self.config = config
        self.conv1 = Convolution(config.num_mel_bins, d_model, key=keys[0])
        self.conv2 = Convolution(d_model, d_model, stride=2, key=keys[1])
        positions = LearnedPositions(config.max_source_len, d_model, key=keys[2])
        sines = SinusoidalPositions(d_model, halves=True)(jnp.arange(config.max_source_len))
        self.positions = eqx.tree_at(lambda x: x.table.weight, positions, sines)
        self.encoder_dropout = eqx.nn.Dropout(numbers.dropout_rate)
        self.encoder = make_stack(numbers, num_layers, causal=False, key=keys[3])
        self.encoder_norm = make_norm(numbers, d_model) if numbers.final_norm else None
        self.embedding = TokenEmbedding(numbers, key=keys[4])
        num_layers = numbers.num_decoder_layers or num_layers
        self.decoder = make_stack(numbers, num_layers, causal=True, cross=True, key=keys[5])
        self.decoder_norm = make_norm(numbers, d_model) if numbers.final_norm else None
        self.head, self.logit_bias = make_head(numbers, key=keys[6])

    @jax.named_scope("eqx_transformer.models.Whisper")
    @unbatched(features="mels frames", target="seq")
    def __call__(
        self,
        features: Float[Array, "mels frames"],
        target: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq vocab"]:
        """The logits of the next token at every position of the target.

        Arguments:

        - `features`: the log-mel spectrogram.
        - `target`: tokens the decoder reads.
        - `mask`: who may attend to whom within the target, combined by `&` with causality and
            padding.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.

        Raises:

        - `ValueError` if there are more than `max_len` tokens, or the spectrogram is not of the
            size the configuration says.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        context = self.encode(features, key=keys[0])
        x, _ = encode(*self._target, target, context=context, mask=mask, key=keys[1])
        return self._logits(x)

    @unbatched(features="mels frames")
    def encode(
        self, features: Float[Array, "mels frames"], *, key: PRNGKeyArray | None = None
    ) -> Source:
        """The encoded sound; `key` is for dropout."""
        expected = (self.config.num_mel_bins, 2 * self.config.max_source_len)
        if features.shape != expected:
            raise ValueError(
                f"Whisper: features have shape {features.shape} but must be [num_mel_bins, 2 * "
                f"max_source_len] = {expected}; pad with silence, or cut."
            )
        keys = (None, None) if key is None else jax.random.split(key)
        gelu = ACTIVATIONS["gelu"]
        x = gelu(self.conv2(gelu(self.conv1(features.T))))
        x = x + self.positions(jnp.arange(x.shape[0], dtype=jnp.int32), x.dtype)
        x = apply_dropout("Whisper", self.encoder_dropout, x, keys[0])
        x = self.encoder(x, key=keys[1])
        return Source(x if self.encoder_norm is None else self.encoder_norm(x))

    @unbatched(features="mels frames")
    def init_cache(
        self,
        features: Float[Array, "mels frames"],
        max_len: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> TokenCache:
        """An empty cache for the target. The sound is encoded, and projected for every layer.

        Arguments:

        - `features`: the log-mel spectrogram. Dropout is off.
        - `max_len`: how many target tokens fit; `cache_max_len` or `max_len` of the configuration
            if not given.
        - `dtype`: what keys and values are stored in; that of the weights if not given.
        """
        context = eqx.nn.inference_mode(self).encode(features)
        parts = (self.config.transformer, self.embedding, self.decoder)
        return init_token_cache(*parts, max_len, dtype, context=context)

    @jax.named_scope("eqx_transformer.models.Whisper.extend")
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

    @property
    def _target(self) -> tuple[TokenEmbedding, Any, Any]:
        """The layers that a target goes through."""
        return self.embedding, self.decoder, self.decoder_norm

    def _logits(self, x: Array) -> Array:
        table, numbers = self.embedding.embedding, self.config.transformer
        return logits(table, self.head, self.logit_bias, x, scaled=numbers.scale_output)
