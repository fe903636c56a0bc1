"""The published vision families compute what their reference implementations do.

`vit_golden.py` made the weights and the expected outputs.
"""

import functools
import operator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.models import CLIP, CLIPConfig, TransformerConfig, VisionTransformer, ViTConfig
from eqx_transformer.nn import Linear, bicubic_matrix
from models.vit_golden import PATH

GOLDEN = np.load(PATH)

SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "d_model": 16,
    "num_heads": 2,
    "num_layers": 2,
    "d_ff": 24,
    "norm_eps": 1e-4,
}
CONFIGS = {
    "deit": ViTConfig(**SIZES, distillation_token=True, num_classes=5),
    "beit": ViTConfig(
        **SIZES,
        positions="none",
        relative_bias=True,
        k_bias=False,
        layer_scale=0.5,
        pooling="mean",
        final_norm="pooled",
    ),
    "dinov2_registers": ViTConfig(
        **SIZES | {"d_ff": None},
        num_registers=3,
        layer_scale=1.0,
        activation="swiglu",
        interpolation="bicubic_antialias",
    ),
    "dinov3": ViTConfig(
        **SIZES | {"norm_eps": 1e-5},
        positions="rope",
        num_registers=3,
        layer_scale=1.0,
        k_bias=False,
        activation="swiglu",
    ),
    "siglip": CLIPConfig(
        vision=ViTConfig(**SIZES, class_token=False, pooling="attention", activation="gelu_tanh"),
        text=TransformerConfig(
            vocab_size=20,
            d_model=16,
            num_heads=2,
            num_layers=2,
            d_ff=24,
            max_len=6,
            norm_eps=1e-6,
            activation="gelu_tanh",
            positions="learned",
            pad_token_id=None,
            dropout_rate=0.0,
        ),
        d_embedding=16,
        text_causal=False,
        text_pooling="last",
        image_projection=False,
        text_projection_bias=True,
        loss="sigmoid",
    ),
}

# Where tensors of the files go. In names of blocks, `*` is the layer.
BLOCK = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "attention.q_proj": "attention.q_proj",
    "attention.k_proj": "attention.k_proj",
    "attention.v_proj": "attention.v_proj",
    "attention.o_proj": "attention.o_proj",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.out_proj": "attention.o_proj",
    "attention.attention.relative_position_bias.relative_position_bias_table": (
        "attention.score_mod.table"
    ),
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "mlp.weights_out": "mlp.down_proj",
    "layernorm_before": "attention_residual.norm",
    "layernorm_after": "mlp_residual.norm",
    "layer_norm1": "attention_residual.norm",
    "layer_norm2": "mlp_residual.norm",
    "norm1": "attention_residual.norm",
    "norm2": "mlp_residual.norm",
    "layer_scale1.lambda1": "attention_residual.scale.weight",
    "layer_scale2.lambda1": "mlp_residual.scale.weight",
    "lambda_1": "attention_residual.scale.weight",
    "lambda_2": "mlp_residual.scale.weight",
}
REST = {
    "embeddings.cls_token": "class_token",
    "embeddings.distillation_token": "distillation_token",
    "embeddings.register_tokens": "registers",
    "embeddings.position_embeddings": "positions.weight",
    "embeddings.position_embedding.weight": "positions.weight",
    "embeddings.patch_embeddings.projection": "patch_embedding.proj",
    "embeddings.patch_embeddings": "patch_embedding.proj",
    "embeddings.patch_embedding": "patch_embedding.proj",
    "layernorm": "norm",
    "norm": "norm",
    "pooler.layernorm": "norm",
    "post_layernorm": "norm",
    "cls_classifier": "head",
    "distillation_classifier": "distillation_head",
    "head.probe": "pooling.query",
    "head.attention.q_proj": "pooling.attention.q_proj",
    "head.attention.k_proj": "pooling.attention.k_proj",
    "head.attention.v_proj": "pooling.attention.v_proj",
    "head.attention.out_proj": "pooling.attention.o_proj",
    "head.layernorm": "pooling.norm",
    "head.mlp.fc1": "pooling.mlp.up_proj",
    "head.mlp.fc2": "pooling.mlp.down_proj",
}
TEXT = {
    "embeddings.token_embedding.weight": "embedding.embedding.weight",
    "embeddings.position_embedding.weight": "embedding.positions.table.weight",
    "final_layer_norm": "norm",
}
TOP = {"logit_scale": "logit_scale", "logit_bias": "logit_bias", "text_model.head": "text_proj"}


def split(weights):
    """Fused tensors taken apart."""
    out = {}
    for name, x in weights.items():
        if ".mlp.weights_in." in name:
            for part, half in zip(("gate_proj", "up_proj"), np.split(x, 2), strict=True):
                out[name.replace("weights_in", part)] = half
        elif ".in_proj_" in name:
            for part, third in zip("qkv", np.split(x, 3), strict=True):
                out[name.replace("in_proj_", f"{part}_proj.")] = third
        elif not name.endswith("mask_token"):
            out[name] = x
    return out


def destination(name):
    """Path in our model, and the layer, of a tensor of a file."""
    name = name.removeprefix("deit.")
    table, prefix = REST, ""
    if name.startswith("text_model.") and not name.startswith("text_model.head"):
        name, table, prefix = name.removeprefix("text_model."), TEXT, "text_tower."
    elif name.startswith("vision_model."):
        name, prefix = name.removeprefix("vision_model."), "image_tower."
    elif name.startswith(("logit_", "text_model.head")):
        table = TOP
    layer = None
    for start in ("encoder.layer.", "encoder.layers.", "layer."):
        if name.startswith(start):
            layer, _, name = name.removeprefix(start).partition(".")
            table, prefix = BLOCK, prefix + "stack.blocks."
            break
    if name in table:
        return prefix + table[name], layer
    module, _, leaf = name.rpartition(".")
    return f"{prefix}{table[module]}.{leaf}", layer


def load(family):
    config = CONFIGS[family]
    make = CLIP if isinstance(config, CLIPConfig) else VisionTransformer
    model = make(config, key=jr.key(0))
    start = f"{family}/weights/"
    weights = {k.removeprefix(start): GOLDEN[k] for k in GOLDEN.files if k.startswith(start)}
    columns = {}
    for name, x in split(weights).items():
        path, layer = destination(name)
        owner = operator.attrgetter(path.rpartition(".")[0])(model) if "." in path else None
        if isinstance(owner, Linear) and path.endswith("weight"):
            x = x.reshape(len(x), -1).T
        columns.setdefault(path, {})[layer] = x
    for path, layers in columns.items():
        where = operator.attrgetter(path)
        value = (
            np.stack([layers[i] for i in sorted(layers)]) if None not in layers else layers[None]
        )
        assert value.size == where(model).size
        value = jnp.asarray(value.reshape(where(model).shape))
        model = eqx.tree_at(where, model, value)
    # Nothing is left as it was built.
    leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(model, eqx.is_inexact_array))[0]
    paths = {jax.tree_util.keystr(path).lstrip(".") for path, _ in leaves}
    assert paths == columns.keys()
    return model


CASES = [(f, case) for f in CONFIGS for case in ("same", "other") if (f, case) != ("beit", "other")]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_family(family, case):
    model = load(family)
    start = f"{family}/{case}/"
    golden = {k.removeprefix(start): GOLDEN[k] for k in GOLDEN.files if k.startswith(start)}
    image = jnp.asarray(golden["pixel_values"][0])
    if family == "siglip":
        texts = jax.vmap(model.embed_text)(jnp.asarray(golden["input_ids"].astype(np.int32)))
        images = eqx.filter_jit(model.embed_image)(image)[None]
        scores = model.scores(images, texts)
        got = {"logits_per_image": scores, "image_embeds": images, "text_embeds": texts}
    elif family == "deit":
        got = {"logits": eqx.filter_jit(model)(image)[None]}
    else:
        tokens = eqx.filter_jit(model.encode)(image)
        got = {"last_hidden_state": tokens.all[None], "pooler_output": model.pool(tokens)[None]}
    assert {f"out/{k}" for k in got} == {k for k in golden if k.startswith("out/")}
    for k, v in got.items():
        np.testing.assert_allclose(v, golden[f"out/{k}"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(5, 4), (7, 9), (3, 2), (1, 5), (10, 3)])
def test_bicubic_interpolation(size, antialias):
    picture = GOLDEN["interpolation/picture"]
    matrix = functools.partial(bicubic_matrix, antialias=antialias)
    rows, columns = (matrix(n, new) for n, new in zip(picture.shape[1:], size, strict=True))
    got = np.einsum("ri,cj,dij->drc", rows, columns, picture)
    expected = GOLDEN[f"interpolation/{size[0]}x{size[1]}/{antialias}"]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
