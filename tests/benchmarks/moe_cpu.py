"""A mixture of experts on CPU: time and memory against computing every expert.

    python tests/benchmarks/moe_cpu.py [--seq 1024] [--experts 64] [--rounds 7] [--json FILE]

Forward, and forward and backward, float32, of gated MLPs of which every position chooses two: all
experts for all positions, without a limit (the default), and with a capacity of 1.25 times the
mean; for one sequence, and for as many positions as a batch of eight.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from harness import interleaved, ratios, report

from eqx_transformer.nn import GatedMLP, MixtureOfExperts


def every_expert(layer, x):
    """What one writes first: all experts for all positions, and most weights zero."""
    logits, chosen = jax.lax.top_k(layer.router(x), layer.top_k)
    rows = jnp.arange(x.shape[0])[:, None]
    weights = (
        jnp.zeros((x.shape[0], layer.num_experts)).at[rows, chosen].set(jax.nn.softmax(logits))
    )
    outputs = eqx.filter_vmap(lambda expert: expert(x))(layer.experts)
    return jnp.einsum("esd,se->sd", outputs, weights)


def chosen_experts(layer, x):
    """The layer itself."""
    return layer(x)


def compiled(function, layer, x, weight, backward: bool):
    """A program for a batch, or for its gradient with a random cotangent."""
    arrays, static = eqx.partition(layer, eqx.is_array)

    def forward(arrays, x):
        return jax.vmap(lambda x: function(eqx.combine(arrays, static), x))(x)

    def loss(arrays, x):
        return (forward(arrays, x) * weight).sum()

    program = jax.grad(loss, argnums=(0, 1)) if backward else forward
    return jax.jit(program).lower(arrays, x).compile(), arrays


def compare(args: argparse.Namespace, batch: int, backward: bool) -> dict:
    """Seconds, how many times faster than every expert, and temporary memory."""
    key, x_key, weight_key = jax.random.split(jax.random.key(0), 3)
    shape = (batch, args.seq // batch, args.d_model)
    x, weight = (jax.random.normal(k, shape) for k in (x_key, weight_key))

    def layer(capacity_factor):
        expert = eqx.Partial(GatedMLP, args.d_model, args.d_ff)
        return MixtureOfExperts(
            args.d_model, args.experts, expert, capacity_factor=capacity_factor, key=key
        )

    candidates, memory = {}, {}
    for name, function, capacity_factor in (
        ("every expert", every_expert, None),
        ("no limit", chosen_experts, None),
        ("capacity 1.25", chosen_experts, 1.25),
    ):
        program, arrays = compiled(function, layer(capacity_factor), x, weight, backward)
        candidates[name] = lambda program=program, arrays=arrays: program(arrays, x)
        memory[name] = program.memory_analysis().temp_size_in_bytes / 2**20
    outputs = (jax.tree.leaves(candidates[name]()) for name in ("every expert", "no limit"))
    for x1, x2 in zip(*outputs, strict=True):
        assert jnp.abs(x1 - x2).max() < 1e-4 * jnp.abs(x1).max()
    seconds = interleaved(candidates, args.rounds)
    shares = ratios(seconds, "every expert")
    return {
        name: {
            "seconds": min(seconds[name]),
            "times faster than every expert": 1 / shares[name],
            "temporary MiB": memory[name],
        }
        for name in candidates
    }


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-ff", type=int, default=512)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    result = {"jax": jax.__version__, "arguments": {**vars(args), "json": None}}
    for batch in (1, 8):
        for backward in (False, True):
            name = f"batch of {batch}, forward" + (" and backward" if backward else "")
            result[name] = compare(args, batch, backward)
    report(result, args.json)


if __name__ == "__main__":
    main()
