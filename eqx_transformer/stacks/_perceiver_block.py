from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import CrossAttention, Memory
from ._block import AbstractBlock, mlp_branch
from ._decoder_block import Source
from ._residual import Residual


class PerceiverCache(eqx.Module):
    """What a `PerceiverBlock` keeps: the keys and values of the source."""

    memory: Memory
    mask: AbstractMask | None


class PerceiverBlock(AbstractBlock):
    """Attention to a source, then an MLP, each a residual branch.

        x = attention_residual(x, attention to context.memory)
        x = mlp_residual(x, mlp)

    Positions do not see each other: each of many outputs is computed from few tokens, in any number
    of chunks. (Jaegle et al., Perceiver, 2021, section 3.1.)

    Arguments:

    - `attention`: attends to the source.
    - `mlp`: maps every position on its own; called as `mlp(x, key=key)`.
    - `attention_residual`, `mlp_residual`: how each is added.
    """

    attention: CrossAttention
    mlp: Callable[..., Array]
    attention_residual: Residual
    mlp_residual: Residual

    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Source | None = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Maps a whole sequence, given a `Source`; its mask says what may be attended to.

        `mask` and `positions` must not be given: positions of `x` do not see each other.
        """
        _refuse(mask, positions)
        cache = self.init_cache(0, context=context)
        return self._branches(x, cache, key)

    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Source | None = None
    ) -> PerceiverCache:
        """The keys and values of the source, stored in `dtype`, or that of the weights."""
        if not isinstance(context, Source):
            raise ValueError(
                "PerceiverBlock: there must be something to attend to; give context=Source(memory)."
            )
        memory = self.attention.project(context.memory)
        if dtype is not None:
            memory = memory.astype(dtype)
        return PerceiverCache(memory, context.mask)

    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: PerceiverCache,
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], PerceiverCache]:
        """Maps some more positions. The source is in the cache; a `context` here is an error."""
        if context is not None:
            raise ValueError(
                "PerceiverBlock: the source belongs to the cache; give the context to init_cache."
            )
        _refuse(mask, length)
        return self._branches(x, cache, None), cache

    def _branches(self, x: Array, cache: PerceiverCache, key: PRNGKeyArray | None) -> Array:
        keys = (None, None) if key is None else jax.random.split(key)

        def attend(h: Array, key: PRNGKeyArray | None) -> tuple[Array, None]:
            return self.attention.attend(h, cache.memory, mask=cache.mask, key=key), None

        x, _ = self.attention_residual(x, attend, key=keys[0])
        return self.mlp_residual(x, mlp_branch(self.mlp), key=keys[1])[0]


def _refuse(*options: Any) -> None:
    if any(option is not None for option in options):
        raise ValueError(
            "PerceiverBlock: positions do not see each other, so there is no use for a mask, "
            "positions or a length; pass a mask of the source as Source(memory, mask)."
        )
