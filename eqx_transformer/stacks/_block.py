import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import AbstractAttention, Modulation
from ._condition import modulated, read_condition
from ._residual import Branch, Norm, Residual


class AbstractBlock(eqx.Module):
    """One layer of a `Stack`: a map of a sequence to a sequence of the same shape and dtype."""

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Maps a whole sequence.

        Arguments:

        - `x`: the sequence.
        - `context`: what else every block of a stack is given, such as a sequence to attend to.
        - `mask`: who may attend to whom, combined by `&` with the block's own mask.
        - `positions`: absolute positions; `0, 1, 2, ...` if not given.
        - `key`: for dropout.
        """

    @abc.abstractmethod
    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Any = None
    ) -> Any:
        """What `extend` needs to begin: an empty cache for `max_len` positions.

        It includes what can be computed from `context` in advance.
        """

    @abc.abstractmethod
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """Maps the next positions of a sequence, given a cache of the earlier ones.

        Arguments:

        - `x`: the next positions.
        - `cache`: what is kept of the earlier ones.
        - `context`: as in `__call__`, if a block needs more of it than is in its cache.
        - `mask`: as in `__call__`, on absolute positions.
        - `length`: how many positions of `x` count; the rest is padding. All if not given.

        Returns:

        What `__call__` would give at these positions, and the cache with them added.
        """


class TransformerBlock(AbstractBlock):
    """Self-attention, then an MLP, each a residual branch.

        x = attention_residual(x, attention)
        x = mlp_residual(x, mlp)

    Norms before or after, dropout and scales are up to the residuals; see `Residual`. With a
    `modulation`, the input of each branch is shifted and scaled, and its output gated, by vectors
    that depend on `context.vector` (Peebles and Xie, 2023).

    Arguments:

    - `attention`: mixes positions.
    - `mlp`: maps every position on its own; called as `mlp(x, key=key)`.
    - `attention_residual`, `mlp_residual`: how each is added.
    - `modulation`: returns six vectors: shift, scale and gate of attention, then of the MLP.
    """

    attention: AbstractAttention
    mlp: Callable[..., Array]
    attention_residual: Residual
    mlp_residual: Residual
    modulation: Modulation | None = None

    def __check_init__(self) -> None:
        if self.modulation is not None and self.modulation.num_vectors != 6:
            raise ValueError(
                f"TransformerBlock: the modulation has num_vectors={self.modulation.num_vectors} "
                "but must have 6: shift, scale and gate, of attention and of the MLP."
            )

    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Maps a whole sequence; see `AbstractBlock`. A `context` must be a `Condition`."""
        options = {"context": context, "mask": mask, "positions": positions, "key": key}
        return self.apply_with_stats(x, **options)[0]

    def apply_with_stats(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """What `__call__` returns, and the statistics of a mixture of experts; `None` without."""
        where, vectors = read_condition("TransformerBlock", context, self.modulation)

        def attend(h: Array, key: PRNGKeyArray | None) -> tuple[Array, None]:
            return self.attention(h, mask=mask, positions=positions, key=key, **where), None

        x, (_, stats) = self._branches(x, attend, vectors, key)
        return x, stats

    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Any = None
    ) -> Any:
        """The empty cache of the attention layer."""
        if context is not None:
            read_condition("TransformerBlock", context, self.modulation)
        return self.attention.init_cache(max_len, dtype)

    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """Maps the next positions of a sequence; see `AbstractBlock`."""
        where, vectors = read_condition("TransformerBlock", context, self.modulation)

        def attend(h: Array, key: PRNGKeyArray | None) -> tuple[Array, Any]:
            return self.attention.extend(h, cache, mask=mask, length=length, **where)

        x, (cache, _) = self._branches(x, attend, vectors, None)
        return x, cache

    def _branches(
        self, x: Array, attend: Branch, vectors: Array | None, key: PRNGKeyArray | None
    ) -> tuple[Array, Any]:
        keys = (None, None) if key is None else jax.random.split(key)
        of_attention, of_mlp = (None, None) if vectors is None else (vectors[:3], vectors[3:])
        x, cache = self.attention_residual(x, modulated(attend, of_attention), key=keys[0])
        mlp = modulated(mlp_branch(self.mlp), of_mlp)
        x, stats = self.mlp_residual(x, mlp, key=keys[1])
        return x, (cache, stats)


class ParallelBlock(AbstractBlock):
    """Self-attention and an MLP side by side, in one residual branch.

        x = residual(x, attention + mlp)

    (Wang and Komatsuzaki, GPT-J, 2021; with a norm for each: Black et al., GPT-NeoX, 2022.)

    Arguments:

    - `attention`: mixes positions.
    - `mlp`: maps every position on its own; called as `mlp(x, key=key)`.
    - `residual`: how their sum is added. Its norm is that of both, unless they have their own.
    - `attention_norm`, `mlp_norm`: norms of their own.
    """

    attention: AbstractAttention
    mlp: Callable[..., Array]
    residual: Residual
    attention_norm: Norm | None = None
    mlp_norm: Norm | None = None

    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Maps a whole sequence; see `AbstractBlock`. A `context` must be a `Condition`."""
        options = {"context": context, "mask": mask, "positions": positions, "key": key}
        return self.apply_with_stats(x, **options)[0]

    def apply_with_stats(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """What `__call__` returns, and the statistics of a mixture of experts; `None` without."""
        where, _ = read_condition("ParallelBlock", context, None)

        def attend(h: Array, key: PRNGKeyArray | None) -> tuple[Array, None]:
            return self.attention(h, mask=mask, positions=positions, key=key, **where), None

        x, (_, stats) = self._branches(x, attend, key)
        return x, stats

    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Any = None
    ) -> Any:
        """The empty cache of the attention layer."""
        if context is not None:
            read_condition("ParallelBlock", context, None)
        return self.attention.init_cache(max_len, dtype)

    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """Maps the next positions of a sequence; see `AbstractBlock`."""
        where, _ = read_condition("ParallelBlock", context, None)

        def attend(h: Array, key: PRNGKeyArray | None) -> tuple[Array, Any]:
            return self.attention.extend(h, cache, mask=mask, length=length, **where)

        x, (cache, _) = self._branches(x, attend, None)
        return x, cache

    def _branches(self, x: Array, attend: Branch, key: PRNGKeyArray | None) -> tuple[Array, Any]:
        def both(h: Array, key: PRNGKeyArray | None) -> tuple[Array, Any]:
            keys = (None, None) if key is None else jax.random.split(key)
            a, cache = attend(h if self.attention_norm is None else self.attention_norm(h), keys[0])
            h = h if self.mlp_norm is None else self.mlp_norm(h)
            m, stats = mlp_branch(self.mlp)(h, keys[1])
            return a + m, (cache, stats)

        return self.residual(x, both, key=key)


class BlockSequence(AbstractBlock):
    """Blocks one after another, as one block: the period of a stack whose layers differ.

    A stack of these with five local blocks and a global one is Gemma 3's pattern.

    Arguments:

    - `blocks`: in the order in which they are applied.
    """

    blocks: tuple[AbstractBlock, ...]

    def __check_init__(self) -> None:
        if not self.blocks:
            raise ValueError("BlockSequence: there must be at least one block.")

    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Maps a whole sequence; see `AbstractBlock`."""
        count = len(self.blocks)
        keys = [None] * count if key is None else jax.random.split(key, count)
        for block, key in zip(self.blocks, keys, strict=True):
            x = block(x, context=context, mask=mask, positions=positions, key=key)
        return x

    def apply_with_stats(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], tuple[Any, ...]]:
        """What `__call__` returns, and the statistics of every block that has any."""
        count = len(self.blocks)
        keys = [None] * count if key is None else jax.random.split(key, count)
        stats = []
        for block, key in zip(self.blocks, keys, strict=True):
            options = {"context": context, "mask": mask, "positions": positions, "key": key}
            apply = getattr(block, "apply_with_stats", None)
            x, of_block = (block(x, **options), None) if apply is None else apply(x, **options)
            stats.append(of_block)
        return x, tuple(stats)

    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Any = None
    ) -> tuple[Any, ...]:
        """The empty caches of the blocks."""
        return tuple(block.init_cache(max_len, dtype, context=context) for block in self.blocks)

    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: tuple[Any, ...],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], tuple[Any, ...]]:
        """Maps the next positions of a sequence; see `AbstractBlock`."""
        caches = []
        for block, old in zip(self.blocks, cache, strict=True):
            x, new = block.extend(x, old, context=context, mask=mask, length=length)
            caches.append(new)
        return x, tuple(caches)


def mlp_branch(mlp: Callable[..., Array]) -> Branch:
    """An MLP as a branch, which for a mixture of experts also returns the router's statistics."""

    def branch(h: Array, key: PRNGKeyArray | None) -> tuple[Array, Any]:
        apply = getattr(mlp, "apply_with_stats", None)
        return (mlp(h, key=key), None) if apply is None else apply(h, key=key)

    return branch
