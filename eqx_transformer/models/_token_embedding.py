import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..attention import AbstractMask, Padding
from ..nn import AbstractLinear, Embedding, LearnedPositions, Linear, SinusoidalPositions
from ..nn._dropout import apply_dropout
from ._checks import check_arguments
from ._transformer_config import TransformerConfig
from ._transformer_parts import make_norm, make_positions


class TokenEmbedding(eqx.Module):
    """The input of the first block: vectors of tokens, with their positions.

        x = scale * embedding(tokens) + token_types(types) + positions
        projection(dropout(norm(x)))

    Whatever is `None` is left out. (Vaswani et al., 2017, section 3.4, where the scale is
    `sqrt(d_model)`; types and norm: Devlin et al., BERT, 2018; projection: Lan et al., ALBERT,
    2019.)
    """

    embedding: Embedding
    positions: SinusoidalPositions | LearnedPositions | None
    token_types: Embedding | None
    norm: Any
    projection: AbstractLinear | None
    dropout: eqx.nn.Dropout
    scale: float = eqx.field(static=True)
    position_offset: int = eqx.field(static=True)
    max_len: int = eqx.field(static=True)
    pad_token_id: int | None = eqx.field(static=True)
    uncounted_token_id: int | None = eqx.field(static=True)

    def __init__(
        self, config: TransformerConfig, *, table: Embedding | None = None, key: PRNGKeyArray
    ):
        """Arguments:

        - `config`: the numbers.
        - `table`: the vectors of tokens, if they exist already.
        - `key`: for the initial weights.
        """
        check_arguments("TokenEmbedding", config, TransformerConfig, key)
        size = config.embedding_dim
        tokens_key, positions_key, types_key, projection_key = jax.random.split(key, 4)
        if table is None:
            table = Embedding(config.vocab_size, size, key=tokens_key)
        self.embedding = table
        self.positions = make_positions(config, key=positions_key)
        self.token_types = None
        if config.num_token_types is not None:
            self.token_types = Embedding(config.num_token_types, size, key=types_key)
        self.norm = make_norm(config, size) if config.embedding_norm else None
        self.projection = None
        if size != config.d_model:
            self.projection = Linear(size, config.d_model, use_bias=True, key=projection_key)
        self.dropout = eqx.nn.Dropout(config.dropout_rate)
        self.scale = math.sqrt(size) if config.scale_embeddings else 1.0
        self.position_offset = config.position_offset
        self.max_len = config.max_len
        self.pad_token_id = config.pad_token_id
        self.uncounted_token_id = config.uncounted_token_id

    def __call__(
        self,
        tokens: Int[Array, " seq"],
        positions: Int[Array, " seq"] | None = None,
        *,
        token_types: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """The vectors of `tokens`, in the dtype of the weights.

        Arguments:

        - `tokens`: their ids.
        - `positions`: absolute positions; `0, 1, 2, ...` of those that count if not given.
        - `token_types`: which type each is of; all of type 0 if not given.
        - `key`: for dropout; needed if there is any.

        Raises:

        - `ValueError` if there are more than `max_len` tokens, or types where there are none.
        """
        self.check_length("seq", tokens.shape[0])
        x = self.embedding(tokens)
        if self.scale != 1:
            x = x * self.scale
        if self.token_types is not None:
            x = x + self.token_types(jnp.zeros_like(tokens) if token_types is None else token_types)
        elif token_types is not None:
            raise ValueError(
                "TokenEmbedding: there are token_types, but no vectors for them; leave them out, "
                "or set num_token_types in the configuration."
            )
        if self.positions is not None:
            at = self._count(tokens) if positions is None else positions
            x = x + self.positions(at + self.position_offset, x.dtype)
        if self.norm is not None:
            x = self.norm(x)
        x = apply_dropout("TokenEmbedding", self.dropout, x, key)
        return x if self.projection is None else self.projection(x)

    def _count(self, tokens: Int[Array, " seq"]) -> Int[Array, " seq"]:
        if self.uncounted_token_id is None:
            return jnp.arange(tokens.shape[0], dtype=jnp.int32)
        counted = tokens != self.uncounted_token_id
        return jnp.where(counted, jnp.cumsum(counted, dtype=jnp.int32) - 1, -1)

    def valid(self, tokens: Int[Array, " seq"]) -> Array | None:
        """Which tokens are not padding; `None` if no token id stands for padding."""
        return None if self.pad_token_id is None else tokens != self.pad_token_id

    def mask(self, tokens: Int[Array, " seq"], mask: AbstractMask | None) -> AbstractMask | None:
        """`mask`, combined with that of padding."""
        valid = self.valid(tokens)
        if valid is None:
            return mask
        return Padding(valid) if mask is None else Padding(valid) & mask

    def check_length(self, what: str, length: int) -> None:
        """Checks a number of tokens against `max_len`."""
        if length > self.max_len:
            raise ValueError(
                f"{what}={length} is more than max_len={self.max_len}; shorten it, or raise "
                "max_len in the configuration."
            )
