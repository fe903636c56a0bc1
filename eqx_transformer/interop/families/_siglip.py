"""SigLIP: CLIP that scores every pair on its own; and its tower for images alone."""

from typing import Any, Final

from ...models import CLIP, CLIPConfig, VisionTransformer, ViTConfig
from .._family import Family, Table
from .._fields import Fields
from .._names import Into
from . import _vit
from ._clip import (
    IGNORED,
    IMAGE_DEFAULTS,
    TEXT_NAMES,
    differences,
    image_names,
    read_image_tower,
    read_text_tower,
    tower,
    write_image_tower,
    write_text_tower,
)

_SAME: Final = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_IMAGE_DEFAULTS: Final = {**IMAGE_DEFAULTS, "patch_size": 16, **_SAME}
_TEXT_DEFAULTS: Final = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 64,
    **_SAME,
}


def _image_names(config: ViTConfig, there: str, here: str) -> dict[str, str | Into]:
    pooling = f"{here}pooling"
    in_proj = [f"{pooling}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    return {
        **image_names(config, there, here),
        f"{there}head.probe": Into(f"{pooling}.query", shape=(1, 1, config.d_model)),
        f"{there}head.attention.in_proj": Into(*in_proj, joint="_"),
        f"{there}head.attention.out_proj": f"{pooling}.attention.o_proj",
        f"{there}head.layernorm": f"{pooling}.norm",
        f"{there}head.mlp.fc1": f"{pooling}.mlp.up_proj",
        f"{there}head.mlp.fc2": f"{pooling}.mlp.down_proj",
    }


def _names(config: CLIPConfig) -> Table:
    return {
        **_image_names(config.vision, "vision_model.", "image_tower."),
        **TEXT_NAMES,
        "text_model.head": "text_proj",
        "logit_scale": Into("logit_scale", shape=(1,)),
        "logit_bias": Into("logit_bias", shape=(1,)),
    }


def _read_vision(fields: Fields) -> ViTConfig:
    fields.choose("vision_use_head", {True: None}, True)
    return read_image_tower(fields, _IMAGE_DEFAULTS, class_token=False, pooling="attention")


def _read(fields: Fields) -> CLIPConfig:
    text, vision = tower(fields, "text_config"), tower(fields, "vision_config")
    size = text.take("projection_size", None)
    text_config = read_text_tower(text, _TEXT_DEFAULTS)
    config = CLIPConfig(
        vision=_read_vision(vision),
        text=text_config,
        d_embedding=text_config.d_model if size is None else size,
        text_causal=False,
        text_pooling="last",
        image_projection=False,
        text_projection_bias=True,
        loss="sigmoid",
    )
    text.finish()
    vision.finish()
    return config


def _write_vision(config: ViTConfig) -> dict[str, Any]:
    return write_image_tower(config) | {"model_type": "siglip_vision_model"}


def _write(config: CLIPConfig) -> dict[str, Any]:
    return {
        "text_config": {
            **write_text_tower(config.text),
            "projection_size": config.d_embedding,
            "model_type": "siglip_text_model",
        },
        "vision_config": _write_vision(config.vision),
    }


SIGLIP = Family(
    model_type="siglip",
    architecture="SiglipModel",
    model=CLIP,
    read=_read,
    write=_write,
    differences=differences,
    names=_names,
    ignored=IGNORED,
)
SIGLIP_VISION = Family(
    model_type="siglip_vision_model",
    architecture="SiglipVisionModel",
    model=VisionTransformer,
    read=_read_vision,
    write=_write_vision,
    differences=_vit.differences,
    names=lambda config: _image_names(config, "", ""),
    renamed=((r"^vision_model\.", ""),),
    ignored=IGNORED,
)
