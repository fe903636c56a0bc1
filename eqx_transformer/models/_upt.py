import dataclasses
import functools
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask, Padding
from ..nn import (
    AbstractLinear,
    Attention,
    LayerNorm,
    Linear,
    SinusoidalCoordinates,
    SupernodePooling,
)
from ..stacks import Condition, Source, Stack, TransformerBlock, linear_drop_path
from ._checks import (
    check_arguments,
    check_heads,
    check_not_negative,
    check_positive,
    check_rates,
    check_sizes,
)
from ._config import AbstractConfig
from ._physics_parts import (
    ConditionEmbedding,
    condition_vector,
    perceiver_block,
    pre_norm_block,
)
from ._vocabulary import REMAT


@dataclasses.dataclass(frozen=True, kw_only=True)
class UPTConfig(AbstractConfig):
    """The numbers that make a `UPT`.

    Arguments:

    - `num_dims`: how many coordinates a point has.
    - `out_features`: how many numbers to predict at a point.
    - `num_features`: how many features an input point has besides its coordinates; may be 0.
    - `d_model`: size of the vectors between layers.
    - `num_layers`, `num_decoder_layers`: how many blocks the supernodes go through, and how many
        the queries.
    - `num_heads`: how many heads.
    - `d_ff`: size inside the MLPs; `None` for `4 * d_model`.
    - `num_neighbours`, `radius`: which points a supernode pools; see `SupernodePooling`.
    - `wavelength_base`: of the vectors of coordinates; see `SinusoidalCoordinates`. Their shortest
        wavelength is `2 pi`, so scale coordinates to some hundreds.
    - `num_conditions`: how many numbers modulate the blocks of supernodes (adaLN-Zero); may be 0.
        Their vectors are those of a `TimestepEmbedding`, so scale them to some hundreds.
    - `norm_eps`: added to the variance in norms.
    - `dropout_rate`: the probability with which an element of a residual branch, or an attention
        weight, is dropped.
    - `layer_scale`: initial factor of the learned scale of each branch of these blocks; `None` for
        no scale.
    - `drop_path_rate`: the probability with which the last of these blocks drops its branches;
        that of the others grows from zero, linearly.
    - `remat`, `unroll`: see `DiTConfig`.
    """

    num_dims: int
    out_features: int
    num_features: int = 0
    d_model: int = 192
    num_layers: int = 12
    num_decoder_layers: int = 1
    num_heads: int = 3
    d_ff: int | None = None
    num_neighbours: int = 32
    radius: float | None = None
    wavelength_base: float = 10_000.0
    num_conditions: int = 0
    norm_eps: float = 1e-6
    dropout_rate: float = 0.0
    layer_scale: float | None = None
    drop_path_rate: float = 0.0
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(
            self,
            *("num_dims", "out_features", "d_model", "num_layers", "num_decoder_layers"),
            *("num_heads", "d_ff", "num_neighbours", "unroll"),
        )
        check_not_negative(self, "num_features", "num_conditions")
        check_positive(self, "radius", "wavelength_base", "norm_eps", "layer_scale")
        check_rates(self, "dropout_rate", "drop_path_rate")
        check_heads(self, None, None)


class UPT(eqx.Module):
    """A universal physics transformer: from a field at some points to one at any others.

    Points are pooled into supernodes, these go through a transformer, and query points read from
    the result, each on its own: `decode` in any number of chunks. The order of points and of
    supernodes does not matter. (Alkin et al., Universal Physics Transformers, 2024.)
    """

    config: UPTConfig = eqx.field(static=True)
    pooling: SupernodePooling
    condition_embedding: ConditionEmbedding | None
    encoder: Stack
    norm: LayerNorm
    embedding: SinusoidalCoordinates
    query_proj: AbstractLinear
    decoder: Stack
    head_norm: LayerNorm
    head: AbstractLinear

    def __init__(self, config: UPTConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("UPT", config, UPTConfig, key)
        keys = jax.random.split(key, 6)
        size, remat = config.d_model, REMAT[config.remat]
        self.config = config
        self.pooling = SupernodePooling(
            config.num_dims,
            size,
            num_features=config.num_features,
            num_neighbours=config.num_neighbours,
            radius=config.radius,
            theta=config.wavelength_base,
            key=keys[0],
        )
        self.condition_embedding = None
        if config.num_conditions:
            self.condition_embedding = ConditionEmbedding(config.num_conditions, size, key=keys[5])
        encoder = Stack(
            functools.partial(_make_block, config),
            config.num_layers,
            remat=remat,
            unroll=min(config.unroll, config.num_layers),
            key=keys[1],
        )
        if config.drop_path_rate > 0:
            encoder = linear_drop_path(encoder, config.drop_path_rate)
        self.encoder = encoder
        self.norm = LayerNorm(size, eps=config.norm_eps)
        self.embedding = SinusoidalCoordinates(config.num_dims, size, config.wavelength_base)
        self.query_proj = Linear(size, size, use_bias=True, key=keys[2])
        self.decoder = Stack(
            functools.partial(
                perceiver_block,
                size,
                config.num_heads,
                config.d_ff,
                norm_eps=config.norm_eps,
                dropout_rate=config.dropout_rate,
            ),
            config.num_decoder_layers,
            remat=remat,
            unroll=min(config.unroll, config.num_decoder_layers),
            key=keys[3],
        )
        self.head_norm = LayerNorm(size, eps=config.norm_eps)
        self.head = Linear(size, config.out_features, use_bias=True, key=keys[4])

    @jax.named_scope("eqx_transformer.models.UPT")
    @unbatched(coordinates="points dims", queries="queries dims")
    def __call__(
        self,
        coordinates: Float[Array, "points dims"],
        supernodes: Int[Array, " supernodes"],
        queries: Float[Array, "queries dims"],
        features: Float[Array, "points features"] | None = None,
        *,
        conditions: Float[Array, " conditions"] | None = None,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "queries out_features"]:
        """`decode` at `queries` of `encode`."""
        keys = (None, None) if key is None else jax.random.split(key)
        options = {"conditions": conditions, "mask": mask, "key": keys[0]}
        source = self.encode(coordinates, supernodes, features, **options)
        return self.decode(source, queries, key=keys[1])

    @unbatched(coordinates="points dims")
    def encode(
        self,
        coordinates: Float[Array, "points dims"],
        supernodes: Int[Array, " supernodes"],
        features: Float[Array, "points features"] | None = None,
        *,
        conditions: Float[Array, " conditions"] | None = None,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Source:
        """The encoded input: a vector for every supernode.

        Arguments:

        - `coordinates`, `features`: where the points are, and their features.
        - `supernodes`: which of them are supernodes.
        - `conditions`: the numbers that modulate the blocks, if the model is built for any.
        - `mask`: `Padding(valid)` where some points are padding; supernodes may be among them.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.
        """
        vector = condition_vector("UPT", self.condition_embedding, conditions)
        x = self.pooling(coordinates, supernodes, features, mask=mask)
        padding = Padding(mask.valid[supernodes]) if isinstance(mask, Padding) else None
        x = self.encoder(x, context=Condition(vector=vector), mask=padding, key=key)
        return Source(self.norm(x), padding)

    @unbatched(queries="queries dims")
    def decode(
        self,
        source: Source,
        queries: Float[Array, "queries dims"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "queries out_features"]:
        """The output at query points, each of which is independent of the others."""
        dtype = jnp.result_type(source.memory)
        x = self.query_proj(self.embedding(queries, dtype))
        return self.head(self.head_norm(self.decoder(x, context=source, key=key)))


def _make_block(config: UPTConfig, *, key: PRNGKeyArray) -> TransformerBlock:
    attention_key, mlp_key = jax.random.split(key)
    attention = Attention(
        config.d_model,
        config.num_heads,
        use_bias=True,
        dropout_rate=config.dropout_rate,
        key=attention_key,
    )
    return pre_norm_block(
        attention,
        config.d_model,
        config.d_ff,
        norm_eps=config.norm_eps,
        dropout_rate=config.dropout_rate,
        layer_scale=config.layer_scale,
        drop_path_rate=config.drop_path_rate,
        conditioned=config.num_conditions > 0,
        key=mlp_key,
    )
