"""The number of operations in a computation, counted in the program, not by a formula."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._precision import accumulation_dtype
from ..attention import dot_product_attention
from ..models._places import is_shaped
from ..nn import AbstractLinear, MixtureOfExperts


def model_flops(function: Callable[..., Any], *args: Any) -> int:
    """The floating-point operations of the matrix products and convolutions in `function(*args)`.

        shapes = equinox.filter_eval_shape(lambda key: Llama(config, key=key), key)
        model_flops(shapes, jax.ShapeDtypeStruct((4096,), jnp.int32))    # forward, one sequence

    A product of `[m, k]` and `[k, n]` counts as `2 m k n`; elementwise operations do not count. The
    function is traced, not run, so shapes will do for all arrays. Pass a gradient to include the
    backward pass, which takes twice the forward pass, and what `remat` recomputes:
    `model_flops(equinox.filter_grad(loss), model, batch)`.

    The number is that of the model and does not depend on the machine, or on the implementations
    chosen for it: tiles that a mask excludes are left out, as with `implementation="chunked"`, and
    a position goes through `top_k` experts, without padding. For this the model must be `function`,
    or among `args`, and `function` must not use `RouterStats`.

    Arguments:

    - `function`: the model, or a function of it.
    - `args`: what it is called with; arrays may be `jax.ShapeDtypeStruct`s.

    Raises:

    - `ValueError` for a loop with matrix products whose number of iterations does not follow from
        shapes, and for a kernel that cannot be inspected.
    """
    function, args = _countable((function, args))
    arrays, static = eqx.partition((function, args), is_shaped)

    def run(arrays: PyTree) -> PyTree:
        function, args = eqx.combine(arrays, static)
        return eqx.filter(function(*args), eqx.is_array)

    return _count(jax.make_jaxpr(run)(arrays).jaxpr)


def _count(jaxpr: Any, axes: tuple[tuple[str, int], ...] = ()) -> int:
    """The count for one device of a program that runs on all along `axes` (names and sizes)."""
    return sum(_count_equation(equation, axes) for equation in jaxpr.eqns)


def _count_equation(equation: Any, axes: tuple[tuple[str, int], ...]) -> int:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
        return _products(name, equation)
    if name == "linear_map":
        # This holds a function, not a jaxpr.
        forward, count = params["forward"], params["num_residuals"]
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
        trace = jax.make_jaxpr(
            lambda *xs: forward(list(xs[:count]), list(xs[count:])), axis_env=list(axes)
        )
        return _count(trace(*shapes).jaxpr, axes)
    if name == "shard_map":
        more = tuple((axis, params["mesh"].shape[axis]) for axis in params["newly_manual_axes"])
        return math.prod(n for _, n in more) * _count(params["jaxpr"], axes + more)
    inner = [_count(program, axes) for value in params.values() for program in _programs(value)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "while" and any(inner):
        raise ValueError(
            "model_flops: there is a loop with matrix products whose number of iterations is not "
            "known from shapes. If it is one over experts, pass the model as an argument of the "
            "function; otherwise use lax.scan, or count one iteration."
        )
    if name == "pallas_call" or name.startswith("dot_product_attention"):
        raise ValueError(
            f"model_flops: the kernel {name} cannot be inspected; pass the model as an argument "
            "of the function, so that attention is counted without kernels."
        )
    return sum(inner)


def _products(name: str, equation: Any) -> int:
    """Two operations for every product: a multiplication and an addition."""
    left, right, *groups = (v.aval.shape for v in equation.invars)
    (out,) = (v.aval.shape for v in equation.outvars)
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name == "ragged_dot_general":
        numbers = equation.params["ragged_dot_dimension_numbers"]
        (contracted, _), _ = numbers.dot_dimension_numbers
        count = 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        # If groups split the contracted axis, each group contracts only its part.
        is_split = set(numbers.lhs_ragged_dimensions) <= set(contracted)
        return count // groups[0][-1] if is_split else count
    # Every output is a sum over a window of as many channels as the kernel has.
    features = equation.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(out) * math.prod(right) // right[features]


def _programs(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation."""
    values = value if isinstance(value, tuple | list) else (value,)
    return [p for p in (getattr(x, "jaxpr", x) for x in values) if hasattr(p, "eqns")]


def _countable(tree: PyTree) -> PyTree:
    """An equivalent model in which nothing depends on the machine or on values."""

    def visit(node: Any) -> Any:
        if isinstance(node, MixtureOfExperts):
            return _ChosenExperts(node)
        if node is dot_product_attention:
            return eqx.Partial(dot_product_attention, implementation="chunked")
        if _is_attention(node):
            return eqx.Partial(
                dot_product_attention, **{**node.keywords, "implementation": "chunked"}
            )
        return node

    return jax.tree.map(
        visit, tree, is_leaf=lambda x: isinstance(x, MixtureOfExperts) or _is_attention(x)
    )


def _is_attention(node: Any) -> bool:
    return isinstance(node, eqx.Partial) and node.func is dot_product_attention


class _ChosenExperts(eqx.Module):
    """A mixture of experts in which every position goes through the first `top_k` experts: as much
    computation, with fixed choices."""

    moe: MixtureOfExperts

    def __call__(
        self, x: Float[Array, "seq d_model"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "seq d_model"]:
        moe = self.moe
        logits = moe.router(x.astype(accumulation_dtype(x.dtype)))
        weights = jax.nn.softmax(logits[:, : moe.top_k])
        arrays, static = eqx.partition(moe.experts, eqx.is_array)
        chosen = jax.tree.map(lambda array: array[: moe.top_k], arrays)
        out = jax.vmap(lambda arrays: eqx.combine(arrays, static)(x))(chosen)
        y = jnp.einsum("sk,ksd->sd", weights, out.astype(weights.dtype)).astype(x.dtype)
        if moe.shared_experts is not None:
            y = y + moe.shared_experts(x, key=key)
        if moe.shared_gate is not None:
            gate: AbstractLinear = moe.shared_gate
            y = y * jnp.broadcast_to(gate(x), y.shape)
        return y
