"""A map over rows in groups, with parameters for each group and sizes known only at run time.

Rows are sorted by group and cut into blocks of one group each, and a loop runs over the blocks. It
reads the parameters, and accumulates their gradients, in place. Measured with `MixtureOfExperts` on
two CPU cores (64 experts of 256 x 512, 2 of them for each of 1,024 positions; forward and
backward): 100 ms and 14 MiB of temporary memory. In plain JAX, a `vmap` over blocks with the
parameters of each gathered takes 190 ms and 270 MiB, a `scan` over blocks 200 ms and 250 MiB, every
expert for every position 1,600 ms and 1,300 MiB. `jax.lax.ragged_dot` does the last on a CPU,
cannot be batched over rows alone, and takes matrices only.

JAX has no reverse mode for such a loop, and would batch it with a copy of the parameters for every
example. So the map has its own rules. It is closed under differentiation: its tangent is the same
map with the tangent of the function, its transpose the same map with the transpose of that. Hence
every derivative of every order is one such loop. A batch becomes more rows.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int, PyTree

from .._precision import accumulation_dtype
from ..attention._linear_map import linear_map
from ..attention._varying import vary_alike

Block = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
"""From the arrays of one expert, and rows: results for every row, and sums over the rows."""

Loop = Callable[[Block, int, PyTree, PyTree, Array], tuple[PyTree, PyTree]]
"""`(block, num_groups, params, rows, groups)` to results for every row and sums for every group. It
need not be differentiable."""


@dataclasses.dataclass(frozen=True)
class _Tangent:
    """The derivative of `block`, linear in the second halves of parameters and rows."""

    block: Block

    def __call__(self, params: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        (params, dparams), (rows, drows) = params, rows
        primals, tangents = (params, rows), (dparams, drows)
        moving, still = eqx.partition(primals, _moving(primals, tangents))
        # Not `eqx.filter_jvp`, which leaves out tangents that are zero: the structure of the
        # result must not depend on what the block does.
        return jax.jvp(lambda x: self.block(*eqx.combine(x, still)), (moving,), (tangents,))[1]


@dataclasses.dataclass(frozen=True)
class _Transpose:
    """The transpose of `_Tangent`.

    Cotangents of sums come in with the parameters, those of rows with the rows. Cotangents of rows
    are returned for every row, those of parameters are summed.
    """

    block: Block
    moving: tuple[bool, ...]

    def __call__(self, params: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        (params, sum_cotangents), (rows, row_cotangents) = params, rows
        mask = jax.tree.unflatten(jax.tree.structure((params, rows)), self.moving)
        moving, still = eqx.partition((params, rows), mask)
        _, pull = jax.vjp(lambda moving: self.block(*eqx.combine(moving, still)), moving)
        ((dparams, drows),) = pull((row_cotangents, sum_cotangents))
        return drows, dparams


def _moving(primals: PyTree, tangents: PyTree) -> PyTree:
    return jax.tree.map(lambda _, tangent: tangent is not None, primals, tangents)


@dataclasses.dataclass(frozen=True)
class _Push:
    """`_Tangent` of all rows, as a linear map of the tangents."""

    block: Block
    num_groups: int
    loop: Loop

    def __call__(self, residuals: PyTree, operands: PyTree) -> tuple[PyTree, PyTree]:
        (params, rows, groups), (dparams, drows) = residuals, operands
        inputs = ((params, dparams), (rows, drows), groups)
        block = _Tangent(self.block)
        return _grouped(inputs, block=block, num_groups=self.num_groups, loop=self.loop)


@dataclasses.dataclass(frozen=True)
class _Pull:
    """`_Transpose` of all rows, as a linear map of the cotangents."""

    block: Block
    num_groups: int
    loop: Loop
    moving: tuple[bool, ...]

    def __call__(self, residuals: PyTree, cotangents: PyTree) -> tuple[PyTree, PyTree]:
        (params, rows, groups), (row_cotangents, sum_cotangents) = residuals, cotangents
        inputs = ((params, sum_cotangents), (rows, row_cotangents), groups)
        block = _Transpose(self.block, self.moving)
        drows, dparams = _grouped(inputs, block=block, num_groups=self.num_groups, loop=self.loop)
        return dparams, drows


def grouped_map(
    block: Block,
    params: PyTree,
    rows: PyTree,
    groups: Int[Array, " rows"],
    num_groups: int,
    *,
    loop: Loop | None = None,
) -> PyTree:
    """Applies `block` to the rows of every group, with the parameters of that group.

    Arguments:

    - `block`: a hashable function that maps every row on its own; nothing is summed.
    - `params`, `rows`: `[num_groups, ...]` and `[rows, ...]`.
    - `groups`: the group of every row; rows of group `num_groups` are skipped and give zeros.
    - `num_groups`: how many groups.
    - `loop`: the loop that computes it, and every derivative; `local_loop` if not given.

    Returns:

    The results for every row, `[rows, ...]`.
    """
    inputs = vary_alike((params, rows, groups))
    loop = local_loop if loop is None else loop
    return _grouped(inputs, block=block, num_groups=num_groups, loop=loop)[0]


@eqx.filter_custom_jvp
def _grouped(inputs: PyTree, *, block: Block, num_groups: int, loop: Loop) -> tuple[PyTree, PyTree]:
    """Results for every row, and sums for every group."""
    return _compiled(inputs, block, num_groups, loop)


@eqx.filter_jit
def _compiled(inputs: PyTree, block: Block, num_groups: int, loop: Loop) -> tuple[PyTree, PyTree]:
    # Compiled once per structure and shape, even for callers who do not use `jax.jit`.
    return _foldable(block, num_groups, loop)(*inputs)


@_grouped.def_jvp
def _grouped_jvp(
    primals: Any, tangents: Any, *, block: Block, num_groups: int, loop: Loop
) -> tuple[PyTree, PyTree]:
    (inputs,), ((dparams, drows, _),) = primals, tangents
    out = _grouped(inputs, block=block, num_groups=num_groups, loop=loop)
    return out, _push(block, num_groups, loop, inputs, (dparams, drows))


def _push(block: Block, num_groups: int, loop: Loop, inputs: PyTree, tangents: PyTree) -> PyTree:
    moving = tuple(jax.tree.leaves(_moving(inputs[:2], tangents)))
    return linear_map(
        _Push(block, num_groups, loop),
        _Pull(block, num_groups, loop, moving),
        inputs,
        tangents,
        batch=_PushBatch(block, num_groups, loop),
    )


@dataclasses.dataclass(frozen=True)
class _PushBatch:
    """`_Push` for a batch that shares the parameters: the same with more rows.

    Its transpose sums over the batch as it goes. Otherwise there would first be a cotangent of the
    parameters for every example.
    """

    block: Block
    num_groups: int
    loop: Loop

    def __call__(self, size: int, residuals: PyTree, operands: PyTree, batched: Any) -> PyTree:
        (params, rows, groups), (dparams, drows) = residuals, operands
        (params_batched, rows_batched, groups_batched), (dparams_batched, drows_batched) = batched
        if any(jax.tree.leaves((params_batched, dparams_batched))):
            return None
        fold = partial(_fold, size)
        rows = jax.tree.map(fold, rows, rows_batched)
        drows = jax.tree.map(fold, drows, drows_batched)
        if _has_sums(self.block, params, rows):
            return None
        inputs = (params, rows, fold(groups, groups_batched))
        out = _push(self.block, self.num_groups, self.loop, inputs, (dparams, drows))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)


def _fold(size: int, x: Array, is_batched: bool) -> Array:
    """The rows of all examples, one example after another."""
    if is_batched and any(jax.typeof(x).sharding.spec):
        raise ValueError(
            f"MixtureOfExperts: the batch is sharded, {jax.typeof(x)}, but with "
            "capacity_factor=None it is computed as a whole; call the layer inside jax.shard_map, "
            "or set capacity_factor."
        )
    x = x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
    return x.reshape(-1, *x.shape[2:])


def _foldable(block: Block, num_groups: int, loop: Loop) -> Callable[..., Any]:
    """`loop`, with a rule for batches: one loop over the rows of all examples.

    Derivatives are taken outside, so it does not matter that JAX's `custom_vmap` has no reverse
    mode.
    """
    run = custom_vmap(partial(loop, block, num_groups))

    @run.def_vmap
    def rule(size: int, batched: Any, params: PyTree, rows: PyTree, groups: Array) -> Any:
        params_batched, rows_batched, groups_batched = batched

        def own(x: Array, is_batched: bool) -> Array:
            # Parameters that all examples share stay as they are: groups are taken modulo length.
            if not is_batched:
                return x
            repeats = num_groups // x.shape[1]
            return jnp.tile(x, (1, repeats, *(1,) * (x.ndim - 2))).reshape(-1, *x.shape[2:])

        rows = jax.tree.map(partial(_fold, size), rows, rows_batched)
        groups = _fold(size, groups, groups_batched)
        if any(jax.tree.leaves(params_batched)) or _has_sums(block, params, rows):
            first = num_groups * jnp.arange(size, dtype=groups.dtype)
            first = jnp.repeat(first, groups.shape[0] // size)
            nowhere = groups == num_groups
            groups = jnp.where(nowhere, size * num_groups, groups + first)
            params = jax.tree.map(own, params, params_batched)
            total = size * num_groups
        else:
            total = num_groups
        out, sums = _foldable(block, total, loop)(params, rows, groups)
        result = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), (out, sums))
        return result, jax.tree.map(lambda _: True, result)

    return run


def shapes_of(block: Block, params: PyTree, rows: PyTree, size: int) -> tuple[PyTree, PyTree]:
    """The shapes of the results of `block` for `size` rows."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), rows)
    return jax.eval_shape(block, params, rows)


def _has_sums(block: Block, params: PyTree, rows: PyTree) -> bool:
    return bool(jax.tree.leaves(shapes_of(block, params, rows, 1)[1]))


def local_loop(
    block: Block, num_groups: int, params: PyTree, rows: PyTree, groups: Int[Array, " rows"]
) -> tuple[PyTree, PyTree]:
    """`_grouped` for one example, without derivatives."""
    num_rows = groups.shape[0]
    size = _block_size(num_rows, num_groups)
    order, place, starts = sorted_by_group(groups, num_groups)
    blocks = -(-jnp.diff(starts) // size)
    ends = jnp.cumsum(blocks)
    # At most one block per group is not full.
    most = min(num_rows, num_rows // size + num_groups)
    numbers = jnp.arange(most, dtype=jnp.int32)
    # Not `jnp.searchsorted`, which JAX 0.10 refuses where a mesh is manual in part.
    group_of = jnp.sum(ends[None] <= numbers[:, None], axis=1, dtype=jnp.int32)
    group_of = jnp.minimum(group_of, num_groups - 1)
    first_of = starts[group_of] + size * (numbers - (ends - blocks)[group_of])
    order = jnp.pad(order, (0, size))

    def run(i: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        outs, sums = carry
        group, first = group_of[i], first_of[i]
        which = jax.lax.dynamic_slice_in_dim(order, first, size)
        live = jnp.arange(size, dtype=jnp.int32) < starts[group + 1] - first

        def of_group(x: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(x, group % x.shape[0], keepdims=False)

        def of_rows(x: Array) -> Array:
            return jnp.where(live.reshape(-1, *(1,) * (x.ndim - 1)), x[which], 0)

        out, add = block(jax.tree.map(of_group, params), jax.tree.map(of_rows, rows))
        # What this writes past the last live row, the next block overwrites: blocks are in order.
        outs = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=0), outs, out
        )
        sums = jax.tree.map(lambda x, y: x.at[group].add(y.astype(x.dtype)), sums, add)
        return outs, sums

    out_shapes, sum_shapes = shapes_of(block, params, rows, size)
    zeros = (
        jax.tree.map(lambda x: jnp.zeros((num_rows + size, *x.shape[1:]), x.dtype), out_shapes),
        jax.tree.map(
            lambda x: jnp.zeros((num_groups, *x.shape), accumulation_dtype(x.dtype)), sum_shapes
        ),
    )
    start = vary_alike(zeros, like=(params, rows, groups))
    outs, sums = jax.lax.fori_loop(0, ends[-1], run, start)

    def unsorted(x: Array) -> Array:
        live = (groups < num_groups).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(live, x[place], 0)

    sums = jax.tree.map(lambda x, shape: x.astype(shape.dtype), sums, sum_shapes)
    return jax.tree.map(unsorted, outs), sums


def _block_size(num_rows: int, num_groups: int) -> int:
    """A power of two, about twice the mean group: most are one block, and loaded once."""
    mean = max(1, num_rows // num_groups)
    return min(max(8, 2 ** math.ceil(math.log2(2 * mean))), 256)


def sorted_by_group(groups: Int[Array, " rows"], num_groups: int) -> tuple[Array, Array, Array]:
    """The rows sorted by group, where each one went, and `[num_groups + 1]` where groups begin."""
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(groups.shape[0], dtype=jnp.int32))
    # Counts are shifted by one group, so that the cumulative sums are where groups begin.
    counts = jnp.zeros((num_groups + 1,), jnp.int32).at[groups + 1].add(1, mode="drop")
    return order, place, jnp.cumsum(counts)
