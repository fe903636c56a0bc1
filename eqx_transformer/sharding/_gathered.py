"""Parameters that are stored split over devices, and gathered only while they are used."""

from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..models._places import Place, is_shaped, map_with_place
from ..nn import AbstractLinear
from ._place import auto, mesh_here, shardings
from ._rules import Rules, axis_names, check_axes, in_layer

Model = TypeVar("Model")


def gathered(
    model: Model, mesh: Mesh, rules: Rules | None = None, *, dtype: DTypeLike | None = None
) -> Model:
    """The model for use inside a loss, when its parameters are split over an FSDP axis.

        def loss(model, batch):
            model = gathered(model, mesh)
            ...

    Without it the compiler is free to leave a weight split and to gather the activations, of all
    examples, instead, and where those are small it does. With it every device gathers a weight when
    its layer is computed, and once more for its gradient, and computes on its own examples.
    Gradients are split like the parameters, on any mesh.

    The result is only for computing: save the original model, and differentiate with respect to it.
    Do not use it inside `jax.shard_map`.

    Arguments:

    - `model`: the model, inside `jax.jit`.
    - `mesh`, `rules`: those that the model was placed with.
    - `dtype`: what parameters are rounded to while they travel, e.g. bfloat16 for half the bytes.
        Layers get them in their own dtype.
    """
    rules, mesh = check_axes(mesh, rules), auto(mesh)
    params, static = eqx.partition(model, eqx.is_array)
    # The cotangents get the same constraint.
    params = jax.lax.with_sharding_constraint(params, shardings(params, mesh, rules))
    model = eqx.combine(params, static)

    def gather_of(place: Place, x: Any) -> _Gather | None:
        rest = in_layer(place, x, mesh, rules)
        use = in_layer(place, x, mesh, rules, fsdp=False)
        if rest == use:
            return None
        to = jnp.dtype(x.dtype if dtype is None or not eqx.is_inexact_array(x) else dtype)
        return _Gather(NamedSharding(mesh, P(*rest)), NamedSharding(mesh, P(*use)), to)

    def visit(place: Place, x: Any) -> Any:
        if isinstance(x, AbstractLinear):
            leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(x, eqx.is_array))
            names = [jax.tree_util.keystr(name, simple=True, separator=".") for name, _ in leaves]
            gathers = tuple(
                gather_of(place._replace(path=f"{place.path}.{name}".lstrip(".")), leaf)
                for name, (_, leaf) in zip(names, leaves, strict=True)
            )
            return _GatheredLinear(x, gathers) if any(gathers) else x
        # Layers of a stack are gathered one at a time, by their projections.
        gather = gather_of(place, x) if is_shaped(x) and not place.stacked else None
        return x if gather is None else gather(x)

    return map_with_place(visit, model, is_leaf=lambda x: isinstance(x, AbstractLinear))


class _Gather(NamedTuple):
    """From the sharding in which an array of one layer is stored to that in which it is used."""

    rest: NamedSharding
    use: NamedSharding
    dtype: Any

    def __call__(self, x: Array) -> Array:
        mesh, dtype = mesh_here(self.rest.mesh), x.dtype
        names = {name for entry in self.rest.spec for name in axis_names(entry)}
        if names.intersection(mesh.manual_axes):
            return x  # It was gathered where these axes became manual.
        x = x.astype(self.dtype)
        # Both constraints: between them it travels, in this dtype, as does its cotangent.
        for sharding in (self.rest, self.use):
            more = (P.UNCONSTRAINED,) * (x.ndim - len(sharding.spec))  # axes that count layers
            spec = P(*more, *sharding.spec)
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x.astype(dtype)


class _GatheredLinear(AbstractLinear):
    """A linear map whose parameters are gathered when it is called."""

    base: AbstractLinear
    gathers: tuple[_Gather | None, ...] = eqx.field(static=True)

    def __init__(self, base: AbstractLinear, gathers: tuple[_Gather | None, ...]):
        self.base = base
        self.gathers = gathers

    @property
    def weight(self) -> Float[Array, "*stack in_features out_features"]:
        return self._gathered(self.base).weight

    @property
    def bias(self) -> Float[Array, "*stack out_features"] | None:
        return self._gathered(self.base).bias

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        params, static = eqx.partition(self.base, eqx.is_array)

        def apply(params: Any, x: Array) -> Array:
            return self._gathered(eqx.combine(params, static))(x)

        # Otherwise reverse mode would keep the gathered weights of all layers.
        return jax.checkpoint(apply)(params, x)

    def _gathered(self, base: AbstractLinear) -> AbstractLinear:
        params, static = eqx.partition(base, eqx.is_array)
        leaves, treedef = jax.tree.flatten(params)
        pairs = zip(self.gathers, leaves, strict=True)
        leaves = [x if gather is None else gather(x) for gather, x in pairs]
        return eqx.combine(jax.tree.unflatten(treedef, leaves), static)
