"""Draws the picture of the masks in docs/attention.md.

python docs/scripts/mask_gallery.py [FILE]
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eqx_transformer.attention import (
    Causal,
    Padding,
    Prefix,
    Segments,
    SlidingWindow,
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


def main(path: Path) -> None:
    """Writes the picture."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 6), layout="constrained")
    position = jnp.arange(SEQ)
    for axis, (title, mask) in zip(axes.flat, MASKS.items(), strict=True):
        allowed = jnp.broadcast_to(mask(position[:, None], position[None, :]), (SEQ, SEQ))
        axis.imshow(allowed, cmap="Blues", vmin=0, vmax=1.4)
        axis.set_title(title, fontsize=8, family="monospace")
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel("key", fontsize=7)
        axis.set_ylabel("query", fontsize=7)
        axis.hlines(jnp.arange(SEQ) - 0.5, -0.5, SEQ - 0.5, color="white", linewidth=0.6)
        axis.vlines(jnp.arange(SEQ) - 0.5, -0.5, SEQ - 0.5, color="white", linewidth=0.6)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    default = Path(__file__).parent.parent / "images" / "masks.png"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
