"""Writes folders as `make.py` does, of models that see images.

python tests/interop/parity/make_images.py DIRECTORY [NAME ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-4,
}
VIT = SIZES | {"intermediate_size": 44}
TEXT = {
    "vocab_size": 96,
    "hidden_size": 28,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-4,
}
# Class of transformers, and the fields of its config.
MODELS = {
    "vit_classifier": ("ViTForImageClassification", VIT | {"num_labels": 5, "qkv_bias": False}),
    "deit": ("DeiTModel", VIT),
    "deit_classifier": ("DeiTForImageClassificationWithTeacher", VIT | {"num_labels": 5}),
    "dinov2_gated": ("Dinov2Model", SIZES | {"use_swiglu_ffn": True}),
    "dinov2_registers": ("Dinov2WithRegistersModel", SIZES | {"num_register_tokens": 3}),
    "dinov2_registers_gated": ("Dinov2WithRegistersModel", SIZES | {"use_swiglu_ffn": True}),
    "dinov3": ("DINOv3ViTModel", VIT | {"num_register_tokens": 4}),
    "dinov3_gated": (
        "DINOv3ViTModel",
        VIT
        | {"num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"}
        | {"query_bias": False, "value_bias": False, "rope_theta": 20.0},
    ),
    "beit": ("BeitModel", VIT | {"use_relative_position_bias": True}),
    "beit_first": (
        "BeitModel",
        VIT | {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "beit_classifier": (
        "BeitForImageClassification",
        VIT
        | {"use_absolute_position_embeddings": True, "num_labels": 5}
        # No scales.
        | {"layer_scale_init_value": 0.0},
    ),
    "clip_largest": (
        "CLIPModel",
        {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": VIT, "projection_dim": 22},
    ),
    "clip_vision": ("CLIPVisionModel", VIT),
    "siglip": (
        "SiglipModel",
        {"text_config": TEXT | {"projection_size": 32}, "vision_config": VIT},
    ),
    "siglip_vision": ("SiglipVisionModel", VIT),
}
# Those whose models must be told that an image is of another size.
_TOLD = ("vit", "deit", "clip", "clip_vision_model", "siglip", "siglip_vision_model")


def random_model(name, seed):
    """A model in which every weight matters."""
    cls = getattr(transformers, MODELS[name][0])
    config = cls.config_class(**MODELS[name][1])
    config._attn_implementation = "eager"
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, x in model.named_parameters():
            noise = torch.randn(x.shape, generator=generator)
            if x.ndim >= 2 and x.shape[0] > 1:
                scale = 1.0 if "position" in key else x[0].numel() ** -0.5
                x.copy_(0.7 * scale * noise)
            else:
                x.copy_(0.2 * noise)
                if key.endswith(("weight", "lambda1", "lambda_1", "lambda_2")):
                    x.add_(1.0)
    return model


def as_transformers_4(config):
    """The same configuration with the names that transformers 4 has."""
    old = {k: v for k, v in config.items() if k != "dtype"}
    return old | {"torch_dtype": "float32", "transformers_version": "4.46.0"}


def flat(outputs, prefix=""):
    """The tensors of an output, and those of outputs in it, by name."""
    found = {}
    for key, x in outputs.items():
        if torch.is_tensor(x):
            found[prefix + key] = x
        elif isinstance(x, dict):
            found |= flat(x, f"{prefix}{key}.")
        elif key == "hidden_states":
            found |= {f"{prefix}{key}.{i}": state for i, state in enumerate(x)}
    return found


def run(model, inputs, **options):
    with torch.no_grad():
        return inputs, flat(model(**inputs, **options))


def make(name, folder, seed=0):
    """Writes the folder of one of `MODELS`."""
    generator = torch.Generator().manual_seed(seed)
    model = random_model(name, seed)
    kind = model.config.model_type
    texts, masked = {}, {}
    if kind in ("clip", "siglip"):
        tokens = torch.randint(3, 96, (3, 13), generator=generator)
        # The largest is not where it could be taken for the first or the last.
        tokens[:, 7] = 95
        texts = {"input_ids": tokens}
        lengths = torch.tensor([13, 10, 9])
        masked = {"attention_mask": (torch.arange(13)[None] < lengths[:, None]).long()}

    def images(count, height, width):
        pixels = torch.randn(count, 3, height, width, generator=generator)
        return {"pixel_values": pixels, **texts}

    told = {"interpolate_pos_encoding": True} if kind in _TOLD else {}
    cases = {
        "full": run(model, images(2, 16, 16), output_hidden_states=True),
        "other_resolution": run(model, images(1, 24, 20), **told),
    }
    if masked:
        cases["mask"] = run(model, images(2, 16, 16) | masked)
    tensors = {}
    for case, (inputs, outputs) in cases.items():
        tensors |= {f"{case}.in.{key}": x.numpy() for key, x in inputs.items()}
        tensors |= {f"{case}.out.{key}": x.numpy() for key, x in outputs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config_hub_v4.json").write_text(json.dumps(as_transformers_4(config), indent=1))
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()}, folder / "expected.safetensors"
    )
    largest = max(float(np.abs(x).max()) for key, x in tensors.items() if ".out." in key)
    meta = {
        "name": name,
        "hf_class": type(model).__name__,
        "kind": "vision",
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
