"""Rotary position embedding."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._precision import accumulation_dtype


def apply_rope(
    x: Float[Array, "seq heads head_dim"],
    positions: Int[Array, " seq"],
    *,
    theta: float = 10_000.0,
    rotary_dim: int | None = None,
) -> Float[Array, "seq heads head_dim"]:
    """Rotates pairs of features by angles proportional to the position.

    With `half = rotary_dim / 2`, feature `i < half` is paired with feature `i + half`, and the pair
    is turned by the angle `position * theta ** (-i / half)`. This is the layout of the Llama
    weights that Hugging Face distributes; the paper pairs neighbours. (Su et al., RoFormer, 2021,
    equation 34.)

    Angles, sines and the rotation are computed in float32 or wider, whatever the dtype of `x`:
    bfloat16 cannot tell position 1000 from 1001.

    Arguments:

    - `x`: queries or keys.
    - `positions`: their absolute positions.
    - `theta`: base of the wavelengths, which range from `2 pi` to nearly `2 pi theta` positions.
    - `rotary_dim`: how many leading features are rotated; all if not given.

    Returns:

    The rotated array, in the dtype of `x`.

    Raises:

    - `ValueError` if `rotary_dim` is odd or more than `head_dim`, or `theta` is not positive.
    """
    return RoPE(theta=theta, rotary_dim=rotary_dim)(x, positions)


class RoPE(eqx.Module):
    """Rotary position embedding as a value: see `apply_rope`.

    It holds numbers only, no tables: nothing here is a parameter.

    Arguments:

    - `theta`: base of the wavelengths.
    - `rotary_dim`: how many leading features of each head are rotated; all if not given.
    """

    theta: float = eqx.field(static=True, default=10_000.0)
    rotary_dim: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if not self.theta > 0:
            raise ValueError(f"RoPE: theta={self.theta} must be positive.")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(
                f"RoPE: rotary_dim={self.rotary_dim} must be even and at least 2: features are "
                "rotated in pairs."
            )

    def __call__(
        self, x: Float[Array, "seq heads head_dim"], positions: Int[Array, " seq"]
    ) -> Float[Array, "seq heads head_dim"]:
        """Rotates `x[i]` to `positions[i]`.

        Raises:

        - `ValueError` if `rotary_dim` (or `head_dim`, where all features are rotated) does not fit.
        """
        size = x.shape[-1] if self.rotary_dim is None else self.rotary_dim
        if size > x.shape[-1] or size % 2:
            raise ValueError(
                f"RoPE: cannot rotate {size} features of head_dim={x.shape[-1]}; rotary_dim must "
                "be even and at most head_dim."
            )
        dtype = accumulation_dtype(x.dtype)
        half = size // 2
        frequency = self.theta ** (-np.arange(half) / half)
        # Full-width tables and one swap of halves: the rotation is then a single elementwise pass.
        frequency = np.concatenate([frequency, frequency])
        sign = np.repeat([-1.0, 1.0], half)
        angle = positions.astype(dtype)[:, None] * jnp.asarray(frequency, dtype)[None, :]
        cos = jnp.cos(angle)[:, None, :]
        sin = (jnp.sin(angle) * jnp.asarray(sign, dtype)[None, :])[:, None, :]
        h = x[..., :size].astype(dtype)
        swapped = jnp.concatenate([h[..., half:], h[..., :half]], axis=-1)
        out = (h * cos + swapped * sin).astype(x.dtype)
        return out if size == x.shape[-1] else jnp.concatenate([out, x[..., size:]], axis=-1)
