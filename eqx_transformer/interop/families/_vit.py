"""ViT, alone or with a classifier, and what others share with it."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Final

from ...models import VisionTransformer, ViTConfig
from .._family import Family
from .._fields import Fields
from .._names import Into
from ._decoder import read_activation, write_activation

# Fields for how something is computed or trained, not for what is computed.
_NOT_COMPUTED: Final = (
    *("dropout_rate", "drop_path_rate", "attention_implementation", "attention_block_size"),
    *("remat", "unroll"),
)
HERE: Final = "encoder.layer.{layer}."
ATTENTION_NAMES: Final = {
    f"{HERE}attention.attention.query": "stack.{layer}.attention.q_proj",
    f"{HERE}attention.attention.key": "stack.{layer}.attention.k_proj",
    f"{HERE}attention.attention.value": "stack.{layer}.attention.v_proj",
    f"{HERE}attention.output.dense": "stack.{layer}.attention.o_proj",
}
LAYER_NAMES: Final = {
    **ATTENTION_NAMES,
    f"{HERE}layernorm_before": "stack.{layer}.attention_residual.norm",
    f"{HERE}layernorm_after": "stack.{layer}.mlp_residual.norm",
    f"{HERE}intermediate.dense": "stack.{layer}.mlp.up_proj",
    f"{HERE}output.dense": "stack.{layer}.mlp.down_proj",
}
# The token for patches that are masked in training.
IGNORED: Final = (r"(.*\.)?embeddings\.mask_token",)
_SIZES: Final = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}


def read_sizes(fields: Fields) -> dict[str, Any]:
    """The sizes every vision transformer has."""
    fields.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
    # Outputs as a backbone.
    fields.ignore("apply_layernorm", "out_features", "out_indices", "stage_names")
    fields.ignore("reshape_hidden_states", "use_mask_token")
    sizes: dict[str, Any] = {
        ours: fields.count(name) if ours == "num_layers" else fields.take(name)
        for ours, name in _SIZES.items()
    }
    for name in ("image_size", "patch_size"):
        if isinstance(sizes[name], list):
            sizes[name] = tuple(sizes[name])
    return sizes


def write_sizes(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `read_sizes`."""
    sizes = {name: getattr(config, ours) for ours, name in _SIZES.items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sizes.items()}


def read_vit(fields: Fields, **others: Any) -> ViTConfig:
    """The fields that ViT's relatives share with it; `others` are those in which they differ."""
    fields.ignore("encoder_stride", "pooler_output_size")
    fields.choose("pooler_act", {"tanh": None}, "tanh")
    return ViTConfig(
        **read_sizes(fields),
        d_ff=fields.take("intermediate_size"),
        activation=read_activation(fields, "hidden_act", "gelu", gated=False),
        qkv_bias=fields.take("qkv_bias", True),
        norm_eps=fields.take("layer_norm_eps", 1e-12),
        **others,
    )


def write_vit(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `read_vit`, and of `read_num_classes` if there are classes."""
    return write_sizes(config) | {
        "intermediate_size": config.inner_size,
        "hidden_act": write_activation(config),
        "qkv_bias": config.use_bias if config.qkv_bias is None else config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        **write_num_classes(config),
    }


def read_num_classes(fields: Fields) -> int:
    """How many classes a classifier has; the field lists their names."""
    labels = fields.take("id2label", None)
    return fields.take("num_labels", 2 if labels is None else len(labels))


def write_num_classes(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `read_num_classes`; nothing if there are no classes."""
    if config.num_classes is None:
        return {}
    labels = [f"LABEL_{i}" for i in range(config.num_classes)]
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def write_layer_scale(config: ViTConfig) -> float:
    """The initial scale of branches, in families that always have one."""
    return 1.0 if config.layer_scale is None else config.layer_scale


def patch_names(config: ViTConfig, there: str, here: str = "") -> dict[str, str | Into]:
    """The embedding of patches, which is a convolution there."""
    shape = (config.d_model, config.num_channels, *config.patch_shape)
    return {there: Into(f"{here}patch_embedding.proj", shape=shape)}


def token_names(config: ViTConfig) -> dict[str, str | Into]:
    """Tokens before the patches, which have a batch axis there."""
    d_model = config.d_model
    return {
        "embeddings.cls_token": Into("class_token", shape=(1, 1, d_model)),
        "embeddings.distillation_token": Into("distillation_token", shape=(1, 1, d_model)),
        "embeddings.register_tokens": Into("registers", shape=(1, config.num_registers, d_model)),
    }


def embedding_names(config: ViTConfig) -> dict[str, str | Into]:
    """Patches, tokens before them, and positions."""
    rows, columns = config.grid
    count = rows * columns + config.num_prefix - config.num_registers
    positions = Into("positions.weight", shape=(1, count, config.d_model))
    return {
        **patch_names(config, "embeddings.patch_embeddings.projection"),
        **token_names(config),
        "embeddings.position_embeddings": positions,
    }


def vit_names(config: ViTConfig) -> dict[str, str | Into]:
    """The names of a whole model without a head."""
    last = {"layernorm": "norm", "pooler.dense": "pooler"}
    return {**embedding_names(config), **LAYER_NAMES, **last}


def with_prefix(prefix: str, names: Mapping[str, str | Into]) -> dict[str, str | Into]:
    """The names of a model in files that also have a head."""
    return {f"{prefix}{name}": ours for name, ours in names.items()}


def adapt_pooler(config: ViTConfig, names: Collection[str]) -> ViTConfig:
    """Some files have no pooler; transformers would initialise one at random."""
    return config.replace(pooler="pooler.dense.weight" in names)


def differences(a: ViTConfig, b: ViTConfig) -> list[str]:
    """The fields that make two models compute different things."""
    a, b = _canonical(a), _canonical(b)
    names = [field.name for field in dataclasses.fields(ViTConfig)]
    return [name for name in names if getattr(a, name) != getattr(b, name)]


def _canonical(config: ViTConfig) -> ViTConfig:
    qkv_bias = config.use_bias if config.qkv_bias is None else config.qkv_bias
    unused = [*_NOT_COMPUTED]
    if config.positions != "rope":
        unused.append("rope_theta")
    if config.positions != "learned":
        unused.append("interpolation")
    return config.replace(
        image_size=config.image_shape,
        patch_size=config.patch_shape,
        num_kv_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.head_dim or config.d_model // config.num_heads,
        d_ff=config.inner_size,
        qkv_bias=qkv_bias,
        k_bias=qkv_bias if config.k_bias is None else config.k_bias,
        # Only an initial value.
        layer_scale=None if config.layer_scale is None else 1.0,
        **{name: getattr(ViTConfig, name) for name in unused},
    )


_CLASSIFIER = Family(
    model_type="vit",
    architecture="ViTForImageClassification",
    model=VisionTransformer,
    read=lambda fields: read_vit(fields, num_classes=read_num_classes(fields)),
    write=write_vit,
    differences=differences,
    names=lambda config: with_prefix("vit.", vit_names(config)) | {"classifier": "head"},
)
VIT = Family(
    model_type="vit",
    architecture="ViTModel",
    model=VisionTransformer,
    read=lambda fields: read_vit(fields, pooler=True),
    write=write_vit,
    differences=differences,
    names=vit_names,
    renamed=((r"^vit\.", ""),),
    ignored=IGNORED,
    adapt=adapt_pooler,
    heads=(_CLASSIFIER,),
)
