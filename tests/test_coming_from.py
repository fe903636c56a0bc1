"""Every row of docs/coming_from.md builds."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import pytest

from eqx_transformer import nn
from eqx_transformer.attention import ALiBi, dot_product_attention
from eqx_transformer.models import TransformerConfig, TransformerDecoder, TransformerEncoder
from eqx_transformer.stacks import decoder_block, encoder_block

PAGE = (Path(__file__).parent.parent / "docs" / "coming_from.md").read_text()
TINY = {"vocab_size": 7, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "max_len": 6}

# What attnax's configuration says, and how it is said here.
ATTNAX_CONFIG = {
    "vocab_size": {"vocab_size": 9},
    "d_model": {"d_model": 16},
    "num_heads": {"num_heads": 4},
    "num_layers": {"num_layers": 2},
    "d_ff": {"d_ff": 12},
    "dropout_rate": {"dropout_rate": 0.3},
    "max_len": {"max_len": 9},
    "use_pre_norm": {"layout": "post"},
    "pos_emb_type": {"positions": "alibi"},
    "ff_activation": {"activation": "swiglu"},
    "norm_type": {"norm": "rms"},
    "pad_token_id": {"pad_token_id": 3},
    "attention_type": {"attention": "linear"},
    "attention_block_size": {"attention_block_size": 4},
    "linear_attention_chunk_size": {"linear_chunk_size": 4},
    "rope_base": {"positions": "rope", "rope_theta": 100.0},
    "rope_max_positions": {"positions": "rope", "max_len": 4},
    "num_kv_heads": {"num_kv_heads": 1},
    "attention_window": {"window": 3},
    "kv_cache_max_len": {"cache_max_len": 4},
}

ATTNAX_BLOCK = {
    "rngs": {"key": jr.key(1)},
    "d_model": {},
    "num_heads": {},
    "d_ff": {},
    "dropout_rate": {"dropout_rate": 0.3},
    "pre_norm": {"layout": "post"},
    "attention_type": {
        "attention_fn": eqx.Partial(dot_product_attention, implementation="chunked")
    },
    "attention_block_size": {"attention_fn": eqx.Partial(dot_product_attention, block_size=4)},
    "linear_attention_chunk_size": {
        "attention": nn.LinearAttention(8, 2, chunk_size=4, key=jr.key(0))
    },
    "norm_type": {"make_norm": nn.RMSNorm},
    "ff_activation": {"activation": jax.nn.silu, "gated": True},
    "num_kv_heads": {"num_kv_heads": 1},
    "attention_window": {"window": 3},
    "score_mod": {"score_mod": ALiBi(2)},
    "use_rope": {"rope": nn.RoPE()},
    "rope_base": {"rope": nn.RoPE(theta=100.0)},
    "rope_max_positions": {},
}


def rows(heading: str) -> dict[str, str]:
    """The first table under a heading: first column to second."""
    table = PAGE.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    table = re.search(r"^\|---.*\n((?:\|.*\n)+)", table, re.M)[1]
    cells = [[c.strip() for c in line.split("|")[1:3]] for line in table.splitlines()]
    return {first.strip("`"): second for first, second in cells}


@pytest.mark.parametrize("field", ATTNAX_CONFIG)
def test_attnax_config(field):
    ours = ATTNAX_CONFIG[field]
    row = rows("TransformerConfig")[field]
    assert any(name in row for name in ours), f"{field} -> {row} does not name {list(ours)}"
    config = TransformerConfig(**TINY | ours)
    for model in (TransformerEncoder, TransformerDecoder):
        eqx.filter_eval_shape(model, config, key=jr.key(0))


def test_attnax_config_is_complete():
    assert rows("TransformerConfig").keys() == ATTNAX_CONFIG.keys() | {"TransformerConfig"}


@pytest.mark.parametrize("field", ATTNAX_BLOCK)
def test_attnax_blocks(field):
    ours = {"key": jr.key(0)} | ATTNAX_BLOCK[field]
    row = rows("EncoderBlock, DecoderBlock")[field]
    assert not ATTNAX_BLOCK[field] or any(name in row for name in ours)
    for build in (encoder_block, decoder_block):
        eqx.filter_eval_shape(build, 8, 2, 8, **ours)


def test_attnax_blocks_are_complete():
    assert rows("EncoderBlock, DecoderBlock").keys() == ATTNAX_BLOCK.keys()
