from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import AbstractAttention, CrossAttention, Memory
from ._block import AbstractBlock, mlp_branch
from ._residual import Residual


class Source(eqx.Module):
    """What a decoder attends to: the output of an encoder, and a mask for it.

    Arguments:

    - `memory`: one vector for every position of the source.
    - `mask`: who may attend to whom, on positions of the target and the source; `Padding(valid)`
        for a padded source.
    """

    memory: Float[Array, "kv_seq d_memory"]
    mask: AbstractMask | None = None


class DecoderCache(eqx.Module):
    """What a `DecoderBlock` keeps: its own earlier keys and values, and those of the source."""

    target: Any
    memory: Memory
    mask: AbstractMask | None


class DecoderBlock(AbstractBlock):
    """Self-attention, attention to a source, then an MLP, each a residual branch.

        x = attention_residual(x, attention)
        x = cross_residual(x, cross_attention to context.memory)
        x = mlp_residual(x, mlp)

    `mask` and `positions` are those of the target; the mask of the source is in `context`. (Vaswani
    et al., 2017, section 3.1.)

    Arguments:

    - `attention`: mixes positions of the target.
    - `cross_attention`: attends to the source.
    - `mlp`: maps every position on its own; called as `mlp(x, key=key)`.
    - `attention_residual`, `cross_residual`, `mlp_residual`: how each is added.
    """

    attention: AbstractAttention
    cross_attention: CrossAttention
    mlp: Callable[..., Array]
    attention_residual: Residual
    cross_residual: Residual
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
        """Maps a whole sequence; see `AbstractBlock`. `context` must be given."""
        options = {"context": context, "mask": mask, "positions": positions, "key": key}
        return self.apply_with_stats(x, **options)[0]

    def apply_with_stats(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Source | None = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """What `__call__` returns, and the statistics of a mixture of experts; `None` without."""
        source = _given(context)
        memory = self.cross_attention.project(source.memory)

        def attend(h: Array, key: PRNGKeyArray | None) -> tuple[Array, None]:
            return self.attention(h, mask=mask, positions=positions, key=key), None

        x, (_, stats) = self._branches(x, attend, memory, source.mask, key)
        return x, stats

    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Source | None = None
    ) -> DecoderCache:
        """An empty cache for `max_len` positions of the target, with the source projected.

        Both are stored in `dtype`, or that of the weights.
        """
        source = _given(context)
        memory = self.cross_attention.project(source.memory)
        if dtype is not None:
            memory = memory.astype(dtype)
        return DecoderCache(self.attention.init_cache(max_len, dtype), memory, source.mask)

    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: DecoderCache,
        *,
        context: Source | None = None,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], DecoderCache]:
        """Maps the next positions of a sequence; see `AbstractBlock`.

        The source is in the cache; a `context` here is an error.
        """
        if context is not None:
            raise ValueError(
                "DecoderBlock: the source belongs to the cache; give the context to init_cache."
            )

        def attend(h: Array, key: PRNGKeyArray | None) -> tuple[Array, Any]:
            return self.attention.extend(h, cache.target, mask=mask, length=length)

        x, (target, _) = self._branches(x, attend, cache.memory, cache.mask, None)
        return x, DecoderCache(target, cache.memory, cache.mask)

    def _branches(
        self,
        x: Array,
        attend: Callable[[Array, PRNGKeyArray | None], tuple[Array, Any]],
        memory: Memory,
        memory_mask: AbstractMask | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Array, Any]:
        def cross(h: Array, key: PRNGKeyArray | None) -> tuple[Array, None]:
            return self.cross_attention.attend(h, memory, mask=memory_mask, key=key), None

        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x, cache = self.attention_residual(x, attend, key=keys[0])
        x, _ = self.cross_residual(x, cross, key=keys[1])
        x, stats = self.mlp_residual(x, mlp_branch(self.mlp), key=keys[2])
        return x, (cache, stats)


def _given(context: Source | None) -> Source:
    if not isinstance(context, Source):
        raise ValueError(
            f"DecoderBlock: context must be a Source(memory, mask) to attend to, but is "
            f"{context!r}."
        )
    return context
