import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..attention import AbstractMask, Padding
from ..nn import Embedding, LearnedPositions, SinusoidalPositions
from ._transformer_config import TransformerConfig, make_positions


class TokenEmbedding(eqx.Module):
    """What enters the first block: vectors of tokens, with their positions.

        dropout(scale * embedding(tokens) + positions)

    (Vaswani et al., 2017, section 3.4, where the scale is `sqrt(d_model)`.)
    """

    embedding: Embedding
    positions: SinusoidalPositions | LearnedPositions | None
    dropout: eqx.nn.Dropout
    scale: float = eqx.field(static=True)
    max_len: int = eqx.field(static=True)
    pad_token_id: int | None = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        tokens_key, positions_key = jax.random.split(key)
        self.embedding = Embedding(config.vocab_size, config.d_model, key=tokens_key)
        self.positions = make_positions(config, key=positions_key)
        self.dropout = eqx.nn.Dropout(config.dropout_rate)
        self.scale = math.sqrt(config.d_model) if config.scale_embeddings else 1.0
        self.max_len = config.max_len
        self.pad_token_id = config.pad_token_id

    def __call__(
        self,
        tokens: Int[Array, " seq"],
        positions: Int[Array, " seq"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """The vectors of `tokens`, in the dtype of the weights.

        Arguments:

        - `tokens`: their ids.
        - `positions`: absolute positions; `0, 1, 2, ...` if not given.
        - `key`: for dropout; needed if there is any.

        Raises:

        - `ValueError` if there are more than `max_len` tokens.
        """
        self.check_length("seq", tokens.shape[0])
        x = self.embedding(tokens)
        if self.scale != 1:
            x = x * self.scale
        if self.positions is not None:
            if positions is None:
                positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
            x = x + self.positions(positions, x.dtype)
        return self.dropout(x, key=key)

    def valid(self, tokens: Int[Array, " seq"]) -> Array | None:
        """Which tokens are not padding; `None` if no token is."""
        return None if self.pad_token_id is None else tokens != self.pad_token_id

    def mask(self, tokens: Int[Array, " seq"], mask: AbstractMask | None) -> AbstractMask | None:
        """`mask`, and nobody attends to padding."""
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
