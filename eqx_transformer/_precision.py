"""The dtype sums are accumulated in."""

from typing import Any

import jax.numpy as jnp


def accumulation_dtype(dtype: Any) -> Any:
    """float32, or `dtype` itself where that is wider: float64 stays float64."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
