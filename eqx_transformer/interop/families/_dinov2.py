"""DINOv2, without registers and with them."""

from typing import Any, Final

from ...models import VisionTransformer, ViTConfig
from .._family import Family, Table
from .._fields import Fields
from .._names import Into
from ._decoder import read_activation, write_activation
from ._vit import (
    ATTENTION_NAMES,
    HERE,
    IGNORED,
    differences,
    embedding_names,
    read_sizes,
    write_layer_scale,
    write_sizes,
)

# In every layer, after its name.
RESIDUAL_NAMES: Final = {
    "norm1": "stack.{layer}.attention_residual.norm",
    "norm2": "stack.{layer}.mlp_residual.norm",
    "layer_scale1.lambda1": "stack.{layer}.attention_residual.scale.weight",
    "layer_scale2.lambda1": "stack.{layer}.mlp_residual.scale.weight",
}
_MLP_NAMES: Final = {
    f"{HERE}mlp.fc1": "stack.{layer}.mlp.up_proj",
    f"{HERE}mlp.fc2": "stack.{layer}.mlp.down_proj",
}
_GATED_NAMES: Final = {
    f"{HERE}mlp.weights_in": Into("stack.{layer}.mlp.gate_proj", "stack.{layer}.mlp.up_proj"),
    f"{HERE}mlp.weights_out": "stack.{layer}.mlp.down_proj",
}


def _names(config: ViTConfig) -> Table:
    return {
        **embedding_names(config),
        **ATTENTION_NAMES,
        **{HERE + there: here for there, here in RESIDUAL_NAMES.items()},
        **(_GATED_NAMES if config.activation == "swiglu" else _MLP_NAMES),
        "layernorm": "norm",
    }


def _read(fields: Fields, **others: Any) -> ViTConfig:
    sizes = read_sizes(fields)
    inner = int(sizes["d_model"] * fields.take("mlp_ratio", 4))
    activation = read_activation(fields, "hidden_act", "gelu", gated=False)
    if fields.take("use_swiglu_ffn", False):
        inner, activation = (int(inner * 2 / 3) + 7) // 8 * 8, "swiglu"
    return ViTConfig(
        **sizes,
        d_ff=inner,
        activation=activation,
        qkv_bias=fields.take("qkv_bias", True),
        norm_eps=fields.take("layer_norm_eps", 1e-6),
        layer_scale=fields.take("layerscale_value", 1.0),
        **others,
    )


def _read_registers(fields: Fields) -> ViTConfig:
    num_registers = fields.take("num_register_tokens", 4)
    return _read(fields, num_registers=num_registers, interpolation="bicubic_antialias")


def _write(config: ViTConfig) -> dict[str, Any]:
    gated = config.activation == "swiglu"
    ratio = config.inner_size / config.d_model
    if gated:
        # Any ratio that rounds to this size will do; published ones are whole numbers.
        ratio = round(1.5 * ratio)
    return write_sizes(config) | {
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else write_activation(config),
        "qkv_bias": config.use_bias if config.qkv_bias is None else config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "layerscale_value": write_layer_scale(config),
    }


DINOV2 = Family(
    model_type="dinov2",
    architecture="Dinov2Model",
    model=VisionTransformer,
    read=_read,
    write=lambda config: _write(config) | {"use_mask_token": False},
    differences=differences,
    names=_names,
    renamed=((r"^dinov2\.", ""),),
    ignored=IGNORED,
)
DINOV2_WITH_REGISTERS = Family(
    model_type="dinov2_with_registers",
    architecture="Dinov2WithRegistersModel",
    model=VisionTransformer,
    read=_read_registers,
    write=lambda config: _write(config) | {"num_register_tokens": config.num_registers},
    differences=differences,
    names=_names,
    renamed=((r"^dinov2_with_registers\.", ""),),
    ignored=IGNORED,
)
