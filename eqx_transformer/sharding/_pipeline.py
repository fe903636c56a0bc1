"""Pipeline parallelism: every device has some of the layers, and micro-batches pass through."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from ..stacks import Stack
from ..stacks._block import AbstractBlock
from ..stacks._stack import scan_layers
from ._place import auto, mesh_here
from ._rules import Rules, check_axes, mesh_size

Model = TypeVar("Model")


def pipeline_parallel(
    model: Model, mesh: Mesh, rules: Rules | None = None, *, num_microbatches: int
) -> Model:
    """The model for use inside a loss, when its layers are split over devices.

        def loss(model, tokens):
            model = pipeline_parallel(gathered(model, mesh), mesh, num_microbatches=16)
            return cross_entropy(jax.vmap(model)(tokens), ...)

    Every device along the mesh axis `rules.pipe` has an equal part of the layers of each `Stack`: a
    stage. A batch is cut into micro-batches; as soon as a stage is done with one, it passes it to
    the next stage and starts another. (GPipe; Huang et al., 2019.) Devices idle while the pipeline
    fills and drains: with `P` stages and `M` micro-batches, for `(P - 1) / (M + P - 1)` of the
    time, forward and backward. Results are those of the stack.

    Only this axis is manual; what is split over others stays so. `jax.vmap` maps over the whole
    batch, from which micro-batches are cut; differentiate outside it, because reverse mode for one
    example, or for every example on its own, is an error. The `remat` of the stack decides what a
    stage keeps for the backward pass.

    On a mesh without the axis nothing changes. To fill caches, use the original model.

    Arguments:

    - `model`: the model, or a `Stack`.
    - `mesh`, `rules`: those that the model was placed with.
    - `num_microbatches`: how many parts a batch is cut into; a multiple of the number of stages.

    Raises:

    - `ValueError` if layers cannot be divided into equal stages, there are no stacks, or
        `num_microbatches` is not a multiple of the number of stages. In a call, if it does not
        divide the batch.
    """
    rules = check_axes(mesh, rules)
    stages = mesh_size(mesh, rules.pipe)
    if num_microbatches < 1 or num_microbatches % stages:
        raise ValueError(
            f"pipeline_parallel: num_microbatches={num_microbatches} is not a positive multiple of "
            f"the {stages} devices of the mesh axis {rules.pipe!r}."
        )
    if rules.pipe is None or stages == 1:
        return model
    found = []

    def visit(x: Any) -> Any:
        if not isinstance(x, Stack):
            return x
        if x.num_layers % stages:
            raise ValueError(
                f"pipeline_parallel: a stack has num_layers={x.num_layers}, which the {stages} "
                f"devices of the mesh axis {rules.pipe!r} do not divide; use as many as do."
            )
        found.append(x)
        pipeline = _Pipeline(auto(mesh), rules.pipe or "", num_microbatches)
        return eqx.tree_at(lambda x: x.layers_fn, x, pipeline)

    model = jax.tree.map(visit, model, is_leaf=lambda x: isinstance(x, Stack))
    if not found:
        raise ValueError("pipeline_parallel: there is no Stack in the model; leave it out.")
    return model


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """`scan_layers` whose layers are on several devices."""

    mesh: Mesh
    axis: str
    num_microbatches: int

    @jax.named_scope("eqx_transformer.sharding.pipeline_parallel")
    def __call__(
        self,
        apply: Callable[..., tuple[Array, Any]],
        blocks: AbstractBlock,
        keys: Array | None,
        x: Array,
        options: dict[str, Any],
        *,
        num_layers: int,
        unroll: int,
        remat: Any,
    ) -> tuple[Array, Any]:
        layers, static_layers = eqx.partition(blocks, eqx.is_array)
        given, static_given = eqx.partition((x, keys, options), eqx.is_array)

        def scan(layers: PyTree, given: PyTree, stage: Any, stages: int) -> tuple[Array, Any]:
            """One example through a stage of the stack."""
            x, keys, options = eqx.combine(given, static_given)
            count = num_layers // stages
            if keys is not None:
                keys = jax.lax.dynamic_slice_in_dim(keys, stage * count, count)
            blocks = eqx.combine(layers, static_layers)
            how = {"num_layers": count, "unroll": min(unroll, count), "remat": remat}
            return scan_layers(apply, blocks, keys, x, options, **how)

        @custom_vmap
        def run(layers: PyTree, given: PyTree) -> tuple[Array, Any]:
            return scan(layers, given, 0, 1)

        @run.def_vmap
        def _(size: int, batched: PyTree, layers: PyTree, given: PyTree) -> tuple[Any, Any]:
            layers_batched, given_batched = batched
            if any(jax.tree.leaves(layers_batched)):
                raise ValueError(
                    "pipeline_parallel: the layers themselves are batched; map over examples only."
                )
            x, *rest = given
            if not given_batched[0]:  # e.g. learned queries, which all examples begin with
                x = jnp.broadcast_to(x[None], (size, *x.shape))
            given, given_batched = (x, *rest), (True, *given_batched[1:])
            out = self._pipeline(scan, layers, given, given_batched, size)
            return out, jax.tree.map(lambda _: True, out)

        return run(layers, given)

    def _pipeline(
        self,
        scan: Callable[..., tuple[Array, Any]],
        layers: PyTree,
        given: PyTree,
        batched: PyTree,
        size: int,
    ) -> tuple[Array, Any]:
        """`scan` of a batch, with micro-batches passed from device to device."""
        stages, count = mesh_size(self.mesh, self.axis), self.num_microbatches
        if size % count:
            raise ValueError(
                f"pipeline_parallel: num_microbatches={count} does not divide the batch of {size}."
            )
        # Every micro-batch has examples of every device that has any, so that none has to move.
        parts = (stages, size // count, count // stages)

        def cut(x: Array) -> Array:
            x = x.reshape(*parts, *x.shape[1:]).swapaxes(1, 2)
            return x.reshape(count, size // count, *x.shape[3:])

        def joined(x: Array) -> Array:
            x = x.reshape(stages, count // stages, size // count, *x.shape[2:]).swapaxes(1, 2)
            return x.reshape(size, *x.shape[3:])

        varied, shared = eqx.partition(given, batched)
        next_stage = [(i, i + 1) for i in range(stages - 1)]

        def local(layers: PyTree, varied: PyTree, shared: PyTree) -> tuple[Array, Any]:
            stage = jax.lax.axis_index(self.axis)

            def step(received: Array, i: Array) -> tuple[Array, Any]:
                # While the pipeline fills or drains, a stage computes something that is not used.
                number = jnp.clip(i - stage, 0, count - 1)
                x, keys, options = jax.tree.map(lambda x: x[number], varied)
                x = jnp.where(stage == 0, x, received)

                def of_example(varied: PyTree) -> tuple[Array, Any]:
                    return scan(layers, eqx.combine(varied, shared), stage, stages)

                out, stats = jax.vmap(of_example)((x, keys, options))
                return jax.lax.ppermute(out, self.axis, next_stage), (out, stats)

            start = varied[0][0]
            steps = jnp.arange(count + stages - 1, dtype=jnp.int32)
            _, (outs, stats) = jax.lax.scan(step, start, steps)
            out = jnp.where(stage == stages - 1, outs[stages - 1 :], 0)
            # Every example returns to the device that had it.
            out = jax.lax.psum_scatter(out, self.axis, tiled=True)
            stats = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, stage, count), stats)
            return out, stats

        out, stats = jax.shard_map(
            local,
            mesh=mesh_here(self.mesh),
            in_specs=(P(self.axis), P(), P()),
            out_specs=(P(self.axis), P(None, None, self.axis)),
            axis_names={self.axis},
            check_vma=False,  # JAX 0.10 gets the types wrong if another one is inside
        )(layers, jax.tree.map(cut, varied), shared)
        return joined(out), jax.tree.map(joined, stats)
