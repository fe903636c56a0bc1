"""Masks and score mods, each with its definition in NumPy, written from the definition."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqx_transformer.attention as attn

# --- Masks, each with its definition in NumPy ----------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask and, independently, which pairs `(i, j)` of positions it allows."""

    build: Callable[[], attn.AbstractMask | None]
    allows: Callable[[Any, Any], Any]

    def __and__(self, other: "Mask") -> "Mask":
        return Mask(
            lambda: self.build() & other.build(),
            lambda i, j: self.allows(i, j) & other.allows(i, j),
        )

    def __or__(self, other: "Mask") -> "Mask":
        return Mask(
            lambda: self.build() | other.build(),
            lambda i, j: self.allows(i, j) | other.allows(i, j),
        )

    def __invert__(self) -> "Mask":
        return Mask(lambda: ~self.build(), lambda i, j: ~self.allows(i, j))


def _at(values: Any, index: Any, outside: Any) -> Any:
    values, index = np.asarray(values), np.asarray(index)
    inside = (index >= 0) & (index < len(values))
    if len(values) == 0:
        return np.full(index.shape, outside)
    return np.where(inside, values[np.where(inside, index, 0)], outside)


NO_MASK = Mask(lambda: None, lambda i, j: np.broadcast_to(True, np.broadcast(i, j).shape))
CAUSAL = Mask(attn.Causal, lambda i, j: j <= i)


def window(left: int | None, right: int | None) -> Mask:
    return Mask(
        lambda: attn.SlidingWindow(left, right),
        lambda i, j: (
            ((left is None) | (i - j <= (left or 0))) & ((right is None) | (j - i <= (right or 0)))
        ),
    )


def prefix(length: int, traced: bool = False) -> Mask:
    return Mask(
        lambda: attn.Prefix(jnp.int32(length) if traced else length),
        lambda i, j: (j < length) & (i == i),
    )


def padding(valid: Any) -> Mask:
    return Mask(
        lambda: attn.Padding(jnp.asarray(valid, bool)),
        lambda i, j: _at(np.asarray(valid, bool), j, False) & (i == i),
    )


def segments(q_ids: Any, kv_ids: Any = None) -> Mask:
    def build() -> attn.AbstractMask:
        kv = None if kv_ids is None else jnp.asarray(kv_ids, jnp.int32)
        return attn.Segments(jnp.asarray(q_ids, jnp.int32), kv)

    def allows(i: Any, j: Any) -> Any:
        a, b = _at(q_ids, i, -1), _at(q_ids if kv_ids is None else kv_ids, j, -1)
        return (a == b) & (a >= 0)

    return Mask(build, allows)


def groups(sizes: Any, attends: Any) -> Mask:
    names = np.repeat(np.arange(len(sizes)), sizes)

    def allows(i: Any, j: Any) -> Any:
        table = np.zeros((len(sizes) + 1,) * 2, bool)
        table[:-1, :-1] = np.asarray(attends, bool).reshape(len(sizes), len(sizes))
        return table[_at(names, i, -1), _at(names, j, -1)]

    return Mask(lambda: attn.TokenGroups(sizes, attends), allows)


def strided(stride: int) -> Mask:
    return Mask(lambda: attn.Strided(stride), lambda i, j: (i - j) % stride == 0)


def dense(allowed: Any) -> Mask:
    allowed = np.asarray(allowed, bool)

    def allows(i: Any, j: Any) -> Any:
        i, j = np.broadcast_arrays(i, j)
        inside = (i >= 0) & (i < allowed.shape[0]) & (j >= 0) & (j < allowed.shape[1])
        return inside & allowed[np.where(inside, i, 0), np.where(inside, j, 0)]

    return Mask(lambda: attn.Dense(jnp.asarray(allowed)), allows)


def predicate(closure: bool) -> Mask:
    def build() -> attn.AbstractMask:
        if closure:
            shift = jnp.int32(3)
            return attn.Predicate(lambda i, j: (i + j) % 4 != shift)
        return attn.Predicate(_plain_predicate)

    return Mask(build, lambda i, j: (i + j) % 4 != 3)


def _plain_predicate(i: Any, j: Any) -> Any:
    return (i + j) % 4 != 3


# --- Score mods, each with its definition in NumPy -----------------------------------------------


@dataclass(frozen=True, eq=False)
class Mod:
    """A score mod made from parameters, and what it does to the scores of one query and head."""

    params: dict[str, tuple[int, ...]] = field(default_factory=dict)
    build: Callable[[Any], Any] = lambda params: None
    numpy: Callable[[Any, Any, Any, Any, int], Any] = lambda params, s, i, j, h: s


NO_MOD = Mod()


class Affine(eqx.Module):
    """A user's own score mod: one slope and one offset a head."""

    slope: Any
    offset: Any

    def __call__(self, score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        distance = (q_pos - kv_pos).astype(score.dtype)
        slope = self.slope[head].astype(score.dtype)
        return score * slope + jnp.sin(distance) * self.offset[head].astype(score.dtype)


def _affine_numpy(p: Any, s: Any, i: Any, j: Any, h: int) -> Any:
    return s * p["slope"][h] + np.sin(i - j) * p["offset"][h]


AFFINE = Mod(
    {"slope": (4,), "offset": (4,)}, lambda p: Affine(p["slope"], p["offset"]), _affine_numpy
)


def _plain_mod(s: Any, i: Any, j: Any, h: Any) -> Any:
    return s * 0.5 + jnp.where(h == 1, 0.25, -0.25).astype(s.dtype) * (j % 3).astype(s.dtype)


def _plain_numpy(p: Any, s: Any, i: Any, j: Any, h: int) -> Any:
    return s * 0.5 + (0.25 if h == 1 else -0.25) * (j % 3)


PLAIN = Mod({}, lambda p: _plain_mod, _plain_numpy)


def _closing_over(p: Any) -> Any:
    return lambda s, i, j, h: s + p["a"].astype(s.dtype) * s * s + p["b"][h].astype(s.dtype)


CLOSURE = Mod(
    {"a": (), "b": (4,)}, _closing_over, lambda p, s, i, j, h: s + p["a"] * s * s + p["b"][h]
)
SOFT_CAP = Mod({}, lambda p: attn.SoftCap(2.0), lambda p, s, i, j, h: 2 * np.tanh(s / 2))
ALIBI = Mod(
    {}, lambda p: attn.ALiBi(4), lambda p, s, i, j, h: s - np.abs(i - j) * 2.0 ** (-2 * (h + 1))
)


def t5_bucket(offset: int, buckets: int, max_distance: int, bidirectional: bool) -> int:
    """The bucket of `key position - query position`, from the words of Raffel et al., 2.1."""
    base = 0
    if bidirectional:
        buckets //= 2
        base = buckets if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = buckets // 2
    if distance < exact:
        return base + distance
    # Bucket `exact + n` starts at `exact * ratio ** n`, and `ratio` makes the one after the last
    # start at `max_distance`.
    ratio = (max_distance / exact) ** (1 / (buckets - exact))
    starts = [exact * ratio**n for n in range(buckets - exact)]
    return base + exact + sum(distance >= start * (1 - 1e-9) for start in starts[1:])


def relative(bidirectional: bool) -> Mod:
    def build(p: Any) -> Any:
        key = jax.random.key(0)
        mod = attn.RelativeBias(4, 8, 20, bidirectional=bidirectional, key=key)
        return eqx.tree_at(lambda m: m.table, mod, p["table"])

    def numpy(p: Any, s: Any, i: Any, j: Any, h: int) -> Any:
        return s + np.array([p["table"][t5_bucket(x - i, 8, 20, bidirectional), h] for x in j])

    return Mod({"table": (8, 4)}, build, numpy)


def _dense_bias_numpy(p: Any, s: Any, i: Any, j: Any, h: int) -> Any:
    bias = p["bias"][h]
    if not 0 <= i < bias.shape[0]:
        return s
    return s + _at(bias[i], j, 0.0)


def dense_bias(q_seq: int, kv_seq: int) -> Mod:
    shape = (4, q_seq, kv_seq)
    return Mod({"bias": shape}, lambda p: attn.DenseBias(p["bias"]), _dense_bias_numpy)


def compose(*mods: Mod) -> Mod:
    params = {f"{n}{key}": x for n, mod in enumerate(mods) for key, x in mod.params.items()}

    def own(p: Any, n: int) -> Any:
        return {key: p[f"{n}{key}"] for key in mods[n].params}

    def numpy(p: Any, s: Any, i: Any, j: Any, h: int) -> Any:
        for n, mod in enumerate(mods):
            s = mod.numpy(own(p, n), s, i, j, h)
        return s

    return Mod(
        params, lambda p: attn.Compose([m.build(own(p, n)) for n, m in enumerate(mods)]), numpy
    )
