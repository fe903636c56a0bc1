"""The masks and score mods that the programs about attention on GPUs have in common."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqx_transformer.attention as attn

DOCUMENTS = 8
"""How many documents a sequence is packed from."""


def segment_ids(seq: int) -> Any:
    """Documents of unequal lengths."""
    ends = [round(seq * (i / DOCUMENTS) ** 1.3) for i in range(1, DOCUMENTS)]
    at = jnp.arange(seq, dtype=jnp.int32)
    return sum((at >= end).astype(jnp.int32) for end in ends)


def mask(name: str, seq: int, ids: Any = None) -> attn.AbstractMask | None:
    """A mask by its name; `ids` where they are an argument of the program."""
    if name == "full":
        return None
    if name == "causal":
        return attn.Causal()
    if name == "window":
        return attn.SlidingWindow(min(1024, seq // 2) - 1, 0)
    if name == "prefix":
        return attn.Causal() | attn.Prefix(seq // 4)
    assert name == "documents"
    return attn.Causal() & attn.Segments(segment_ids(seq) if ids is None else ids)


def mod(name: str, heads: int) -> Any:
    """A score mod by its name."""
    if name == "none":
        return None
    if name == "alibi":
        return attn.ALiBi(heads)
    if name == "soft cap":
        return attn.SoftCap(30.0)
    assert name == "relative"
    bias = attn.RelativeBias(heads, 32, 128, bidirectional=False, key=jax.random.key(1))
    table = np.random.default_rng(0).normal(size=bias.table.shape).astype(np.float32)
    return eqx.tree_at(lambda x: x.table, bias, jnp.asarray(table))
