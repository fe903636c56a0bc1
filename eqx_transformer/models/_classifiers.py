from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask, Padding
from ..nn import AbstractLinear, Linear
from ._checks import check_arguments
from ._decoder import logits
from ._encoder import TransformerEncoder, pool
from ._transformer_config import TransformerConfig
from ._transformer_parts import make_norm
from ._vocabulary import ACTIVATIONS

Transform = Literal["none", "linear", "linear_norm"]
"""What comes before the last linear map of a classifier: nothing, or a linear map and the
activation, or these and a norm."""


class HeadTransform(eqx.Module):
    """A map before an output head: `norm(activation(linear(x)))`, the norm where there is one.

    (Devlin et al., BERT, 2018, in the code that was published.)
    """

    linear: AbstractLinear
    norm: Any
    activation: Callable[[Array], Array]

    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch features"]:
        """Maps the last axis of `x`."""
        x = self.activation(self.linear(x))
        return x if self.norm is None else self.norm(x)


def _make_transform(
    config: TransformerConfig, how: Transform, size: int, *, key: PRNGKeyArray
) -> HeadTransform | None:
    if how not in get_args(Transform):
        raise ValueError(f"transform={how!r} is not one of {get_args(Transform)}.")
    if how == "none":
        return None
    linear = Linear(config.d_model, size, use_bias=config.use_bias, key=key)
    norm = make_norm(config, size) if how == "linear_norm" else None
    return HeadTransform(linear, norm, ACTIVATIONS[config.activation])


class SequenceClassifier(eqx.Module):
    """An encoder and a linear map of its pooled output: one score per class for a sequence."""

    encoder: TransformerEncoder
    transform: HeadTransform | None
    head: AbstractLinear
    pooling: Literal["first", "mean", "pooler"] = eqx.field(static=True)

    def __init__(
        self,
        config: TransformerConfig,
        num_classes: int,
        *,
        pooling: Literal["first", "mean", "pooler"] = "mean",
        transform: Transform = "none",
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `config`: of the encoder.
        - `num_classes`: how many scores.
        - `pooling`: the vector that represents a sequence: see `pool`, or the encoder's own pooler.
            For `"first"` and `"pooler"`, begin every sequence with a special token.
        - `transform`: what comes before the last linear map.
        - `key`: for the initial weights.

        Raises:

        - `ValueError` if `pooling` and the `pooler` of the configuration do not fit.
        """
        check_arguments("SequenceClassifier", config, TransformerConfig, key)
        if pooling not in ("first", "mean", "pooler"):
            raise ValueError(
                f"SequenceClassifier: pooling={pooling!r} must be 'first', 'mean' or 'pooler'."
            )
        if (pooling == "pooler") != config.pooler:
            raise ValueError(
                f"SequenceClassifier: pooling={pooling!r} and pooler={config.pooler} in the "
                "configuration do not fit: 'pooler' needs one, and the others have no use for it."
            )
        encoder_key, head_key, transform_key = jax.random.split(key, 3)
        d_model = config.d_model
        self.encoder = TransformerEncoder(config, key=encoder_key)
        self.transform = _make_transform(config, transform, d_model, key=transform_key)
        self.head = Linear(d_model, num_classes, use_bias=True, key=head_key)
        self.pooling = pooling

    @property
    def config(self) -> TransformerConfig:
        """That of the encoder."""
        return self.encoder.config

    @unbatched(tokens="seq")
    def __call__(
        self,
        tokens: Int[Array, " seq"],
        *,
        token_types: Int[Array, " seq"] | None = None,
        valid: Bool[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " num_classes"]:
        """The logits of the classes.

        Arguments:

        - `tokens`: their ids.
        - `token_types`: which type each is of; all of type 0 if not given.
        - `valid`: which tokens are not padding; those other than `pad_token_id` if not given.
        - `key`: for dropout.
        """
        valid = self.encoder.embedding.valid(tokens) if valid is None else valid
        mask = None if valid is None else Padding(valid)
        x = self.encoder(tokens, token_types=token_types, mask=mask, key=key)
        if self.pooling == "pooler":
            x = self.encoder.pool(x)
        else:
            x = pool(x, valid, how=self.pooling)
        return self.head(x if self.transform is None else self.transform(x))


class TokenClassifier(eqx.Module):
    """An encoder and a map of every position to scores, of classes or of tokens.

    With `num_classes=None` the classes are the vocabulary, as in masked language models, and with
    `tie_embeddings` in the configuration the map is then the embedding.
    """

    encoder: TransformerEncoder
    transform: HeadTransform | None
    head: AbstractLinear | None
    logit_bias: Float[Array, " vocab"] | None

    def __init__(
        self,
        config: TransformerConfig,
        num_classes: int | None = None,
        *,
        transform: Transform = "none",
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `config`: of the encoder. `head_bias` applies to a vocabulary; classes always have a bias.
        - `num_classes`: how many scores per token; one for each token id if not given.
        - `transform`: what comes before the last linear map: `"linear_norm"` in BERT.
        - `key`: for the initial weights.
        """
        check_arguments("TokenClassifier", config, TransformerConfig, key)
        encoder_key, head_key, transform_key = jax.random.split(key, 3)
        tied = num_classes is None and config.tie_embeddings
        size = config.embedding_dim if tied else config.d_model
        if transform == "none" and size != config.d_model:
            raise ValueError(
                f"TokenClassifier: tie_embeddings=True makes the embedding the head, but "
                f"d_embedding={config.d_embedding} and d_model={config.d_model} differ; use a "
                "transform, which maps one to the other."
            )
        self.encoder = TransformerEncoder(config, key=encoder_key)
        self.transform = _make_transform(config, transform, size, key=transform_key)
        self.head = self.logit_bias = None
        if num_classes is not None:
            self.head = Linear(config.d_model, num_classes, use_bias=True, key=head_key)
            return
        if not tied:
            self.head = Linear(config.d_model, config.vocab_size, key=head_key)
        if config.head_bias:
            self.logit_bias = jnp.zeros((config.vocab_size,))

    @property
    def config(self) -> TransformerConfig:
        """That of the encoder."""
        return self.encoder.config

    @unbatched(tokens="seq")
    def __call__(
        self,
        tokens: Int[Array, " seq"],
        *,
        token_types: Int[Array, " seq"] | None = None,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq num_classes"]:
        """The logits at every position. Arguments are those of `TransformerEncoder`."""
        x = self.encoder(tokens, token_types=token_types, mask=mask, key=key)
        x = x if self.transform is None else self.transform(x)
        return logits(self.encoder.embedding.embedding, self.head, self.logit_bias, x)
