"""Attention between groups of tokens on CPU: calls by shape against one call with a mask.

    python tests/benchmarks/mixed_attention_cpu.py [--size 2048] [--rounds 5] [--json FILE]

Forward and backward, float32, of a `MixedAttention` whose groups each attend to themselves: all
scores at once with a boolean matrix, as one would write it; the `TokenGroups` mask tile by tile;
and a call for every shape. Besides, temporary memory over the number of queries for fixed anchors,
from the compiled programs; and from which number of scores on (`q_seq * kv_seq`) several calls are
faster than one with a mask.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from harness import interleaved, ratios, report

from eqx_transformer.nn import (
    AnchorBranch,
    MixedAttention,
    TokenSpec,
    cross_patterns,
    self_patterns,
)


def dense(q, k, v, *, mask, q_positions=None, **options):
    """What people write: all scores at once, a boolean matrix, a softmax."""
    rows = jnp.arange(q.shape[0]) if q_positions is None else q_positions
    allowed = mask(rows[:, None], jnp.arange(k.shape[0])[None])
    scores = jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(allowed[None], scores, -1e30), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v)


def gradient(layer, tokens, x, coefficient):
    """A compiled program for the gradient by parameters and tokens; `x` may have a batch axis."""
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def loss(params, x):
        model = eqx.combine(params, static)
        out = jax.vmap(lambda x: model(x, tokens=tokens))(x)
        return (out * coefficient).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    return compiled, params


def compare(layers, tokens, args, rounds, baseline, batch=1):
    """Seconds, how many times faster than the first, and temporary memory."""
    seq = sum(spec.size for spec in tokens)
    x, coefficient = jax.random.normal(jax.random.key(1), (2, batch, seq, args.d_model))
    candidates, memory = {}, {}
    for name, layer in layers.items():
        compiled, params = gradient(layer, tokens, x, coefficient)
        candidates[name] = lambda compiled=compiled, params=params: compiled(params, x)
        memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    outputs = [jax.tree.leaves(run()) for run in candidates.values()]
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            assert jnp.abs(a - b).max() < 1e-4 * jnp.abs(a).max() + 1e-6
    seconds = interleaved(candidates, rounds)
    shares = ratios(seconds, baseline)
    return {
        name: {
            "seconds": min(seconds[name]),
            f"times faster than {baseline}": 1 / shares[name],
            "temporary MiB": memory[name],
        }
        for name in candidates
    }


def make(args, patterns, **options):
    """A layer with the same weights every time."""
    return MixedAttention(args.d_model, args.heads, patterns, key=jax.random.key(0), **options)


def large(args):
    """Many tokens, in groups that attend to themselves."""
    tokens = tuple(TokenSpec(str(i), args.size) for i in range(args.groups))
    patterns = self_patterns([AnchorBranch(spec.name) for spec in tokens])
    layers = {
        "dense": make(args, patterns, as_mask=True, attention_fn=dense),
        "mask": make(args, patterns, as_mask=True),
        "calls": make(args, patterns, as_mask=False),
    }
    return compare(layers, tokens, args, args.rounds, "dense")


def memory(args):
    """Temporary MiB by the number of queries, for 256 anchors in each of two branches."""
    branches = [AnchorBranch(name, (name + " queries",)) for name in ("surface", "volume")]
    table = {}
    for queries in (4096, 8192, 16384, 32768):
        tokens = tuple(
            TokenSpec(name, size)
            for branch in branches
            for name, size in ((branch.anchors, 256), (branch.queries[0], queries // 2))
        )
        x = jax.ShapeDtypeStruct((1, 512 + queries, args.d_model), jnp.float32)
        compiled, _ = gradient(make(args, cross_patterns(branches)), tokens, x, 1.0)
        table[queries] = {
            "temporary": compiled.memory_analysis().temp_size_in_bytes / 2**20,
            "one array of tokens": x.size * 4 / 2**20,
        }
    return table


def small(args):
    """One call with a mask against several, by the number of scores and the shapes of groups."""
    table = {}
    for shapes, parts in (("4 equal", (1, 1, 1, 1)), ("4 different", (2, 3, 4, 7))):
        for seq in (64, 128, 256):
            tokens = tuple(
                TokenSpec(str(i), seq * part // sum(parts)) for i, part in enumerate(parts)
            )
            patterns = self_patterns([AnchorBranch(spec.name) for spec in tokens])
            layers = {
                "mask": make(args, patterns, as_mask=True),
                "calls": make(args, patterns, as_mask=False),
            }
            result = compare(layers, tokens, args, args.small_rounds, "mask", args.batch)
            table[f"{shapes}, {seq**2} scores"] = result["calls"]["times faster than mask"]
    return table


def main() -> None:
    """Prints the tables as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="where there are few scores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small-rounds", type=int, default=31)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    result = {
        "jax": jax.__version__,
        "arguments": {**vars(args), "json": None},
        "groups of one size": large(args),
        "temporary memory by queries": memory(args),
        "times that calls are faster than a mask": small(args),
    }
    report(result, args.json)


if __name__ == "__main__":
    main()
