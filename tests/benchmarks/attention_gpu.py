"""Attention on a GPU: every way to compute it there is, in one run.

    python tests/benchmarks/attention_gpu.py [--quick] [--only TEXT] [--json FILE] [--plot FILE]

Before anything is timed, each of our kernels is compared with float64 on the device itself. Then
candidates run in turn (see `harness.py`) for every pass, mask, score mod, head dimension and
length: ours as `"pallas"` (and, apart from what was measured before, as the kernels for Hopper
GPUs) and `"cudnn"`, `jax.nn.dot_product_attention` by XLA and by cuDNN, JAX's Pallas kernels, and,
where PyTorch is installed, its SDPA and FlexAttention. What cannot compute a cell is left out of
it, with the reason. Rates are in TFLOP/s of what the mask leaves over, and as a share of what a
product of two large matrices reaches on the same device; decoding is in TB/s of cache read.
Elsewhere than on a GPU a tiny version of all this runs, interpreted, which times nothing.
"""

import argparse
import functools
import gc
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import mask, mod
from harness import interleaved

import eqx_transformer.attention as attn
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._kernels._passes import kernel_passes
from eqx_transformer.attention._kernels._tuning import HOPPER
from eqx_transformer.attention._paged import PagedKV

ON_GPU = jax.default_backend() == "gpu"
PASSES = ("forward", "gradient", "jvp")
PRODUCTS = {"forward": 2, "gradient": 7, "jvp": 6, "backward": 5}
"""How many products of matrices a pass consists of, at least. Gradient and `jvp` include the value;
the backward pass alone is the difference of gradient and forward pass."""


@dataclass(frozen=True)
class Cell:
    """What is computed."""

    step: str
    seq: int
    head_dim: int
    mask: str = "causal"
    mod: str = "none"
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        parts = [self.step, f"D{self.head_dim}", str(self.seq), self.mask, self.mod]
        return " ".join(x for x in parts if x != "none")

    @property
    def decodes(self) -> bool:
        """Whether there is one query for each of many sequences."""
        return self.step in ("decode", "paged decode")

    def flops(self) -> float:
        """Of the pairs that the mask leaves over."""
        return PRODUCTS[self.step] * 2.0 * self.pairs() * self.batch * self.heads * self.head_dim

    def pairs(self) -> int:
        """How many pairs of positions attend."""
        which = mask(self.mask, self.seq)
        if which is None:
            return self.seq**2
        at, total = jnp.arange(self.seq, dtype=jnp.int32), 0
        for rows in np.array_split(np.arange(self.seq, dtype=np.int32), max(1, self.seq // 1024)):
            total += int(which(jnp.asarray(rows)[:, None], at[None, :]).sum())
        return total

    def cache_bytes(self) -> int:
        """What decoding has to read."""
        return int(lengths(self).sum()) * 2 * self.kv_heads * self.head_dim * 2


def lengths(cell: Cell) -> np.ndarray:
    """Of the sequences that are decoded: from half of the cache to all of it."""
    return np.linspace(cell.seq // 2, cell.seq, cell.batch).astype(np.int32)


def cells(quick: bool) -> list[Cell]:
    """Every cell of the table."""
    if not ON_GPU:
        small = {"heads": 2, "kv_heads": 2, "dtype": "float32"}
        steps = [Cell(step, 64, 16, "causal", **small) for step in PASSES]
        decode = {**small, "heads": 4, "batch": 2}
        return [*steps, *(Cell(x, 64, 16, **decode) for x in ("decode", "paged decode"))]
    seqs = (4096,) if quick else (1024, 2048, 4096, 8192, 16384)
    dims = (128,) if quick else (64, 128)
    table = []
    for dim in dims:
        for seq in seqs:
            # As many tokens at every length.
            sizes: dict[str, int] = {"batch": 16384 // seq}
            for step in PASSES:
                for name in ("full", "causal"):
                    table.append(Cell(step, seq, dim, name, **sizes))
            if seq not in (4096, 16384):
                continue
            for step in PASSES[:2]:
                for name in ("window", "documents", "prefix"):
                    table.append(Cell(step, seq, dim, name, **sizes))
                for name in ("alibi", "soft cap", "relative"):
                    table.append(Cell(step, seq, dim, "causal", name, **sizes))
    for batch, seq in (
        ((1, 2048), (64, 4096)) if quick else ((1, 2048), (1, 32768), (64, 4096), (256, 4096))
    ):
        for step in ("decode", "paged decode"):
            table.append(Cell(step, seq, 128, batch=batch, heads=64, kv_heads=8))
    return table


# --- the candidates: functions of q, k, v as [batch, seq, heads, head_dim] ---


def ours(cell: Cell, implementation: Any) -> Callable[..., Any]:
    """This library's."""
    which, score_mod = mask(cell.mask, cell.seq), mod(cell.mod, cell.heads)
    if implementation == "hopper":
        # As `"pallas"` would be if these kernels were known to be the faster ones.
        passes = kernel_passes(platform="hopper")
        return jax.vmap(
            lambda q, k, v: passes(make_inputs(q, k, v, mask=which, score_mod=score_mod))[0]
        )
    return jax.vmap(
        functools.partial(
            attn.dot_product_attention,
            mask=which,
            score_mod=score_mod,
            implementation=implementation,
        )
    )


def jax_nn(cell: Cell, implementation: Any) -> Callable[..., Any]:
    """`jax.nn.dot_product_attention`."""
    if cell.mod != "none":
        raise NotImplementedError("has no score mods")
    options: dict[str, Any] = {"implementation": implementation}
    if cell.mask == "window":
        left = mask(cell.mask, cell.seq)
        assert isinstance(left, attn.SlidingWindow) and left.left is not None
        options |= {"is_causal": True, "local_window_size": (left.left, 0)}
    elif cell.mask == "causal":
        options |= {"is_causal": True}
    elif cell.mask != "full":
        raise NotImplementedError("would be given a mask of all pairs")
    return functools.partial(jax.nn.dot_product_attention, **options)


def jax_pallas(cell: Cell) -> Callable[..., Any]:
    """`jax.experimental.pallas.ops.gpu.attention`."""
    if cell.mod != "none" or cell.mask not in ("full", "causal"):
        raise NotImplementedError("takes no such mask or mod")
    from jax.experimental.pallas.ops.gpu import attention

    return functools.partial(
        attention.mha,
        segment_ids=None,
        sm_scale=cell.head_dim**-0.5,
        causal=cell.mask == "causal",
        block_sizes=attention.BlockSizes.get_default(),
    )


def jax_mosaic(cell: Cell) -> Callable[..., Any]:
    """`jax.experimental.pallas.ops.gpu.attention_mgpu`."""
    if cell.mod != "none" or cell.mask not in ("full", "causal"):
        raise NotImplementedError("takes no such mask or mod")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=64,
        max_concurrent_steps=2,
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
        causal=cell.mask == "causal",
    )

    def scaled(q: Any, k: Any, v: Any) -> Any:
        # It has no scale of its own.
        return attention_mgpu.attention((q * cell.head_dim**-0.5).astype(q.dtype), k, v, config)

    return scaled


def in_jax(cell: Cell, attention: Callable[..., Any]) -> Callable[[], Any]:
    """A pass of an attention function, compiled."""
    q, k, v, cotangent = arrays(cell)

    def gradient(*x: Any) -> Any:
        return jax.vjp(attention, *x)[1](cotangent)

    def jvp(*x: Any) -> Any:
        return jax.jvp(attention, x, x)

    run = jax.jit({"forward": attention, "gradient": gradient, "jvp": jvp}[cell.step])
    jax.block_until_ready(run(q, k, v))
    return lambda: run(q, k, v)


def arrays(cell: Cell) -> list[Any]:
    """Queries, keys, values, and a cotangent of the output."""
    heads = (cell.heads, cell.kv_heads, cell.kv_heads, cell.heads)
    shapes = [(cell.batch, cell.seq, n, cell.head_dim) for n in heads]
    return [
        jax.random.normal(jax.random.key(i), shape, jnp.dtype(cell.dtype))
        for i, shape in enumerate(shapes)
    ]


def decoding(cell: Cell, implementation: Any) -> Callable[[], Any]:
    """One query for every sequence, with keys in a cache or in pages."""
    q = jax.random.normal(jax.random.key(0), (cell.batch, 1, cell.heads, cell.head_dim))
    q, n = q.astype(cell.dtype), jnp.asarray(lengths(cell))
    size = 16
    pages = (cell.batch * cell.seq // size, size, cell.kv_heads, cell.head_dim)
    cache = (cell.batch, cell.kv_heads, cell.seq, cell.head_dim)
    shape = pages if cell.step == "paged decode" else cache
    k, v = (jax.random.normal(jax.random.key(i), shape, jnp.dtype(cell.dtype)) for i in (1, 2))
    if cell.step == "paged decode":
        order = jax.random.permutation(jax.random.key(3), pages[0]).astype(jnp.int32)
        tables = order.reshape(cell.batch, -1)

        def paged(q: Any, k: Any, v: Any, table: Any, n: Any) -> Any:
            pool = PagedKV(k, v)
            return attn.paged_attention(q, pool, table, n, implementation=implementation)

        run = jax.jit(jax.vmap(paged, in_axes=(0, None, None, 0, 0)))
        return lambda: run(q, k, v, tables, n)

    def cached(q: Any, k: Any, v: Any, n: Any) -> Any:
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        return attn.dot_product_attention(
            q, k, v, mask=attn.Prefix(n), implementation=implementation
        )

    run = jax.jit(jax.vmap(cached))
    return lambda: run(q, k, v, n)


# --- PyTorch, if it is there ---


def in_torch(cell: Cell, name: str) -> Callable[[], Any]:
    """A pass of PyTorch's attention. Arrays are its own: nothing is compared but time."""
    import torch
    from torch.nn.attention import flex_attention as flex

    if cell.decodes or cell.step == "jvp":
        raise NotImplementedError("is compared forward and backward")
    heads = (cell.heads, cell.kv_heads, cell.kv_heads, cell.heads)
    q, k, v, cotangent = (
        torch.randn(cell.batch, n, cell.seq, cell.head_dim, device="cuda", dtype=torch.bfloat16)
        for n in heads
    )
    if name == "sdpa":
        if cell.mod != "none" or cell.mask not in ("full", "causal"):
            raise NotImplementedError("takes no such mask or mod")
        causal = cell.mask == "causal"

        def attend(q: Any, k: Any, v: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    else:
        block = _block_mask(cell)
        score = _score_mod(cell)
        compiled = torch.compile(flex.flex_attention)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return compiled(q, k, v, score_mod=score, block_mask=block)

    if cell.step == "forward":

        def run() -> None:
            with torch.no_grad():
                attend(q, k, v)
            torch.cuda.synchronize()

    else:
        for x in (q, k, v):
            x.requires_grad_()

        def run() -> None:
            # Forward included, as in JAX.
            torch.autograd.grad(attend(q, k, v), (q, k, v), cotangent)
            torch.cuda.synchronize()

    run()
    return run


def _block_mask(cell: Cell) -> Any:
    import torch
    from torch.nn.attention import flex_attention as flex

    if cell.mask == "full":
        return None
    window, prefix = min(1024, cell.seq // 2), cell.seq // 4
    from attention_cases import segment_ids

    ids = torch.tensor(np.asarray(segment_ids(cell.seq)), device="cuda")
    masks = {
        "causal": lambda b, h, i, j: i >= j,
        "window": lambda b, h, i, j: (i >= j) & (i - j < window),
        "documents": lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]),
        "prefix": lambda b, h, i, j: (i >= j) | (j < prefix),
    }
    return flex.create_block_mask(masks[cell.mask], None, None, cell.seq, cell.seq, device="cuda")


def _score_mod(cell: Cell) -> Any:
    import torch

    if cell.mod == "none":
        return None
    heads = torch.arange(cell.heads, device="cuda")
    slopes = 2.0 ** (-8.0 * (heads + 1) / cell.heads)
    table = torch.randn(32, cell.heads, device="cuda")
    mods = {
        "alibi": lambda s, b, h, i, j: s - slopes[h] * (i - j).abs(),
        "soft cap": lambda s, b, h, i, j: 30.0 * torch.tanh(s / 30.0),
        "relative": lambda s, b, h, i, j: s + table[torch.clamp(i - j, 0, 31), h],
    }
    return mods[cell.mod]


# --- running ---


def candidates(cell: Cell) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What can compute a cell, ready to run, and why others cannot."""
    builders: dict[str, Callable[[], Any]] = {}
    if cell.decodes:
        for name in ("pallas", "chunked", "reference"):
            builders[f"ours, {name}"] = functools.partial(decoding, cell, name)
    else:
        for name in ("pallas", *(("hopper",) if ON_GPU and HOPPER else ()), "cudnn", "chunked"):
            builders[f"ours, {name}"] = lambda name=name: in_jax(cell, ours(cell, name))
        for name in ("xla", "cudnn"):
            builders[f"jax.nn, {name}"] = lambda name=name: in_jax(cell, jax_nn(cell, name))
        if ON_GPU:
            builders["jax pallas"] = lambda: in_jax(cell, jax_pallas(cell))
            builders["jax mosaic"] = lambda: in_jax(cell, jax_mosaic(cell))
            for name in ("sdpa", "flex"):
                builders[f"torch {name}"] = functools.partial(in_torch, cell, name)
    ready, refused = {}, {}
    for name, build in builders.items():
        try:
            ready[name] = build()
            jax.block_until_ready(ready[name]())
        # Others' libraries fail in ways of their own, and a table with a hole beats none.
        except Exception as error:
            ready.pop(name, None)
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return ready, refused


def correctness() -> dict[str, float]:
    """The greatest error of our kernels against float64, as a share of the greatest number."""
    errors = {}
    seq = 640 if ON_GPU else 48
    for dtype in ("bfloat16", "float32") if ON_GPU else ("float32",):
        for name, mod_name in (
            ("full", "none"),
            ("causal", "alibi"),
            ("documents", "relative"),
            ("window", "soft cap"),
        ):
            cell = Cell("forward", seq, 64 if ON_GPU else 16, name, mod_name, 1, 4, 2, dtype)
            q, k, v, cotangent = arrays(cell)

            def everything(implementation: Any, cell: Cell, *x: Any) -> Any:
                *x, cotangent = x
                attention = ours(cell, implementation)
                out, pull = jax.vjp(attention, *x)
                return out, jax.jvp(attention, tuple(x), tuple(x))[1], pull(cotangent)

            with jax.enable_x64(True):
                wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, cotangent)]
                exact = jax.jit(functools.partial(everything, "reference", cell))(*wide)
            narrow = ON_GPU and HOPPER and dtype != "float32"
            for kernels in ("pallas", *(("hopper",) if narrow else ())):
                found = jax.jit(functools.partial(everything, kernels, cell))(q, k, v, cotangent)
                errors[f"{dtype}, {name}, {mod_name}, {kernels}"] = max(
                    float(np.abs(np.asarray(x, np.float64) - np.asarray(y)).max() / np.abs(y).max())
                    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
                )
    return errors


TOLERANCE = {"bfloat16": 2e-2, "float32": 5e-3}
"""A GPU's products of float32 numbers round their factors to ten bits."""


def ceiling() -> float:
    """TFLOP/s of a product of two large matrices."""
    n = 8192 if ON_GPU else 128
    x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in (0, 1))
    product = jax.jit(jnp.matmul)
    seconds = interleaved({"product": lambda: product(x, y)}, 20 if ON_GPU else 2)["product"]
    return 2 * n**3 / min(seconds) / 1e12


def measure(cell: Cell, rounds: int, most: float) -> dict[str, Any]:
    """Times all candidates for a cell."""
    ready, refused = candidates(cell)
    seconds = interleaved(ready, rounds) if ready else {}
    gc.collect()
    medians = {name: statistics.median(x) for name, x in seconds.items()}
    return row(cell, medians, most) | {"refused": refused}


def row(cell: Cell, seconds: dict[str, float], most: float) -> dict[str, Any]:
    """A line of the table."""
    amount = cell.cache_bytes() if cell.decodes else cell.flops()
    rates = {name: amount / x / 1e12 for name, x in seconds.items() if x > 0}
    shares = {} if cell.decodes else {name: rate / most for name, rate in rates.items()}
    return {"cell": str(cell), **vars(cell), "seconds": seconds, "rates": rates, "shares": shares}


def backward(rows: list[dict[str, Any]], most: float) -> list[dict[str, Any]]:
    """What is left of gradients without forward passes."""
    fields = [x for x in vars(Cell("forward", 1, 1)) if x != "step"]
    forward = {tuple(x[f] for f in fields): x for x in rows if x["step"] == "forward"}
    found = []
    for gradient in rows:
        same = tuple(gradient[field] for field in fields)
        if gradient["step"] == "gradient" and same in forward:
            before = forward[same]["seconds"]
            rest = {x: y - before[x] for x, y in gradient["seconds"].items() if x in before}
            cell = Cell("backward", **dict(zip(fields, same, strict=True)))
            found.append(row(cell, rest, most))
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """Cells down, candidates across; the fastest in bold."""
    names = list(dict.fromkeys(name for row in rows for name in row["rates"]))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row in rows:
        rates = row["rates"]
        digits = 2 if row["step"] in ("decode", "paged decode") else 0
        best = max(rates.values(), default=0)
        texts = [f"{rates[x]:.{digits}f}" if x in rates else "" for x in names]
        texts = [
            f"**{t}**" if rates.get(x) == best else t for x, t in zip(names, texts, strict=True)
        ]
        lines.append(f"| {row['cell']} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path, most: float) -> None:
    """Rates by length, without mods and with the largest heads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dim = max(row["head_dim"] for row in rows)
    panels = [(step, name) for step in ("forward", "backward") for name in ("full", "causal")]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), sharey=True)
    for axis, (step, name) in zip(axes, panels, strict=True):
        shown = [
            row
            for row in rows
            if (row["step"], row["mask"], row["mod"], row["head_dim"]) == (step, name, "none", dim)
        ]
        for candidate in dict.fromkeys(x for row in shown for x in row["rates"]):
            points = [(row["seq"], row["rates"].get(candidate, np.nan)) for row in shown]
            axis.plot(*zip(*points, strict=True), marker="o", label=candidate)
        axis.axhline(most, color="grey", linestyle=":", linewidth=1)
        axis.set(title=f"{step}, {name}", xlabel="length", xscale="log")
    axes[0].set_ylabel("TFLOP/s")
    if axes[-1].lines[:-1]:
        axes[-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one length and one head dimension")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--plot", type=Path, help="where to draw rates by length")
    args = parser.parse_args(argv)
    errors = correctness()
    print(json.dumps({"greatest error": errors}, indent=1), flush=True)
    wrong = {x: e for x, e in errors.items() if not e < TOLERANCE[x.split(",")[0]]}
    if wrong:
        sys.exit(f"wrong, so not timed: {wrong}")
    most, rows = ceiling(), []
    result = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "ceiling, TFLOP/s": most,
        "greatest error": errors,
        "cells": rows,
    }
    for cell in cells(args.quick):
        if args.only not in str(cell):
            continue
        rows.append(measure(cell, args.rounds if ON_GPU else 1, most))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if args.json:
            # After every cell, as sessions on borrowed machines end early.
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    rows += backward(rows, most)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"TFLOP/s, of {most:.0f} for a product of matrices; decoding in TB/s\n\n{markdown(rows)}")
    if args.plot:
        plot(rows, args.plot, most)
    return result


if __name__ == "__main__":
    main()
