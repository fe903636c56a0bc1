"""The chunked cross-entropy on CPU: time and temporary memory against all logits at once.

    python tests/benchmarks/cross_entropy_cpu.py [--tokens 4096] [--vocab 32768] [--json FILE]

Value and gradient by the vectors and the head's weight, float32; shares are medians of interleaved
rounds.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from harness import interleaved, ratios, report

from eqx_transformer.nn import Linear
from eqx_transformer.training import cross_entropy_from_hidden


def dense(head, hidden, targets):
    """As it is usually written."""
    scores = jax.nn.log_softmax(head(hidden))
    return -jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--chunks", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    keys = jr.split(jr.key(0), 3)
    head = Linear(args.d_model, args.vocab, key=keys[0])
    hidden = jr.normal(keys[1], (args.tokens, args.d_model))
    targets = jr.randint(keys[2], (args.tokens,), 0, args.vocab)

    losses = {"dense": dense}
    for size in args.chunks:
        losses[f"chunks of {size}"] = eqx.Partial(cross_entropy_from_hidden, chunk_size=size)
    run, result = {}, {"jax": jax.__version__, "arguments": {**vars(args), "json": None}}
    for name, loss in losses.items():
        step = jax.value_and_grad(lambda *x, loss=loss: loss(*x).mean(), argnums=(0, 1))
        compiled = jax.jit(step).lower(head, hidden, targets).compile()
        run[name] = lambda compiled=compiled: compiled(head, hidden, targets)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        result[name] = {"temporary MiB": round(temporary / 2**20)}
    seconds = interleaved(run, args.rounds)
    shares = ratios(seconds, "dense")
    for name, values in seconds.items():
        result[name] |= {"seconds": min(values), "share of dense": shares[name]}
    report(result, args.json)


if __name__ == "__main__":
    main()
