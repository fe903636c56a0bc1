"""Who may attend to whom, as values.

A mask is a predicate on absolute positions together with a classification of rectangles of
positions. The predicate defines the mask; the classification says what may be skipped. Masks
are closed under `&`, `|` and `~`, and the classification of an expression is sound because
`min`, `max` and `2 - b` are conjunction, disjunction and negation of Kleene's three-valued logic.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ._hoist import hoist

EMPTY: Final = 0
"""No pair of the rectangle may attend."""
PARTIAL: Final = 1
"""Some pairs may attend and others not, or this is unknown."""
FULL: Final = 2
"""Every pair of the rectangle may attend."""


class AbstractMask(eqx.Module):
    """Which query positions may attend to which key positions.

    `True` means "may attend". Combine masks with `&`, `|` and `~`. A mask is a PyTree: one that
    differs from example to example (padding, documents) is batched by `jax.vmap` over its leaves.
    """

    @abc.abstractmethod
    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Says whether each query position may attend to each key position.

        Arguments:

        - `q_pos`, `kv_pos`: absolute positions; they broadcast against each other.

        Returns:

        Booleans of the broadcast shape.
        """

    @abc.abstractmethod
    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        """Classifies rectangles of positions (bounds inclusive, broadcasting).

        Answers `EMPTY` or `FULL` only where that is certain; `PARTIAL` is always allowed.
        """

    def __and__(self, other: "AbstractMask") -> "AbstractMask":
        return And(self, other)

    def __or__(self, other: "AbstractMask") -> "AbstractMask":
        return Or(self, other)

    def __invert__(self) -> "AbstractMask":
        return Not(self)

    def __bool__(self) -> bool:
        # `causal and padding` would silently mean `padding` alone.
        raise TypeError(
            "A mask is neither true nor false: combine masks with &, | and ~, not with and, or, "
            "not; compare with `is None`."
        )

    def draw(self, q_seq: int, kv_seq: int | None = None) -> str:
        """Draws the mask over positions `0..q_seq-1` (down) and `0..kv_seq-1` (across) as text.

        `#` marks a pair that may attend, `.` one that may not.
        """
        kv_seq = q_seq if kv_seq is None else kv_seq
        allowed = np.asarray(self(jnp.arange(q_seq)[:, None], jnp.arange(kv_seq)[None, :]))
        allowed = np.broadcast_to(allowed, (q_seq, kv_seq))
        return "\n".join(" ".join("#" if x else "." for x in row) for row in allowed)


def _as_flags(x: Bool[Array | np.ndarray, " seq"]) -> Bool[Array, " seq"]:
    return _booleans("Padding: valid", "tokens != pad_id", x)


def _as_matrix(x: Bool[Array | np.ndarray, "q kv"]) -> Bool[Array, "q kv"]:
    return _booleans("Dense: allowed", "matrix > 0", x)


def _booleans(what: str, example: str, x: Any) -> Array:
    x = jnp.asarray(x)
    if x.dtype != jnp.bool_:
        raise ValueError(
            f"{what} has dtype {x.dtype} but must be boolean, true where one may attend, e.g. "
            f"{example}."
        )
    return x


def _classify(none: Any, all_: Any) -> Int[Array, "..."]:
    return jnp.where(none, EMPTY, jnp.where(all_, FULL, PARTIAL))


class And(AbstractMask):
    """Both masks allow the pair. Written `a & b`."""

    left: AbstractMask
    right: AbstractMask

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        return self.left(q_pos, kv_pos) & self.right(q_pos, kv_pos)

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        bounds = (q_lo, q_hi, kv_lo, kv_hi)
        return jnp.minimum(self.left.block(*bounds), self.right.block(*bounds))

    def __str__(self) -> str:
        return f"({self.left} & {self.right})"


class Or(AbstractMask):
    """At least one mask allows the pair. Written `a | b`."""

    left: AbstractMask
    right: AbstractMask

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        return self.left(q_pos, kv_pos) | self.right(q_pos, kv_pos)

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        bounds = (q_lo, q_hi, kv_lo, kv_hi)
        return jnp.maximum(self.left.block(*bounds), self.right.block(*bounds))

    def __str__(self) -> str:
        return f"({self.left} | {self.right})"


class Not(AbstractMask):
    """The mask does not allow the pair. Written `~a`."""

    mask: AbstractMask

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        return ~self.mask(q_pos, kv_pos)

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        return FULL - self.mask.block(q_lo, q_hi, kv_lo, kv_hi)

    def __str__(self) -> str:
        return f"~{self.mask}"


class Causal(AbstractMask):
    """A query attends to its own position and to earlier ones: `kv_pos <= q_pos`.

    Positions are absolute, so the mask means the same in a full forward pass, in a chunked
    prefill, and while decoding one token against a cache.
    """

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        return kv_pos <= q_pos

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        return _classify(kv_lo > q_hi, kv_hi <= q_lo)

    def __str__(self) -> str:
        return "Causal()"


class SlidingWindow(AbstractMask):
    """A query attends to `left` positions before its own, itself, and `right` after it.

    `None` leaves a side unbounded. A window of `w` keys for a causal model, the query's own
    included, is `SlidingWindow(left=w - 1, right=0)`; for an encoder `SlidingWindow(r, r)` is
    symmetric. (Beltagy et al., Longformer, 2020; Jiang et al., Mistral 7B, 2023.)

    Raises:

    - `ValueError` if a side is negative.
    """

    left: int | None = eqx.field(static=True)
    right: int | None = eqx.field(static=True)

    def __check_init__(self) -> None:
        for name, side in (("left", self.left), ("right", self.right)):
            if side is not None and side < 0:
                raise ValueError(
                    f"SlidingWindow: {name}={side} is negative; pass 0 to stop at the query's own "
                    "position, or None for no bound."
                )

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        offset = kv_pos - q_pos
        allowed = jnp.ones(offset.shape, bool)
        if self.left is not None:
            allowed &= offset >= -self.left
        if self.right is not None:
            allowed &= offset <= self.right
        return allowed

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        least, most = kv_lo - q_hi, kv_hi - q_lo
        none, all_ = jnp.zeros(least.shape, bool), jnp.ones(least.shape, bool)
        if self.left is not None:
            none |= most < -self.left
            all_ &= least >= -self.left
        if self.right is not None:
            none |= least > self.right
            all_ &= most <= self.right
        return _classify(none, all_)

    def __str__(self) -> str:
        return f"SlidingWindow(left={self.left}, right={self.right})"


class Prefix(AbstractMask):
    """Every query attends to the first `length` key positions.

    `Causal() | Prefix(n)` is a prefix language model. `length` is an integer, or an integer array
    where it differs from example to example.
    """

    length: int | Int[Array, ""]

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        return (kv_pos < self.length) & (q_pos == q_pos)

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        return _classify(kv_lo >= self.length, kv_hi < self.length)

    def __str__(self) -> str:
        return f"Prefix({self.length if isinstance(self.length, int) else 'array'})"


class Padding(AbstractMask):
    """A key may be attended to only where `valid` is true, e.g. `Padding(tokens != pad_id)`.

    Keys at positions outside `0..kv_seq-1` are padding.
    """

    valid: Bool[Array, " kv_seq"] = eqx.field(converter=_as_flags)

    def extent(self, axis: Literal["q", "kv"]) -> int | None:
        """How many positions the mask covers along an axis; `None`: all of them."""
        return self.valid.shape[0] if axis == "kv" else None

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        valid = _lookup(self.valid, kv_pos, False)
        return valid & (q_pos == q_pos)

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        none = ~jnp.any(_over_range(self.valid, kv_lo, kv_hi, False), axis=-1)
        all_ = jnp.all(_over_range(self.valid, kv_lo, kv_hi, True), axis=-1)
        return _classify(none, all_ & _in_range(self.valid, kv_lo, kv_hi))

    def __str__(self) -> str:
        return "Padding(valid)"


class Segments(AbstractMask):
    """A query attends to the keys of its own segment: documents packed into one row, say.

    Arguments:

    - `q_ids`: the segment of every query position.
    - `kv_ids`: the segment of every key position; the same as `q_ids` if left out.

    A negative id marks padding: it attends to nothing and nothing attends to it. Positions outside
    the arrays count as padding. Rectangles are classified exactly when ids, padding aside, do not
    decrease along the sequence, conservatively otherwise.
    """

    q_ids: Int[Array, " q_seq"]
    kv_ids: Int[Array, " kv_seq"]

    def __init__(
        self,
        q_ids: Int[Array | np.ndarray, " q_seq"],
        kv_ids: Int[Array | np.ndarray, " kv_seq"] | None = None,
    ):
        self.q_ids = jnp.asarray(q_ids)
        self.kv_ids = self.q_ids if kv_ids is None else jnp.asarray(kv_ids)

    def extent(self, axis: Literal["q", "kv"]) -> int | None:
        """How many positions the mask covers along an axis."""
        return (self.q_ids if axis == "q" else self.kv_ids).shape[0]

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        q_ids = _lookup(self.q_ids, q_pos, -1)
        return (q_ids == _lookup(self.kv_ids, kv_pos, -1)) & (q_ids >= 0)

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        q_least, q_most, q_whole = _extremes(self.q_ids, q_lo, q_hi)
        kv_least, kv_most, kv_whole = _extremes(self.kv_ids, kv_lo, kv_hi)
        none = (q_most < kv_least) | (kv_most < q_least)
        one_id = (q_least == q_most) & (kv_least == kv_most) & (q_least == kv_least)
        all_ = one_id & q_whole & kv_whole
        return _classify(none, all_)

    def __str__(self) -> str:
        return "Segments(q_ids, kv_ids)"


class TokenGroups(AbstractMask):
    """Named runs of tokens, and which run may attend to which.

    Arguments:

    - `sizes`: how many consecutive positions each group has, in order; the same for queries and
        keys.
    - `attends`: `attends[i][j]` says whether group `i` may attend to group `j`.

    Positions after the last group attend to nothing and are attended to by nothing.

    Raises:

    - `ValueError` if a size is negative or `attends` is not square with one row per group.
    """

    sizes: tuple[int, ...] = eqx.field(static=True)
    attends: tuple[tuple[bool, ...], ...] = eqx.field(static=True)

    def __init__(self, sizes: Sequence[int], attends: Sequence[Sequence[bool | int]]):
        self.sizes = tuple(int(size) for size in sizes)
        self.attends = tuple(tuple(bool(x) for x in row) for row in attends)
        if any(size < 0 for size in self.sizes):
            raise ValueError(f"TokenGroups: sizes={self.sizes} has a negative size.")
        if {len(self.sizes)} != {
            len(self.attends),
            *(len(row) for row in self.attends),
        }:
            raise ValueError(
                f"TokenGroups: there are {len(self.sizes)} sizes, but attends has rows of lengths "
                f"{[len(row) for row in self.attends]}; it must be square, one row per group."
            )

    def _group(self, pos: Int[Array, "..."]) -> Int[Array, "..."]:
        """The group of each position, from 1; 0 before the first, one more after the last."""
        starts = jnp.asarray(np.cumsum((0, *self.sizes)), jnp.int32)
        return jnp.searchsorted(starts, pos, side="right").astype(jnp.int32)

    def _table(self) -> Int[np.ndarray, "groups groups"]:
        groups = len(self.sizes)
        table = np.zeros((groups + 2, groups + 2), np.int32)
        table[1:-1, 1:-1] = np.asarray(self.attends, np.int32).reshape(groups, groups)
        return table

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        return jnp.asarray(self._table() == 1)[self._group(q_pos), self._group(kv_pos)]

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        # Sums over rectangles of the group table, by its two-dimensional prefix sums.
        sums = np.pad(self._table(), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
        sums = jnp.asarray(sums, jnp.int32)
        top, bottom = self._group(q_lo), self._group(q_hi) + 1
        near, far = self._group(kv_lo), self._group(kv_hi) + 1
        allowed = sums[bottom, far] - sums[top, far] - sums[bottom, near] + sums[top, near]
        return _classify(allowed == 0, allowed == (bottom - top) * (far - near))

    def __str__(self) -> str:
        return f"TokenGroups({self.sizes}, {self.attends})"


class Strided(AbstractMask):
    """A query attends to keys a multiple of `stride` positions away, on both sides.

    `Causal() & Strided(s)` is the strided pattern of Child et al. (Sparse Transformers, 2019),
    and `SlidingWindow(l, r) & Strided(s)` a dilated window.

    Raises:

    - `ValueError` if `stride` is less than one.
    """

    stride: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"Strided: stride={self.stride} must be at least 1.")

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        return (q_pos - kv_pos) % self.stride == 0

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        least, most = q_lo - kv_hi, q_hi - kv_lo
        none = (most // self.stride) * self.stride < least
        all_ = (self.stride == 1) | ((least == most) & (least % self.stride == 0))
        return _classify(none, all_)

    def __str__(self) -> str:
        return f"Strided({self.stride})"


class Dense(AbstractMask):
    """Any boolean matrix, indexed by position. No tile is skipped for it.

    Positions outside the matrix may not attend.
    """

    allowed: Bool[Array, "q_seq kv_seq"] = eqx.field(converter=_as_matrix)

    def extent(self, axis: Literal["q", "kv"]) -> int | None:
        """How many positions the mask covers along an axis."""
        return self.allowed.shape[0 if axis == "q" else 1]

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        index = jnp.where(q_pos < 0, self.allowed.shape[0], q_pos)
        return self.allowed.at[index, jnp.where(kv_pos < 0, self.allowed.shape[1], kv_pos)].get(
            mode="fill", fill_value=False
        )

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        return _unknown(q_lo, q_hi, kv_lo, kv_hi)

    def __str__(self) -> str:
        return "Dense(allowed)"


class Predicate(AbstractMask):
    """Any elementwise function `(q_pos, kv_pos) -> bool`. No tile is skipped for it.

    Arrays the function closes over become leaves of the mask, so it crosses `jax.vmap`,
    `jax.jit` and differentiation like any other. For block skipping write a subclass of
    `AbstractMask` with a `block` method, or combine with a mask that has one:
    `Causal() & Predicate(fn)` skips what `Causal` skips.
    """

    function: Callable[[Int[Array, "..."], Int[Array, "..."]], Bool[Array, "..."]]

    def __init__(
        self,
        function: Callable[[Int[Array, "..."], Int[Array, "..."]], Bool[Array, "..."]],
    ):
        q_pos, kv_pos = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3, 1), (1, 5)))
        self.function = hoist(function, q_pos, kv_pos, what="Predicate", out_dtype=jnp.bool)

    def __call__(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        return self.function(q_pos, kv_pos)

    def block(
        self,
        q_lo: Int[Array, "..."],
        q_hi: Int[Array, "..."],
        kv_lo: Int[Array, "..."],
        kv_hi: Int[Array, "..."],
    ) -> Int[Array, "..."]:
        return _unknown(q_lo, q_hi, kv_lo, kv_hi)

    def __str__(self) -> str:
        return "Predicate(function)"


def lookback(mask: AbstractMask | None) -> int | None:
    """The most positions before its own that a query can see; `None` if there is no bound.

    Caches need not keep more.
    """
    if isinstance(mask, SlidingWindow):
        return mask.left
    if isinstance(mask, And | Or):
        sides = [lookback(mask.left), lookback(mask.right)]
        known = [side for side in sides if side is not None]
        if isinstance(mask, And):
            return min(known, default=None)
        return max(known) if len(known) == len(sides) else None
    return None


def _unknown(*bounds: Int[Array, "..."]) -> Int[Array, "..."]:
    return jnp.full(jnp.broadcast_shapes(*(jnp.shape(x) for x in bounds)), PARTIAL)


def _lookup(values: Any, pos: Int[Array, "..."], outside: bool | int) -> Any:
    # A negative index would count from the end.
    index = jnp.where(pos < 0, values.shape[0], pos)
    return values.at[index].get(mode="fill", fill_value=outside)


def _over_range(values: Any, lo: Any, hi: Any, outside: bool | int) -> Array:
    """All `values` along a new last axis, for every range, with `outside` outside the range."""
    index = jnp.arange(values.shape[0], dtype=jnp.int32)
    index, values = (x.reshape((1,) * jnp.ndim(lo) + x.shape) for x in (index, values))
    return jnp.where((lo[..., None] <= index) & (index <= hi[..., None]), values, outside)


def _in_range(values: Any, lo: Any, hi: Any) -> Bool[Array, "..."]:
    return (lo >= 0) & (hi < values.shape[0])


def _extremes(ids: Int[Array, " seq"], lo: Any, hi: Any) -> tuple[Any, Any, Any]:
    """The least and greatest id in each range, padding aside, and whether it has no padding.

    In a range of nothing but padding, the least id exceeds the greatest.
    """
    greatest = jnp.iinfo(ids.dtype).max
    least = jnp.min(
        _over_range(jnp.where(ids < 0, greatest, ids), lo, hi, greatest), axis=-1, initial=greatest
    )
    most = jnp.max(_over_range(ids, lo, hi, -1), axis=-1, initial=-1)
    whole = jnp.min(_over_range(ids, lo, hi, 0), axis=-1, initial=0) == 0
    return least, most, whole & _in_range(ids, lo, hi)
