"""A model's cache for many sequences, in one pool of pages."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from ..nn import KVCache, truncate
from ..nn._paged_cache import PagedKVCache, Pages
from ._prompt import AbstractDecoder


class PagedCache(eqx.Module):
    """A model's cache for many sequences, with their keys and values in one pool of pages.

    For batches that sequences join and leave: sequences need pages only for the positions they
    have, not for the longest possible one, and can share those of a common prefix. A page holds
    `page_size` positions in every layer. (Kwon et al., Efficient Memory Management for Large
    Language Model Serving with PagedAttention, 2023.)

    Like all caches it is immutable: every method returns a new one, under `jax.jit` too, with
    shapes that never change. Donate it to the compiled function (`donate_argnums`), or carry it
    through a loop, and the pages are updated in place. A sequence is a row; one of length 0 is
    free.

    Layers with a sliding window keep their window, and other layers their state, for each row.
    """

    pools: Any
    """The pages of every layer that has keys and values of all positions."""
    states: Any
    """Everything else that the model keeps, with a leading axis of rows."""
    empty: Any
    """The same for a free row, without that axis."""
    page_table: Int[Array, "num_sequences max_pages"]
    """The pages of every row in order, then -1."""
    lengths: Int[Array, " num_sequences"]
    """How many tokens every row has."""
    users: Int[Array, " num_pages"]
    """How many rows use each page; 0 if it is free."""
    page_size: int = eqx.field(static=True)
    max_len: int = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        model: AbstractDecoder,
        *,
        num_sequences: int,
        num_pages: int,
        page_size: int = 16,
        max_len: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> "PagedCache":
        """An empty cache.

        Arguments:

        - `model`: the decoder that it is for.
        - `num_sequences`: how many sequences there can be at a time.
        - `num_pages`, `page_size`: the pool holds `num_pages * page_size` positions.
        - `max_len`: how many positions one sequence can have; the model's `max_len` if not given.
        - `dtype`: what keys and values are stored in; see `init_cache` of the model.

        Raises:

        - `ValueError` if a number is less than one, `max_len` is more than the model's, or no layer
            of the model has keys and values of all positions.
        """
        most: int = model.config.max_len if max_len is None else max_len
        for name, number in (
            ("num_sequences", num_sequences),
            ("num_pages", num_pages),
            ("page_size", page_size),
            ("max_len", most),
        ):
            if number < 1:
                raise ValueError(f"PagedCache: {name}={number} must be at least 1.")
        pools, empty = _empty(model, num_pages, page_size, most, dtype)
        if not jax.tree.leaves(pools):
            raise ValueError(
                f"PagedCache: no layer of {type(model).__name__} keeps all positions, so there is "
                "nothing to put into pages; jax.vmap its init_cache and extend."
            )
        return cls(
            pools,
            jax.tree.map(lambda x: jnp.broadcast_to(x[None], (num_sequences, *x.shape)), empty),
            empty,
            jnp.full((num_sequences, -(-most // page_size)), -1, jnp.int32),
            jnp.zeros(num_sequences, jnp.int32),
            jnp.zeros(num_pages, jnp.int32),
            page_size,
            most,
        )

    @property
    def num_free_pages(self) -> Int[Array, ""]:
        """How many pages no row uses."""
        return jnp.sum(self.users == 0, dtype=jnp.int32)

    def extend(
        self,
        model: AbstractDecoder,
        tokens: Int[Array, "batch seq"],
        length: Int[Array, " batch"] | None = None,
        *,
        rows: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch seq vocab"], "PagedCache"]:
        """The logits at the next positions of every row, for prefill (also in parts) and decoding.

        Arguments:

        - `model`: the one that the cache was made for. Dropout is switched off.
        - `tokens`: the next tokens of every row.
        - `length`: how many of them count, 0 for a row that is not to change; the rest is padding,
            whose logits are meaningless. All if not given.
        - `rows`: which rows these are, without repetition; all in order if not given. Use it to
            read the prompt of one without computing anything for the others.

        Returns:

        What `model.extend` would give for each sequence on its own, and the cache with them added.

        Raises:

        - `ValueError` if `tokens` is not `[batch, seq]`, `length` or `rows` is not `[batch]`, or
            there are not tokens for every row and `rows` is not given.
        - An error, at run time under `jax.jit`, if there are too few free pages, a sequence
            becomes longer than `max_len`, or `length` or `rows` are out of range.
        """
        if np.ndim(tokens) != 2:
            raise ValueError(
                f"PagedCache: tokens has shape {np.shape(tokens)} but must be [batch, seq]; "
                "tokens[:, None] for one token of every row, tokens[None] and rows= for one row."
            )
        (batch, seq), num_rows = tokens.shape, self.lengths.shape[0]
        if rows is None and batch != num_rows:
            raise ValueError(
                f"PagedCache: tokens for {batch} rows, but there are {num_rows}; pass tokens for "
                "every row, or say with rows= which they are for."
            )
        for name, given in (("length", length), ("rows", rows)):
            if given is not None and np.shape(given) != (batch,):
                raise ValueError(
                    f"PagedCache: {name} has shape {np.shape(given)} for the tokens of {batch} "
                    "rows; give one number for each."
                )
        counts = jnp.full(batch, seq, jnp.int32) if length is None else length.astype(jnp.int32)
        counts = eqx.error_if(
            counts,
            (counts < 0) | (counts > seq),
            f"PagedCache: length must be from 0 to the {seq} tokens of a row.",
        )
        if rows is not None:
            given = jnp.zeros(num_rows, jnp.int32).at[rows].add(1, mode="drop")
            rows = eqx.error_if(
                rows,
                (jnp.max(given) > 1)
                | (jnp.sum(given, dtype=jnp.int32) < batch)
                | (jnp.min(rows) < 0),
                f"PagedCache: rows must be different ones from 0 to {num_rows - 1}.",
            )
        at = slice(None) if rows is None else rows
        model = eqx.nn.inference_mode(model)
        grown = self.lengths.at[at].add(counts)
        cache = self._reserved(grown)

        def one(tokens: Array, count: Array, before: Array, table: Array, state: Any) -> Any:
            def view(pages: Pages) -> PagedKVCache:
                shared = (jnp.broadcast_to(x, (*pages.stack, *x.shape)) for x in (table, before))
                return PagedKVCache(pages, *shared)

            views = jax.tree.map(view, cache.pools, is_leaf=_is_pages)
            old = eqx.combine(state, views, is_leaf=_is_view)
            logits, new = model.extend(tokens, old, length=count)
            views, state = eqx.partition(new, _is_view, is_leaf=_is_view)
            return logits, state, jax.tree.map(lambda x: x.pages, views, is_leaf=_is_view)

        states = jax.tree.map(lambda x: x[at], cache.states)
        parts = (tokens, counts, self.lengths[at], cache.page_table[at], states)
        logits, states, pools = jax.vmap(one, out_axes=(0, 0, None))(*parts)
        states = jax.tree.map(lambda old, new: old.at[at].set(new), cache.states, states)
        return logits, dataclasses.replace(cache, pools=pools, states=states, lengths=grown)

    def free(self, which: Bool[Array, " num_sequences"]) -> "PagedCache":
        """Ends the sequences marked in `which`; pages that no other row uses become free.

        Raises:

        - `ValueError` if `which` is not one flag for every row.
        """
        if which.dtype != bool or which.shape != self.lengths.shape:
            raise ValueError(
                f"PagedCache: free(which) got {which.dtype}{list(which.shape)} but takes one flag "
                f"for each of the {self.lengths.shape[0]} rows, not their numbers."
            )

        def cleared(x: Array, empty: Array) -> Array:
            return jnp.where(which.reshape(-1, *[1] * empty.ndim), empty[None], x)

        states = jax.tree.map(cleared, self.states, self.empty)
        lengths = jnp.where(which, 0, self.lengths)
        return dataclasses.replace(self, states=states)._released(lengths)

    def truncate(self, lengths: Int[Array, " num_sequences"]) -> "PagedCache":
        """The cache with only the first `lengths[i]` tokens of row `i`, to take back the others.

        Raises:

        - `ValueError` if there is not one length for every row, or a layer's state cannot take
            tokens back.
        - An error, at run time under `jax.jit`, if a length is negative or more than there are, if
            a window no longer has the positions (see `RingCache`), or if a shared page must be
            copied and none is free.
        """
        if lengths.shape != self.lengths.shape:
            raise ValueError(
                f"PagedCache: truncate(lengths) got shape {lengths.shape} but takes one length for "
                f"each of the {self.lengths.shape[0]} rows."
            )
        lengths = eqx.error_if(
            lengths.astype(jnp.int32),
            (lengths < 0) | (lengths > self.lengths),
            "PagedCache: truncate(lengths) needs lengths from 0 to those of the cache.",
        )
        states = jax.vmap(truncate)(self.states, lengths)
        cache = dataclasses.replace(self, states=states)
        return cache._released(lengths)._owned(lengths < self.lengths)

    def fork(self, source: Int[Array, ""] | int, target: Int[Array, ""] | int) -> "PagedCache":
        """Makes the free row `target` a duplicate of `source`: for samples, or a common prompt.

        Pages are shared, except for a last one with room in it, which is copied.

        Raises:

        - An error, at run time under `jax.jit`, if `target` is in use, either is not a row, or no
            page is free for the copy.
        """
        source, target = (jnp.asarray(x, jnp.int32) for x in (source, target))
        num_rows = self.lengths.shape[0]
        lengths = eqx.error_if(
            self.lengths,
            (self.lengths[target] > 0)
            | (jnp.minimum(source, target) < 0)
            | (jnp.maximum(source, target) >= num_rows),
            f"PagedCache: fork goes from one of the {num_rows} rows to a free one; free it first.",
        )
        row = self.page_table[source]
        cache = dataclasses.replace(
            self,
            states=jax.tree.map(lambda x: x.at[target].set(x[source]), self.states),
            page_table=self.page_table.at[target].set(row),
            lengths=lengths.at[target].set(lengths[source]),
            users=self.users.at[self._pages(row)].add(1, mode="drop"),
        )
        return cache._owned(jnp.arange(num_rows, dtype=jnp.int32) == target)

    def _columns(self) -> Array:
        return jnp.arange(self.page_table.shape[1], dtype=jnp.int32)[None, :]

    def _pages(self, table: Array) -> Array:
        """The entries of a table, with empty ones past the last page."""
        return jnp.where(table < 0, self.users.shape[0], table)

    def _reserved(self, lengths: Array) -> "PagedCache":
        """With pages for this many positions of every row."""
        lengths = eqx.error_if(
            lengths,
            lengths > self.max_len,
            f"PagedCache: a sequence becomes longer than max_len={self.max_len}; free it, or make "
            "the cache with a larger max_len.",
        )
        has = jnp.sum(self.page_table >= 0, axis=1, dtype=jnp.int32)
        new = jnp.maximum(-(-lengths // self.page_size) - has, 0)
        columns = self._columns() - has[:, None]
        return self._given((columns >= 0) & (columns < new[:, None]))

    def _given(self, wanted: Array) -> "PagedCache":
        """With a free page at every marked place of the table."""
        num_pages = self.users.shape[0]
        order = jnp.cumsum(wanted.reshape(-1), dtype=jnp.int32).reshape(wanted.shape) - 1
        order = eqx.error_if(
            order,
            jnp.sum(wanted, dtype=jnp.int32) > self.num_free_pages,
            f"PagedCache: fewer of the {num_pages} pages are free than are needed; free sequences, "
            "or make the cache with a larger num_pages.",
        )
        (free,) = jnp.nonzero(self.users == 0, size=num_pages, fill_value=num_pages)
        page = free.astype(jnp.int32).at[order].get(mode="clip")
        table = jnp.where(wanted, page, self.page_table)
        users = self.users.at[jnp.where(wanted, page, num_pages)].add(1, mode="drop")
        return dataclasses.replace(self, page_table=table, users=users)

    def _released(self, lengths: Array) -> "PagedCache":
        """Without the pages beyond these lengths."""
        kept = self._columns() < -(-lengths[:, None] // self.page_size)
        gone = self._pages(jnp.where(kept, -1, self.page_table))
        return dataclasses.replace(
            self,
            page_table=jnp.where(kept, self.page_table, -1),
            lengths=lengths,
            users=self.users.at[gone].add(-1, mode="drop"),
        )

    def _owned(self, which: Array) -> "PagedCache":
        """With the page that each of these rows writes to next copied if it is shared."""
        column, rest = self.lengths // self.page_size, self.lengths % self.page_size
        last = self._columns() == column[:, None]
        old = jnp.max(jnp.where(last, self.page_table, -1), axis=1)
        writes = which & (rest > 0)
        # Of rows that would all leave the page they share, the last keeps it.
        alike = jnp.tril((old[:, None] == old[None, :]) & writes[None, :], -1)
        shared = writes & (self.users[old] > 1 + jnp.sum(alike, axis=1, dtype=jnp.int32))
        wanted = last & shared[:, None]
        cache = self._given(wanted)
        new = jnp.where(shared, jnp.max(jnp.where(last, cache.page_table, -1), axis=1), -1)
        left = cache.users.at[self._pages(jnp.where(shared, old, -1))].add(-1, mode="drop")
        source, target = jnp.maximum(old, 0), self._pages(new)
        pools = jax.tree.map(
            lambda pages: pages.copied(source, target), cache.pools, is_leaf=_is_pages
        )
        return dataclasses.replace(cache, users=left, pools=pools)


# Compiled, so that the arrays that pages replace are never allocated.
@eqx.filter_jit
def _empty(
    model: AbstractDecoder, num_pages: int, page_size: int, max_len: int, dtype: Any
) -> tuple[Any, Any]:
    """Pages for every layer, and everything else that the model keeps of one sequence."""
    state = jax.tree.map(
        lambda x: Pages.like(x, num_pages, page_size) if isinstance(x, KVCache) else x,
        model.init_cache(max_len, dtype),
        is_leaf=lambda x: isinstance(x, KVCache),
    )
    return eqx.partition(state, _is_pages, is_leaf=_is_pages)


def _is_pages(x: Any) -> bool:
    return isinstance(x, Pages)


def _is_view(x: Any) -> bool:
    return isinstance(x, PagedKVCache)
