"""What the words in configurations mean."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..attention import Implementation, dot_product_attention
from ..nn import DynamicTanh, LayerNorm, RMSNorm

Activation = Literal[
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu_squared",
    "silu",
    "swiglu",
    "geglu",
    "geglu_tanh",
    "quick_geglu",
    "reglu",
]
"""The nonlinearity of the MLPs. The last five have a multiplicative gate; `"gelu"` and
`"geglu"` are exact, and `quick_gelu(x) = x * sigmoid(1.702 x)`."""

GATED = ("swiglu", "geglu", "geglu_tanh", "quick_geglu", "reglu")


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _relu_squared(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu_squared": _relu_squared,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "geglu": _gelu,
    "geglu_tanh": jax.nn.gelu,
    "quick_geglu": _quick_gelu,
    "reglu": jax.nn.relu,
}

REMAT = {
    "none": None,
    "full": True,
    # The products in attention have batch axes, and would be recomputed; its result is small.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
}


def norm_of(
    norm: Literal["layer", "rms", "dynamic_tanh"], size: int, *, eps: float, use_bias: bool = True
) -> Any:
    """The norm of this name."""
    if norm == "layer":
        return LayerNorm(size, eps=eps, use_bias=use_bias)
    return RMSNorm(size, eps=eps) if norm == "rms" else DynamicTanh(size)


def attention_fn_of(
    implementation: Implementation | None, block_size: int | None = None
) -> Callable[..., Array]:
    """`dot_product_attention`, by a named implementation or with tiles of a given size."""
    if implementation is None and block_size is None:
        return dot_product_attention
    return eqx.Partial(dot_product_attention, implementation=implementation, block_size=block_size)
