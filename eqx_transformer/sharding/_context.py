"""Context parallelism: sequences split over devices, and attention on a ring of them."""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..attention import AbstractMask, Layout, ScoreMod, ring_attention
from ..nn import Attention, CrossAttention, LatentAttention
from ._place import auto, mesh_here
from ._rules import Rules, check_axes, mesh_size

Model = TypeVar("Model")


def context_parallel(
    model: Model, mesh: Mesh, rules: Rules | None = None, *, layout: Layout = "contiguous"
) -> Model:
    """The model for use inside a loss, when sequences are split over devices.

        def loss(model, inputs, targets):
            model = context_parallel(gathered(model, mesh), mesh)
            ...

        inputs = jax.device_put(inputs, batch_sharding(mesh, sequence=True))

    Attention is `ring_attention`: every device keeps its queries, and keys and values go from
    neighbour to neighbour, so no device ever has those of the whole sequence. Everything else is
    computed for each position on its own, without communication. Only the mesh axis `rules.context`
    is manual, the others are left to the compiler; map over the batch with `jax.vmap`, as on one
    device.

    Positions, masks and score mods are those of the whole sequence, and masks with arrays
    (`Segments`, `Padding`) cover it in its original order. `Attention`, `LatentAttention` and
    `CrossAttention` are adapted, whatever their `attention_fn` was. Other layers are left to the
    compiler, which gathers what they need. On a mesh without the axis nothing changes.

    Arguments:

    - `model`: the model.
    - `mesh`, `rules`: those that the model was placed with.
    - `layout`: how sequences lie on the devices, `"contiguous"` or `"zigzag"`. With the second,
        under a causal mask, all devices have the same work. Then give the model `tokens[order]`
        with `positions=order`, where `order` is that of `zigzag_order`, and the loss
        `targets[order]`.

    Raises:

    - `ValueError` if there is no attention in the model. In a call, for a sequence that is not a
        multiple of the devices, a zigzag layout without positions, or dropout of attention weights.
    """
    rules = check_axes(mesh, rules)
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"context_parallel: layout={layout!r} is not one of contiguous, zigzag.")
    if rules.context is None or mesh_size(mesh, rules.context) == 1:
        return model
    layers = (Attention, LatentAttention, CrossAttention)
    found = []

    def visit(x: Any) -> Any:
        if not isinstance(x, layers):
            return x
        found.append(x)
        # Attention to a source is given no positions: both sides count as contiguous.
        own: Layout = "contiguous" if isinstance(x, CrossAttention) else layout
        ring = _RingAttention(auto(mesh), rules.context or "", own)
        return eqx.tree_at(lambda x: x.attention_fn, x, ring)

    model = jax.tree.map(visit, model, is_leaf=lambda x: isinstance(x, layers))
    if not found:
        raise ValueError(
            "context_parallel: there is no Attention, LatentAttention or CrossAttention in the "
            "model; leave it out."
        )
    return model


@dataclasses.dataclass(frozen=True)
class _RingAttention:
    """`dot_product_attention` of whole sequences, computed on a ring."""

    mesh: Mesh
    axis: str
    layout: Layout

    def __call__(
        self,
        q: Float[Array, "q_seq heads head_dim"],
        k: Float[Array, "kv_seq kv_heads head_dim"],
        v: Float[Array, "kv_seq kv_heads v_dim"],
        *,
        mask: AbstractMask | None = None,
        score_mod: ScoreMod | None = None,
        scale: float | None = None,
        q_positions: Int[Array, " q_seq"] | None = None,
        kv_positions: Int[Array, " kv_seq"] | None = None,
        sinks: Float[Array, " heads"] | None = None,
        dropout_rate: float = 0.0,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "q_seq heads v_dim"]:
        devices = mesh_size(self.mesh, self.axis)
        for name, x in (("q_seq", q), ("kv_seq", k)):
            if x.shape[0] % devices:
                raise ValueError(
                    f"context_parallel: {name}={x.shape[0]} is not a multiple of the {devices} "
                    f"devices of the mesh axis {self.axis!r}; pad the sequence. (A cache is filled "
                    "and read with the model as it was.)"
                )
        if self.layout == "zigzag" and q_positions is None:
            raise ValueError(
                "context_parallel: with layout='zigzag' tokens are in another order, so the model "
                "needs their positions: model(tokens[order], positions=order)."
            )
        if dropout_rate > 0:
            raise ValueError(
                f"context_parallel: attention weights are not dropped on a ring, but dropout_rate="
                f"{dropout_rate}; build the model with 0, or use eqx.nn.inference_mode(model)."
            )
        arrays, static = eqx.partition((mask, score_mod, sinks), eqx.is_array)

        def local(q: Array, k: Array, v: Array, positions: Any, arrays: Any) -> Array:
            mask, score_mod, sinks = eqx.combine(arrays, static)
            return ring_attention(
                q,
                k,
                v,
                axis_name=self.axis,
                mask=mask,
                score_mod=score_mod,
                scale=scale,
                q_positions=positions[0],
                kv_positions=positions[1],
                sinks=sinks,
                layout=self.layout,
            )

        split, mesh = P(self.axis), mesh_here(self.mesh)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(split, split, split, split, P()),
            out_specs=split,
            axis_names={self.axis},
            check_vma=not mesh.manual_axes,
        )(q, k, v, (q_positions, kv_positions), arrays)
