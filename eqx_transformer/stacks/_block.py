import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import AbstractAttention


class AbstractBlock(eqx.Module):
    """One layer of a `Stack`: a map of a sequence to a sequence of the same shape and dtype."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Maps a whole sequence.

        Arguments:

        - `x`: the sequence.
        - `mask`: who may attend to whom, besides what the block itself forbids.
        - `positions`: absolute positions; `0, 1, 2, ...` if not given.
        - `key`: for dropout.
        """

    @abc.abstractmethod
    def init_cache(self, max_len: int, dtype: DTypeLike | None = None) -> Any:
        """What `extend` needs to begin: an empty cache for `max_len` positions."""

    @abc.abstractmethod
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """Maps the next positions of a sequence, given a cache of the earlier ones.

        Arguments:

        - `x`: the next positions.
        - `cache`: what is kept of the earlier ones.
        - `mask`: as in `__call__`, on absolute positions.
        - `length`: how many positions of `x` count; the rest is padding. All if not given.

        Returns:

        What `__call__` would give at these positions, and the cache with them added.
        """


class TransformerBlock(AbstractBlock):
    """The pre-norm transformer block.

        x = x + dropout(attention(attention_norm(x)))
        x = x + dropout(mlp(mlp_norm(x)))

    (Xiong et al., 2020, figure 1b.)
    """

    attention_norm: Callable[[Array], Array]
    attention: AbstractAttention
    mlp_norm: Callable[[Array], Array]
    mlp: Callable[..., Array]
    dropout: eqx.nn.Dropout

    def __init__(
        self,
        attention_norm: Callable[[Array], Array],
        attention: AbstractAttention,
        mlp_norm: Callable[[Array], Array],
        mlp: Callable[..., Array],
        *,
        dropout_rate: float = 0.0,
    ):
        """Arguments:

        - `attention_norm`, `mlp_norm`: applied to what enters each branch, `[seq, d_model]`.
        - `attention`: mixes positions.
        - `mlp`: maps every position on its own; called as `mlp(x, key=key)`.
        - `dropout_rate`: the probability with which an output of a branch is dropped.
        """
        if not 0 <= dropout_rate < 1:
            raise ValueError(
                f"TransformerBlock: dropout_rate={dropout_rate} must be at least 0 and below 1."
            )
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.dropout = eqx.nn.Dropout(dropout_rate)

    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Maps a whole sequence; see `AbstractBlock`."""

        def attend(h: Array, key: PRNGKeyArray | None) -> tuple[Array, None]:
            return self.attention(h, mask=mask, positions=positions, key=key), None

        return self._residual(x, attend, key)[0]

    def init_cache(self, max_len: int, dtype: DTypeLike | None = None) -> Any:
        """The empty cache of the attention layer."""
        return self.attention.init_cache(max_len, dtype)

    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """Maps the next positions of a sequence; see `AbstractBlock`."""

        def attend(h: Array, key: PRNGKeyArray | None) -> tuple[Array, Any]:
            return self.attention.extend(h, cache, mask=mask, length=length)

        return self._residual(x, attend, None)

    def _residual(
        self,
        x: Array,
        attend: Callable[[Array, PRNGKeyArray | None], tuple[Array, Any]],
        key: PRNGKeyArray | None,
    ) -> tuple[Array, Any]:
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        h, cache = attend(self.attention_norm(x), keys[0])
        x = x + self.dropout(h, key=keys[1])
        h = self.mlp(self.mlp_norm(x), key=keys[2])
        return x + self.dropout(h, key=keys[3]), cache
