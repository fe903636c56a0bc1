"""How scores change before the softmax: elementwise functions, which may have parameters.

A score mod is any callable `(score, q_pos, kv_pos, head) -> score` on arrays that broadcast
against each other. If it is an `eqx.Module`, its array leaves are trained, in every implementation.
Use a mask to exclude pairs, not a score mod that returns `-inf`: the values would be right, but
implementations could not see what to skip.

Score mods are also evaluated at pairs that a mask excludes. What they return there is not used, but
it must be differentiable there: the logarithm of a negative distance would make their parameters'
gradients NaN.
"""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

ScoreMod = Callable[
    [Float[Array, "..."], Int[Array, "..."], Int[Array, "..."], Int[Array, "..."]],
    Float[Array, "..."],
]
"""What `dot_product_attention` accepts as `score_mod`: `(score, q_pos, kv_pos, head) -> score`,
elementwise on arrays that broadcast against each other, in the dtype of `score`."""


class SoftCap(eqx.Module):
    """Bounds scores smoothly to `(-cap, cap)`: `cap * tanh(score / cap)`.

    (Gemma Team, Gemma 2, 2024.)

    Raises:

    - `ValueError` if `cap` is not positive.
    """

    cap: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"SoftCap: cap={self.cap} must be positive.")

    def __call__(
        self,
        score: Float[Array, "..."],
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        head: Int[Array, "..."],
    ) -> Float[Array, "..."]:
        """Caps `score`; positions and heads play no part."""
        return self.cap * jnp.tanh(score / self.cap)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of ALiBi: a geometric sequence, or two if `num_heads` is not a power of two.

    (Press et al., Train Short, Test Long, 2022, section 3 and its reference code.)

    Raises:

    - `ValueError` if `num_heads` is less than one.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads={num_heads} must be at least 1.")

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(num_heads))
    # Heads beyond a power of two take every other slope of the sequence for twice as many heads.
    return tuple(geometric(power) + geometric(2 * power)[0::2][: num_heads - power])


class ALiBi(eqx.Module):
    """Attention with linear biases: `score - scale * slope[head] * |q_pos - kv_pos|`.

    The slopes are numbers, not parameters. The distance is absolute, which for a causal mask is
    the paper's definition and for an encoder its symmetric form. The scale is 1 in the paper and
    `1 / sqrt(head_dim)` in Falcon. (Press et al., 2022.)

    Raises:

    - `ValueError` if `num_heads` is less than one.
    """

    num_heads: int = eqx.field(static=True)
    scale: float | int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"ALiBi: num_heads={self.num_heads} must be at least 1.")

    def __call__(
        self,
        score: Float[Array, "..."],
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        head: Int[Array, "..."],
    ) -> Float[Array, "..."]:
        """Subtracts the head's slope times the distance."""
        slopes = jnp.asarray(self.scale * np.asarray(alibi_slopes(self.num_heads)), score.dtype)
        return score - slopes[head] * jnp.abs(q_pos - kv_pos).astype(score.dtype)


class RelativeBias(eqx.Module):
    """The learned relative position bias of T5: one number per head and distance bucket.

    Half of the buckets hold exact distances, the rest grow logarithmically up to `max_distance`;
    greater distances share the last bucket. With `bidirectional`, each direction has half of the
    buckets; otherwise keys after the query share bucket 0. (Raffel et al., 2020, section 2.1.)

    Raises:

    - `ValueError` if `num_buckets` or `max_distance` is too small to form the buckets, or
        `num_heads` is less than one.
    """

    table: Float[Array, "buckets heads"]
    max_distance: int = eqx.field(static=True)
    bidirectional: bool = eqx.field(static=True)

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        *,
        bidirectional: bool,
        key: PRNGKeyArray,
    ):
        if num_heads < 1:
            raise ValueError(f"RelativeBias: num_heads={num_heads} must be at least 1.")
        exact = (num_buckets // 2 if bidirectional else num_buckets) // 2
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"RelativeBias: num_buckets={num_buckets} gives {exact} exact distances, which "
                f"must be at least 1 and less than max_distance={max_distance}."
            )
        self.table = jax.random.normal(key, (num_buckets, num_heads)) * 0.02
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def bucket(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Int[Array, "..."]:
        """The bucket of each pair of positions."""
        offset = kv_pos - q_pos
        num_buckets = self.table.shape[0]
        base = jnp.zeros_like(offset)
        if self.bidirectional:
            num_buckets //= 2
            base = jnp.where(offset > 0, num_buckets, 0)
            distance = jnp.abs(offset)
        else:
            distance = jnp.maximum(-offset, 0)
        exact = num_buckets // 2
        # log(0) would not reach the result, but -inf cannot be converted to an integer.
        ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
        ratio /= math.log(self.max_distance / exact)
        far = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
        far = jnp.minimum(far, num_buckets - 1)
        return base + jnp.where(distance < exact, distance, far)

    def __call__(
        self,
        score: Float[Array, "..."],
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        head: Int[Array, "..."],
    ) -> Float[Array, "..."]:
        """Adds the bias of the pair's bucket."""
        return score + self.table[self.bucket(q_pos, kv_pos), head].astype(score.dtype)


def _as_bias(x: Float[Array | np.ndarray, "heads q kv"]) -> Float[Array, "heads q kv"]:
    return jnp.asarray(x)


class DenseBias(eqx.Module):
    """A learned (or computed) bias for every head and pair of positions, indexed by position.

    Pairs outside the array get no bias. It takes `O(q_seq * kv_seq)` memory in every
    implementation; prefer a function of the positions where one exists.
    """

    bias: Float[Array, "heads q_seq kv_seq"] = eqx.field(converter=_as_bias)

    def __call__(
        self,
        score: Float[Array, "..."],
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        head: Int[Array, "..."],
    ) -> Float[Array, "..."]:
        """Adds `bias[head, q_pos, kv_pos]`."""
        _, q_seq, kv_seq = self.bias.shape
        q_index = jnp.where(q_pos < 0, q_seq, q_pos)
        kv_index = jnp.where(kv_pos < 0, kv_seq, kv_pos)
        bias = self.bias.at[head, q_index, kv_index].get(mode="fill", fill_value=0)
        return score + bias.astype(score.dtype)


class Compose(eqx.Module):
    """Applies score mods one after the other, the first one first."""

    mods: tuple[ScoreMod, ...]

    def __init__(self, mods: Sequence[ScoreMod]):
        self.mods = tuple(mods)

    def __call__(
        self,
        score: Float[Array, "..."],
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        head: Int[Array, "..."],
    ) -> Float[Array, "..."]:
        """Returns the score after every mod."""
        for mod in self.mods:
            score = mod(score, q_pos, kv_pos, head)
        return score
