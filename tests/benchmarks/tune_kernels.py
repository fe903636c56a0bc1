"""Finds the fastest tiles of every attention kernel on the GPU at hand.

    python tests/benchmarks/tune_kernels.py --json tiles.json [--minutes 20] [--only TEXT]

Every kernel on its own, for the usual head dimensions, lengths, masks and mods: candidates that
compile are compared with the default tiles in value, then timed in turn with them. What is faster
by more than 3% becomes a row of the file, for

    EQX_TRANSFORMER_TILES=tiles.json python your_program.py

and for `MEASURED` in `eqx_transformer/attention/_kernels/_tuning.py`, which ships with the library.
Elsewhere than on a GPU a tiny version of this runs, interpreted, and what it finds means nothing.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import mask, mod
from harness import interleaved

from eqx_transformer.attention import Prefix
from eqx_transformer.attention._inputs import Inputs, make_inputs
from eqx_transformer.attention._kernels import _decode, _triton
from eqx_transformer.attention._kernels._tile import mask_program, mod_program
from eqx_transformer.attention._kernels._tuning import (
    HOPPER,
    HopperTiles,
    Kernel,
    Measured,
    Tiles,
    Tuning,
    default_tiles,
    mod_kind,
    padded,
    pattern,
)

ON_GPU = jax.default_backend() == "gpu"
HEADS, KV_HEADS = (16, 4) if ON_GPU else (4, 2)


@dataclass(frozen=True)
class Case:
    """A kernel, and what it is called with."""

    kernel: Kernel
    dtype: str
    head_dim: int
    seq: int
    mask: str
    mod: str

    def __str__(self) -> str:
        return " ".join(map(str, vars(self).values()))

    def inputs(self, q: Any, k: Any, v: Any) -> Inputs:
        """Of one example."""
        which = mask(self.mask, self.seq)
        if self.kernel == "decode":
            which = Prefix(jnp.int32(self.seq - 3))
        return make_inputs(q, k, v, mask=which, score_mod=mod(self.mod, HEADS))

    def arrays(self) -> list[Any]:
        """A batch of queries, keys, values, cotangents of the output, and two statistics."""
        batch = max(1, 16384 // self.seq) if ON_GPU else 1
        q_seq = 1 if self.kernel == "decode" else self.seq
        shapes = [
            (batch, n, heads, self.head_dim)
            for n, heads in ((q_seq, HEADS), (self.seq, KV_HEADS), (self.seq, KV_HEADS))
        ]
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (
            jax.random.normal(key, shape, jnp.dtype(self.dtype))
            for key, shape in zip(keys, shapes, strict=True)
        )
        stat = jnp.full((batch, HEADS, q_seq), 5.0, jnp.float32)
        return [q, k, v, q, stat, stat]

    def run(self, tiles: Tiles | HopperTiles) -> Callable[..., Any]:
        """The kernel alone, with these tiles, compiled."""
        tuning, kernels = Tuning(tiles), _triton
        if isinstance(tiles, HopperTiles):
            from eqx_transformer.attention._kernels import _hopper as kernels

        def one(q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any) -> Any:
            inputs = self.inputs(q, k, v)
            if self.kernel == "decode":
                return _decode.forward(inputs, tuning)
            if self.kernel == "forward":
                return kernels.forward(inputs, tuning)
            if self.kernel == "tangent":
                unmoved = jax.tree.map(lambda _: None, inputs.score_mod)
                moved = {"q": q, "k": k, "v": v, "score_mod": unmoved}
                return kernels.tangent(inputs, tuning, dout, lse, delta, moved)
            transpose = getattr(kernels, self.kernel)
            return transpose(inputs, tuning, lse, delta, dout)

        return jax.jit(jax.vmap(one))


def cases() -> Iterator[Case]:
    """The most used first, as time may run out."""
    kernels: tuple[Kernel, ...] = ("forward", "transpose_q", "transpose_kv", "tangent", "decode")
    if not ON_GPU:
        yield from (Case(kernel, "float32", 16, 64, "causal", "alibi") for kernel in kernels)
        return
    patterns = (("causal", "none"), ("full", "none"), ("causal", "soft cap"), ("documents", "none"))
    patterns += (("window", "none"), ("causal", "relative"), ("documents", "relative"))
    for (name, mod_name), dim in itertools.product(patterns, (128, 64)):
        for kernel, seq in itertools.product(kernels[:4], (4096, 1024, 16384)):
            yield Case(kernel, "bfloat16", dim, seq, name, mod_name)
    for dim, seq in itertools.product((128, 64), (4096, 32768)):
        yield Case("decode", "bfloat16", dim, seq, "full", "none")
    for kernel, dim in itertools.product(kernels, (64, 128)):
        yield Case(kernel, "float32", dim, 4096, "causal", "none")


def candidates(case: Case) -> Iterator[Tiles | HopperTiles]:
    """Tiles that may fit; which do, the compiler says."""
    if not ON_GPU:
        yield from (Tiles(16, 16), Tiles(32, 32, split=32))
        return
    if case.kernel == "decode":
        for block, warps, stages, split in itertools.product(
            (32, 64, 128), (2, 4), (2, 3, 4), (256, 512, 1024)
        ):
            yield Tiles(16, block, warps, stages, split)
        return
    yield from (
        *(Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 1), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3)),
        *(Tiles(128, 64, 4, 2), Tiles(128, 32, 8, 2), Tiles(128, 32, 4, 3), Tiles(64, 128, 8, 2)),
        *(Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 2)),
        *(Tiles(32, 32, 4, 1), Tiles(32, 32, 8, 1)),
    )
    if HOPPER and case.dtype != "float32":
        yield from (HopperTiles(*x) for x in ((64, 2), (128, 2), (64, 3), (64, 4), (128, 1)))


def best(case: Case, rounds: int) -> tuple[Measured, dict[str, float]] | None:
    """The fastest tiles, and the times of all as shares of that of the default ones."""
    arrays = case.arrays()
    example = case.inputs(*(x[0] for x in arrays[:3]))
    programs = (mod_program(example), mask_program(example))
    lookup = any(x is not None and x.program.looks_up_pairs for x in programs)
    kind = mod_kind(example, lookup)
    default = default_tiles(case.kernel, example, kind)
    default = default._replace(block_q=min(default.block_q, padded(example.q_seq)))
    if not ON_GPU:
        default = Tiles(16, 32)
    wanted = jax.tree.map(np.asarray, case.run(default)(*arrays))
    ready = {}
    for tiles in dict.fromkeys((default, *candidates(case))):
        run = case.run(tiles)
        try:
            found = jax.tree.map(np.asarray, run(*arrays))
        # Too many registers, or too much shared memory, is no one kind of error.
        except Exception as error:
            print(f"{case} {tuple(tiles)}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
            continue
        if all(map(_alike, jax.tree.leaves(found), jax.tree.leaves(wanted))):
            ready[tiles] = functools.partial(run, *arrays)
    names = {str(tuple(tiles)): run for tiles, run in ready.items()}
    medians = {
        name: statistics.median(x)
        for name, x in interleaved(names, rounds if ON_GPU else 1).items()
    }
    shares = {name: x / medians[str(tuple(default))] for name, x in medians.items()}
    fastest = min(ready, key=lambda tiles: shares[str(tuple(tiles))])
    if ON_GPU and shares[str(tuple(fastest))] > 0.97:
        return None
    device = jax.devices()[0].device_kind
    key = (device, case.kernel, case.dtype, padded(case.head_dim), case.seq)
    return Measured(*key, pattern(example), kind, fastest), shares


def _alike(x: np.ndarray, y: np.ndarray) -> bool:
    # Sums in another order: a few roundings of the output's dtype.
    x, y = x.astype(np.float32), y.astype(np.float32)
    return bool(np.allclose(x, y, rtol=0, atol=2e-2 * max(1e-6, float(np.abs(y).max()))))


def main(argv: list[str] | None = None) -> None:
    """Writes the file after every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the tiles")
    parser.add_argument("--minutes", type=float, default=20, help="when to stop")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    end = time.perf_counter() + 60 * args.minutes
    for case in cases():
        if args.only not in str(case) or time.perf_counter() > end:
            continue
        result = best(case, args.rounds)
        if result is None:
            print(f"{case}: nothing better than the default tiles", flush=True)
            continue
        found, shares = result
        rows.append(found._asdict())
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
        share = shares[str(tuple(found.tiles))]
        print(f"{case}: {share:.2f} of the time with {found.tiles}", flush=True)
    for row in rows:
        print(Measured(**row))


if __name__ == "__main__":
    main()
