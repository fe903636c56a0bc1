"""Operations that move elements, or combine a few: which element of the result is which.

Each rule takes the interpreter of `_unrolled.py`, an equation and its inputs, and returns a
function from an index of the result to the element there.
"""

import itertools
from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax

MAX_UNROLLED: Final = 256
"""The most elements that a sum, or steps that a loop, may have."""


def _negated(x: Any) -> Any:
    # Pallas for Hopper GPUs fails to lower `not`.
    return x ^ jnp.full(x.shape, True)


def select(which: Any, value: Any, otherwise: Any) -> Any:
    """`value` where `which` holds. By logic for booleans, which Pallas for TPUs cannot select."""
    if value.dtype == bool:
        return (which & value) | (_negated(which) & otherwise)
    return lax.select(which, value, otherwise)


def is_number(x: Any) -> bool:
    """Whether an index is known."""
    return isinstance(x, int | np.integer)


def _broadcast_in_dim(self: Any, eqn: Any, x: Any, *_: Any) -> Any:
    dims = eqn.params["broadcast_dimensions"]
    return lambda index: self.element(
        x, tuple(0 if n == 1 else index[d] for d, n in zip(dims, x.shape, strict=True))
    )


def _reshape(self: Any, eqn: Any, x: Any, *_: Any) -> Any:
    shape = eqn.outvars[0].aval.shape
    new, old = ([(d, n) for d, n in enumerate(s) if n != 1] for s in (shape, x.shape))
    if [n for _, n in new] == [n for _, n in old]:

        def element(index: tuple[Any, ...]) -> Any:
            full: list[Any] = [0] * len(x.shape)
            for (d, _), (e, _) in zip(old, new, strict=True):
                full[d] = index[e]
            return self.element(x, tuple(full))

        return element

    def by_number(index: tuple[Any, ...]) -> Any:
        if not all(is_number(i) for i in index):
            self.refuse("indexes an array that it reshapes")
        flat = np.ravel_multi_index([int(i) for i in index], shape)
        return self.element(x, tuple(int(i) for i in np.unravel_index(flat, x.shape)))

    return by_number


def _squeeze(self: Any, eqn: Any, x: Any) -> Any:
    gone = {d % len(x.shape) for d in eqn.params["dimensions"]}

    def element(index: tuple[Any, ...]) -> Any:
        rest = iter(index)
        return self.element(x, tuple(0 if d in gone else next(rest) for d in range(len(x.shape))))

    return element


def _transpose(self: Any, eqn: Any, x: Any) -> Any:
    permutation = eqn.params["permutation"]

    def element(index: tuple[Any, ...]) -> Any:
        full: list[Any] = [None] * len(index)
        for d, i in zip(permutation, index, strict=True):
            full[d] = i
        return self.element(x, tuple(full))

    return element


def _concatenate(self: Any, eqn: Any, *xs: Any) -> Any:
    axis = eqn.params["dimension"]
    places = [(x, i) for x in xs for i in range(x.shape[axis])]

    def element(index: tuple[Any, ...]) -> Any:
        def at(x: Any, i: int) -> Any:
            return self.element(x, (*index[:axis], i, *index[axis + 1 :]))

        return self.choose(index[axis], [lambda x=x, i=i: at(x, i) for x, i in places])

    return element


def _stack(self: Any, eqn: Any, *xs: Any) -> Any:
    axis = eqn.params["axis"]
    return lambda index: self.choose(
        index[axis],
        [lambda x=x: self.element(x, (*index[:axis], *index[axis + 1 :])) for x in xs],
    )


def _slice(self: Any, eqn: Any, x: Any) -> Any:
    # NumPy's integers, sometimes.
    starts = [int(n) for n in eqn.params["start_indices"]]
    strides = [int(n) for n in eqn.params["strides"] or (1,) * len(starts)]
    return lambda index: self.element(
        x,
        tuple(
            self.add(self.times(i, n), s) for i, n, s in zip(index, strides, starts, strict=True)
        ),
    )


def _dynamic_slice(self: Any, eqn: Any, x: Any, *starts: Any) -> Any:
    sizes = eqn.params["slice_sizes"]

    def element(index: tuple[Any, ...]) -> Any:
        full = []
        for i, start, n, size in zip(index, starts, x.shape, sizes, strict=True):
            full.append(self.add(self.clip(self.index(start, ()), n - size), i))
        return self.element(x, tuple(full))

    return element


def _dynamic_update_slice(self: Any, eqn: Any, x: Any, update: Any, *starts: Any) -> Any:
    def element(index: tuple[Any, ...]) -> Any:
        inner, inside = [], []
        for i, start, n, size in zip(index, starts, x.shape, update.shape, strict=True):
            first = self.clip(self.index(start, ()), n - size)
            offset = self.add(i, self.times(first, -1))
            inner.append(self.clip(offset, size - 1))
            inside.append(_within(self, offset, size - 1))
        return _where(self, inside, self.element(update, tuple(inner)), self.element(x, index))

    return element


def _pad(self: Any, eqn: Any, x: Any, value: Any) -> Any:
    config = eqn.params["padding_config"]
    if any(interior for _, _, interior in config):
        self.refuse("puts something between the elements of an array")

    def element(index: tuple[Any, ...]) -> Any:
        offsets = [self.add(i, -before) for i, (before, _, _) in zip(index, config, strict=True)]
        inner = tuple(self.clip(i, n - 1) for i, n in zip(offsets, x.shape, strict=True))
        inside = [_within(self, i, n - 1) for i, n in zip(offsets, x.shape, strict=True)]
        return _where(self, inside, self.element(x, inner), self.element(value, ()))

    return element


def _within(self: Any, i: Any, most: int) -> Any:
    """Whether an index is in `0..most`."""
    if is_number(i):
        return 0 <= i <= most
    return self.apply(lambda i: (i >= 0) & (i <= most), i)


def _where(self: Any, conditions: list[Any], value: Any, otherwise: Any) -> Any:
    """`value` where all conditions hold, each of which may be known."""
    if any(x is False for x in conditions):
        return otherwise
    for condition in conditions:
        if condition is not True:
            value = self.apply(select, condition, value, otherwise)
    return value


def _gather(self: Any, eqn: Any, x: Any, indices: Any) -> Any:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    fill_value = eqn.params["fill_value"]
    fills = lax.GatherScatterMode.from_any(eqn.params["mode"]) == (
        lax.GatherScatterMode.FILL_OR_DROP
    )
    hidden = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    shown = [d for d in range(len(x.shape)) if d not in hidden]
    if fill_value is None:
        fill_value = _default_fill(x.dtype)
    if 0 in x.shape:
        self.refuse("indexes an array without elements")

    def element(index: tuple[Any, ...]) -> Any:
        batch = [i for d, i in enumerate(index) if d not in numbers.offset_dims]
        full: list[Any] = [0] * len(x.shape)
        for d, e in zip(numbers.offset_dims, shown, strict=True):
            full[e] = index[d]
        for d, e in zip(
            numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
        ):
            full[d] = batch[e]
        inside = []
        for n, d in enumerate(numbers.start_index_map):
            start, most = self.index(indices, (*batch, n)), x.shape[d] - sizes[d]
            if fills:
                inside.append(_within(self, start, most))
            # Clipped even if indices are promised to be in bounds: those of rows that pad a tile
            # need not be.
            full[d] = self.add(self.clip(start, most), full[d])
        return _where(
            self, inside, self.element(x, tuple(full)), np.asarray(fill_value, x.dtype)[()]
        )

    return element


def _default_fill(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.nan
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return jnp.iinfo(dtype).min
    return True if dtype == jnp.bool else jnp.iinfo(dtype).max


def _reduction(combine: Callable[..., Any]) -> Callable[..., Any]:
    def rule(self: Any, eqn: Any, x: Any) -> Any:
        axes = eqn.params["axes"]
        extents = [x.shape[d] for d in axes]
        if not 0 < np.prod(extents) <= MAX_UNROLLED:
            self.refuse(f"reduces an array of shape {tuple(x.shape)}")

        def element(index: tuple[Any, ...]) -> Any:
            parts = []
            for reduced in itertools.product(*map(range, extents)):
                rest, inner = iter(index), dict(zip(axes, reduced, strict=True))
                full = (inner[d] if d in inner else next(rest) for d in range(len(x.shape)))
                parts.append(self.element(x, tuple(full)))
            total = parts[0]
            for part in parts[1:]:
                total = self.apply(combine, total, part)
            return total

        return element

    return rule


def _dot_general(self: Any, eqn: Any, x: Any, y: Any) -> Any:
    (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    dtype = eqn.outvars[0].aval.dtype
    extents = [x.shape[d] for d in x_sum]
    if not 0 < np.prod(extents) <= MAX_UNROLLED:
        self.refuse(f"sums products over axes of lengths {extents}")

    def product(x: Any, y: Any) -> Any:
        return x.astype(dtype) * y.astype(dtype)

    def element(index: tuple[Any, ...]) -> Any:
        batch, rest = index[: len(x_batch)], iter(index[len(x_batch) :])
        free = []
        for z, summed, batched in ((x, x_sum, x_batch), (y, y_sum, y_batch)):
            own = dict(zip(batched, batch, strict=True))
            own |= {d: next(rest) for d in range(len(z.shape)) if d not in (*summed, *batched)}
            free.append(own)
        total = None
        for inner in itertools.product(*map(range, extents)):
            pair = []
            for z, summed, own in zip((x, y), (x_sum, y_sum), free, strict=True):
                full = own | dict(zip(summed, inner, strict=True))
                pair.append(self.element(z, tuple(full[d] for d in range(len(z.shape)))))
            term = self.apply(product, *pair)
            total = term if total is None else self.apply(lax.add, total, term)
        return total

    return element


def computation(eqn: Any) -> Callable[..., Any]:
    """What an elementwise operation computes, by operations that Pallas for TPUs supports too."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval.dtype
    dtypes = {x.aval.dtype for x in eqn.invars}
    (dtype, *others) = dtypes

    def compute(*xs: Any) -> Any:
        return _sign(*xs) if name == "sign" else eqn.primitive.bind(*xs, **eqn.params)

    if name == "add_any":
        return lax.add
    if dtypes == {jnp.dtype(bool)} and name in _OF_BOOLEANS:
        return _OF_BOOLEANS[name]
    narrow = jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize < 4 and not others
    if narrow and name not in _OF_BITS:
        # TPUs compute with 32-bit integers. Truncating the result is how narrow ones overflow.
        return lambda *xs: compute(*(x.astype(jnp.int32) for x in xs)).astype(out)
    return compute


_OF_BOOLEANS: Final = {
    "eq": lambda x, y: _negated(x ^ y),
    "ne": lambda x, y: x ^ y,
    "not": _negated,
    "select_n": lambda which, otherwise, value: select(which, value, otherwise),
}
"""By logic, because Pallas for TPUs and Hopper GPUs cannot do these on booleans."""
_OF_BITS: Final = ("clz", "convert_element_type", "population_count", "shift_right_logical")
"""Operations that depend on how many bits an integer has, not on its value alone."""


def _sign(x: Any) -> Any:
    # The one of Pallas for TPUs asks the machine it is compiled on which TPU it has.
    found = (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)
    return jnp.where(x != x, x, found) if jnp.issubdtype(x.dtype, jnp.floating) else found


def _log2(self: Any, eqn: Any, x: Any) -> Any:
    return lambda index: self.apply(lambda x: jnp.log(x) * (1 / np.log(2)), self.element(x, index))


def _is_finite(self: Any, eqn: Any, x: Any) -> Any:
    return lambda index: self.apply(lambda x: jnp.abs(x) < jnp.inf, self.element(x, index))


def _total_order(compare: Callable[..., Any]) -> Callable[..., Any]:
    def rule(self: Any, eqn: Any, x: Any, y: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            self.refuse("orders floating numbers totally")
        return lambda index: self.apply(
            compare, *(self.element(z, index if z.shape else ()) for z in (x, y))
        )

    return rule


RULES: dict[str, Callable[..., Callable[[tuple[Any, ...]], Any]]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "is_finite": _is_finite,
    "le_to": _total_order(lax.le),
    "log2": _log2,
    "lt_to": _total_order(lax.lt),
    "pad": _pad,
    "reduce_and": _reduction(lax.bitwise_and),
    "reduce_max": _reduction(lax.max),
    "reduce_min": _reduction(lax.min),
    "reduce_or": _reduction(lax.bitwise_or),
    "reduce_prod": _reduction(lax.mul),
    "reduce_sum": _reduction(lax.add),
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
}
