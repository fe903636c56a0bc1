"""Writes folders of models with random weights, and what transformers makes of some inputs.

    python tests/interop/parity/make.py DIRECTORY [NAME ...]

Needs torch and transformers (the group `parity`). A folder has the model as transformers 5 saves it
(`config.json`, `model.safetensors`), its configuration as transformers 4 would have written it
(`config_hub_v4.json`), inputs and outputs (`expected.safetensors`: `<case>.in.<argument>`,
`<case>.out.<output>`, `gen.<i>.in.input_ids`, `gen.<i>.out.new_tokens`), and in `meta.json` how far
outputs may be off.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OLD = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-4,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
NEOX = {k: v for k, v in TINY.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
HEADS = {"head_dim": 12}
EXPERTS = {"num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    **EXPERTS,
}


def rope(kind, theta=500.0, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 10,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5}

# Class of transformers (without ForCausalLM where it has that), and the fields of its config.
MODELS = {
    "llama": ("Llama", TINY | HEADS | {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("Llama", TINY | rope("linear", factor=3.0)),
    "llama_dynamic": (
        "Llama",
        TINY | rope("dynamic", factor=3.0) | {"max_position_embeddings": 10},
    ),
    "llama3_rope": (
        "Llama",
        TINY
        | {"tie_word_embeddings": True}
        | rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama_yarn": ("Llama", TINY | rope("yarn", **YARN)),
    "llama_yarn_mscale": (
        "Llama",
        TINY | rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.2, truncate=False),
    ),
    "mistral": ("Mistral", TINY | HEADS | {"sliding_window": 4}),
    "mixtral": ("Mixtral", TINY | EXPERTS | {"num_local_experts": 5, "sliding_window": 4}),
    "gemma": ("Gemma", TINY | HEADS),
    "gemma2": (
        "Gemma2",
        TINY
        | HEADS
        | {
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "query_pre_attn_scalar": 15,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        TINY
        | HEADS
        | {"num_hidden_layers": 5, "sliding_window": 4, "query_pre_attn_scalar": 15}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 200.0},
            }
        },
    ),
    "qwen2": ("Qwen2", TINY | {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        TINY
        | {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", TINY | HEADS | {"attention_bias": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        TINY
        | HEADS
        | EXPERTS
        | {
            "num_hidden_layers": 5,
            "num_experts": 6,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    "qwen3_moe_normalized": (
        "Qwen3Moe",
        TINY
        | HEADS
        | EXPERTS
        | {"num_experts": 6, "moe_intermediate_size": 20, "norm_topk_prob": True},
    ),
    "phi3": (
        "Phi3",
        TINY
        | {"original_max_position_embeddings": 10, "sliding_window": 6}
        | rope("longrope", **FACTORS),
    ),
    "phi3_partial": ("Phi3", TINY | rope("default", partial_rotary_factor=0.5)),
    "olmo2": ("Olmo2", TINY | {"attention_bias": True}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    ),
    "gpt2_unscaled": (
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
        | {"scale_attn_weights": False, "n_inner": 60, "activation_function": "relu"},
    ),
    "gpt_neox": ("GPTNeoX", NEOX | rope("default", partial_rotary_factor=0.5)),
    "gpt_neox_sequential": (
        "GPTNeoX",
        NEOX
        | rope("default", partial_rotary_factor=1.0)
        | {"use_parallel_residual": False, "attention_bias": False},
    ),
    "falcon_new": (
        "Falcon",
        OLD | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon_new_one_norm": (
        "Falcon",
        OLD | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon_7b": ("Falcon", OLD | {"multi_query": True, "parallel_attn": True}),
    "falcon_rw": (
        "Falcon",
        OLD | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "mpt": (
        "Mpt",
        {"vocab_size": 96, "d_model": 36, "n_heads": 6, "n_layers": 2, "max_seq_len": 64}
        | {"attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.3}},
    ),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 36, "n_layer": 2, "n_head": 6}),
    "gpt_oss": (
        "GptOss",
        TINY
        | EXPERTS
        | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4, "swiglu_limit": 1.0}
        | rope("yarn", **YARN, truncate=False),
    ),
    "deepseek_v2": (
        "DeepseekV2",
        TINY
        | LATENT
        | {"q_lora_rank": None, "first_k_dense_replace": 1, "n_shared_experts": 2}
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 1.7},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        TINY
        | LATENT
        | {"q_lora_rank": 20, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}
        | rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.8),
    ),
}
# ALiBi is added twice by the eager attention of Falcon.
SDPA = ("falcon_rw",)


def class_of(name):
    name = MODELS[name][0]
    return getattr(transformers, name if "Model" in name else f"{name}ForCausalLM")


def random_model(name, seed):
    """A model in which every weight matters."""
    cls = class_of(name)
    config = cls.config_class(**MODELS[name][1])
    config._attn_implementation = "sdpa" if name in SDPA else "eager"
    model = cls(config).eval()
    # Products of experts in groups need sizes that are multiples of 16 bytes.
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, x in [*model.named_parameters(), *model.named_buffers()]:
            if not x.is_floating_point() or "inv_freq" in key or "embed_scale" in key:
                continue
            noise = torch.randn(x.shape, generator=generator)
            if x.ndim >= 2:
                x.copy_(noise * (1.0 if "emb" in key or "wte" in key else x.shape[-1] ** -0.5))
            else:
                x.copy_((0.3 if "norm" not in key and "ln_" not in key else 0.2) * noise)
                if key.endswith("weight") and "emma" not in type(model).__name__:
                    x.add_(1.0)
    return model


def as_transformers_4(config):
    """The same configuration with the names that transformers 4 has."""
    old = {name: value for name, value in config.items() if name not in ("layer_types", "dtype")}
    kind = config["model_type"]
    old["torch_dtype"] = config.get("dtype", "float32")
    old["transformers_version"] = "4.46.0"
    if kind in ("gpt_oss", "gemma3_text"):
        old["layer_types"] = config["layer_types"]
    both = old.pop("rope_parameters", None)
    if both is None:
        return old
    if "full_attention" in both:
        old["rope_local_base_freq"] = both["sliding_attention"]["rope_theta"]
        both = both["full_attention"]
    scaling = dict(both)
    theta, fraction = scaling.pop("rope_theta"), scaling.pop("partial_rotary_factor", None)
    if kind == "gpt_neox":
        old["rotary_emb_base"], old["rotary_pct"] = theta, fraction
    else:
        old["rope_theta"] = theta
        if fraction is not None:
            old["partial_rotary_factor"] = fraction
    if scaling["rope_type"] != "default":
        old["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    return old


def run(model, with_positions, tokens, mask=None):
    options = {"output_hidden_states": mask is None, "use_cache": False}
    inputs = {"input_ids": tokens}
    if mask is not None:
        inputs["attention_mask"] = mask
        if with_positions:
            inputs["position_ids"] = torch.clamp(mask.cumsum(1) - 1, min=0)
    with torch.no_grad():
        # Wavelengths that depend on the length are otherwise those of the longest sequence so far.
        model(input_ids=tokens[:, :2], use_cache=False)
        out = model(**inputs, **options)
    outputs = {"logits": out.logits}
    for i, x in enumerate(out.hidden_states or ()):
        outputs[f"hidden_states.{i}"] = x
    return inputs, outputs


def greedy(model, prompt, count):
    """The most likely tokens, and by how much the closest was it."""
    tokens, gap = prompt, np.inf
    for _ in range(count):
        with torch.no_grad():
            model(input_ids=tokens[:, :2], use_cache=False)
            logits = model(input_ids=tokens, use_cache=False).logits[0, -1]
        best = torch.topk(logits, 2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        tokens = torch.cat([tokens, best.indices[:1, None].T.reshape(1, 1)], dim=1)
    return tokens[:, prompt.shape[1] :], gap


def make(name, folder, seed=0):
    """Writes the folder of one of `MODELS`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(3, 96, shape, generator=generator)

    while True:
        model = random_model(name, seed)
        generated = [(prompt, *greedy(model, prompt, 16)) for prompt in (draw(1, 13), draw(1, 11))]
        # Both are longer than 10, where some wavelengths change: a cache outlives no such change.
        # And where two tokens are nearly as likely, rounding decides.
        if min(gap for _, _, gap in generated) > 1e-3:
            break
        seed += 1000
    lengths = torch.tensor([14, 9, 5])
    right = (torch.arange(14)[None] < lengths[:, None]).long()
    left = right.flip(1)
    positions = model.config.model_type not in ("mpt", "bloom") and name != "falcon_rw"
    cases = {
        "full": run(model, False, draw(2, 14)),
        "right_pad": run(model, False, draw(3, 14), right),
        "left_pad": run(model, positions, draw(3, 14), left),
        "short": run(model, False, draw(2, 8)),
    }
    tensors = {}
    for case, (inputs, outputs) in cases.items():
        tensors |= {f"{case}.in.{key}": x.numpy() for key, x in inputs.items()}
        tensors |= {f"{case}.out.{key}": x.numpy() for key, x in outputs.items()}
    for i, (prompt, new, _) in enumerate(generated):
        tensors |= {f"gen.{i}.in.input_ids": prompt.numpy(), f"gen.{i}.out.new_tokens": new.numpy()}
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config_hub_v4.json").write_text(json.dumps(as_transformers_4(config), indent=1))
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()}, folder / "expected.safetensors"
    )
    outputs = [x for key, x in tensors.items() if ".out." in key and key.endswith("logits")]
    largest = max(float(np.abs(x[np.isfinite(x)]).max()) for x in outputs)
    meta = {
        "name": name,
        "hf_class": type(model).__name__,
        "kind": "decoder",
        "seed": seed,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "suggested_atol": 2.5e-5 * max(largest, 1.0),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return model


if __name__ == "__main__":
    directory, *names = sys.argv[1:]
    for name in names or MODELS:
        make(name, Path(directory) / name)
        print(name)
