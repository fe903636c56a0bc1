"""CLIP: a tower for images and one for texts; and that for images alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from ...models import CLIP as Model
from ...models import CLIPConfig, TransformerConfig, VisionTransformer, ViTConfig
from .._family import Family, Table
from .._fields import Fields
from .._names import Into
from . import _transformer, _vit
from ._decoder import read_activation, write_activation

_TEXT_SIZES: Final = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_heads": "num_attention_heads",
    "max_len": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
}
_LAYER: Final = {
    "layer_norm1": "attention_residual.norm",
    "layer_norm2": "mlp_residual.norm",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.out_proj": "attention.o_proj",
}
# Defaults for missing fields of a tower: files omit those that are as in the first release.
IMAGE_DEFAULTS: Final = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT_DEFAULTS: Final = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
IGNORED: Final = (r"(.*\.)?embeddings\.position_ids",)


def read_image_tower(fields: Fields, defaults: Mapping[str, Any], **others: Any) -> ViTConfig:
    """The numbers of a tower for images."""
    for name, value in defaults.items():
        fields.default(name, value)
    # Said by the model as a whole.
    fields.ignore("projection_dim", "dropout", "tie_word_embeddings")
    return ViTConfig(
        **_vit.read_sizes(fields),
        d_ff=fields.take("intermediate_size"),
        activation=read_activation(fields, "hidden_act", "gelu", gated=False),
        norm_eps=fields.take("layer_norm_eps"),
        **others,
    )


def write_image_tower(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `read_image_tower`."""
    return {
        **_vit.write_sizes(config),
        "intermediate_size": config.inner_size,
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_eps,
    }


def read_text_tower(fields: Fields, defaults: Mapping[str, Any]) -> TransformerConfig:
    """The numbers of a tower for texts."""
    for name, value in defaults.items():
        fields.default(name, value)
    # Said by the model as a whole.
    fields.ignore("projection_dim", "dropout", "tie_word_embeddings")
    return TransformerConfig(
        **{ours: fields.take(name) for ours, name in _TEXT_SIZES.items()},
        num_layers=fields.count("num_hidden_layers"),
        activation=read_activation(fields, "hidden_act", "gelu", gated=False),
        positions="learned",
        pad_token_id=None,
        dropout_rate=0.0,
    )


def write_text_tower(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_text_tower`."""
    return {
        **{name: getattr(config, ours) for ours, name in _TEXT_SIZES.items()},
        "num_hidden_layers": config.num_layers,
        "hidden_act": write_activation(config),
    }


def _layers(there: str, here: str) -> dict[str, str | Into]:
    return {
        f"{there}encoder.layers.{{layer}}.{name}": f"{here}stack.{{layer}}.{ours}"
        for name, ours in _LAYER.items()
    }


def image_names(config: ViTConfig, there: str, here: str) -> dict[str, str | Into]:
    """The names of a tower for images; `there` and `here` are their prefixes."""
    return {
        **_vit.patch_names(config, f"{there}embeddings.patch_embedding", here),
        f"{there}embeddings.class_embedding": f"{here}class_token",
        f"{there}embeddings.position_embedding.weight": f"{here}positions.weight",
        f"{there}pre_layrnorm": f"{here}embedding_norm",
        f"{there}post_layernorm": f"{here}norm",
        **_layers(there, here),
    }


TEXT_NAMES: Final[Table] = {
    "text_model.embeddings.token_embedding": "text_tower.embedding.embedding",
    "text_model.embeddings.position_embedding": "text_tower.embedding.positions.table",
    "text_model.final_layer_norm": "text_tower.norm",
    **_layers("text_model.", "text_tower."),
}


def _names(config: CLIPConfig) -> Table:
    return {
        **image_names(config.vision, "vision_model.", "image_tower."),
        **TEXT_NAMES,
        "visual_projection": "image_proj",
        "text_projection": "text_proj",
        "logit_scale": "logit_scale",
    }


def tower(fields: Fields, name: str) -> Fields:
    """The fields of a tower; empty if it is missing."""
    return fields.nested(name) or Fields({}, name)


def _read_vision(fields: Fields) -> ViTConfig:
    parts: dict[str, Any] = {"embedding_norm": True, "patch_bias": False, "final_norm": "pooled"}
    return read_image_tower(fields, IMAGE_DEFAULTS, **parts)


def _read(fields: Fields) -> CLIPConfig:
    # The last two are copies of the towers' fields.
    fields.ignore("logit_scale_init_value", "text_config_dict", "vision_config_dict")
    text, vision = tower(fields, "text_config"), tower(fields, "vision_config")
    end = text.take("eos_token_id", 49_407)
    # Old files have 2 here, and mean the largest id.
    pooling: dict[str, Any] = {"text_pooling": "largest"} if end == 2 else {"eos_token_id": end}
    config = CLIPConfig(
        vision=_read_vision(vision),
        text=read_text_tower(text, _TEXT_DEFAULTS),
        d_embedding=fields.take("projection_dim", 512),
        **pooling,
    )
    text.finish()
    vision.finish()
    return config


def _write_vision(config: ViTConfig) -> dict[str, Any]:
    return write_image_tower(config) | {"model_type": "clip_vision_model"}


def _write(config: CLIPConfig) -> dict[str, Any]:
    end = config.eos_token_id
    return {
        "projection_dim": config.d_embedding,
        "text_config": {
            **write_text_tower(config.text),
            "eos_token_id": 2 if end is None else end,
            "model_type": "clip_text_model",
        },
        "vision_config": _write_vision(config.vision),
    }


def differences(a: CLIPConfig, b: CLIPConfig) -> list[str]:
    """The fields that make two models compute different things."""
    names = [field.name for field in dataclasses.fields(CLIPConfig)]
    return [
        *(f"vision.{name}" for name in _vit.differences(a.vision, b.vision)),
        *(f"text.{name}" for name in _transformer.differences(a.text, b.text)),
        *(
            name
            for name in names
            if name not in ("vision", "text") and getattr(a, name) != getattr(b, name)
        ),
    ]


CLIP = Family(
    model_type="clip",
    architecture="CLIPModel",
    model=Model,
    read=_read,
    write=_write,
    differences=differences,
    names=_names,
    ignored=IGNORED,
)
CLIP_VISION = Family(
    model_type="clip_vision_model",
    architecture="CLIPVisionModel",
    model=VisionTransformer,
    read=_read_vision,
    write=_write_vision,
    differences=_vit.differences,
    names=lambda config: image_names(config, "", ""),
    renamed=((r"^vision_model\.", ""),),
    ignored=IGNORED,
)
