"""Writes the table of what each implementation of attention computes into docs/attention.md.

    python docs/scripts/implementation_table.py

Every row is a call; the entries are what the library's own choice says about it.
"""

import re
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr

from eqx_transformer.attention import (
    ALiBi,
    Causal,
    Dense,
    DenseBias,
    Padding,
    Predicate,
    Prefix,
    RelativeBias,
    Segments,
    SlidingWindow,
    SoftCap,
)
from eqx_transformer.attention._api import refusals
from eqx_transformer.attention._inputs import make_inputs

PAGE = Path(__file__).parents[1] / "attention.md"
SEQ = 16


def _inputs(dtype=jnp.bfloat16, q_seq=SEQ, kv_heads=4, head_dim=16, v_dim=16, **options):
    q = jnp.zeros((q_seq, 4, head_dim), dtype)
    k = jnp.zeros((SEQ, kv_heads, head_dim), dtype)
    return make_inputs(q, k, jnp.zeros((SEQ, kv_heads, v_dim), dtype), **options)


def _calls():
    """What a call has, and whether the log-sum-exp is wanted: name, inputs, lse."""
    positions = jnp.arange(SEQ, dtype=jnp.int32)
    everyone = jnp.ones((SEQ, SEQ), bool)
    yield "bfloat16, float16", _inputs(), False
    yield "float32", _inputs(jnp.float32), False
    yield "grouped queries", _inputs(kv_heads=1), False
    yield "head_dim not a multiple of 8", _inputs(head_dim=12, v_dim=12), False
    yield "v_dim different from head_dim", _inputs(v_dim=24), False
    yield "more keys than queries", _inputs(q_seq=10), False
    yield "odd lengths", _inputs(q_seq=9), False
    masks = {
        "`Causal()`": Causal(),
        "`SlidingWindow(left, 0)`": SlidingWindow(3, 0),
        "`SlidingWindow(left, right)`": SlidingWindow(3, 3),
        "`Prefix`, `TokenGroups`, `Strided`": Prefix(3),
        "`Padding`": Padding(positions < 9),
        "`Segments`": Segments(positions // 8),
        "`Dense`, `Predicate`": Dense(everyone) & Predicate(lambda i, j: i + j > 3),
        "`&`, `|`, `~` of any of them": Causal() | ~Prefix(3),
    }
    for name, mask in masks.items():
        yield name, _inputs(mask=mask), False
    mods = {
        "`SoftCap`": SoftCap(30.0),
        "`ALiBi`": ALiBi(4),
        "`RelativeBias`": RelativeBias(4, bidirectional=True, key=jr.key(0)),
        "`DenseBias`": DenseBias(jnp.zeros((4, SEQ, SEQ))),
        "any other score mod": lambda score, i, j, h: score - 1.0,
    }
    for name, mod in mods.items():
        yield name, _inputs(score_mod=mod), False
    yield "`q_positions`, `kv_positions`", _inputs(q_positions=positions), False
    yield "`sinks`", _inputs(sinks=jnp.zeros(4)), False
    yield "`dropout_rate`", _inputs(dropout_rate=0.1, dropout_key=jr.key(0)), False
    yield "`attention_and_lse`", _inputs(), True


def table() -> str:
    """The table as Markdown."""
    rows = {}
    for name, inputs, lse in _calls():
        rows[name] = {k: why is None for k, why in refusals(inputs, lse=lse).items()}
    names = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(f'`"{name}"`' for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for row, entries in rows.items():
        lines.append(
            f"| {row} | " + " | ".join("yes" if entries[n] else "no" for n in names) + " |"
        )
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The page with the table between its two marks."""
    marks = r"(<!-- table: implementations -->\n).*?(<!-- end -->\n)"
    assert re.search(marks, text, re.S), "the page has no place for the table"
    return re.sub(marks, lambda m: m[1] + table() + m[2], text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
