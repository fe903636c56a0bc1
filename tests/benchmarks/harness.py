"""Interleaved timing: what is compared runs in turn, so that a noisy machine disturbs all alike."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one untimed call of each.

    The order is reversed from one round to the next, so that none always follows the same one.
    """
    for run in candidates.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for index in range(rounds):
        for name in names if index % 2 == 0 else names[::-1]:
            start = time.perf_counter()
            jax.block_until_ready(candidates[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Median over the rounds of each candidate's time as a share of the baseline's."""
    return {
        name: statistics.median(x / y for x, y in zip(values, seconds[baseline], strict=True))
        for name, values in seconds.items()
    }


def foreign_load(seconds: float = 1.0) -> float:
    """The share of the machine's cores that others use, watched for a while doing nothing."""

    def busy() -> float:
        user, nice, system, *_ = Path("/proc/stat").read_text().split()[1:]
        return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")

    start, before = time.perf_counter(), busy()
    time.sleep(seconds)
    return (busy() - before) / (time.perf_counter() - start) / (os.cpu_count() or 1)


def matmul_limit() -> float:
    """Floating-point operations a second of a product of two large float32 matrices."""
    size = 2048
    x = jax.random.normal(jax.random.key(0), (size, size))
    seconds = interleaved({"product": lambda: _product(x)}, 9)["product"]
    return 2 * size**3 / min(seconds)


def report(result: Any, path: Path | None) -> None:
    """Prints a result as JSON, and writes it to a file if one is given."""
    text = json.dumps(result, indent=2)
    print(text)
    if path is not None:
        path.write_text(text + "\n")


@jax.jit
def _product(x: jax.Array) -> jax.Array:
    return x @ x
