"""Writes folders as `make.py` does, of encoders and of encoder-decoders.

python tests/interop/parity/make_encoders.py DIRECTORY [NAME ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

BERT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-4,
}
MODERN = {
    **{k: v for k, v in BERT.items() if k != "layer_norm_eps"},
    "num_hidden_layers": 5,
    "norm_eps": 1e-4,
    "local_attention": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
DEBERTA = {**BERT, "relative_attention": True, "type_vocab_size": 0}
DISTIL = {
    "vocab_size": 96,
    "dim": 32,
    "hidden_dim": 44,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 40,
}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 44,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 40,
}
MARIAN = {"pad_token_id": 95, "decoder_start_token_id": 95, "eos_token_id": 0}
WHISPER = {
    **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
    "num_mel_bins": 10,
    "max_source_positions": 12,
    "max_target_positions": 40,
    "decoder_start_token_id": 5,
    "bos_token_id": 5,
    "eos_token_id": 6,
    "pad_token_id": 6,
    "begin_suppress_tokens": None,
}
# Class of transformers, and the fields of its config.
MODELS = {
    "bert_masked_lm": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaModel", BERT | {"type_vocab_size": 1}),
    "roberta_masked_lm": ("RobertaForMaskedLM", BERT | {"pad_token_id": 4}),
    "distilbert": ("DistilBertModel", DISTIL | {"activation": "relu"}),
    "distilbert_masked_lm": ("DistilBertForMaskedLM", DISTIL),
    "electra": ("ElectraModel", BERT | {"embedding_size": 20}),
    "electra_same_size": ("ElectraModel", BERT | {"embedding_size": 32}),
    "electra_discriminator": ("ElectraForPreTraining", BERT | {"embedding_size": 20}),
    "electra_masked_lm": ("ElectraForMaskedLM", BERT | {"embedding_size": 20}),
    "modernbert": ("ModernBertModel", MODERN),
    "modernbert_masked_lm": (
        "ModernBertForMaskedLM",
        MODERN | {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]},
    ),
    "deberta": (
        "DebertaV2Model",
        DEBERTA
        | {"pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3}
        | {"share_att_key": True, "position_buckets": 4, "type_vocab_size": 2, "conv_act": "gelu"},
    ),
    "deberta_own_projections": (
        "DebertaV2Model",
        DEBERTA | {"pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "deberta_one_term": (
        "DebertaV2Model",
        DEBERTA | {"pos_att_type": ["p2c"], "max_relative_positions": 6},
    ),
    "t5_v1_1": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5_not_scaled": ("T5ForConditionalGeneration", T5 | {"tie_word_embeddings": False}),
    "bart": ("BartForConditionalGeneration", BART | {"scale_embedding": True}),
    "marian": (
        "MarianMTModel",
        BART | MARIAN | {"activation_function": "swish", "scale_embedding": True},
    ),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
}


def random_model(name, seed):
    """A model in which every weight matters."""
    cls = getattr(transformers, MODELS[name][0])
    config = cls.config_class(**MODELS[name][1])
    config._attn_implementation = "eager"
    model = cls(config).eval()
    fixed = config.model_type == "marian"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tensors = [*model.named_parameters()]
        tensors += [(k, x) for k, x in model.named_buffers() if k == "final_logits_bias"]
        for key, x in tensors:
            if fixed and "embed_positions" in key:
                continue
            noise = torch.randn(x.shape, generator=generator)
            if x.ndim >= 2 and x.shape[0] > 1:
                scale = 1.0 if "emb" in key or "relative" in key else x[0].numel() ** -0.5
                x.copy_(0.7 * scale * noise)
            else:
                x.copy_(0.2 * noise)
                if key.endswith("weight"):
                    x.add_(1.0)
        if name == "t5_v1_1":
            # As the files that were published have it.
            head = 0.2 * torch.randn(model.lm_head.weight.shape, generator=generator)
            model.lm_head.weight = torch.nn.Parameter(head)
    return model


def as_transformers_4(config):
    """The same configuration with the names that transformers 4 has."""
    old = {k: v for k, v in config.items() if k not in ("dtype", "scale_decoder_outputs")}
    if config.get("scale_decoder_outputs") is False:
        old["tie_word_embeddings"] = False
    elif old.get("tie_word_embeddings"):
        old.pop("tie_word_embeddings")
    both = old.pop("rope_parameters", None)
    if both is not None:
        old["global_rope_theta"] = both["full_attention"]["rope_theta"]
        old["local_rope_theta"] = both["sliding_attention"]["rope_theta"]
        types = old.pop("layer_types")
        old["global_attn_every_n_layers"] = 1 + types[1:].index("full_attention")
    return old | {"torch_dtype": "float32", "transformers_version": "4.46.0"}


def run(model, inputs, states):
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=states)
    outputs = {}
    for key in ("logits", "last_hidden_state", "pooler_output", "encoder_last_hidden_state"):
        if key in out and out[key] is not None:
            outputs[key] = out[key]
    for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        # The sound's first is before the positions in one version, and after them in another.
        if states and key in out and not ("input_features" in inputs and "encoder" in key):
            outputs |= {f"{key}.{i}": x for i, x in enumerate(out[key])}
    return inputs, outputs


def greedy(model, inputs, start, count):
    """The most likely tokens, and by how much the closest was it."""
    tokens, gap = torch.tensor([[start]]), np.inf
    for _ in range(count):
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=tokens).logits[0, -1]
        best = torch.topk(logits, 2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        tokens = torch.cat([tokens, best.indices[:1, None]], dim=1)
    return tokens[:, 1:], gap


def make(name, folder, seed=0):
    """Writes the folder of one of `MODELS`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(0, 96, shape, generator=generator)

    config = getattr(transformers, MODELS[name][0]).config_class(**MODELS[name][1])
    sound, seq2seq = config.model_type == "whisper", config.is_encoder_decoder
    start = getattr(config, "decoder_start_token_id", None)

    def source(count, length=14):
        if sound:
            return {"input_features": torch.randn(count, 10, 24, generator=generator)}
        return {"input_ids": draw(count, length)}

    mask = (torch.arange(14)[None] < torch.tensor([14, 9, 5])[:, None]).long()
    full, padded = source(2), source(3)
    if not sound:
        padded["attention_mask"] = mask
    if seq2seq:
        full["decoder_input_ids"], padded["decoder_input_ids"] = draw(2, 9), draw(3, 9)
        lengths = torch.tensor([9, 4, 6])
        padded["decoder_attention_mask"] = (torch.arange(9)[None] < lengths[:, None]).long()
    if getattr(config, "type_vocab_size", 0) and config.type_vocab_size > 1:
        padded["token_type_ids"] = (torch.arange(14)[None] > mask.sum(1)[:, None] // 2).long()
    while True:
        model = random_model(name, seed)
        generated = []
        if seq2seq:
            prompts = (source(1, 7), source(1, 5))
            generated = [(prompt, *greedy(model, prompt, start, 16)) for prompt in prompts]
        # Where two tokens are nearly as likely, rounding decides.
        if min([1.0, *(gap for _, _, gap in generated)]) > 1e-3:
            break
        seed += 1000
    cases = {"full": run(model, full, True), "padded": run(model, padded, False)}
    tensors = {}
    for case, (inputs, outputs) in cases.items():
        tensors |= {f"{case}.in.{key}": x.numpy() for key, x in inputs.items()}
        tensors |= {f"{case}.out.{key}": x.numpy() for key, x in outputs.items()}
    for i, (prompt, new, _) in enumerate(generated):
        tensors |= {f"gen.{i}.in.{key}": x.numpy() for key, x in prompt.items()}
        tensors[f"gen.{i}.out.new_tokens"] = new.numpy()[0]
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config_hub_v4.json").write_text(json.dumps(as_transformers_4(config), indent=1))
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()}, folder / "expected.safetensors"
    )
    largest = max(float(np.abs(x).max()) for key, x in tensors.items() if ".out." in key)
    meta = {
        "name": name,
        "hf_class": type(model).__name__,
        "kind": "seq2seq" if seq2seq else "encoder",
        "decoder_start_token_id": start,
        "seed": seed,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "suggested_atol": 5e-5 * max(largest, 1.0),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return model


if __name__ == "__main__":
    directory, *names = sys.argv[1:]
    for name in names or MODELS:
        make(name, Path(directory) / name)
        print(name)
