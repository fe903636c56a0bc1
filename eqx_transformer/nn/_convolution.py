import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._unbatched import unbatched
from ._along_last import along_last


class Convolution(eqx.Module):
    """A convolution along a sequence, with zeros around it.

        y[t] = bias + sum over i of weight[:, :, i] @ x[stride * t + i - (size - 1) / 2]

    The weight is laid out as in PyTorch; sequences have features last.
    """

    weight: Float[Array, "out_features in_features size"]
    bias: Float[Array, " out_features"] | None
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        size: int = 3,
        stride: int = 1,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `in_features`, `out_features`: sizes of the last axis before and after.
        - `size`: how many positions an output sees, odd.
        - `stride`: how far apart the outputs are.
        - `use_bias`: whether to add a bias, initially zero.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weight.

        Raises:

        - `ValueError` if `size` is even, or another number less than one.
        """
        if size < 1 or size % 2 == 0:
            raise ValueError(f"Convolution: size={size} must be odd, so that it can be centred.")
        sizes = {"in_features": in_features, "out_features": out_features, "stride": stride}
        for name, number in sizes.items():
            if number < 1:
                raise ValueError(f"Convolution: {name}={number} must be at least 1.")
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        init = jax.nn.initializers.lecun_normal(in_axis=(1, 2), out_axis=0)
        self.weight = init(key, (out_features, in_features, size), dtype)
        self.bias = jnp.zeros((out_features,), dtype) if use_bias else None
        self.stride = stride

    @jax.named_scope("eqx_transformer.nn.Convolution")
    @unbatched(x="seq in_features")
    def __call__(
        self, x: Float[Array, "seq in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "out_seq out_features"]:
        """Maps a sequence. `key` is ignored, as in Equinox."""
        around = self.weight.shape[-1] // 2
        y = jax.lax.conv_general_dilated(
            x[None],
            self.weight.astype(x.dtype),
            window_strides=(self.stride,),
            padding=((around, around),),
            dimension_numbers=("NTC", "OIT", "NTC"),
        )[0]
        if self.bias is not None:
            y = y + along_last("Convolution", self.bias, y)
        return y
