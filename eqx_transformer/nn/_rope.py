"""Rotary position embedding."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._precision import accumulation_dtype
from ._checks import check_positive
from ._rope_scaling import AbstractRoPEScaling


def apply_rope(
    x: Float[Array, "seq heads head_dim"],
    positions: Int[Array, " seq"],
    *,
    theta: float = 10_000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: AbstractRoPEScaling | None = None,
    length: int | Int[Array, ""] | None = None,
) -> Float[Array, "seq heads head_dim"]:
    """Rotates pairs of features by angles proportional to the position.

    With `half = rotary_dim / 2`, pair `i` is rotated by `position * theta ** (-i / half)`. It
    consists of features `i` and `i + half`, which is the layout of the Llama weights that Hugging
    Face distributes, or, `interleaved`, of the neighbours `2 i` and `2 i + 1`, which is that of the
    paper. (Su et al., RoFormer, 2021, equation 34.)

    Angles, sines and the rotation are computed in float32 or wider, whatever the dtype of `x`:
    bfloat16 cannot tell position 1000 from 1001.

    Arguments:

    - `x`: queries or keys.
    - `positions`: their absolute positions.
    - `theta`: base of the wavelengths, which range from `2 pi` to nearly `2 pi theta` positions.
    - `rotary_dim`: how many leading features are rotated; all if not given.
    - `interleaved`: whether neighbours are paired.
    - `scaling`: how wavelengths change for sequences longer than those of training.
    - `length`: how long the sequence is, for a `scaling` that depends on it; `max(positions) + 1`
        if not given.

    Returns:

    The rotated array, in the dtype of `x`.

    Raises:

    - `ValueError` if `rotary_dim` is odd or more than `head_dim`, or `theta` is not positive.
    """
    rope = RoPE(theta=theta, rotary_dim=rotary_dim, interleaved=interleaved, scaling=scaling)
    return rope(x, positions, length=length)


class RoPE(eqx.Module):
    """Rotary position embedding as a value: see `apply_rope`.

    It has no parameters and no tables.

    Arguments:

    - `theta`: base of the wavelengths.
    - `rotary_dim`: how many leading features of each head are rotated; all if not given.
    - `interleaved`: whether neighbours are paired, instead of features half of the size apart.
    - `scaling`: a `LinearScaling`, `DynamicScaling`, `Llama3Scaling`, `YaRNScaling` or
        `LongRoPEScaling`, for sequences longer than those of training.
    """

    theta: float | int = eqx.field(static=True, default=10_000.0)
    rotary_dim: int | None = eqx.field(static=True, default=None)
    interleaved: bool = eqx.field(static=True, default=False)
    scaling: AbstractRoPEScaling | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        check_positive("RoPE", "theta", self.theta)
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(
                f"RoPE: rotary_dim={self.rotary_dim} must be even and at least 2: features are "
                "rotated in pairs."
            )

    @property
    def needs_length(self) -> bool:
        """Whether the angles of a position depend on how long the sequence is."""
        return self.scaling is not None and self.scaling.needs_length

    def __call__(
        self,
        x: Float[Array, "seq heads head_dim"],
        positions: Int[Array, " seq"],
        *,
        length: int | Int[Array, ""] | None = None,
    ) -> Float[Array, "seq heads head_dim"]:
        """Rotates `x[i]` to `positions[i]`, in a sequence of `length`; see `apply_rope`.

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
        frequency: Any = self.theta ** (-np.arange(half) / half)
        factor = 1.0
        if self.scaling is not None:
            if self.needs_length and length is None:
                length = jnp.max(positions, initial=-1) + 1
            frequency, factor = self.scaling(frequency, self.theta, length)
        # Full-width tables and one swap of partners: the rotation is then one elementwise pass.
        frequency = jnp.asarray(frequency, dtype)
        frequency = frequency.repeat(2) if self.interleaved else jnp.tile(frequency, 2)
        sign = np.tile([-1.0, 1.0], half) if self.interleaved else np.repeat([-1.0, 1.0], half)
        angle = positions.astype(dtype)[:, None] * frequency[None, :]
        cos = (factor * jnp.cos(angle))[:, None, :]
        sin = (jnp.sin(angle) * jnp.asarray(factor * sign, dtype)[None, :])[:, None, :]
        h = x[..., :size].astype(dtype)
        if self.interleaved:
            swapped = h.reshape(*h.shape[:-1], half, 2)[..., ::-1].reshape(h.shape)
        else:
            swapped = jnp.concatenate([h[..., half:], h[..., :half]], axis=-1)
        out = (h * cos + swapped * sin).astype(x.dtype)
        return out if size == x.shape[-1] else jnp.concatenate([out, x[..., size:]], axis=-1)
