"""Training steps through solvers on CPU: time to compile and to run, against a block by hand.

    python tests/benchmarks/composition_cpu.py [--seq 16] [--rounds 7] [--json FILE]

The steps are those of `examples/continuous_depth.py` (diffrax, three steps of Tsit5, checkpoints)
and of `examples/deep_equilibrium.py` (optimistix, a fixed point and its implicit gradient), on a
batch of sequences in float32. Ours is `encoder_block`; by hand, norms, attention and MLP are
written in `jax.numpy` for this one case, on the same weights. Both are compared in what they
compute. Compilation includes tracing, and begins with empty caches.
"""

import argparse
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
from harness import interleaved, ratios, report

from eqx_transformer.stacks import encoder_block

RATE = 1e-3


def ours(block, x):
    """The block of the library."""
    return block(x)


def by_hand(block, x):
    """The same, for `encoder_block` with its defaults, and with norms after the branches."""

    def norm(layer, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return centred * scale * layer.weight + layer.bias

    def linear(layer, x):
        return x @ layer.weight + layer.bias

    def attend(layer, x):
        def heads(projection):
            return linear(projection, x).reshape(x.shape[0], -1, layer.head_dim)

        q, k, v = heads(layer.q_proj), heads(layer.k_proj), heads(layer.v_proj)
        scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        out = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), v)
        return linear(layer.o_proj, out.reshape(x.shape))

    def mlp(layer, x):
        return linear(layer.down_proj, jax.nn.gelu(linear(layer.up_proj, x)))

    first, second = block.attention_residual, block.mlp_residual
    if first.norm is not None:
        x = x + attend(block.attention, norm(first.norm, x))
        return x + mlp(block.mlp, norm(second.norm, x))
    x = norm(first.output_norm, x + attend(block.attention, x))
    return norm(second.output_norm, x + mlp(block.mlp, x))


def continuous_depth(apply, block, x):
    """Where the block's branches carry a batch, in three steps of Tsit5."""

    def of_one(x):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, z, block: apply(block, z) - z),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=1 / 3,
            y0=x,
            args=block,
            adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=4),
            max_steps=3,
        ).ys[-1]

    return jax.vmap(of_one)(x)


def deep_equilibrium(apply, block, x):
    """The fixed point `z = block(z / 4 + x)` of a batch, whose block ends with a norm."""

    def function(z, inputs):
        block, x = inputs
        return jax.vmap(lambda z: apply(block, z))(z / 4 + x)

    return optimistix.fixed_point(
        function,
        optimistix.FixedPointIteration(rtol=1e-3, atol=1e-3, norm=optimistix.rms_norm),
        jnp.zeros_like(x),
        args=(block, x),
        max_steps=40,
        adjoint=optimistix.ImplicitAdjoint(lineax.GMRES(1e-3, 1e-6, restart=8, max_steps=32)),
        throw=False,
    ).value


PROGRAMS = {
    "continuous depth": (continuous_depth, "pre"),
    "deep equilibrium": (deep_equilibrium, "post"),
}


def step_of(program, apply):
    """A step of training: the gradient by all weights, and gradient descent."""

    def step(block, x, weight):
        def loss(block):
            return jnp.mean(weight * program(apply, block, x))

        value, gradient = eqx.filter_value_and_grad(loss)(block)
        return value, eqx.apply_updates(block, jax.tree.map(lambda g: -RATE * g, gradient))

    return step


def compare(program, layout, args):
    """Seconds to compile and to run, ours and by hand, and what ours is as a share."""
    keys = jax.random.split(jax.random.key(0), 3)
    block = encoder_block(
        args.d_model, args.num_heads, 2 * args.d_model, layout=layout, key=keys[0]
    )
    x, weight = jax.random.normal(keys[1], (2, args.batch, args.seq, args.d_model))
    inputs = block, x, weight

    def compiled(apply):
        jax.clear_caches()
        return eqx.filter_jit(step_of(program, apply)).lower(*inputs).compile()

    def compile_only(apply):
        def run():
            compiled(apply)

        return run

    kinds = {"ours": ours, "by hand": by_hand}
    compile_seconds = interleaved(
        {name: compile_only(apply) for name, apply in kinds.items()}, args.rounds
    )
    steps = {name: compiled(apply) for name, apply in kinds.items()}
    results = {
        name: jax.tree.leaves(eqx.filter(s(*inputs), eqx.is_array)) for name, s in steps.items()
    }
    for got, expected in zip(results["ours"], results["by hand"], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)

    def several(step):
        for _ in range(args.steps):
            value, _ = step(*inputs)
        return value

    run_seconds = interleaved(
        {name: lambda step=step: several(step) for name, step in steps.items()}, args.rounds
    )
    return {
        what: {
            "seconds": {name: min(values) for name, values in seconds.items()},
            "share of by hand": ratios(seconds, "by hand")["ours"],
        }
        for what, seconds in (("compile", compile_seconds), ("run", run_seconds))
    }


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--d-model", type=int, default=32)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    result = {"jax": jax.__version__, "arguments": {**vars(args), "json": None}}
    for name, (program, layout) in PROGRAMS.items():
        result[name] = compare(program, layout, args)
    report(result, args.json)


if __name__ == "__main__":
    main()
