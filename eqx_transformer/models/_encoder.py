from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import AbstractLinear, Linear
from ._checks import check_arguments
from ._token_embedding import TokenEmbedding
from ._transformer_config import TransformerConfig
from ._transformer_parts import AnyStack, make_norm, make_stack


class TransformerEncoder(eqx.Module):
    """A transformer that reads a sequence of tokens in both directions.

    Padding tokens are not attended to; what is returned at their positions is meaningless. (Vaswani
    et al., 2017.)

    With settings of its configuration it is BERT (Devlin et al., 2018), RoBERTa (Liu et al., 2019),
    DistilBERT (Sanh et al., 2019), ELECTRA (Clark et al., 2020) or ModernBERT (Warner et al.,
    2024).
    """

    config: TransformerConfig = eqx.field(static=True)
    embedding: TokenEmbedding
    stack: AnyStack
    norm: Any
    pooler: AbstractLinear | None

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("TransformerEncoder", config, TransformerConfig, key)
        embedding_key, stack_key = jax.random.split(key)
        self.config = config
        self.embedding = TokenEmbedding(config, key=embedding_key)
        self.stack = make_stack(config, config.num_layers, causal=False, key=stack_key)
        self.norm = make_norm(config, config.d_model) if config.final_norm else None
        self.pooler = None
        if config.pooler:
            pooler_key = jax.random.fold_in(key, 0)
            self.pooler = Linear(config.d_model, config.d_model, use_bias=True, key=pooler_key)

    @jax.named_scope("eqx_transformer.models.TransformerEncoder")
    @unbatched(tokens="seq")
    def __call__(
        self,
        tokens: Int[Array, " seq"],
        *,
        token_types: Int[Array, " seq"] | None = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """One vector for every position.

        Arguments:

        - `tokens`: their ids.
        - `token_types`: which type each is of; all of type 0 if not given.
        - `mask`: who may attend to whom, combined by `&` with that of padding.
        - `positions`: absolute positions; `0, 1, 2, ...` if not given.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.

        Raises:

        - `ValueError` if there are more than `max_len` tokens.
        """
        options = {"token_types": token_types, "mask": mask, "positions": positions, "key": key}
        return self.apply_with_stats(tokens, **options)[0]

    @unbatched(tokens="seq")
    def apply_with_stats(
        self,
        tokens: Int[Array, " seq"],
        *,
        token_types: Int[Array, " seq"] | None = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """What `__call__` returns, and the `RouterStats` of each layer if there are experts."""
        parts = (self.embedding, self.stack, self.norm)
        options = {"token_types": token_types, "mask": mask, "positions": positions, "key": key}
        return encode(*parts, tokens, **options)

    def pool(self, x: Float[Array, "seq d_model"]) -> Float[Array, " d_model"]:
        """One vector for the sequence, by the pooler: `tanh(pooler(x[0]))`.

        Arguments:

        - `x`: what the encoder returned.

        Raises:

        - `ValueError` if there is no pooler.
        """
        if self.pooler is None:
            raise ValueError(
                "TransformerEncoder: there is no pooler; set pooler=True in the configuration, or "
                "use the function pool."
            )
        return jnp.tanh(self.pooler(x[0]))


def encode(
    embedding: TokenEmbedding,
    stack: Any,
    norm: Any,
    tokens: Int[Array, " seq"],
    *,
    context: Any = None,
    token_types: Int[Array, " seq"] | None = None,
    mask: AbstractMask | None = None,
    positions: Int[Array, " seq"] | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "seq d_model"], Any]:
    """Embedding, blocks and norm, with padding masked: what encoders and decoders share."""
    keys = (None, None) if key is None else jax.random.split(key)
    x = embedding(tokens, positions, token_types=token_types, key=keys[0])
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
    if how not in ("first", "mean"):
        raise ValueError(f"pool: how={how!r} must be 'first' or 'mean'.")
    if how == "first":
        return x[0]
    wide = x.astype(accumulation_dtype(x.dtype))
    weight = jnp.ones(x.shape[0], wide.dtype) if valid is None else valid.astype(wide.dtype)
    # The contents of padding do not matter, even if NaN.
    total = jnp.where(weight[:, None] > 0, wide, 0).sum(axis=0)
    return (total / jnp.maximum(weight.sum(), 1)).astype(x.dtype)
