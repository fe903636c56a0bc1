"""Draws docs/images/performance.png from what the programs in tests/benchmarks wrote.

    python docs/scripts/performance_figures.py

The results are in docs/benchmarks, one JSON file a program, written with its option `--json`.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1]


def result(name: str) -> Any:
    """What a program wrote."""
    return json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())


def colour(name: str) -> str:
    """Ours stand out."""
    return "tab:blue" if name.startswith("ours") else "tab:gray"


def bars(axes: Any, values: dict[str, float], title: str) -> None:
    """One bar a candidate, the shortest first."""
    names = sorted(values, key=lambda name: -values[name])
    axes.barh(names, [values[x] for x in names], color=[colour(x) for x in names])
    axes.bar_label(axes.containers[0], fmt="%.2f", padding=2)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.15)


def lines(axes: Any, rows: dict[str, dict[str, float]], title: str, x: str, y: str) -> None:
    """One line a candidate, over a number that doubles."""
    names = list(next(iter(rows.values())))
    for name in names:
        style = "-" if name.startswith("ours") else "--"
        numbers = [int(number) for number in rows]
        axes.plot(numbers, [row[name] for row in rows.values()], style, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.set_xticks([int(number) for number in rows], list(rows))
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7)


def main() -> None:
    """Draws all of it."""
    step = result("training_cpu")["step"]["seconds"]
    vit = result("vit_cpu")["step"]["seconds"]
    memory = result("memory_cpu")["by length"]
    compiled = result("compile_cpu")
    seconds: dict[str, dict[str, float]] = {}
    for name, rows in compiled.items():
        for layers, row in rows.items() if isinstance(rows, dict) else ():
            seconds.setdefault(layers, {})[name] = row["seconds"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    bars(axes[0, 0], step, "A step of training, language model: seconds")
    bars(axes[0, 1], vit, "A step of training, ViT-S/16: seconds")
    lines(axes[1, 0], memory, "Temporary memory of a step", "tokens", "MiB")
    lines(axes[1, 1], seconds, "Compiling a step", "layers", "seconds")
    figure.savefig(DOCS / "images" / "performance.png", dpi=130)


if __name__ == "__main__":
    main()
