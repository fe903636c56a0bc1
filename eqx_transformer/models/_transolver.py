import dataclasses
import functools
from typing import Literal

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import (
    AbstractLinear,
    LayerNorm,
    Linear,
    SliceAttention,
)
from ..stacks import Condition, Stack, TransformerBlock, linear_drop_path
from ._checks import (
    check_arguments,
    check_heads,
    check_not_negative,
    check_positive,
    check_rates,
    check_sizes,
)
from ._config import AbstractConfig
from ._physics_parts import ConditionEmbedding, condition_vector, pre_norm_block
from ._vocabulary import REMAT


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransolverConfig(AbstractConfig):
    """The numbers that make a `Transolver`.

    Arguments:

    - `num_features`: how many features a point has, its coordinates included.
    - `out_features`: how many numbers to predict at a point.
    - `d_model`: size of the vectors between layers.
    - `num_layers`: how many blocks.
    - `num_heads`: how many heads.
    - `num_slices`: how many slices each has.
    - `d_ff`: size inside the MLPs; `None` for `4 * d_model`.
    - `adaptive_temperature`, `gumbel`, `separate_values`: see `SliceAttention`. Transolver++ has
        the first two and not the third.
    - `num_conditions`: how many numbers modulate the blocks (adaLN-Zero); may be 0. Their
        vectors are those of a `TimestepEmbedding`, so scale them to some hundreds.
    - `norm_eps`: added to the variance in norms.
    - `dropout_rate`: the probability with which an element of a residual branch, or an attention
        weight, is dropped.
    - `layer_scale`: initial factor of the learned scale of each branch of the blocks;
        `None` for no scale.
    - `drop_path_rate`: the probability with which the last of the blocks drops its
        branches; that of the others grows from zero, linearly.
    - `remat`, `unroll`: see `DiTConfig`.
    """

    num_features: int
    out_features: int
    d_model: int = 256
    num_layers: int = 8
    num_heads: int = 8
    num_slices: int = 32
    d_ff: int | None = None
    adaptive_temperature: bool = False
    gumbel: bool = False
    separate_values: bool = True
    num_conditions: int = 0
    norm_eps: float = 1e-5
    dropout_rate: float = 0.0
    layer_scale: float | None = None
    drop_path_rate: float = 0.0
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(
            self,
            *("num_features", "out_features", "d_model", "num_layers", "num_heads", "num_slices"),
            *("d_ff", "unroll"),
        )
        check_positive(self, "norm_eps", "layer_scale")
        check_rates(self, "dropout_rate", "drop_path_rate")
        check_not_negative(self, "num_conditions")
        check_heads(self, None, None)


class Transolver(eqx.Module):
    """A transformer of points, whose attention is through slices: linear in the number of points.

    The order of points does not matter. (Wu et al., Transolver: A Fast Transformer Solver for PDEs
    on General Geometries, 2024; Luo et al., Transolver++, 2025.)
    """

    config: TransolverConfig = eqx.field(static=True)
    up_proj: AbstractLinear
    down_proj: AbstractLinear
    condition_embedding: ConditionEmbedding | None
    stack: Stack
    norm: LayerNorm
    head: AbstractLinear

    def __init__(self, config: TransolverConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("Transolver", config, TransolverConfig, key)
        keys = jax.random.split(key, 5)
        size = config.d_model
        self.config = config
        self.up_proj = Linear(config.num_features, 2 * size, use_bias=True, key=keys[0])
        self.down_proj = Linear(2 * size, size, use_bias=True, key=keys[1])
        self.condition_embedding = None
        if config.num_conditions:
            self.condition_embedding = ConditionEmbedding(config.num_conditions, size, key=keys[4])
        stack = Stack(
            functools.partial(_make_block, config),
            config.num_layers,
            remat=REMAT[config.remat],
            unroll=min(config.unroll, config.num_layers),
            key=keys[2],
        )
        if config.drop_path_rate > 0:
            stack = linear_drop_path(stack, config.drop_path_rate)
        self.stack = stack
        self.norm = LayerNorm(size, eps=config.norm_eps)
        self.head = Linear(size, config.out_features, use_bias=True, key=keys[3])

    @jax.named_scope("eqx_transformer.models.Transolver")
    @unbatched(features="points num_features")
    def __call__(
        self,
        features: Float[Array, "points num_features"],
        *,
        conditions: Float[Array, " conditions"] | None = None,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "points out_features"]:
        """The output at every point.

        Arguments:

        - `features`: of the points: coordinates, and whatever else is known.
        - `conditions`: the numbers that modulate the blocks, if the model is built for any.
        - `mask`: `Padding(valid)` where some points are padding; the output there is meaningless.
        - `key`: for dropout and Gumbel noise; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.
        """
        vector = condition_vector("Transolver", self.condition_embedding, conditions)
        x = self.down_proj(jax.nn.gelu(self.up_proj(features)))
        x = self.stack(x, context=Condition(vector=vector), mask=mask, key=key)
        return self.head(self.norm(x))


def _make_block(config: TransolverConfig, *, key: PRNGKeyArray) -> TransformerBlock:
    attention_key, mlp_key = jax.random.split(key)
    attention = SliceAttention(
        config.d_model,
        config.num_heads,
        config.num_slices,
        adaptive_temperature=config.adaptive_temperature,
        gumbel=config.gumbel,
        separate_values=config.separate_values,
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
