"""GPT-2: learned positions, LayerNorm, and weights laid out as in this library."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from .._names import Into
from ._decoder import (
    SIZES,
    decoder_family,
    read_activation,
    read_sizes,
    write_activation,
    write_sizes,
)

_HERE = "transformer.h.{layer}."
_NAMES = {
    "transformer.wte": "embedding",
    "transformer.wpe": "positions.table",
    f"{_HERE}ln_1": "stack.{layer}.attention_residual.norm",
    f"{_HERE}attn.c_attn": Into(
        *(f"stack.{{layer}}.attention.{name}" for name in ("q_proj", "k_proj", "v_proj")),
        transpose=False,
    ),
    f"{_HERE}attn.c_proj": Into("stack.{layer}.attention.o_proj", transpose=False),
    f"{_HERE}ln_2": "stack.{layer}.mlp_residual.norm",
    f"{_HERE}mlp.c_fc": Into("stack.{layer}.mlp.up_proj", transpose=False),
    f"{_HERE}mlp.c_proj": Into("stack.{layer}.mlp.down_proj", transpose=False),
    "transformer.ln_f": "norm",
    "lm_head": "head",
}
_SIZES = {
    **SIZES,
    "d_model": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_len": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "d_ff": "n_inner",
}


def _read(fields: Fields) -> LlamaConfig:
    fields.ignore(
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        "summary_first_dropout",
    )
    fields.default("n_inner", None)
    sizes = read_sizes(fields, _SIZES)
    sizes["d_ff"] = sizes["d_ff"] or 4 * sizes["d_model"]
    scaled = fields.take("scale_attn_weights", True)
    return LlamaConfig(
        **sizes,
        activation=read_activation(fields, "activation_function", "gelu_new", gated=False),
        tie_embeddings=fields.take("tie_word_embeddings", True),
        query_scale=None if scaled else 1.0,
        norm="layer",
        norm_bias=True,
        positions="learned",
        use_bias=True,
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_sizes(config, _SIZES) | {
        # The same function as "gelu_pytorch_tanh", with other rounding.
        "activation_function": (
            "gelu_new" if config.activation == "gelu_tanh" else write_activation(config)
        ),
        "tie_word_embeddings": config.tie_embeddings,
        "scale_attn_weights": config.query_scale != 1.0,
    }


GPT2 = decoder_family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read=_read,
    write=_write,
    names=_NAMES,
    ignored=(r".*\.attn\.(bias|masked_bias)",),
    tied={"lm_head.weight": "transformer.wte.weight"},
    # Names in files of the first release.
    renamed=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
)
