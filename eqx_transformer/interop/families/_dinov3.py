"""DINOv3: rotated queries and keys in place of position vectors."""

from typing import Any, Final

from ...models import VisionTransformer, ViTConfig
from ...models._vocabulary import GATED
from .._family import Family, Table
from .._fields import Fields
from ._decoder import read_activation, write_activation
from ._dinov2 import RESIDUAL_NAMES
from ._vit import (
    IGNORED,
    differences,
    patch_names,
    read_sizes,
    token_names,
    write_layer_scale,
    write_sizes,
)

_LAYER: Final = "layer.{layer}."
_LAYER_NAMES: Final = {
    **{
        f"{_LAYER}{part}.{name}": f"stack.{{layer}}.{part}.{name}"
        for part, names in {
            "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("gate_proj", "up_proj", "down_proj"),
        }.items()
        for name in names
    },
    **{_LAYER + there: here for there, here in RESIDUAL_NAMES.items()},
}


def _names(config: ViTConfig) -> Table:
    return {
        **patch_names(config, "embeddings.patch_embeddings"),
        **token_names(config),
        **_LAYER_NAMES,
        "norm": "norm",
    }


def _same(fields: Fields, *names: str) -> bool:
    """The value of several fields, which must be the same here."""
    values = {name: fields.take(name, True) for name in names}
    if len(set(values.values())) > 1:
        raise ValueError(f"{values} must be the same.")
    return values[names[0]]


def _read(fields: Fields) -> ViTConfig:
    # How coordinates are perturbed in training.
    fields.ignore("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
    gated = fields.take("use_gated_mlp", False)
    return ViTConfig(
        **read_sizes(fields),
        d_ff=fields.take("intermediate_size"),
        activation=read_activation(fields, "hidden_act", "gelu", gated=gated),
        num_registers=fields.take("num_register_tokens", 0),
        positions="rope",
        rope_theta=fields.take("rope_theta", 100.0),
        use_bias=_same(fields, "proj_bias", "mlp_bias"),
        qkv_bias=_same(fields, "query_bias", "value_bias"),
        k_bias=fields.take("key_bias", False),
        norm_eps=fields.take("layer_norm_eps", 1e-5),
        layer_scale=fields.take("layerscale_value", 1.0),
    )


def _write(config: ViTConfig) -> dict[str, Any]:
    qkv_bias = config.use_bias if config.qkv_bias is None else config.qkv_bias
    return write_sizes(config) | {
        "intermediate_size": config.inner_size,
        "hidden_act": write_activation(config),
        "use_gated_mlp": config.activation in GATED,
        "num_register_tokens": config.num_registers,
        "rope_theta": config.rope_theta,
        "proj_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "query_bias": qkv_bias,
        "value_bias": qkv_bias,
        "key_bias": qkv_bias if config.k_bias is None else config.k_bias,
        "layer_norm_eps": config.norm_eps,
        "layerscale_value": write_layer_scale(config),
    }


DINOV3 = Family(
    model_type="dinov3_vit",
    architecture="DINOv3ViTModel",
    model=VisionTransformer,
    read=_read,
    write=_write,
    differences=differences,
    names=_names,
    ignored=IGNORED,
)
