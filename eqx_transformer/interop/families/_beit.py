"""BEiT: a bias for every offset in rows and columns, and no biases of keys."""

from typing import Any, Final

from ...models import VisionTransformer, ViTConfig
from .._family import Family
from .._fields import Fields
from .._names import Into
from ._decoder import read_activation, write_activation
from ._vit import (
    HERE,
    IGNORED,
    LAYER_NAMES,
    differences,
    embedding_names,
    read_num_classes,
    read_sizes,
    with_prefix,
    write_num_classes,
    write_sizes,
)

_TABLE: Final = "relative_position_bias.relative_position_bias_table"
_LAYER_NAMES: Final = {
    **LAYER_NAMES,
    f"{HERE}attention.attention.{_TABLE}": "stack.{layer}.attention.score_mod.table",
    f"{HERE}lambda_1": "stack.{layer}.attention_residual.scale.weight",
    f"{HERE}lambda_2": "stack.{layer}.mlp_residual.scale.weight",
}
_IGNORED: Final = (*IGNORED, r".*\.relative_position_index")


def _names(config: ViTConfig) -> dict[str, str | Into]:
    norm = "pooler.layernorm" if config.final_norm == "pooled" else "layernorm"
    layers = _LAYER_NAMES
    if config.share_relative_bias:
        layers = {there: here.replace("stack.", "stack.stack.") for there, here in layers.items()}
        layers[f"encoder.{_TABLE}"] = "stack.score_mod.table"
    return {**embedding_names(config), **layers, norm: "norm"}


def _read(fields: Fields, **head: Any) -> ViTConfig:
    # Fields of other heads, and of the tokenizer of patches.
    fields.ignore("vocab_size", "pool_scales", "semantic_loss_ignore_index", "use_auxiliary_head")
    fields.ignore("auxiliary_loss_weight", "auxiliary_channels", "auxiliary_num_convs")
    fields.ignore("auxiliary_concat_input")
    own = fields.take("use_relative_position_bias", False)
    shared = fields.take("use_shared_relative_position_bias", False)
    if own and shared:
        raise ValueError(
            "use_relative_position_bias and use_shared_relative_position_bias are both true; "
            "only one of them is supported."
        )
    absolute = fields.take("use_absolute_position_embeddings", False)
    mean = fields.take("use_mean_pooling", True)
    scale = fields.take("layer_scale_init_value", 0.1)
    return ViTConfig(
        **read_sizes(fields),
        d_ff=fields.take("intermediate_size"),
        activation=read_activation(fields, "hidden_act", "gelu", gated=False),
        norm_eps=fields.take("layer_norm_eps", 1e-12),
        k_bias=False,
        relative_bias=own or shared,
        share_relative_bias=shared,
        positions="learned" if absolute else "none",
        pooling="mean" if mean else "first",
        final_norm="pooled" if mean else "tokens",
        layer_scale=scale if scale > 0 else None,
        **head,
    )


def _write(config: ViTConfig) -> dict[str, Any]:
    return write_sizes(config) | {
        "intermediate_size": config.inner_size,
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_eps,
        "use_relative_position_bias": config.relative_bias and not config.share_relative_bias,
        "use_shared_relative_position_bias": config.share_relative_bias,
        "use_absolute_position_embeddings": config.positions == "learned",
        "use_mean_pooling": config.pooling == "mean",
        "layer_scale_init_value": 0.0 if config.layer_scale is None else config.layer_scale,
        **write_num_classes(config),
    }


_CLASSIFIER = Family(
    model_type="beit",
    architecture="BeitForImageClassification",
    model=VisionTransformer,
    read=lambda fields: _read(fields, num_classes=read_num_classes(fields)),
    write=_write,
    differences=differences,
    names=lambda config: with_prefix("beit.", _names(config)) | {"classifier": "head"},
    ignored=_IGNORED,
)
_BACKBONE = Family(
    model_type="beit",
    architecture="BeitBackbone",
    model=VisionTransformer,
    # Other models continue from the states between its layers, which have no norm.
    read=lambda fields: _read(fields).replace(final_norm="none"),
    write=_write,
    differences=differences,
    names=_names,
    ignored=_IGNORED,
)
BEIT = Family(
    model_type="beit",
    architecture="BeitModel",
    model=VisionTransformer,
    read=_read,
    write=_write,
    differences=differences,
    names=_names,
    renamed=((r"^beit\.", ""),),
    ignored=_IGNORED,
    heads=(_CLASSIFIER, _BACKBONE),
)
