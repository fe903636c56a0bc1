"""Attention against keys and values that live in pages of a pool shared by many sequences.

A page table says, for each sequence, which page of the pool holds its positions `0..page_size-1`,
which the next `page_size`, and so on. A page can belong to several sequences. (Kwon et al.,
Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023.)
"""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._api import Implementation, compute
from ._inputs import Source, make_inputs
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
    - `page_table`: the pages of the sequence in order; entries beyond its length are ignored, and
        `-1` by convention.
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
    inputs = make_inputs(
        q,
        _gather(pages.k_pages, page_table),
        _gather(pages.v_pages, page_table),
        mask=filled if mask is None else mask & filled,
        score_mod=score_mod,
        scale=scale,
        q_positions=q_positions,
        # Passed, although they are the default, so that a mask need not cover the capacity.
        kv_positions=jnp.arange(capacity, dtype=jnp.int32),
        sinks=sinks,
    )
    # The kernel for decoding reads the pages themselves, and then nothing is gathered.
    source = Source(q, pages.k_pages, pages.v_pages, page_table)
    return compute(dataclasses.replace(inputs, kv_positions=None, source=source), implementation)


def _gather(
    pages: Float[Array, "num_pages page_size kv_heads dim"], page_table: Int[Array, " max_pages"]
) -> Float[Array, "capacity kv_heads dim"]:
    # A negative index would count from the end.
    index = jnp.where(page_table < 0, pages.shape[0], page_table)
    found = pages.at[index].get(mode="fill", fill_value=0)
    return found.reshape(-1, *pages.shape[2:])
