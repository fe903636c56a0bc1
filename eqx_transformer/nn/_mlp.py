from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._unbatched import unbatched
from ._linear import AbstractLinear, Linear


class MLP(eqx.Module):
    """Two linear maps with a nonlinearity between: `down(activation(up(x)))`.

    (Vaswani et al., 2017, equation 2.)
    """

    up_proj: AbstractLinear
    down_proj: AbstractLinear
    activation: Callable[[Array], Array]

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `d_ff`: size between the two maps.
        - `activation`: the nonlinearity, a function or a Module with parameters. Give options
            with `eqx.Partial`: two lambdas are never equal, so each causes a compilation.
        - `use_bias`: whether the maps have biases.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weights.
        """
        up_key, down_key = jax.random.split(key)
        self.up_proj = Linear(d_model, d_ff, use_bias=use_bias, dtype=dtype, key=up_key)
        self.down_proj = Linear(d_ff, d_model, use_bias=use_bias, dtype=dtype, key=down_key)
        self.activation = activation

    @jax.named_scope("eqx_transformer.nn.MLP")
    @unbatched(x="seq d_model")
    def __call__(
        self, x: Float[Array, "seq d_model"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "seq d_model"]:
        """Maps every position on its own. `key` is ignored, as in Equinox."""
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedMLP(eqx.Module):
    """An MLP with a multiplicative gate: `down(activation(gate(x)) * up(x))`.

    With the default activation this is SwiGLU. (Shazeer, 2020, equation 6.) With the options it is
    `down(activation(min(gate(x), clip)) * (up_offset + clip(up(x), -clip, clip)))`, which is that
    of GPT-OSS (2025).
    """

    gate_proj: AbstractLinear
    up_proj: AbstractLinear
    down_proj: AbstractLinear
    activation: Callable[[Array], Array]
    clip: float | int | None = eqx.field(static=True)
    up_offset: float | int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.silu,
        clip: float | int | None = None,
        up_offset: float | int = 0,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `d_ff`: size of the gate and of what it multiplies.
        - `activation`: applied to the gate; see `MLP`.
        - `clip`: an upper bound on the gate before the activation, and a bound on the size of what
            it multiplies. No limit if not given.
        - `up_offset`: added to what the gate multiplies.
        - `use_bias`: whether the three maps have biases.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weights.
        """
        if clip is not None and not clip > 0:
            raise ValueError(f"GatedMLP: clip={clip} must be positive; None is no limit.")
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate_proj = Linear(d_model, d_ff, use_bias=use_bias, dtype=dtype, key=gate_key)
        self.up_proj = Linear(d_model, d_ff, use_bias=use_bias, dtype=dtype, key=up_key)
        self.down_proj = Linear(d_ff, d_model, use_bias=use_bias, dtype=dtype, key=down_key)
        self.activation = activation
        self.clip = clip
        self.up_offset = up_offset

    @jax.named_scope("eqx_transformer.nn.GatedMLP")
    @unbatched(x="seq d_model")
    def __call__(
        self, x: Float[Array, "seq d_model"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "seq d_model"]:
        """Maps every position on its own. `key` is ignored, as in Equinox."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.clip is not None:
            gate, up = jnp.minimum(gate, self.clip), jnp.clip(up, -self.clip, self.clip)
        if self.up_offset:
            up = self.up_offset + up
        return self.down_proj(self.activation(gate) * up)
