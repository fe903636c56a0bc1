from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask, ScoreMod
from ..nn import Attention
from ._block import AbstractBlock
from ._stack import Stack


class BiasedStack(eqx.Module):
    """A stack whose self-attention layers share one score mod, such as T5's relative bias.

    Its parameters exist once, and get the sum of the gradients of all layers. It is used like the
    stack itself.

    Arguments:

    - `stack`: its blocks have one `Attention` each, as `attention`, without a score mod.
    - `score_mod`: shared by all of them.
    """

    stack: Stack
    score_mod: ScoreMod

    def __check_init__(self) -> None:
        attention = getattr(self.stack.blocks, "attention", None)
        if not isinstance(attention, Attention) or attention.score_mod is not None:
            raise ValueError(
                "BiasedStack: the blocks must each have an Attention without a score_mod, but have "
                f"{type(attention).__name__} with score_mod="
                f"{getattr(attention, 'score_mod', None)!r}."
            )

    @property
    def num_layers(self) -> int:
        """How many blocks there are."""
        return self.stack.num_layers

    def spread(self) -> Stack:
        """An equivalent plain stack: every block has a copy of the score mod."""
        copies = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (self.num_layers, *x.shape)) if eqx.is_array(x) else x,
            self.score_mod,
        )
        return eqx.tree_at(
            lambda stack: stack.blocks.attention.score_mod,
            self.stack,
            copies,
            is_leaf=lambda x: x is None,
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
        """Applies the blocks in order; see `Stack`."""
        return self.spread()(x, context=context, mask=mask, positions=positions, key=key)

    @unbatched(x="seq d_model")
    def apply_with_stats(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """What `__call__` returns, and the statistics of every block; see `Stack`."""
        options = {"context": context, "mask": mask, "positions": positions, "key": key}
        return self.spread().apply_with_stats(x, **options)

    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Any = None
    ) -> Any:
        """The empty caches of the blocks."""
        return self.stack.init_cache(max_len, dtype, context=context)

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
        """Maps the next positions of a sequence; see `AbstractBlock.extend`."""
        return self.spread().extend(x, cache, context=context, mask=mask, length=length)

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, index: int) -> AbstractBlock:
        """Layer `index` on its own, with the score mod; negative indices count from the last."""
        return self.spread()[index]

    def __iter__(self) -> Iterator[AbstractBlock]:
        return iter(self.spread())
