"""Draws the pictures of the masks and of the score mods in docs/attention.md.

python docs/scripts/attention_gallery.py [FOLDER]
"""

import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eqx_transformer.attention import (
    ALiBi,
    Causal,
    Compose,
    GridBias,
    Padding,
    Prefix,
    RelativeBias,
    Segments,
    SlidingWindow,
    SoftCap,
    Strided,
    TokenGroups,
)

SEQ = 16
DOCUMENTS = jnp.asarray([0] * 5 + [1] * 7 + [2] * 4)
MASKS = {
    "Causal()": Causal(),
    "SlidingWindow(3, 3)": SlidingWindow(3, 3),
    "Causal() & SlidingWindow(3, 0)": Causal() & SlidingWindow(3, 0),
    "Causal() | Prefix(5)": Causal() | Prefix(5),
    "Padding(valid)": Padding(jnp.arange(SEQ) < 12),
    "Causal() & Segments(ids)": Causal() & Segments(DOCUMENTS),
    "Causal() & (SlidingWindow(2, 0) | Strided(4))": Causal() & (SlidingWindow(2, 0) | Strided(4)),
    "TokenGroups((5, 7, 4), ...)": TokenGroups((5, 7, 4), ((1, 0, 0), (1, 1, 0), (1, 0, 1))),
}


GRID = (4, 4)
_KEYS = jax.random.split(jax.random.key(0), 3)
_GRID_BIAS = GridBias(GRID, 1)
MODS = {
    "ALiBi(2)": ALiBi(2),
    "RelativeBias(1, 8, 16)": RelativeBias(1, 8, 16, bidirectional=True, key=_KEYS[0]),
    "GridBias((4, 4), 1)": eqx.tree_at(
        lambda bias: bias.table,
        _GRID_BIAS,
        jax.random.normal(_KEYS[1], _GRID_BIAS.table.shape),
    ),
    "Compose([ALiBi(2), SoftCap(2.0)])": Compose([ALiBi(2), SoftCap(2.0)]),
}


def draw(axis: Any, title: str) -> None:
    """Names a square of queries and keys."""
    axis.set_title(title, fontsize=8, family="monospace")
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel("key", fontsize=7)
    axis.set_ylabel("query", fontsize=7)
    for lines in (axis.hlines, axis.vlines):
        lines(jnp.arange(SEQ) - 0.5, -0.5, SEQ - 0.5, color="white", linewidth=0.6)


def main(folder: Path) -> None:
    """Writes both pictures."""
    position = jnp.arange(SEQ)
    pairs = position[:, None], position[None, :]
    figure, axes = plt.subplots(2, 4, figsize=(11, 6), layout="constrained")
    for axis, (title, mask) in zip(axes.flat, MASKS.items(), strict=True):
        allowed = jnp.broadcast_to(mask(*pairs), (SEQ, SEQ))
        axis.imshow(allowed, cmap="Blues", vmin=0, vmax=1.4)
        draw(axis, title)
    figure.savefig(folder / "masks.png", dpi=130)

    figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
    for axis, (title, mod) in zip(axes.flat, MODS.items(), strict=True):
        changed = mod(jnp.zeros((SEQ, SEQ)), *pairs, jnp.zeros((), jnp.int32))
        axis.imshow(changed, cmap="viridis")
        draw(axis, title)
    figure.savefig(folder / "score_mods.png", dpi=130)


if __name__ == "__main__":
    default = Path(__file__).parent.parent / "images"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
