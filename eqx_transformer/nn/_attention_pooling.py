from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask
from ._cross_attention import CrossAttention


class AttentionPooling(eqx.Module):
    """Pools a sequence into one vector, by attention from a learned query.

        h = attention(query, x)
        y = h + mlp(norm(h))

    (Lee et al., Set Transformer, 2019, equation 11; without the query in the residual, as in Zhai
    et al., Scaling Vision Transformers, 2022.)
    """

    query: Float[Array, "1 d_model"]
    attention: CrossAttention
    norm: Callable[[Array], Array]
    mlp: Callable[..., Array]

    def __init__(
        self,
        attention: CrossAttention,
        norm: Callable[[Array], Array],
        mlp: Callable[..., Array],
        *,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `attention`: from the query to the sequence.
        - `norm`: before the MLP.
        - `mlp`: called as `mlp(x)`.
        - `key`: for the initial query, of standard deviation `1 / sqrt(d_model)`.
        """
        d_model, dtype = attention.q_proj.weight.shape[0], attention.q_proj.weight.dtype
        init = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.query = init(key, (1, d_model), dtype)
        self.attention = attention
        self.norm = norm
        self.mlp = mlp

    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " d_model"]:
        """Pools a sequence.

        Arguments:

        - `x`: the sequence.
        - `mask`: what may be attended to: `Padding(valid)`.
        - `key`: for dropout of attention weights.
        """
        query = jnp.asarray(self.query, x.dtype)
        h = self.attention(query, x, mask=mask, key=key)
        return (h + self.mlp(self.norm(h)))[0]
