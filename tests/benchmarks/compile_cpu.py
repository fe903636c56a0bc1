"""Seconds to trace and compile a step of training, and its memory, by the number of layers.

    python tests/benchmarks/compile_cpu.py [--layers 2 8 32] [--batch 4] [--seq 256] [--json FILE]

The models are those of `training_cpu.py`. Each is compiled once after a small program has warmed up
the compiler; attnax and penzai take part if they are installed.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from harness import foreign_load, report
from training_cpu import VOCAB, ByHand, JaxRun, call, installed, make_config, of_attnax, of_penzai

from eqx_transformer.models import Llama


def make(name: str, layers: int, tokens: jax.Array) -> JaxRun:
    """What is to be compiled."""
    seq = tokens.shape[1]
    if name == "attnax":
        return JaxRun(*of_attnax(layers, seq), tokens)
    if name == "penzai":
        return JaxRun(*of_penzai(layers, seq), tokens)
    if name == "by hand":
        return JaxRun(call, ByHand(layers, jax.random.key(0)), tokens)
    remat = "dots" if name.endswith("'dots'") else "none"
    config = make_config(layers, seq).replace(remat=remat)
    return JaxRun(call, Llama(config, key=jax.random.key(0)), tokens)


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    tokens = jnp.zeros((args.batch, args.seq + 1), jnp.int32) % VOCAB
    names = ["ours", "ours, remat='dots'", "by hand"]
    names += [name for name in ("attnax", "penzai") if installed(name)]
    result: dict[str, object] = {"jax": jax.__version__, "load by others": round(foreign_load(), 2)}
    for name in names:
        rows = {}
        for layers in args.layers:
            run = make(name, layers, tokens)
            start = time.perf_counter()
            compiled = run.jitted[0].lower(*run.state, tokens).compile()
            seconds = time.perf_counter() - start
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            rows[layers] = {"seconds": round(seconds, 2), "MiB": round(temporaries / 2**20)}
        result[name] = rows
    report(result, args.json)


if __name__ == "__main__":
    main()
