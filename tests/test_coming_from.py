"""Every row of docs/coming_from.md builds."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

import eqx_transformer
from eqx_transformer import nn
from eqx_transformer.attention import ALiBi, dot_product_attention
from eqx_transformer.models import (
    Llama,
    LlamaConfig,
    TransformerConfig,
    TransformerDecoder,
    TransformerEncoder,
    VisionTransformer,
    ViTConfig,
)
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

TINY_VISION = {"image_size": 8, "patch_size": 4, "d_model": 8, "num_heads": 2, "num_layers": 1}
ATTNAX_VISION = {
    "image_size": {"image_size": 12},
    "patch_size": {"patch_size": 2},
    "num_channels": {"num_channels": 1},
    "num_classes": {"num_classes": 3},
    "use_cls_token": {"class_token": False, "pooling": "mean"},
    "pool": {"pooling": "mean"},
    "d_model": {"d_model": 16},
    "num_heads": {"num_heads": 4},
    "num_layers": {"num_layers": 2},
    "d_ff": {"d_ff": 12},
    "dropout_rate": {"dropout_rate": 0.3},
    "use_pre_norm": {"layout": "post"},
    "ff_activation": {"activation": "swiglu"},
    "norm_type": {"norm": "rms"},
    "attention_type": {"attention_implementation": "chunked"},
    "attention_block_size": {"attention_block_size": 4},
    "num_kv_heads": {"num_kv_heads": 1},
    "attention_window": {"window": 2},
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


@pytest.mark.parametrize("field", ATTNAX_VISION)
def test_attnax_vision(field):
    ours = ATTNAX_VISION[field]
    row = rows("VisionTransformerConfig")[field]
    assert any(name in row for name in ours), f"{field} -> {row} does not name {list(ours)}"
    eqx.filter_eval_shape(VisionTransformer, ViTConfig(**TINY_VISION | ours), key=jr.key(0))


def test_attnax_vision_is_complete():
    known = ATTNAX_VISION.keys() | {"VisionTransformerConfig", "linear_attention_chunk_size"}
    assert rows("VisionTransformerConfig").keys() == known


@pytest.mark.parametrize("field", ATTNAX_BLOCK)
def test_attnax_blocks(field):
    ours = {"key": jr.key(0)} | ATTNAX_BLOCK[field]
    row = rows("EncoderBlock, DecoderBlock")[field]
    assert not ATTNAX_BLOCK[field] or any(name in row for name in ours)
    for build in (encoder_block, decoder_block):
        eqx.filter_eval_shape(build, 8, 2, 8, **ours)


def test_attnax_blocks_are_complete():
    assert rows("EncoderBlock, DecoderBlock").keys() == ATTNAX_BLOCK.keys()


TINY_LLAMA = {"vocab_size": 7, "d_model": 8, "num_heads": 2, "num_layers": 2, "max_len": 8}
PENZAI = {
    "num_kv_heads": {"num_kv_heads": 1},
    "query_head_multiplier": {"num_kv_heads": 2, "num_heads": 4},
    "embedding_dim": {"d_model": 16},
    "projection_dim": {"head_dim": 6},
    "mlp_hidden_dim": {"d_ff": 12},
    "num_decoder_blocks": {"num_layers": 3},
    "vocab_size": {"vocab_size": 9},
    "mlp_variant": {"activation": "geglu_tanh"},
    "tie_embedder_and_logits": {"tie_embeddings": True, "embedding_scale": 8**0.5},
    "rope_wavelength": {"rope_theta": 100.0},
    "rms_norm_eps": {"norm_eps": 1e-6},
    "attention_type": {"layer_types": ("sliding", "global"), "window": 3},
    "use_post_attn_norm": {"post_attention_norm": True},
    "use_post_ffw_norm": {"post_mlp_norm": True},
    "final_logit_softcap": {"logit_soft_cap": 30.0},
    "attn_logits_soft_cap": {"attention_soft_cap": 50.0},
    "query_scaling_factor": {"query_scale": 0.2},
    "parameter_dtype": {"param_dtype": "bfloat16"},
    "activation_dtype": {"dtype": "bfloat16"},
    "use_layer_stack": {"unroll": 2},
    "use_qk_norm": {"qk_norm": True},
    "global_scale_factor": {"rope_scaling": nn.LinearScaling(factor=8.0)},
    "local_rope_wavelength": {"rope_local_theta": 50.0, "layer_types": "sliding", "window": 3},
}
XLSTM_JAX = {
    "vocab_size": {"vocab_size": 9},
    "embedding_dim": {"d_model": 16},
    "num_blocks": {"num_layers": 3},
    "head_dim": {"head_dim": 2, "num_heads": 4},
    "qk_norm": {"qk_norm": True},
    "causal": {"causal": False},
    "theta": {"rope_theta": 100.0},
    "ffn_multiple_of": {"ffn_multiple_of": 5},
    "ffn_dim_multiplier": {"ffn_dim_multiplier": 4.0},
    "use_bias": {"use_bias": True},
    "scan_blocks": {"unroll": 2},
    "attention_backend": {"attention_implementation": "chunked"},
    "mask_across_document_boundaries": {"document_start_id": 1},
    "dtype": {"dtype": "bfloat16"},
    "dropout_rate": {"dropout_rate": 0.3},
    "add_embedding_dropout": {"embedding_dropout_rate": 0.3},
    "logits_soft_cap": {"logit_soft_cap": 30.0},
}


@pytest.mark.parametrize(
    ("heading", "field", "ours"),
    [("LlamalikeTransformerConfig", *item) for item in PENZAI.items()]
    + [("LlamaConfig", *item) for item in XLSTM_JAX.items()],
)
def test_llama_configs(heading, field, ours):
    row = rows(heading)[field]
    assert any(name in row for name in ours), f"{field} -> {row} does not name {list(ours)}"
    programs = []
    for options in (TINY_LLAMA, TINY_LLAMA | ours):
        model = eqx.filter_eval_shape(Llama, LlamaConfig(**options), key=jr.key(0))
        arrays, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
        tokens = jax.ShapeDtypeStruct((5,), "int32")
        run = eqx.Partial(_run, static)
        program = jax.make_jaxpr(run)(arrays, tokens, jr.key(0))
        programs.append((str(program), [np.asarray(x).tolist() for x in program.consts]))
    assert programs[0] != programs[1]


def _run(static, arrays, tokens, key):
    return eqx.combine(arrays, static)(tokens, key=key)


def test_llama_configs_are_complete():
    assert rows("LlamalikeTransformerConfig").keys() == PENZAI.keys()
    assert rows("LlamaConfig").keys() == XLSTM_JAX.keys() | {"parallel"}


# What noether's configurations say, and how it is said here.
NOETHER_ATTENTION = {
    "hidden_dim": {"d_model": 16},
    "num_heads": {"num_heads": 4},
    "head_dim": {"head_dim": 6},
    "use_rope": {"rope": nn.AxialRoPE(2)},
    "qk_norm": {"qk_norm": True},
    "bias": {"use_bias": True},
    "dropout": {"dropout_rate": 0.5},
}
INITIALIZERS = jax.nn.initializers
NOETHER_INIT = {
    "truncnormal002": INITIALIZERS.truncated_normal(0.02, lower=-100, upper=100),
    "torch": INITIALIZERS.variance_scaling(1 / 3, "fan_in", "uniform"),
    "xavier_uniform": INITIALIZERS.glorot_uniform(),
    "zeros": INITIALIZERS.zeros,
}


@pytest.mark.parametrize("field", NOETHER_ATTENTION)
def test_noether_attention(field):
    ours = NOETHER_ATTENTION[field]
    assert any(name in rows("AttentionConfig")[field] for name in ours)
    patterns = (nn.AttentionPattern(("a",), ("a",)),)
    layers = {
        nn.Attention: {"d_model": 8, "num_heads": 2},
        nn.MixedAttention: {"d_model": 8, "num_heads": 2, "patterns": patterns},
    }
    for layer, tiny in layers.items():
        made, plain = (
            eqx.filter_eval_shape(lambda key, x=x, f=layer: f(**x, key=key), jr.key(0))
            for x in (tiny | ours, tiny)
        )
        assert jax.tree.flatten(made) != jax.tree.flatten(plain)


@pytest.mark.parametrize("mode", NOETHER_INIT)
def test_noether_init(mode):
    row = rows("InitWeightsMode")[mode]
    made = eval(row.strip("`"), dict(vars(INITIALIZERS)))
    shape = (8, 8)
    a, b = (init(jr.key(0), shape, float) for init in (made, NOETHER_INIT[mode]))
    assert (a == b).all()
    layer = nn.reinitialized(nn.Linear(8, 8, key=jr.key(1)), made, key=jr.key(0))
    assert layer.weight.shape == shape


def test_noether_is_complete():
    assert rows("AttentionConfig").keys() == NOETHER_ATTENTION.keys() | {"init_weights"}
    assert rows("InitWeightsMode").keys() == NOETHER_INIT.keys()


def test_noether_tokens():
    spec = nn.TokenSpec.from_dict({"surface": 3})
    assert spec.to_dict() == {"surface": 3} and nn.TokenSpec("anything", None).size is None
    pattern = nn.AttentionPattern(query_tokens=["surface"], key_value_tokens=["surface"])
    ours = {"TokenSpec": spec, "AttentionPattern": pattern}
    for field, row in rows("TokenSpec, AttentionPattern").items():
        assert row.strip("`") == field
        owner, _, attribute = field.partition(".")
        assert not attribute or hasattr(ours[owner], attribute)


@pytest.mark.parametrize("heading", ["Modules and models", "torch.nn", "flax.nnx"])
def test_names_exist(heading):
    found = 0
    for row in rows(heading).values():
        for module, name in re.findall(r"`(\w+)\.(\w+)`", row):
            assert hasattr(getattr(eqx_transformer, module), name), f"{module}.{name}"
            found += 1
    assert found >= 10
