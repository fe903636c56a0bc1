"""Gemma 3, text only: five local layers to each global one, normalised queries and keys."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from ._decoder import (
    decoder_family,
    read_layer_types,
    windowed,
    write_activation,
    write_layer_types,
    write_llama,
    write_query_scale,
)
from ._gemma import read_gemma
from ._gemma2 import NAMES
from ._rope import read_rope_parameters


def _read(fields: Fields) -> LlamaConfig:
    both = fields.nested("rope_parameters")
    if both is None:
        local = fields.take("rope_local_base_freq", 10_000.0)
        rope = {}
    else:
        max_len = fields.take("max_position_embeddings")
        fields.default("max_position_embeddings", max_len)
        sliding = both.nested("sliding_attention") or Fields({}, "")
        slow = both.nested("full_attention") or Fields({}, "")
        both.finish()
        rope = read_rope_parameters(slow, max_len, theta=1e6)
        of_sliding = read_rope_parameters(sliding, max_len, theta=10_000.0)
        local = of_sliding["rope_theta"]
        if of_sliding["rope_scaling"] is not None:
            raise ValueError("the rope_scaling of sliding layers is not supported.")
    # Later versions of transformers ignore it.
    fields.ignore("attn_logit_softcapping")
    numbers = read_gemma(fields, theta=1e6) | rope
    num_layers = numbers["num_layers"]
    fields.ignore("_sliding_window_pattern")
    period = fields.take("sliding_window_pattern", None) or 6
    regular = ["global" if (i + 1) % period == 0 else "sliding" for i in range(num_layers)]
    window = windowed(
        fields.take("sliding_window", 4096), read_layer_types(fields, num_layers, regular)
    )
    return LlamaConfig(
        **numbers,
        **window,
        rope_local_theta=local if window else None,
        post_attention_norm=True,
        post_mlp_norm=True,
        qk_norm=True,
        query_scale=fields.take("query_pre_attn_scalar", 256) ** -0.5,
        logit_soft_cap=fields.take("final_logit_softcapping", None),
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    types = write_layer_types(config)
    fields = write_llama(config) | {
        "hidden_activation": write_activation(config),
        "attention_bias": config.qkv_bias,
        "layer_types": types,
        "sliding_window": config.window,
        "rope_local_base_freq": config.rope_local_theta or config.rope_theta,
        "query_pre_attn_scalar": write_query_scale(config),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.logit_soft_cap,
    }
    if "full_attention" in types:
        # For versions without layer_types.
        fields["sliding_window_pattern"] = types.index("full_attention") + 1
    return fields


GEMMA3 = decoder_family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=_read,
    write=_write,
    names=NAMES,
    # Names in files of the models that take images as well.
    renamed=((r"^(model\.)?language_model\.(model\.)?", "model."),),
)
