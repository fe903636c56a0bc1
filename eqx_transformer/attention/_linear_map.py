"""A linear map with a given transpose, as a JAX primitive with every rule.

This is the piece that lets a fused kernel keep *all* derivatives. A `custom_jvp` function needs
a tangent rule that JAX can transpose; left alone, JAX would transpose the tangent rule's own
operations, and a hand-written backward pass (let alone an opaque kernel) could never be used.
`linear_map` says: here is a function linear in its operands, and here is its transpose. Forward
mode runs the first, reverse mode the second, and both can be batched and differentiated again.

`jax.custom_vjp` has no forward mode, and `jax.custom_derivatives.linear_call` cannot be batched,
which is why neither is used. Only this module touches JAX's primitive machinery.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from ._varying import vary_alike


def linear_map(
    function: Callable[[PyTree, PyTree], PyTree],
    transpose: Callable[[PyTree, PyTree], PyTree],
    residuals: PyTree,
    operands: PyTree,
    *,
    batch: "BatchRule | None" = None,
) -> PyTree:
    """Computes `function(residuals, operands)`, whose transpose is `transpose`.

    Arguments:

    - `function`: linear in `operands`; differentiable by JAX in `residuals`. Hashable (a
        module-level function, or a frozen dataclass with `__call__`), so that compilations are
        reused.
    - `transpose`: `transpose(residuals, cotangents)` returns cotangents of `operands`; linear in
        `cotangents` and differentiable by JAX in `residuals`.
    - `residuals`: a PyTree; its non-array leaves must be hashable.
    - `operands`: a PyTree of floating arrays.
    - `batch`: a rule for `vmap`, used instead of applying the map to every example. Hashable.

    Returns:

    The PyTree of arrays `function` returns.
    """
    dynamic, static = eqx.partition(residuals, eqx.is_array)
    dynamic_leaves, dynamic_treedef = jax.tree.flatten(dynamic)
    static_leaves, static_treedef = jax.tree.flatten(static)
    operand_leaves, operand_treedef = jax.tree.flatten(operands)
    out_treedef = jax.tree.structure(eqx.filter_eval_shape(function, residuals, operands))
    context = _Context(dynamic_treedef, static_treedef, tuple(static_leaves))
    forward = _Flat(function, context, operand_treedef, out_treedef)
    backward = _Flat(transpose, context, out_treedef, operand_treedef)
    # Cast here, outside the primitive, where JAX transposes the cast by itself.
    operand_leaves = vary_alike(operand_leaves, like=dynamic_leaves)
    out = _linear_map_p.bind(
        *dynamic_leaves,
        *operand_leaves,
        forward=forward,
        backward=backward,
        num_residuals=len(dynamic_leaves),
        batch=batch,
    )
    return jax.tree.unflatten(out_treedef, out)


BatchRule = Callable[[int, PyTree, PyTree, tuple[PyTree, PyTree]], PyTree]
"""From `(size, residuals, operands, batched)` to the results of a batch, by differentiable
operations; or `None`, for the default. Batched arrays have the batch as their first axis; `batched`
says which ones are, for residuals and operands."""


@dataclasses.dataclass(frozen=True)
class _Context:
    """The static half of the residuals, hashable."""

    dynamic_treedef: Any
    static_treedef: Any
    static_leaves: tuple[Any, ...]

    def residuals(self, dynamic_leaves: list[Any]) -> PyTree:
        dynamic = jax.tree.unflatten(self.dynamic_treedef, dynamic_leaves)
        static = jax.tree.unflatten(self.static_treedef, self.static_leaves)
        return eqx.combine(dynamic, static)


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A map on PyTrees as a map on lists of arrays, with value equality."""

    function: Callable[[PyTree, PyTree], PyTree]
    context: _Context
    in_treedef: Any
    out_treedef: Any

    def unflatten(self, residuals: list[Any], operands: list[Any]) -> tuple[PyTree, PyTree]:
        operands_tree = jax.tree.unflatten(self.in_treedef, operands)
        return self.context.residuals(residuals), operands_tree

    def unflatten_flags(self, axes: Sequence[Any]) -> tuple[PyTree, PyTree]:
        flags = [axis is not None for axis in axes]
        count = self.context.dynamic_treedef.num_leaves
        residuals = jax.tree.unflatten(self.context.dynamic_treedef, flags[:count])
        return residuals, jax.tree.unflatten(self.in_treedef, flags[count:])

    def __call__(self, residuals: list[Any], operands: list[Any]) -> list[Any]:
        out = self.function(*self.unflatten(residuals, operands))
        leaves, treedef = jax.tree.flatten(out)
        if treedef != self.out_treedef:
            raise ValueError(
                f"linear_map: {self.function} returned the structure {treedef}, "
                f"but its transpose takes {self.out_treedef}."
            )
        return leaves


@dataclasses.dataclass(frozen=True)
class _Batched:
    """`inner` under `vmap`; residuals that are not batched are not copied."""

    inner: "_Flat | _Batched"
    residual_axes: tuple[int | None, ...]
    axis_size: int

    def __call__(self, residuals: list[Any], operands: list[Any]) -> list[Any]:
        return jax.vmap(
            self.inner,
            in_axes=(list(self.residual_axes), 0),
            out_axes=0,
            axis_size=self.axis_size,
        )(residuals, operands)


_linear_map_p = Primitive("linear_map")
_linear_map_p.multiple_results = True


def _run(*args, forward, backward, num_residuals, batch):
    del backward, batch
    return forward(list(args[:num_residuals]), list(args[num_residuals:]))


@_linear_map_p.def_impl
def _impl(*args, **params):
    return jax.jit(partial(_run, **params))(*args)


@_linear_map_p.def_abstract_eval
def _abstract_eval(*avals, **params):
    # Tracing, rather than copying shapes from somewhere, keeps whatever else JAX's types carry:
    # shardings, and the mesh axes a value varies over inside shard_map.
    return jax.make_jaxpr(partial(_run, **params))(*avals).out_avals


mlir.register_lowering(_linear_map_p, mlir.lower_fun(_run, multiple_results=True))


def _jvp(primals, tangents, *, forward, backward, num_residuals, batch):
    bind = partial(
        _linear_map_p.bind,
        forward=forward,
        backward=backward,
        num_residuals=num_residuals,
        batch=batch,
    )
    residuals, operands = list(primals[:num_residuals]), list(primals[num_residuals:])
    out = bind(*residuals, *operands)
    terms = []
    if any(type(t) is not ad.Zero for t in tangents[num_residuals:]):
        dots = [ad.instantiate_zeros(t) for t in tangents[num_residuals:]]
        terms.append(bind(*residuals, *dots))
    moving = [i for i in range(num_residuals) if type(tangents[i]) is not ad.Zero]
    if moving:

        def of_moving(*values):
            moved = list(residuals)
            for i, value in zip(moving, values, strict=True):
                moved[i] = value
            return forward(moved, operands)

        terms.append(
            jax.jvp(
                of_moving,
                tuple(residuals[i] for i in moving),
                tuple(tangents[i] for i in moving),
            )[1]
        )
    if not terms:
        return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    return out, [sum(parts[1:], start=parts[0]) for parts in zip(*terms, strict=True)]


def _transpose(cotangents, *args, forward, backward, num_residuals, batch):
    del batch  # it applies to the forward direction only
    residuals = args[:num_residuals]
    assert not any(ad.is_undefined_primal(x) for x in residuals)
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    out = _linear_map_p.bind(
        *residuals,
        *cotangents,
        forward=backward,
        backward=forward,
        num_residuals=num_residuals,
        batch=None,
    )
    return [None] * num_residuals + [
        x if ad.is_undefined_primal(arg) else None
        for x, arg in zip(out, args[num_residuals:], strict=True)
    ]


def _batch(args, axes, *, forward, backward, num_residuals, batch):
    size = next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)
    args = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(args, axes, strict=True)]
    residuals, operands = args[:num_residuals], args[num_residuals:]
    if batch is not None:
        out = batch(size, *forward.unflatten(residuals, operands), forward.unflatten_flags(axes))
        if out is not None:
            out = jax.tree.leaves(out)
            return out, [0] * len(out)
    residual_axes = tuple(None if a is None else 0 for a in axes[:num_residuals])
    # An operand shared by the batch is broadcast here, outside the primitive, so that summing
    # its cotangent over the batch is JAX's own transpose of broadcasting. `vmap` does it, because
    # it knows how the batch is sharded.
    batched = next(x for x, a in zip(args, axes, strict=True) if a is not None)
    shared = jax.vmap(lambda _, x: x, in_axes=(0, None))
    operands = [
        shared(batched, x) if a is None else x
        for x, a in zip(operands, axes[num_residuals:], strict=True)
    ]
    out = _linear_map_p.bind(
        *residuals,
        *operands,
        forward=_Batched(forward, residual_axes, size),
        backward=_Batched(backward, residual_axes, size),
        num_residuals=num_residuals,
        batch=None,
    )
    return out, [0] * len(out)


ad.primitive_jvps[_linear_map_p] = _jvp
ad.primitive_transposes[_linear_map_p] = _transpose
batching.primitive_batchers[_linear_map_p] = _batch
