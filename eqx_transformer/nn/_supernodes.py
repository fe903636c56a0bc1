"""Few tokens for many points: each pools the points around it."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import AbstractMask
from ._coordinates import SinusoidalCoordinates
from ._linear import AbstractLinear, Linear
from ._padding import padding_flags


def nearest_neighbours(
    points: Float[Array, "points dims"],
    centres: Float[Array, "centres centre_dims"],
    num_neighbours: int,
    *,
    radius: float | None = None,
    valid: Bool[Array, " points"] | None = None,
) -> tuple[Int[Array, "centres neighbours"], Bool[Array, "centres neighbours"]]:
    """The points nearest to each centre, nearest first.

    All distances are computed, so memory is `O(centres * points)`. The choice of neighbours is
    discrete, so nothing here is differentiated.

    Arguments:

    - `points`, `centres`: their coordinates.
    - `num_neighbours`: how many points at most.
    - `radius`: how far away they may be; no limit if not given.
    - `valid`: which points are not padding.

    Returns:

    Indices of points, and which of them are neighbours at all: there may be fewer points within the
    radius.

    Raises:

    - `ValueError` if the numbers of coordinates differ, or there is no neighbour to find.
    """
    if points.shape[1] != centres.shape[1]:
        raise ValueError(
            f"nearest_neighbours: points have {points.shape[1]} coordinates, centres "
            f"{centres.shape[1]}; they must be points in the same space."
        )
    if num_neighbours < 1:
        raise ValueError(f"nearest_neighbours: num_neighbours={num_neighbours} must be at least 1.")
    points, centres = jax.lax.stop_gradient((points, centres))
    wide = accumulation_dtype(points.dtype)
    # Differences, not the expanded square, which suffers from cancellation far from the origin.
    squares = [
        (centres[:, i].astype(wide)[:, None] - points[:, i].astype(wide)[None, :]) ** 2
        for i in range(points.shape[1])
    ]
    distance = sum(squares[1:], squares[0])
    if valid is not None:
        distance = jnp.where(valid[None, :], distance, jnp.inf)
    nearest, index = jax.lax.top_k(-distance, min(num_neighbours, points.shape[0]))
    limit = jnp.inf if radius is None else radius**2
    return index.astype(jnp.int32), (-nearest <= limit) & (nearest > -jnp.inf)


class SupernodePooling(eqx.Module):
    """Pools points into supernodes: the mean of messages from the points around each.

        e(i) = coordinate_proj(embedding(coordinates[i])) + feature_proj(features[i])
        m(i, s) = activation(point_proj(e(i)) + centre_proj(e(s)))
        y[s] = down_proj(mean of m(i, s) over the neighbours i of s)

    This is the mean of an MLP of `[e(i), e(s)]`, with its linear parts computed once per point.
    Supernodes are points themselves. A supernode always has a neighbour, itself, unless it is
    padding: then its vector is zero. (Alkin et al., Universal Physics Transformers, 2024, section
    3.1.)
    """

    coordinate_proj: AbstractLinear
    feature_proj: AbstractLinear | None
    point_proj: AbstractLinear
    centre_proj: AbstractLinear
    down_proj: AbstractLinear
    embedding: SinusoidalCoordinates
    activation: Callable[[Array], Array]
    num_neighbours: int = eqx.field(static=True)
    radius: float | None = eqx.field(static=True)

    def __init__(
        self,
        num_dims: int,
        d_model: int,
        *,
        num_features: int = 0,
        num_neighbours: int = 32,
        radius: float | None = None,
        theta: float = 10_000.0,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `num_dims`: how many coordinates a point has.
        - `d_model`: size of the vectors.
        - `num_features`: how many features a point has besides its coordinates; may be 0.
        - `num_neighbours`: how many points send messages to a supernode at most, the nearest.
        - `radius`: how far away they may be; no limit if not given.
        - `theta`: base of the wavelengths of coordinates; see `SinusoidalCoordinates`.
        - `activation`: the nonlinearity of messages.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weights.

        Raises:

        - `ValueError` if a number is out of range.
        """
        if num_neighbours < 1:
            raise ValueError(
                f"SupernodePooling: num_neighbours={num_neighbours} must be at least 1."
            )
        if radius is not None and not radius > 0:
            raise ValueError(f"SupernodePooling: radius={radius} must be positive.")
        keys = jax.random.split(key, 5)
        self.coordinate_proj = Linear(d_model, d_model, use_bias=True, dtype=dtype, key=keys[0])
        self.feature_proj = None
        if num_features:
            self.feature_proj = Linear(num_features, d_model, dtype=dtype, key=keys[1])
        self.point_proj = Linear(d_model, d_model, use_bias=True, dtype=dtype, key=keys[2])
        self.centre_proj = Linear(d_model, d_model, dtype=dtype, key=keys[3])
        self.down_proj = Linear(d_model, d_model, use_bias=True, dtype=dtype, key=keys[4])
        self.embedding = SinusoidalCoordinates(num_dims, d_model, theta)
        self.activation = activation
        self.num_neighbours = num_neighbours
        self.radius = radius

    @jax.named_scope("eqx_transformer.nn.SupernodePooling")
    @unbatched(coordinates="points dims", supernodes="supernodes")
    def __call__(
        self,
        coordinates: Float[Array, "points dims"],
        supernodes: Int[Array, " supernodes"],
        features: Float[Array, "points features"] | None = None,
        *,
        mask: AbstractMask | None = None,
    ) -> Float[Array, "supernodes d_model"]:
        """A vector for every supernode.

        Arguments:

        - `coordinates`: where the points are.
        - `supernodes`: which points are supernodes, e.g. `jax.random.choice(key, points, (n,),
            replace=False)`.
        - `features`: of the points, besides their coordinates.
        - `mask`: `Padding(valid)` where some points are padding.

        Raises:

        - `ValueError` if there are features but the layer takes none, or the reverse.
        """
        if (features is None) != (self.feature_proj is None):
            raise ValueError(
                "SupernodePooling: there are features, but num_features=0; leave them out, or "
                "build the layer with as many."
                if self.feature_proj is None
                else "SupernodePooling: features are missing; the layer was built with "
                f"num_features={self.feature_proj.weight.shape[0]}."
            )
        valid = padding_flags("SupernodePooling", mask, coordinates.shape[0])
        if valid is not None:
            # NaN in padding must not reach a gradient either, through a product with zero.
            coordinates = jnp.where(valid[:, None], coordinates, 0)
            features = None if features is None else jnp.where(valid[:, None], features, 0)
        dtype = self.point_proj.weight.dtype if features is None else features.dtype
        e = self.coordinate_proj(self.embedding(coordinates, dtype))
        if self.feature_proj is not None and features is not None:
            e = e + self.feature_proj(features)
        index, near = nearest_neighbours(
            coordinates,
            coordinates[supernodes],
            self.num_neighbours,
            radius=self.radius,
            valid=valid,
        )
        messages = self.activation(
            self.point_proj(e)[index] + self.centre_proj(e[supernodes])[:, None, :]
        )
        wide = accumulation_dtype(messages.dtype)
        messages = jnp.where(near[:, :, None], messages.astype(wide), 0)
        # A supernode that is padding may have neighbours, but its vector is zero all the same.
        alive = near.any(axis=1) if valid is None else near.any(axis=1) & valid[supernodes]
        count = jnp.maximum(near.sum(axis=1), 1).astype(wide)
        mean = (messages.sum(axis=1) / count[:, None]).astype(dtype)
        return jnp.where(alive[:, None], self.down_proj(mean), 0)
