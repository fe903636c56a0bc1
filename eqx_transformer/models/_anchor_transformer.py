import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..attention import Padding
from ..nn import (
    AnchorBranch,
    AxialRoPE,
    LayerNorm,
    Linear,
    MixedAttention,
    SinusoidalCoordinates,
    TokenSpec,
    cross_patterns,
    joint_patterns,
    self_patterns,
)
from ..stacks import (
    BlockSequence,
    Condition,
    PerceiverBlock,
    Source,
    Stack,
    linear_drop_path,
)
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

Pattern = Literal["self", "cross", "joint"]
PATTERNS = {"self": self_patterns, "cross": cross_patterns, "joint": joint_patterns}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorTransformerConfig(AbstractConfig):
    """The numbers that make an `AnchorTransformer`.

    Arguments:

    - `num_dims`: how many coordinates a point has.
    - `branches`: names of the parts of the problem, such as the surface and the volume.
    - `out_features`: how many numbers to predict at a point of each branch, in their order.
    - `d_model`: size of the vectors between layers.
    - `num_layers`: how many blocks.
    - `patterns`: which anchors the blocks attend to, repeated over depth: those of their own
        branch, of the others, or of all. `num_layers` must be a multiple of how many there are.
    - `num_heads`: how many heads.
    - `d_ff`: size inside the MLPs; `None` for `4 * d_model`.
    - `d_geometry`: size of the vectors that describe a geometry; `None` for no such description.
    - `wavelength_base`: of the vectors of coordinates; see `SinusoidalCoordinates`. Their shortest
        wavelength is `2 pi`, so scale coordinates to some hundreds.
    - `rope_theta`: ratio of the wavelengths by which queries and keys are rotated.
    - `rope_scale`: the shortest of them is `2 pi / rope_scale`.
    - `qk_norm`: whether queries and keys are normalised, each head by an `RMSNorm`.
    - `num_conditions`: how many numbers modulate the blocks (adaLN-Zero); may be 0. Their vectors
        are those of a `TimestepEmbedding`, so scale them to some hundreds.
    - `norm_eps`: added to the variance in norms.
    - `dropout_rate`: the probability with which an element of a residual branch, or an attention
        weight, is dropped.
    - `layer_scale`: initial factor of the learned scale of each branch of the blocks;
        `None` for no scale.
    - `drop_path_rate`: the probability with which the last blocks (one for each of `patterns`)
        drop their branches; that of the others grows from zero, linearly.
    - `remat`, `unroll`: see `DiTConfig`.
    """

    num_dims: int
    branches: tuple[str, ...]
    out_features: tuple[int, ...]
    d_model: int = 192
    num_layers: int = 12
    patterns: tuple[Pattern, ...] = ("self", "cross")
    num_heads: int = 3
    d_ff: int | None = None
    d_geometry: int | None = None
    wavelength_base: float = 10_000.0
    rope_theta: float = 10_000.0
    rope_scale: float = 1.0
    qk_norm: bool = False
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
            *("num_dims", "d_model", "num_layers", "num_heads", "d_ff", "d_geometry", "unroll"),
        )
        check_positive(
            self, "wavelength_base", "rope_theta", "rope_scale", "norm_eps", "layer_scale"
        )
        check_rates(self, "dropout_rate", "drop_path_rate")
        check_not_negative(self, "num_conditions")
        head_dim = check_heads(self, None, None)
        owner = "AnchorTransformerConfig"
        if head_dim % 2 or head_dim < 2 * self.num_dims:
            raise ValueError(
                f"{owner}: head_dim={head_dim} must be even and at least 2 * num_dims = "
                f"{2 * self.num_dims}: every coordinate rotates pairs of features."
            )
        named = all(self.branches) and len(set(self.branches)) == len(self.branches)
        if not self.branches or not named:
            raise ValueError(
                f"{owner}: branches={self.branches} must be one or more different names."
            )
        if len(self.out_features) != len(self.branches) or any(n < 1 for n in self.out_features):
            raise ValueError(
                f"{owner}: out_features={self.out_features} must be {len(self.branches)} numbers "
                f"of at least 1, one for each of branches={self.branches}."
            )
        if not self.patterns or self.num_layers % len(self.patterns):
            raise ValueError(
                f"{owner}: num_layers={self.num_layers} must be a multiple of the "
                f"{len(self.patterns)} patterns={self.patterns}."
            )
        if self.drop_path_rate > 0 and self.num_layers == len(self.patterns):
            raise ValueError(
                f"{owner}: drop_path_rate={self.drop_path_rate} grows from zero, so "
                f"num_layers={self.num_layers} must be at least twice the {len(self.patterns)} "
                "patterns."
            )
        if "cross" in self.patterns and len(self.branches) < 2:
            raise ValueError(
                f"{owner}: patterns={self.patterns} has 'cross', by which branches attend to the "
                f"others, but branches={self.branches}."
            )


class AnchorState(eqx.Module):
    """What an `AnchorTransformer` keeps of its anchors: enough to compute any point."""

    geometry: Any
    blocks: Any
    vector: Array | None


class AnchorTransformer(eqx.Module):
    """A transformer of points in branches, which attend only to some of them, the anchors.

    The output at any other point, a query, depends only on the anchors and on its own coordinates.
    So compute the anchors once (`encode`), and any number of queries in chunks (`decode`), with the
    same results as all at once. The cost is linear in the number of queries. The order of points in
    a branch does not matter. (Alkin et al., AB-UPT: Scaling Neural CFD Surrogates for High-Fidelity
    Automotive Aerodynamics Simulations via Anchored-Branched Universal Physics Transformers, 2025.)

    A geometry is a `Source`, such as `UPT.encode` returns; every point attends to it before
    anything else.
    """

    config: AnchorTransformerConfig = eqx.field(static=True)
    embedding: SinusoidalCoordinates
    projs: dict[str, Linear]
    condition_embedding: ConditionEmbedding | None
    geometry_block: PerceiverBlock | None
    stack: Stack
    norm: LayerNorm
    heads: dict[str, Linear]

    def __init__(self, config: AnchorTransformerConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("AnchorTransformer", config, AnchorTransformerConfig, key)
        keys = jax.random.split(key, 5)
        size, count = config.d_model, len(config.branches)
        self.config = config
        self.embedding = SinusoidalCoordinates(config.num_dims, size, config.wavelength_base)
        # A projection for each branch: it tells points of the surface from those of the volume.
        self.projs = {
            name: Linear(size, size, use_bias=True, key=k)
            for name, k in zip(config.branches, jax.random.split(keys[0], count), strict=True)
        }
        self.condition_embedding = None
        if config.num_conditions:
            self.condition_embedding = ConditionEmbedding(config.num_conditions, size, key=keys[4])
        self.geometry_block = None
        if config.d_geometry is not None:
            self.geometry_block = perceiver_block(
                size,
                config.num_heads,
                config.d_ff,
                d_memory=config.d_geometry,
                norm_eps=config.norm_eps,
                dropout_rate=config.dropout_rate,
                key=keys[1],
            )
        periods = config.num_layers // len(config.patterns)
        stack = Stack(
            functools.partial(_make_period, config),
            periods,
            remat=REMAT[config.remat],
            unroll=min(config.unroll, periods),
            key=keys[2],
        )
        if config.drop_path_rate > 0:
            stack = linear_drop_path(stack, config.drop_path_rate)
        self.stack = stack
        self.norm = LayerNorm(size, eps=config.norm_eps)
        self.heads = {
            name: Linear(size, out, use_bias=True, key=k)
            for name, out, k in zip(
                config.branches, config.out_features, jax.random.split(keys[3], count), strict=True
            )
        }

    @jax.named_scope("eqx_transformer.models.AnchorTransformer")
    def __call__(
        self,
        anchors: Mapping[str, Float[Array, "_ dims"]],
        queries: Mapping[str, Float[Array, "_ dims"]] | None = None,
        *,
        geometry: Source | None = None,
        conditions: Float[Array, " conditions"] | None = None,
        valid: Mapping[str, Bool[Array, " _"]] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[dict[str, Float[Array, "_ _"]], dict[str, Float[Array, "_ _"]]]:
        """The output at anchors and at queries, all at once.

        Arguments:

        - `anchors`: coordinates, for every branch.
        - `queries`: coordinates, for any branch; none if not given.
        - `geometry`: what every point attends to first, if the model is built for it.
        - `conditions`: the numbers that modulate the blocks, if the model is built for any.
        - `valid`: which anchors are not padding, for any branch; all if not given. The output of
            padding is meaningless.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.

        Returns:

        `[points, out_features]` by branch, of the anchors and of the queries.
        """
        queries = {} if queries is None else queries
        self._check(anchors, queries, geometry)
        keys = (None, None) if key is None else jax.random.split(key)
        vector = condition_vector("AnchorTransformer", self.condition_embedding, conditions)
        x, context, mask = self._embed(anchors, queries, valid, vector)
        if self.geometry_block is not None:
            x = self.geometry_block(x, context=geometry, key=keys[0])
        x = self.stack(x, context=context, mask=mask, key=keys[1])
        parts = self._outputs(x, [*anchors.items(), *queries.items()])
        return dict(parts[: len(anchors)]), dict(parts[len(anchors) :])

    @jax.named_scope("eqx_transformer.models.AnchorTransformer.encode")
    def encode(
        self,
        anchors: Mapping[str, Float[Array, "_ dims"]],
        *,
        geometry: Source | None = None,
        conditions: Float[Array, " conditions"] | None = None,
        valid: Mapping[str, Bool[Array, " _"]] | None = None,
    ) -> tuple[dict[str, Float[Array, "_ _"]], AnchorState]:
        """The output at the anchors, and what `decode` needs of them.

        Arguments are those of `__call__`; there is no dropout.
        """
        self._check(anchors, {}, geometry)
        vector = condition_vector("AnchorTransformer", self.condition_embedding, conditions)
        x, context, mask = self._embed(anchors, {}, valid, vector)
        of_geometry = None
        if self.geometry_block is not None:
            of_geometry = self.geometry_block.init_cache(0, context=geometry)
            x, _ = self.geometry_block.extend(x, of_geometry)
        x, blocks = self.stack.extend(x, self.stack.init_cache(0), context=context, mask=mask)
        state = AnchorState(of_geometry, blocks, vector)
        return dict(self._outputs(x, list(anchors.items()))), state

    @jax.named_scope("eqx_transformer.models.AnchorTransformer.decode")
    def decode(
        self, state: AnchorState, queries: Mapping[str, Float[Array, "_ dims"]]
    ) -> dict[str, Float[Array, "_ _"]]:
        """The output at queries, given what `encode` returned; what `__call__` gives for them."""
        _check_names("queries", queries, self.config.branches)
        x, context, _ = self._embed({}, queries, None, state.vector)
        if self.geometry_block is not None:
            x, _ = self.geometry_block.extend(x, state.geometry)
        x, _ = self.stack.extend(x, state.blocks, context=context)
        return dict(self._outputs(x, list(queries.items())))

    def _check(
        self, anchors: Mapping[str, Array], queries: Mapping[str, Array], geometry: Any
    ) -> None:
        branches = self.config.branches
        if set(anchors) != set(branches):
            raise ValueError(
                f"AnchorTransformer: there are anchors of {list(anchors)}, but every one of "
                f"branches={branches} needs some."
            )
        _check_names("queries", queries, branches)
        if (geometry is None) != (self.geometry_block is None):
            raise ValueError(
                "AnchorTransformer: there is a geometry, but d_geometry=None; leave it out, or "
                "build the model with one."
                if self.geometry_block is None
                else "AnchorTransformer: the model is built with d_geometry, so there must be a "
                "geometry=Source(...)."
            )

    def _embed(
        self,
        anchors: Mapping[str, Array],
        queries: Mapping[str, Array],
        valid: Mapping[str, Array] | None,
        vector: Array | None,
    ) -> tuple[Array, Condition, Padding | None]:
        """Vectors of all points, the context for the blocks, and which points are padding."""
        valid = {} if valid is None else valid
        _check_names("flags", valid, self.config.branches)
        flags = None
        if valid:
            rows = [
                valid.get(name, jnp.ones(len(points), bool)) for name, points in anchors.items()
            ]
            rows += [jnp.ones(len(points), bool) for points in queries.values()]
            flags = jnp.concatenate(rows)
        points = [*anchors.items(), *queries.items()]
        tokens = [TokenSpec(name, len(x)) for name, x in anchors.items()]
        tokens += [TokenSpec(_queries(name), len(x)) for name, x in queries.items()]
        if not anchors:
            tokens += [TokenSpec(name, None) for name in self.config.branches]
        coordinates = jnp.concatenate([where for _, where in points])
        if flags is not None:
            # NaN in padding must not reach a gradient, through a product with zero.
            coordinates = jnp.where(flags[:, None], coordinates, 0)
        vectors = self.embedding(coordinates)
        parts = _split(vectors, points)
        x = jnp.concatenate([self.projs[name](part) for name, part in parts])
        mask = None if flags is None else Padding(flags)
        return x, Condition(coordinates, vector, tuple(tokens)), mask

    def _outputs(self, x: Array, points: list[tuple[str, Array]]) -> list[tuple[str, Array]]:
        return [(name, self.heads[name](part)) for name, part in _split(self.norm(x), points)]


def _queries(branch: str) -> str:
    return f"{branch} (queries)"


def _split(x: Array, points: list[tuple[str, Array]]) -> list[tuple[str, Array]]:
    parts, start = [], 0
    for name, where in points:
        parts.append((name, x[start : start + len(where)]))
        start += len(where)
    return parts


def _check_names(what: str, given: Mapping[str, Array], branches: tuple[str, ...]) -> None:
    for name in given:
        if name not in branches:
            raise ValueError(
                f"AnchorTransformer: there are {what} of {name!r}, which is not one of "
                f"branches={branches}."
            )


def _make_period(config: AnchorTransformerConfig, *, key: PRNGKeyArray) -> BlockSequence:
    branches = [AnchorBranch(name, (_queries(name),)) for name in config.branches]
    blocks = []
    for pattern, block_key in zip(
        config.patterns, jax.random.split(key, len(config.patterns)), strict=True
    ):
        attention_key, mlp_key = jax.random.split(block_key)
        attention = MixedAttention(
            config.d_model,
            config.num_heads,
            PATTERNS[pattern](branches),
            rope=AxialRoPE(config.num_dims, config.rope_theta, config.rope_scale),
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            use_bias=True,
            dropout_rate=config.dropout_rate,
            key=attention_key,
        )
        blocks.append(
            pre_norm_block(
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
        )
    return BlockSequence(tuple(blocks))
