from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import Linear
from ..stacks import Stack
from ._token_embedding import TokenEmbedding
from ._transformer_config import TransformerConfig, make_norm, make_stack


class TransformerEncoder(eqx.Module):
    """A transformer that reads a sequence of tokens in both directions.

    Nobody attends to padding tokens; what is returned at their positions is meaningless. (Vaswani
    et al., 2017; Devlin et al., BERT, 2018.)
    """

    config: TransformerConfig = eqx.field(static=True)
    embedding: TokenEmbedding
    stack: Stack
    norm: Any

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        embedding_key, stack_key = jax.random.split(key)
        self.config = config
        self.embedding = TokenEmbedding(config, key=embedding_key)
        self.stack = make_stack(config, config.num_layers, causal=False, key=stack_key)
        self.norm = make_norm(config, config.d_model) if config.final_norm else None

    @jax.named_scope("eqx_transformer.models.TransformerEncoder")
    @unbatched(tokens="seq")
    def __call__(
        self,
        tokens: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """One vector for every position.

        Arguments:

        - `tokens`: their ids.
        - `mask`: who may attend to whom besides that nobody attends to padding.
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
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """What `__call__` returns, and the `RouterStats` of each layer if there are experts."""
        parts = (self.embedding, self.stack, self.norm)
        return encode(*parts, tokens, mask=mask, positions=positions, key=key)


def encode(
    embedding: TokenEmbedding,
    stack: Stack,
    norm: Any,
    tokens: Int[Array, " seq"],
    *,
    context: Any = None,
    mask: AbstractMask | None = None,
    positions: Int[Array, " seq"] | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "seq d_model"], Any]:
    """Embedding, blocks and norm, with padding masked: what encoders and decoders share."""
    keys = (None, None) if key is None else jax.random.split(key)
    x = embedding(tokens, positions, key=keys[0])
    mask = embedding.mask(tokens, mask)
    options = {"context": context, "mask": mask, "positions": positions, "key": keys[1]}
    x, stats = stack.apply_with_stats(x, **options)
    return x if norm is None else norm(x), stats


def pool(
    x: Float[Array, "seq d_model"],
    valid: Array | None = None,
    *,
    how: Literal["first", "mean"] = "mean",
) -> Float[Array, " d_model"]:
    """One vector for a sequence.

    Arguments:

    - `x`: one vector for every position.
    - `valid`: which positions count, at least one; all if not given.
    - `how`: the vector of the first position, or the mean over those that count.
    """
    if how == "first":
        return x[0]
    wide = x.astype(accumulation_dtype(x.dtype))
    weight = jnp.ones(x.shape[0], wide.dtype) if valid is None else valid.astype(wide.dtype)
    # What padding holds does not matter, NaN included.
    total = jnp.where(weight[:, None] > 0, wide, 0).sum(axis=0)
    return (total / jnp.maximum(weight.sum(), 1)).astype(x.dtype)


class SequenceClassifier(eqx.Module):
    """An encoder and a linear map of its pooled output: one score a class for a sequence."""

    encoder: TransformerEncoder
    head: Linear
    pooling: Literal["first", "mean"] = eqx.field(static=True)

    def __init__(
        self,
        config: TransformerConfig,
        num_classes: int,
        *,
        pooling: Literal["first", "mean"] = "mean",
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `config`: of the encoder.
        - `num_classes`: how many scores.
        - `pooling`: see `pool`. With `"first"` begin every sequence with a token of its own.
        - `key`: for the initial weights.
        """
        encoder_key, head_key = jax.random.split(key)
        self.encoder = TransformerEncoder(config, key=encoder_key)
        self.head = Linear(config.d_model, num_classes, use_bias=True, key=head_key)
        self.pooling = pooling

    @unbatched(tokens="seq")
    def __call__(
        self, tokens: Int[Array, " seq"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " num_classes"]:
        """The logits of the classes; `key` is for dropout."""
        x = self.encoder(tokens, key=key)
        return self.head(pool(x, self.encoder.embedding.valid(tokens), how=self.pooling))


class TokenClassifier(eqx.Module):
    """An encoder and a linear map of every position: scores a token, of classes or of tokens.

    With `num_classes=None` the classes are the vocabulary, as in masked language models, and with
    `tie_embeddings` in the configuration the map is then the embedding.
    """

    encoder: TransformerEncoder
    head: Linear | None

    def __init__(
        self,
        config: TransformerConfig,
        num_classes: int | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `config`: of the encoder.
        - `num_classes`: how many scores a token; one for each token id if not given.
        - `key`: for the initial weights.
        """
        encoder_key, head_key = jax.random.split(key)
        self.encoder = TransformerEncoder(config, key=encoder_key)
        self.head = None
        if num_classes is not None or not config.tie_embeddings:
            num_classes = config.vocab_size if num_classes is None else num_classes
            self.head = Linear(config.d_model, num_classes, use_bias=config.use_bias, key=head_key)

    @unbatched(tokens="seq")
    def __call__(
        self, tokens: Int[Array, " seq"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "seq num_classes"]:
        """The logits at every position; `key` is for dropout."""
        x = self.encoder(tokens, key=key)
        return self.encoder.embedding.embedding.attend(x) if self.head is None else self.head(x)
