"""Every derivative of attention, from three passes.

An implementation supplies a forward pass, its tangent, and the transpose of the tangent; here they
become one function for which `jax.jvp`, `jax.vjp` and any nesting of them work, under `jit`,
`vmap`, `scan`, `checkpoint` and `shard_map`. Reverse mode runs the given transpose, so a fused
backward pass is used wherever JAX asks for a gradient; second derivatives differentiate the
tangent and the transpose, which must therefore consist of differentiable operations, or have rules.

This belongs to attention as a whole, not to any one kernel: `jax.custom_vjp`, with which attention
kernels usually come, would make `jax.jvp` an error, and with it implicit solvers, Newton's method,
Levenberg-Marquardt, and gradients of fixed points.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ._inputs import Inputs
from ._linear_map import linear_map
from ._varying import vary_alike

Output = tuple[Float[Array, "q_seq heads v_dim"], Float[Array, "q_seq heads"]]
"""Attention output and the log-sum-exp of the scores."""
Tangents = dict[str, Any]
"""Tangents, or cotangents, of some of `q, k, v, sinks, score_mod`, by name."""

_DIFFERENTIABLE = ("q", "k", "v", "sinks", "score_mod")


@dataclasses.dataclass(frozen=True)
class Passes:
    """The three passes of an implementation: module-level functions, so that they are hashable.

    Arguments:

    - `forward`: from `Inputs` to output and log-sum-exp (`None` where a kernel does not give it).
    - `tangent`: from `(inputs, *saved)` and tangents of some inputs to tangents of the output.
        Those of `q, k, v` are always given; those of `sinks` and `score_mod` only where needed.
    - `transpose`: from `(inputs, *saved)`, cotangents of the output, and the names that are
        wanted, to the cotangents of these.
    - `save`: from `Inputs` to `((output, log-sum-exp), saved)`, where `saved` goes to the other
        passes; without it, `saved` is the output and the log-sum-exp. JAX treats `saved` as
        constant: passes that depend on `inputs` through it need derivative rules that say so.
    """

    forward: Callable[[Inputs], tuple[Array, Any]]
    tangent: Callable[[Any, Tangents], tuple[Array, Any]]
    transpose: Callable[[Any, Any, frozenset[str]], Tangents]
    save: Callable[[Inputs], tuple[tuple[Array, Any], tuple[Any, ...]]] | None = None

    def __call__(self, inputs: Inputs) -> tuple[Array, Any]:
        """Runs the forward pass, with every derivative."""
        return _attend(vary_alike(inputs), passes=self)


@dataclasses.dataclass(frozen=True)
class _Transpose:
    passes: Passes
    wanted: frozenset[str]

    def __call__(self, residuals: Any, cotangents: Any) -> Tangents:
        return self.passes.transpose(residuals, cotangents, self.wanted)


@dataclasses.dataclass(frozen=True)
class _Forward:
    passes: Passes

    def __call__(self, inputs: Inputs, operands: tuple[()]) -> tuple[Array, Any]:
        return self.passes.forward(inputs)


def _no_cotangents(inputs: Inputs, cotangents: Any) -> tuple[()]:
    return ()


@eqx.filter_jit
def _compiled_forward(inputs: Inputs, passes: Passes) -> tuple[Array, Any]:
    # Compiled once per structure and shape, even for callers who do not use `jax.jit`. To JAX it is
    # one opaque operation, a linear map without operands: otherwise a loop over layers would hoist
    # all that does not depend on the layer, such as the masks of all tiles, and keep it, in memory
    # quadratic in the sequence. A forward pass with a `save` is one operation already, and may be
    # one that cannot be lowered inside another.
    if passes.save is not None:
        return passes.forward(inputs)
    return linear_map(_Forward(passes), _no_cotangents, inputs, ())


@eqx.filter_custom_jvp
def _attend(inputs: Inputs, *, passes: Passes) -> tuple[Array, Any]:
    return _compiled_forward(inputs, passes)


@_attend.def_jvp
def _attend_jvp(primals: Any, tangents: Any, *, passes: Passes) -> Any:
    if passes.save is None:
        output = saved = _named(_attend(*primals, passes=passes))
    else:
        output, saved = _named(_save(*primals, passes=passes))
    return output, _tangent(passes, primals, saved, tangents)


def _named(saved: Any) -> Any:
    """Adds the name by which a `jax.checkpoint` policy can save this for the backward pass."""
    return jax.tree.map(partial(checkpoint_name, name="attention"), saved)


@eqx.filter_custom_jvp
def _save(inputs: Inputs, *, passes: Passes) -> tuple[Any, tuple[Any, ...]]:
    assert passes.save is not None
    return passes.save(inputs)


@_save.def_jvp
def _save_jvp(primals: Any, tangents: Any, *, passes: Passes) -> Any:
    output, saved = _save(*primals, passes=passes)
    constant = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_inexact_array(x) else None, saved)
    return (output, saved), (_tangent(passes, primals, saved, tangents), constant)


def _tangent(passes: Passes, primals: Any, saved: Any, tangents: Any) -> tuple[Array, Any]:
    (inputs,), (dinputs,) = primals, tangents
    # Only forward passes read `source`, and as a residual it would be kept in memory.
    inputs = dataclasses.replace(inputs, source=None)
    asked = {}
    for name in _DIFFERENTIABLE:
        primal = eqx.filter(getattr(inputs, name), eqx.is_inexact_array)
        moved = getattr(dinputs, name)
        if name in ("q", "k", "v") or jax.tree.leaves(moved):
            asked[name] = jax.tree.map(_explicit, primal, moved, is_leaf=lambda x: x is None)
    return linear_map(passes.tangent, _Transpose(passes, frozenset(asked)), (inputs, *saved), asked)


def _explicit(primal: Array | None, moved: Array | None) -> Array | None:
    """Replaces a symbolically zero tangent by zeros."""
    return jnp.zeros_like(primal) if moved is None and primal is not None else moved
