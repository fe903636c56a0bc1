"""What published vision models say of themselves, and what is refused."""

import json
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from interop.test_parity import lay_out
from safetensors.numpy import load_file, save_file

from eqx_transformer.interop import load_pretrained, save_pretrained
from eqx_transformer.interop._fields import Fields
from eqx_transformer.interop.families import FAMILIES
from eqx_transformer.models import CLIPConfig, TransformerConfig, VisionTransformer, ViTConfig

# Not `ROOT` of the suite, which may be another directory.
PARITY = Path(__file__).parent / "parity"

TINY = ViTConfig(image_size=8, patch_size=4, d_model=16, num_layers=2, num_heads=2, d_ff=64)


def read(folder):
    return json.loads((PARITY / folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("folder", "prefix", "buffer"),
    [
        ("vit", "vit.", "vit.embeddings.mask_token"),
        ("dinov2", "dinov2.", None),
        ("beit", "beit.", "beit.encoder.layer.0.attention.attention.relative_position_index"),
        ("clip", "", "text_model.embeddings.position_ids"),
        ("siglip", "", "vision_model.embeddings.position_ids"),
    ],
)
def test_prefixes_and_buffers(folder, prefix, buffer, tmp_path):
    """As other releases of transformers wrote the same weights."""
    target = lay_out(PARITY / folder, tmp_path / "model")
    tensors = load_file(target / "model.safetensors")
    tensors = {prefix + name: x for name, x in tensors.items()}
    if buffer is not None:
        tensors[buffer] = np.arange(16, dtype=np.int64)[None]
    save_file(tensors, target / "model.safetensors")
    assert eqx.tree_equal(load_pretrained(target), load_pretrained(PARITY / folder))


@pytest.mark.parametrize(
    ("folder", "path", "value", "message"),
    [
        ("vit", ["rotate"], 3, "rotate=3"),
        ("vit", ["hidden_act"], "mish", "hidden_act='mish'"),
        ("vit", ["pooler_act"], "gelu", "pooler_act='gelu'"),
        ("clip", ["text_config", "rotate"], 3, "text_config has fields .* rotate=3"),
        ("clip", ["vision_config", "rotate"], 3, "vision_config has fields .* rotate=3"),
        ("siglip", ["vision_config", "vision_use_head"], False, "vision_use_head=False"),
        ("siglip", ["text_config", "projection_size"], 20, "d_embedding=20"),
        ("dinov3_gated", ["value_bias"], True, "'value_bias': True} must be the same"),
        ("beit", ["use_shared_relative_position_bias"], True, "both true"),
    ],
)
def test_what_is_not_understood_is_refused(folder, path, value, message, tmp_path):
    target = lay_out(PARITY / folder, tmp_path / "model")
    fields = inner = read(folder)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    (target / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load_pretrained(target)


def test_a_head_that_is_not_known_is_refused(tmp_path):
    target = lay_out(PARITY / "deit_classifier", tmp_path / "model")
    fields = read("deit_classifier") | {"architectures": ["DeiTForImageClassification"]}
    (target / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"unexpected: cls_classifier\.weight"):
        load_pretrained(target)


def test_a_backbone_without_a_norm(tmp_path):
    target = lay_out(PARITY / "beit", tmp_path / "model")
    tensors = load_file(target / "model.safetensors")
    tensors = {name: x for name, x in tensors.items() if not name.startswith("pooler.")}
    save_file(tensors, target / "model.safetensors")
    fields = read("beit") | {"architectures": ["BeitBackbone"]}
    (target / "config.json").write_text(json.dumps(fields))
    model = load_pretrained(target)
    assert model.norm is None and eqx.tree_equal(
        model.stack, load_pretrained(PARITY / "beit").stack
    )
    save_pretrained(model, tmp_path / "again")
    assert eqx.tree_equal(load_pretrained(tmp_path / "again"), model)


def test_towers_that_say_little_are_those_of_the_first_release():
    towers = {"text_config": {"model_type": "x"}, "vision_config": {"model_type": "x"}}
    siglip = FAMILIES["siglip"].read(Fields(towers, "config.json"))
    clip = FAMILIES["clip"].read(Fields({}, "config.json"))
    text = {"positions": "learned", "pad_token_id": None, "dropout_rate": 0.0, "num_layers": 12}
    assert siglip == CLIPConfig(
        vision=ViTConfig(d_ff=3072, class_token=False, pooling="attention", activation="gelu_tanh"),
        text=TransformerConfig(
            **text,
            vocab_size=32_000,
            d_model=768,
            num_heads=12,
            d_ff=3072,
            max_len=64,
            norm_eps=1e-6,
            activation="gelu_tanh",
        ),
        d_embedding=768,
        text_causal=False,
        text_pooling="last",
        image_projection=False,
        text_projection_bias=True,
        loss="sigmoid",
    )
    assert clip == CLIPConfig(
        vision=ViTConfig(
            patch_size=32,
            d_ff=3072,
            norm_eps=1e-5,
            activation="quick_gelu",
            embedding_norm=True,
            patch_bias=False,
            final_norm="pooled",
        ),
        text=TransformerConfig(
            **text,
            vocab_size=49_408,
            d_model=512,
            num_heads=8,
            d_ff=2048,
            max_len=77,
            norm_eps=1e-5,
            activation="quick_gelu",
        ),
        eos_token_id=49_407,
    )


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "vit"),
        ({"num_classes": 3, "dropout_rate": 0.1, "drop_path_rate": 0.1}, "vit"),
        ({"distillation_token": True, "num_classes": 3}, "deit"),
        ({"layer_scale": 0.1}, "dinov2"),
        ({"layer_scale": 0.1, "activation": "swiglu", "d_ff": 48}, "dinov2"),
        (
            {"layer_scale": 0.1, "num_registers": 2, "interpolation": "bicubic_antialias"},
            "dinov2_with_registers",
        ),
        (
            {"layer_scale": 0.1, "positions": "rope", "activation": "geglu", "d_ff": 20},
            "dinov3_vit",
        ),
        ({"k_bias": False, "relative_bias": True, "positions": "none"}, "beit"),
        ({"class_token": False, "pooling": "attention"}, "siglip_vision_model"),
        (
            {"embedding_norm": True, "patch_bias": False, "final_norm": "pooled"},
            "clip_vision_model",
        ),
    ],
    ids=str,
)
def test_a_model_is_saved_as_the_family_that_computes_it(changes, family, tmp_path):
    model = VisionTransformer(TINY.replace(**changes), key=jax.random.key(0))
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    again = load_pretrained(tmp_path)
    ours, theirs = (jax.tree.leaves(eqx.filter(m, eqx.is_inexact_array)) for m in (model, again))
    for x, y in zip(ours, theirs, strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize(
    "changes",
    [{"positions": "rope"}, {"positions": "sinusoidal"}, {"window": 1}, {"qk_norm": True}],
    ids=str,
)
def test_what_no_family_computes_is_not_saved(changes, tmp_path):
    """A model with rotations but no scales among them: DINOv3 would begin with some."""
    model = VisionTransformer(TINY.replace(**changes), key=jax.random.key(0))
    with pytest.raises(ValueError, match="no family for this VisionTransformer"):
        save_pretrained(model, tmp_path)
