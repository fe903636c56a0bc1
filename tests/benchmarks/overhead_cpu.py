"""What the library itself costs: importing it, and calling it from Python.

    python tests/benchmarks/overhead_cpu.py [--rounds 9] [--json FILE]

Seconds of `import eqx_transformer` after `import equinox`, each in a new process, with bytecode
there as `pip install` leaves it. And a step of training of a tiny model, where Python is all there
is to time: `equinox.filter_jit` over the model, `jax.jit` over the model's arrays as a PyTree and
over a flat list of arrays; and one forward pass without any `jit`, next to
`equinox.nn.MultiheadAttention` alone.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from harness import foreign_load, interleaved, ratios, report

from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.nn import Attention

IMPORTS = """
import time
start = time.perf_counter()
import equinox
middle = time.perf_counter()
import eqx_transformer
print(middle - start, time.perf_counter() - middle)
"""


def import_seconds(rounds: int) -> tuple[float, float]:
    """Of Equinox with JAX, and what this library adds: medians over new processes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        found = []
        for _ in range(rounds + 1):
            out = subprocess.run(
                [sys.executable, "-c", IMPORTS],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            found.append([float(x) for x in out.stdout.split()])
    before, added = zip(*found[1:], strict=True)  # the first one writes the bytecode
    return statistics.median(before), statistics.median(added)


def steps() -> dict[str, Any]:
    """One step of plain gradient descent, called in three ways."""
    config = LlamaConfig(vocab_size=32, d_model=16, num_layers=4, num_heads=2, d_ff=32, max_len=8)
    model = Llama(config, key=jax.random.key(0))
    tokens = jnp.arange(8)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(params)

    def loss_of(model: Any, tokens: Any) -> Any:
        return jnp.mean(model(tokens) ** 2)

    @eqx.filter_jit
    def of_model(model: Any, tokens: Any) -> Any:
        gradient = eqx.filter_grad(loss_of)(model, tokens)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -1e-3 * g, gradient))

    @jax.jit
    def of_tree(params: Any, tokens: Any) -> Any:
        gradient = jax.grad(lambda p: loss_of(eqx.combine(p, static), tokens))(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)

    @jax.jit
    def of_leaves(leaves: list[Any], tokens: Any) -> list[Any]:
        return jax.tree.leaves(of_tree(jax.tree.unflatten(treedef, leaves), tokens))

    def many(step: Any, state: Any) -> Any:
        for _ in range(200):
            state = step(state, tokens)
        return state

    return {
        "jax.jit, a list of arrays": lambda: many(of_leaves, leaves),
        "jax.jit, a PyTree of arrays": lambda: many(of_tree, params),
        "equinox.filter_jit, the model": lambda: many(of_model, model),
    }


def eager() -> dict[str, Any]:
    """Attention of 16 positions without `jit`."""
    key = jax.random.key(0)
    ours = Attention(d_model=64, num_heads=4, key=key)
    theirs = eqx.nn.MultiheadAttention(num_heads=4, query_size=64, key=key)
    x = jax.random.normal(key, (16, 64))
    return {"equinox.nn.MultiheadAttention": lambda: theirs(x, x, x), "ours": lambda: ours(x)}


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    load = round(foreign_load(), 2)
    before, added = import_seconds(args.rounds)
    called = interleaved(steps(), args.rounds)
    uncompiled = interleaved(eager(), args.rounds)
    result = {
        "jax": jax.__version__,
        "load by others before": load,
        "seconds to import": {"equinox": round(before, 3), "and then ours": round(added, 3)},
        "milliseconds a step": {
            name: round(1e3 * statistics.median(x) / 200, 3) for name, x in called.items()
        },
        "over jax.jit with a list": ratios(called, "jax.jit, a list of arrays"),
        "milliseconds without jit": {
            name: round(1e3 * statistics.median(x), 2) for name, x in uncompiled.items()
        },
    }
    report(result, args.json)


if __name__ == "__main__":
    main()
