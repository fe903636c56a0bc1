"""Attention problems for the kernels: small, with several tiles each way."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqx_transformer.attention as attn
from eqx_transformer.attention._inputs import make_inputs


class Scaled(eqx.Module):
    """A module of a user, with a parameter, a lookup in two steps, and a switch."""

    temperature: Any
    slopes: Any
    by_distance: Any

    def __call__(self, score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        distance = jnp.clip(jnp.abs(q_pos - kv_pos), 0, self.by_distance.shape[0] - 1)
        bias = jnp.take(self.by_distance, distance)
        far = jnp.where(kv_pos > q_pos, bias, -bias)
        score = jnp.exp(self.temperature) * score + jnp.tanh(self.slopes)[head] * far
        return score + jax.nn.softplus(score)


class Rows(eqx.Module):
    """Products of features of the two positions."""

    features: Any

    def __call__(self, score: Any, q_pos: Any, kv_pos: Any, head: Any) -> Any:
        del head
        n = self.features.shape[0]
        return score + (self.features[q_pos % n] * self.features[kv_pos % n]).sum(-1)


def closure(score_weight: Any) -> Callable[..., Any]:
    return lambda score, q_pos, kv_pos, head: (
        score * score_weight[head] + jnp.sin((q_pos - kv_pos).astype(score.dtype))
    )


_RNG = np.random.default_rng(0)


def _normal(*shape: int) -> Any:
    return jnp.asarray(_RNG.normal(size=shape), jnp.float32)


SCALED = Scaled(jnp.float32(0.1), _normal(4), _normal(9))
RELATIVE = attn.RelativeBias(4, 8, 20, bidirectional=True, key=jr.key(1))
RELATIVE = eqx.tree_at(lambda x: x.table, RELATIVE, _normal(8, 4))
DENSE_BIAS = attn.DenseBias(_normal(4, 30, 44))
HOLES = np.array(_RNG.random((41, 53)) < 0.4)
HOLES[3], HOLES[:, 5] = False, False


@dataclass(frozen=True, eq=False)
class Problem:
    name: str
    q_seq: int = 41
    kv_seq: int = 53
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_dim: int = 16
    mask: Any = None
    mod: Any = None
    sinks: bool = False
    dtype: Any = jnp.float32
    options: dict[str, Any] = field(default_factory=dict)
    slow: bool = False
    """Whether others cover most of it."""

    def __str__(self) -> str:
        return self.name

    def args(self, seed: int = 0) -> dict[str, Any]:
        """Everything that is differentiated."""
        rng = np.random.default_rng([seed, *self.name.encode()])

        def draw(*shape: int) -> Any:
            return jnp.asarray(rng.normal(size=shape), jnp.float32).astype(self.dtype)

        args = {
            "q": draw(self.q_seq, self.heads, self.head_dim),
            "k": draw(self.kv_seq, self.kv_heads, self.head_dim),
            "v": draw(self.kv_seq, self.kv_heads, self.v_dim),
            "mod": eqx.filter(self.mod, eqx.is_inexact_array),
        }
        if self.sinks:
            args["sinks"] = draw(self.heads).astype(jnp.float32)
        return args

    def run(self, passes: Callable[..., Any], args: dict[str, Any]) -> Any:
        """Output and log-sum-exp."""
        rest = {name: x for name, x in args.items() if name != "mod"}
        mod = eqx.combine(args["mod"], eqx.filter(self.mod, eqx.is_inexact_array, inverse=True))
        return passes(make_inputs(**rest, score_mod=mod, mask=self.mask, **self.options))


def marked(problems: list[Problem]) -> list[Any]:
    """Parameters of a test."""
    return [pytest.param(x, marks=[pytest.mark.slow] * x.slow, id=x.name) for x in problems]


def like(tree: Any, seed: int) -> Any:
    """Normal numbers in the shape of a PyTree."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(rng.normal(size=x.shape)).astype(x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, drawn)


def device(platform: str) -> dict[str, Any]:
    """For a mesh of devices that this machine does not have."""
    if platform != "cuda" or jax.__version_info__ < (0, 11):
        return {}
    kind = {"device_kind": "NVIDIA H200", "num_cores": 132, "platform": "gpu"}
    return {"abstract_device": jax.sharding.AbstractDevice(**kind)}


def gpu() -> Any:
    """In which programs can be lowered for a GPU on a machine without one."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), **device("cuda")))


CAUSAL = attn.Causal()
IDS = jnp.asarray(np.concatenate([np.arange(46) // 13, np.full(7, -1)]))

PROBLEMS = [
    Problem("plain"),
    Problem(
        "padding", mask=attn.Padding(jnp.arange(53) % 30 < 20), mod=attn.SoftCap(2.0), slow=True
    ),
    Problem("one_head", heads=1, kv_heads=1, head_dim=8, v_dim=1, slow=True),
    Problem("causal_mqa", kv_heads=1, mask=CAUSAL, head_dim=48, v_dim=24),
    Problem("segments", 53, 53, mask=CAUSAL & attn.Segments(IDS), slow=True),
    Problem("dense", mask=attn.Dense(HOLES), mod=DENSE_BIAS),
    Problem(
        "groups", mask=attn.TokenGroups((13, 2, 38), ((1, 0, 1), (1, 1, 0), (0, 0, 0))), slow=True
    ),
    Problem("expression", mask=~attn.Strided(3) & (attn.Prefix(jnp.int32(20)) | CAUSAL), slow=True),
    Problem("relative", mod=RELATIVE),
    Problem("user_module", mod=SCALED, sinks=True),
    Problem("closure", mod=closure(_normal(4)), mask=CAUSAL, slow=True),
    Problem(
        "compose", mod=attn.Compose((Rows(_normal(7, 3)), attn.SoftCap(3.0), RELATIVE)), slow=True
    ),
    Problem("dropout", options={"dropout_rate": 0.3, "dropout_key": jr.key(5)}, slow=True),
    Problem(
        "everything",
        40,
        50,
        head_dim=20,
        v_dim=33,
        mask=CAUSAL & attn.Segments(IDS) & attn.SlidingWindow(20, None),
        mod=attn.Compose((SCALED, attn.SoftCap(4.0))),
        sinks=True,
        options={
            "dropout_rate": 0.2,
            "dropout_key": jr.key(6),
            "scale": -0.4,
            "q_positions": jnp.asarray(_RNG.permutation(53)[:40], jnp.int32),
            "kv_positions": jnp.asarray(_RNG.permutation(53)[:50], jnp.int32),
        },
    ),
    Problem("one_query", 1, 9, mask=CAUSAL, options={"q_positions": jnp.asarray([30])}),
    Problem("no_keys", 5, 0, sinks=True),
    Problem("nothing", mask=attn.Padding(jnp.zeros(53, bool)), mod=RELATIVE),
    Problem("bfloat16", mask=CAUSAL, mod=attn.ALiBi(4), dtype=jnp.bfloat16, slow=True),
    Problem("float16", mask=attn.SlidingWindow(9, 9), sinks=True, dtype=jnp.float16),
]
NAMED = {problem.name: problem for problem in PROBLEMS}


def documents_gradient(passes: Any) -> Callable[..., Any]:
    """The gradient by queries and keys of packed documents, for tests that batch it."""

    def gradient(q: Any, k: Any, ids: Any) -> Any:
        def loss(q: Any, k: Any) -> Any:
            mask = CAUSAL & attn.Segments(ids)
            return passes(make_inputs(q, k, k, mask=mask, score_mod=attn.ALiBi(2)))[0].sum()

        return jax.grad(loss, argnums=(0, 1))(q, k)

    return gradient
