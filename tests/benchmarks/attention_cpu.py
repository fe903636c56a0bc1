"""Attention on CPU: time and memory against what one would otherwise write.

    python tests/benchmarks/attention_cpu.py [--seq 4096] [--rounds 7] [--json FILE]

Forward and backward of causal attention, float32: einsum and softmax written by hand,
`jax.nn.dot_product_attention`, and ours; besides a sliding window of 256, ours and written by hand
for that alone, and temporary memory over the length of the sequence from the compiled programs,
for every order of derivative.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from harness import interleaved, ratios, report

from eqx_transformer.attention import Causal, SlidingWindow, dot_product_attention


def einsum_softmax(q, k, v):
    """What people write: all scores at once, an additive mask, a softmax."""
    scores = jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    allowed = jnp.tril(jnp.ones(scores.shape[1:], bool))
    weights = jax.nn.softmax(jnp.where(allowed[None], scores, -1e30), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v)


def jax_nn(q, k, v):
    """JAX's own function, which is this one on CPU."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def ours(q, k, v):
    """Causal attention by this library's default choice."""
    return dot_product_attention(q, k, v, mask=Causal())


def window(q, k, v):
    """The same with a sliding window of 256 keys."""
    return dot_product_attention(q, k, v, mask=SlidingWindow(left=255, right=0))


def local(q, k, v, rows=256):
    """What one would write for a window of 256 keys and for nothing else: two blocks a row."""
    seq, heads, head_dim = q.shape
    count = seq // rows

    def split(x):
        return x.reshape(count, rows, heads, head_dim).transpose(0, 2, 1, 3)

    def with_previous(x):
        x = jnp.pad(split(x), ((1, 0), (0, 0), (0, 0), (0, 0)))
        return jnp.concatenate([x[:-1], x[1:]], axis=2)

    row, column = jnp.arange(rows)[:, None] + rows, jnp.arange(2 * rows)[None]
    allowed = (column <= row) & (column > row - 256)

    @jax.checkpoint
    def band(args):
        q, k, v, i = args
        scores = jnp.einsum("hqd,hkd->hqk", q, k) * head_dim**-0.5
        scores = jnp.where((allowed & (column >= rows * (i == 0)))[None], scores, -1e30)
        return jnp.einsum("hqk,hkd->hqd", jax.nn.softmax(scores, axis=-1), v)

    out = jax.lax.map(band, (split(q), with_previous(k), with_previous(v), jnp.arange(count)))
    return out.transpose(0, 2, 1, 3).reshape(seq, heads, head_dim)


def gradient(attention, weight):
    """A gradient with a random cotangent."""
    return jax.grad(lambda q, k, v: (attention(q, k, v) * weight).sum(), argnums=(0, 1, 2))


def temporaries(function, *args) -> float:
    """MiB of temporary memory of the compiled program; nothing is run."""
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def times(seq: int, heads: int, head_dim: int, rounds: int) -> dict:
    """Time of one forward and backward pass, as a share of the hand-written one's."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (seq, heads, head_dim)) for key in keys)
    candidates = {}
    for name, attention in {
        "einsum-softmax": einsum_softmax,
        "jax.nn": jax_nn,
        "causal": ours,
        "window 256": window,
        "window 256 by hand": local,
    }.items():
        compiled = jax.jit(gradient(attention, weight)).lower(q, k, v).compile()
        candidates[name] = lambda compiled=compiled: compiled(q, k, v)
    seconds = interleaved(candidates, rounds)
    return {
        "seconds": {name: min(values) for name, values in seconds.items()},
        "of einsum-softmax": ratios(seconds, "einsum-softmax"),
        "of jax.nn": ratios(seconds, "jax.nn"),
        "of causal": ratios(seconds, "causal"),
    }


def memory(heads: int, head_dim: int) -> dict:
    """Temporary memory in MiB by length, from compilation alone."""
    table = {}
    for seq in (4096, 8192, 16384):
        shape = jax.ShapeDtypeStruct((seq, heads, head_dim), jnp.float32)
        args = (shape,) * 3

        def loss(q, k, v):
            return jnp.sin(ours(q, k, v)).sum()

        def jvp(*x):
            return jax.jvp(loss, x, x)

        def hvp(*x):
            return jax.jvp(jax.grad(loss, argnums=(0, 1, 2)), x, x)

        def reverse_over_forward(*x):
            return jax.grad(lambda *y: jax.jvp(loss, y, x)[1], argnums=(0, 1, 2))(*x)

        table[seq] = {
            "forward": temporaries(ours, *args),
            "gradient": temporaries(jax.grad(loss, argnums=(0, 1, 2)), *args),
            "jvp": temporaries(jvp, *args),
            "hvp": temporaries(hvp, *args),
            "gradient of jvp": temporaries(reverse_over_forward, *args),
            "one array of q": seq * heads * head_dim * 4 / 2**20,
        }
    shape = jax.ShapeDtypeStruct((4096, heads, head_dim), jnp.float32)
    dense = temporaries(
        jax.grad(lambda *x: jnp.sin(einsum_softmax(*x)).sum(), argnums=(0, 1, 2)), *(shape,) * 3
    )
    # Scores grow with the square of the length.
    table["einsum-softmax gradient"] = {"4096": dense, "16384, extrapolated": dense * 16}
    return table


def main() -> None:
    """Prints both tables as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    result = {
        "jax": jax.__version__,
        "shape": {"seq": args.seq, "heads": args.heads, "head_dim": args.head_dim},
        "memory MiB": memory(args.heads, args.head_dim),
        "forward and backward": times(args.seq, args.heads, args.head_dim, args.rounds),
    }
    report(result, args.json)


if __name__ == "__main__":
    main()
