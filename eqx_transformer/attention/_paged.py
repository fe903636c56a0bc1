"""Attention against keys and values that live in pages of a pool shared by many sequences.

A page table says, for each sequence, which page of the pool holds its positions `0..page_size-1`,
which the next `page_size`, and so on. Pages in use are counted and not listed, so that a page can
belong to several sequences: a fork shares the whole pages of its source. (Kwon et al., Efficient
Memory Management for Large Language Model Serving with PagedAttention, 2023.)
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._api import Implementation, dot_product_attention
from ._masks import AbstractMask, Prefix
from ._score_mods import ScoreMod


class PagedKV(eqx.Module):
    """A pool of pages of keys and values."""

    k_pages: Float[Array, "num_pages page_size kv_heads head_dim"]
    v_pages: Float[Array, "num_pages page_size kv_heads v_dim"]

    @property
    def num_pages(self) -> int:
        """How many pages there are."""
        return self.k_pages.shape[0]

    @property
    def page_size(self) -> int:
        """How many positions a page holds."""
        return self.k_pages.shape[1]


def paged_attention(
    q: Float[Array, "q_seq heads head_dim"],
    pages: PagedKV,
    page_table: Int[Array, " max_pages"],
    length: Int[Array, ""],
    *,
    mask: AbstractMask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    q_positions: Int[Array, " q_seq"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "q_seq heads v_dim"]:
    """Attention of one sequence's queries to its keys and values in a pool of pages.

    Equals `dot_product_attention` with the sequence's keys and values in one piece. For several
    sequences use `jax.vmap` over `q`, `page_table` and `length` but not over `pages`: the pool is
    then shared, not copied.

    Arguments:

    - `q`: queries.
    - `pages`: the pool.
    - `page_table`: the pages of the sequence in order; entries beyond its length are not looked
        at, `-1` by convention.
    - `length`: how many positions of the sequence the pages hold.
    - `mask`, `score_mod`, `scale`, `sinks`, `implementation`: as for `dot_product_attention`.
        Positions count from the beginning of the sequence. `None` as mask lets every query attend
        to all `length` positions, later ones included: decoding several tokens at once needs
        `Causal()`.
    - `q_positions`: absolute positions of the queries; the last `q_seq` of the sequence if left
        out, which is right once their own keys have been appended.

    Returns:

    The output, in the dtype of the inputs.

    Raises:

    - `ValueError` for shapes, dtypes, masks or options that do not fit together.
    """
    length = jnp.asarray(length, jnp.int32)
    capacity = page_table.shape[0] * pages.page_size
    if q_positions is None:
        q_positions = length - q.shape[0] + jnp.arange(q.shape[0], dtype=jnp.int32)
    filled = Prefix(length)
    return dot_product_attention(
        q,
        _gather(pages.k_pages, page_table),
        _gather(pages.v_pages, page_table),
        mask=filled if mask is None else mask & filled,
        score_mod=score_mod,
        scale=scale,
        q_positions=q_positions,
        # Given, although they are the default: a mask need not cover the capacity.
        kv_positions=jnp.arange(capacity, dtype=jnp.int32),
        sinks=sinks,
        implementation=implementation,
    )


def _gather(
    pages: Float[Array, "num_pages page_size kv_heads dim"], page_table: Int[Array, " max_pages"]
) -> Float[Array, "capacity kv_heads dim"]:
    # A negative index would count from the end.
    index = jnp.where(page_table < 0, pages.shape[0], page_table)
    found = pages.at[index].get(mode="fill", fill_value=0)
    return found.reshape(-1, *pages.shape[2:])


class PagedKVCache(eqx.Module):
    """Keys and values of `num_seqs` sequences in a pool of pages, and who uses which page.

    A value: every method returns a new cache, under `jax.jit` too, and a cache that is kept is a
    snapshot. Sequences are rows; a row of length 0 is free. Rows grow by `append`, give their
    pages back by `free`, and are duplicated by `fork`, which copies at most one page.

    With `jax.jit(..., donate_argnums=...)` on the cache, pages are updated in place.
    """

    pages: PagedKV
    page_table: Int[Array, "num_seqs max_pages"]
    """The pages of every sequence in order, then `-1`."""
    lengths: Int[Array, " num_seqs"]
    users: Int[Array, " num_pages"]
    """How many sequences use each page; 0 if it is free."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        num_seqs: int,
        max_len: int,
        dtype: Any = jnp.float32,
    ):
        """Builds an empty cache.

        Arguments:

        - `num_pages`, `page_size`: the pool holds `num_pages * page_size` positions.
        - `num_kv_heads`, `head_dim`: the shape of one key, and of one value.
        - `num_seqs`: how many sequences there can be at a time.
        - `max_len`: how many positions one sequence can have, rounded up to whole pages.
        - `dtype`: of keys and values, a floating one.

        Raises:

        - `ValueError` if a number is less than one, or for another dtype.
        """
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"PagedKVCache: dtype={jnp.dtype(dtype)} must be floating.")
        for name, number in (
            ("num_pages", num_pages),
            ("page_size", page_size),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("num_seqs", num_seqs),
            ("max_len", max_len),
        ):
            if number < 1:
                raise ValueError(f"PagedKVCache: {name}={number} must be at least 1.")
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        self.pages = PagedKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        self.page_table = jnp.full((num_seqs, -(-max_len // page_size)), -1, jnp.int32)
        self.lengths = jnp.zeros(num_seqs, jnp.int32)
        self.users = jnp.zeros(num_pages, jnp.int32)

    def allocate(self, counts: Int[Array, " num_seqs"]) -> "PagedKVCache":
        """Makes sure that every sequence has pages for `counts` more positions.

        `append` does so by itself; this is for reserving pages ahead.

        Raises:

        - A run-time error if the pool has too few free pages, or a sequence becomes too long.
        """
        num_pages, page_size = self.pages.num_pages, self.pages.page_size
        max_pages = self.page_table.shape[1]
        has = jnp.sum(self.page_table >= 0, axis=1, dtype=jnp.int32)
        needs = -(-(self.lengths + jnp.asarray(counts, jnp.int32)) // page_size)
        needs = eqx.error_if(
            needs,
            needs > max_pages,
            f"PagedKVCache: a sequence outgrows its {max_pages} pages of {page_size} positions; "
            "build the cache with a greater max_len.",
        )
        new = jnp.maximum(needs - has, 0)
        new = eqx.error_if(
            new,
            jnp.sum(new) > jnp.sum(self.users == 0),
            f"PagedKVCache: fewer of the {num_pages} pages are free than are needed; free "
            "sequences, or build the cache with a greater num_pages.",
        )
        (free,) = jnp.nonzero(self.users == 0, size=num_pages, fill_value=num_pages)
        # The j-th new page of a sequence comes after those of the sequences before it.
        first = jnp.cumsum(new, dtype=jnp.int32) - new
        column = jnp.arange(max_pages, dtype=jnp.int32)[None, :] - has[:, None]
        is_new = (column >= 0) & (column < new[:, None])
        taken = free.astype(jnp.int32).at[first[:, None] + column].get(mode="clip")
        return eqx.tree_at(
            lambda x: (x.page_table, x.users),
            self,
            (
                jnp.where(is_new, taken, self.page_table),
                self.users.at[jnp.where(is_new, taken, num_pages)].add(1, mode="drop"),
            ),
        )

    def append(
        self,
        k: Float[Array, "num_seqs new kv_heads head_dim"],
        v: Float[Array, "num_seqs new kv_heads head_dim"],
        counts: Int[Array, " num_seqs"],
    ) -> "PagedKVCache":
        """Appends the first `counts[i]` of the given keys and values to every sequence `i`.

        A count of 0 leaves a sequence alone. What is behind the count is ignored.

        Raises:

        - A run-time error if the pool has too few free pages, a sequence becomes too long, or a
            count is not between 0 and `new`.
        """
        counts = eqx.error_if(
            jnp.asarray(counts, jnp.int32),
            (counts < 0) | (counts > k.shape[1]),
            f"PagedKVCache: counts must lie between 0 and {k.shape[1]}, the number of given keys.",
        )
        cache = self.allocate(counts)
        offset = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
        position = cache.lengths[:, None] + offset
        page_size, max_pages = cache.pages.page_size, cache.page_table.shape[1]
        column = jnp.minimum(position // page_size, max_pages - 1)
        page = jnp.take_along_axis(cache.page_table, column, axis=1)
        page = jnp.where(offset < counts[:, None], page, cache.pages.num_pages)
        slot = position % page_size

        def write(pages: Array, new: Array) -> Array:
            return pages.at[page, slot].set(new.astype(pages.dtype), mode="drop")

        pages = PagedKV(write(cache.pages.k_pages, k), write(cache.pages.v_pages, v))
        return eqx.tree_at(lambda x: (x.pages, x.lengths), cache, (pages, cache.lengths + counts))

    def free(self, which: Bool[Array, " num_seqs"]) -> "PagedKVCache":
        """Ends the sequences marked in `which`; pages nobody else uses become free."""
        gone = which[:, None] & (self.page_table >= 0)
        page = jnp.where(gone, self.page_table, self.pages.num_pages)
        return eqx.tree_at(
            lambda x: (x.page_table, x.lengths, x.users),
            self,
            (
                jnp.where(which[:, None], -1, self.page_table),
                jnp.where(which, 0, self.lengths),
                self.users.at[page].add(-1, mode="drop"),
            ),
        )

    def fork(self, source: Int[Array, ""], target: Int[Array, ""]) -> "PagedKVCache":
        """Makes the free sequence `target` a duplicate of `source`.

        Full pages are shared, which is safe because only the last page of a sequence is ever
        written to; that one is copied.

        Raises:

        - A run-time error if `target` is in use, or no page is free for the copy.
        """
        page_size = self.pages.page_size
        full, rest = self.lengths[source] // page_size, self.lengths[source] % page_size
        row = self.page_table[source]
        shared = jnp.where(jnp.arange(row.shape[0], dtype=jnp.int32) < full, row, -1)
        shared = eqx.error_if(
            shared,
            jnp.any(self.page_table[target] >= 0),
            "PagedKVCache: the target of a fork is in use; free it first.",
        )
        page = jnp.where(shared >= 0, shared, self.pages.num_pages)
        cache = eqx.tree_at(
            lambda x: (x.page_table, x.lengths, x.users),
            self,
            (
                self.page_table.at[target].set(shared),
                self.lengths.at[target].set(full * page_size),
                self.users.at[page].add(1, mode="drop"),
            ),
        )
        last = row[jnp.minimum(full, row.shape[0] - 1)]
        counts = jnp.zeros_like(self.lengths).at[target].set(rest)
        # Of the same page for every sequence, only the target's counts.
        shape = (self.lengths.shape[0], *self.pages.k_pages.shape[1:])
        return cache.append(
            jnp.broadcast_to(self.pages.k_pages[last][None], shape),
            jnp.broadcast_to(self.pages.v_pages[last][None], shape),
            counts,
        )
