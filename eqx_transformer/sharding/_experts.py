"""Expert parallelism: every device has some of the experts, and rows travel to theirs."""

import dataclasses
import math
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from .._precision import accumulation_dtype
from ..attention._varying import vary_alike
from ..nn import MixtureOfExperts
from ..nn._grouped import Block, grouped_map, local_loop, shapes_of, sorted_by_group
from ._place import auto, mesh_here
from ._rules import Rules, check_axes, mesh_size

Model = TypeVar("Model")


def expert_parallel(
    model: Model, mesh: Mesh, rules: Rules | None = None, *, buffer_factor: float | int = 1.25
) -> Model:
    """The model for use inside a loss, when experts are split over devices.

        def loss(model, tokens):
            model = expert_parallel(gathered(model, mesh), mesh)
            ...

    Without it the compiler brings the weights of all experts to every device. With it the rows of
    a `MixtureOfExperts` travel, by an all-to-all over the mesh axis `rules.expert`, to the device
    that has their expert, and their results back. (Lepikhin et al., GShard, 2020.) All examples of
    a device are sent together.

    Nothing is dropped, and results are those of one device. The size of the buffers must be known
    at compile time, but how many rows choose an expert is not: rows that do not fit are sent in
    another round, and there are as many rounds as the fullest device needs. The backward pass sends
    the rows once more; nothing that was received is kept for it.

    Layers with a `capacity_factor` are left as they are: their buffers have one size for each
    expert, and the compiler exchanges these. On a mesh without the axis nothing changes.

    Arguments:

    - `model`: the model.
    - `mesh`, `rules`: those that the model was placed with.
    - `buffer_factor`: how many rows are sent to a device at once, relative to a uniform
        distribution. It affects only speed and memory.

    Raises:

    - `ValueError` if `buffer_factor` is not positive, there is no such layer in the model, or the
        experts of one are not a multiple of the devices.
    """
    rules = check_axes(mesh, rules)
    if not 0 < buffer_factor < math.inf:
        raise ValueError(f"expert_parallel: buffer_factor={buffer_factor} must be positive.")
    size = mesh_size(mesh, rules.expert)
    if rules.expert is None or size == 1:
        return model
    axes = tuple(dict.fromkeys([*rules.batch, rules.expert]))
    axes = tuple(name for name in axes if mesh_size(mesh, name) > 1)
    loop = _Exchange(auto(mesh), axes, rules.expert, float(buffer_factor))
    found = []

    def visit(x: Any) -> Any:
        if not isinstance(x, MixtureOfExperts) or x.capacity_factor is not None:
            return x
        if x.num_experts % size:
            raise ValueError(
                f"expert_parallel: a layer has num_experts={x.num_experts}, which the {size} "
                f"devices of the mesh axis {rules.expert!r} do not divide; use as many as do."
            )
        found.append(x)
        return eqx.tree_at(lambda x: x.experts_fn, x, eqx.Partial(grouped_map, loop=loop))

    model = jax.tree.map(visit, model, is_leaf=lambda x: isinstance(x, MixtureOfExperts))
    if not found:
        raise ValueError(
            "expert_parallel: there is no MixtureOfExperts without a capacity_factor in the model; "
            "leave it out."
        )
    return model


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """Applies the experts of other devices to rows, as the `loop` of `grouped_map`.

    Derivatives of a `grouped_map` run the same loop, so no other rule is needed for them.
    """

    mesh: Mesh
    axes: tuple[str, ...]
    """The mesh axes over which rows are split."""
    expert: str
    buffer_factor: float

    def __call__(
        self, block: Block, num_groups: int, params: PyTree, rows: PyTree, groups: Array
    ) -> tuple[PyTree, PyTree]:
        mesh = mesh_here(self.mesh)
        # Inside a pipeline the batch is not split over its stages.
        axes = tuple(name for name in self.axes if name not in mesh.manual_axes)
        devices = math.prod(mesh_size(mesh, name) for name in axes)
        if {x.shape[0] for x in jax.tree.leaves(params)} - {num_groups}:
            raise ValueError(
                "expert_parallel: gradients of experts cannot be computed per example; take the "
                "gradient of a whole batch, outside jax.vmap."
            )
        num_rows = groups.shape[0]
        missing = -num_rows % devices

        def padded(x: Array, value: int) -> Array:
            widths = [(0, missing)] + [(0, 0)] * (x.ndim - 1)
            return jnp.pad(x, widths, constant_values=value)

        rows = jax.tree.map(lambda x: padded(x, 0), rows)
        groups = padded(groups, num_groups)

        def local(params: PyTree, rows: PyTree, groups: Array) -> tuple[PyTree, PyTree]:
            return self._local(block, num_groups, axes, *vary_alike((params, rows, groups)))

        outs, sums = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(self.expert), P(axes), P(axes)),
            out_specs=(P(axes), P(self.expert)),
            axis_names=set(axes),
            check_vma=not mesh.manual_axes,
        )(params, rows, groups)
        return jax.tree.map(lambda x: x[:num_rows], outs), sums

    def _local(
        self,
        block: Block,
        num_groups: int,
        axes: tuple[str, ...],
        params: PyTree,
        rows: PyTree,
        groups: Int[Array, " rows"],
    ) -> tuple[PyTree, PyTree]:
        """Sends the rows of one device to all experts, and applies its experts to their rows."""
        devices = jax.lax.axis_size(self.expert)
        own, num_rows = num_groups // devices, groups.shape[0]
        size = min(num_rows, math.ceil(self.buffer_factor * num_rows / devices))
        # Rows of no group are sorted past the last device, since they are past the last group.
        order, _, starts = sorted_by_group(groups // own, devices)
        rounds = jax.lax.pmax(-(-jnp.diff(starts).max() // size), axes)

        def swap(x: Array) -> Array:
            x = x.reshape(devices, size, *x.shape[1:])
            x = jax.lax.all_to_all(x, self.expert, split_axis=0, concat_axis=0, tiled=True)
            return x.reshape(devices * size, *x.shape[2:])

        def send(i: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            outs, sums = carry
            which = starts[:-1, None] + i * size + jnp.arange(size, dtype=jnp.int32)[None]
            live = (which < starts[1:, None]).reshape(-1)
            which = jnp.where(live, order[jnp.where(live, which.reshape(-1), 0)], num_rows)
            sent = jax.tree.map(
                lambda x: jnp.take(x, which, axis=0, mode="fill", fill_value=0), rows
            )
            group = jnp.where(live, groups[jnp.where(live, which, 0)] % own, own)
            out, add = local_loop(block, own, params, jax.tree.map(swap, sent), swap(group))
            outs = jax.tree.map(lambda x, y: x.at[which].set(swap(y), mode="drop"), outs, out)
            return outs, jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, add)

        out_shapes, sum_shapes = shapes_of(block, params, rows, num_rows)
        zeros = (
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shapes),
            jax.tree.map(
                lambda x: jnp.zeros((own, *x.shape), accumulation_dtype(x.dtype)), sum_shapes
            ),
        )
        start = vary_alike(zeros, like=groups)
        outs, sums = jax.lax.fori_loop(0, rounds, send, start)
        others = tuple(name for name in axes if name != self.expert)
        sums = jax.lax.psum(sums, others) if others else sums
        return outs, jax.tree.map(lambda x, shape: x.astype(shape.dtype), sums, sum_shapes)
