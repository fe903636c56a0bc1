"""Keys and values of one sequence, in pages that many sequences share."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from ..attention import PagedKV, dot_product_attention, paged_attention
from ._cache import KVCache
from ._cache_storage import Int8Vectors, Stored, as_floats, stored


class Pages(eqx.Module):
    """A pool of pages of the keys and values of one attention layer.

    Every array is `[*stack, num_pages, page_size, kv_heads, dim]`, with the axes of the stack that
    the layer is in.
    """

    k: Stored
    v: Stored

    @classmethod
    def like(cls, cache: KVCache, num_pages: int, page_size: int) -> "Pages":
        """Empty pages for the keys and values of such a cache."""
        stack = cache.length.shape

        def empty(x: Array) -> Array:
            heads = x.shape[len(stack) : -2] or (1,)
            return jnp.zeros((*stack, num_pages, page_size, *heads, x.shape[-1]), x.dtype)

        return cls(*jax.tree.map(empty, (cache.k, cache.v)))

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes of the stack."""
        return self.k.shape[:-4]

    def copied(self, source: Int[Array, " n"], target: Int[Array, " n"]) -> "Pages":
        """Copies each `source` page to its `target`; a `target` that does not exist is skipped."""

        def copy(pages: Array) -> Array:
            at = (slice(None),) * len(self.stack)
            return pages.at[(*at, target)].set(pages[(*at, source)], mode="drop")

        return jax.tree.map(copy, self)


class PagedKVCache(eqx.Module):
    """The keys and values of one attention layer and one sequence: a view of pages.

    For `jax.vmap` over sequences, that is, over everything but `pages`, which then stay one pool:
    all sequences write into it at once, and each reads its own pages.

    Arguments:

    - `pages`: the pool. No two sequences may write to one page.
    - `page_table`: the pages of the sequence in order, then -1.
    - `length`: how many positions of the sequence are in them.
    """

    pages: Pages
    page_table: Int[Array, "*stack max_pages"]
    length: Int[Array, "*stack"]

    def extended(
        self,
        k: Float[Array, "seq kv_heads head_dim"],
        v: Float[Array, "seq kv_heads v_dim"],
        length: int | Int[Array, ""] | None = None,
    ) -> tuple["PagedKVCache", Array, Array, Int[Array, " kv_seq"]]:
        """The cache with the next positions, and what these may attend to; see `KVCache.extended`.

        The page table must have pages for them.
        """
        num_pages, page_size = self.pages.k.shape[:2]
        max_pages, seq = self.page_table.shape[0], k.shape[0]
        count = jnp.asarray(seq if length is None else length, jnp.int32)
        rows = jnp.arange(seq, dtype=jnp.int32)
        at = self.length + rows
        page = self.page_table[jnp.minimum(at // page_size, max_pages - 1)]
        page = jnp.where((rows < count) & (page >= 0), page, num_pages)
        new = tuple(stored(x, self.pages.k.dtype) for x in (k, v))
        pages = jax.tree.map(
            lambda old, rows: _written(old, page, at % page_size, rows), self.pages, Pages(*new)
        )
        cache = PagedKVCache(pages, self.page_table, self.length + count)
        places = jnp.arange(max_pages * page_size, dtype=jnp.int32)
        filled = places < cache.length

        def read(x: Array) -> Array:
            found = x[jnp.maximum(self.page_table, 0)].reshape(places.shape[0], *x.shape[2:])
            # Earlier sequences may have left NaN there, which a mask does not keep out of a sum.
            return jnp.where(filled[:, None, None], found, jnp.zeros((), x.dtype))

        k, v = (as_floats(jax.tree.map(read, x), k.dtype) for x in (pages.k, pages.v))
        return cache, k, v, jnp.where(filled, places, -1)

    def read_in_place(
        self, attention_fn: Callable[..., Array], dtype: DTypeLike
    ) -> Callable[..., Array]:
        """`attention_fn` for what `extended` returned, but reading keys and values from the pages.

        It is returned as it is unless it is `dot_product_attention`, with no option bound but the
        `implementation`, and the pages are of `dtype`.
        """
        partial = isinstance(attention_fn, eqx.Partial)
        fn, options = (attention_fn.func, attention_fn.keywords) if partial else (attention_fn, {})
        named = {name: x for name, x in options.items() if x is not None}
        if fn is not dot_product_attention or named.keys() - {"implementation"}:
            return attention_fn
        k, v = self.pages.k, self.pages.v
        if isinstance(k, Int8Vectors) or isinstance(v, Int8Vectors) or k.dtype != dtype:
            return attention_fn
        pages = PagedKV(k, v)
        unused = {"kv_positions", "dropout_rate", "dropout_key"}

        def attend(q: Array, k: Array, v: Array, **options: Any) -> Array:
            options = {name: options[name] for name in options.keys() - unused} | named
            return paged_attention(q, pages, self.page_table, self.length, **options)

        return attend


def _write(pages: Array, page: Array, slot: Array, rows: Array) -> Array:
    """Writes rows to their slots; a page that does not exist is skipped."""
    return pages.at[page, slot].set(rows, mode="drop")


_written = jax.custom_batching.custom_vmap(_write)


@_written.def_vmap
def _(
    axis_size: int, in_batched: list[bool], pages: Array, page: Array, slot: Array, rows: Array
) -> tuple[Array, bool]:
    """Sequences write to different pages, so the result is one pool, without a batch axis."""
    if not in_batched[0] and all(in_batched[1:]):
        return _write(pages, page, slot, rows), False
    axes = [0 if batched else None for batched in in_batched]
    return jax.vmap(_write, axes, axis_size=axis_size)(pages, page, slot, rows), True
