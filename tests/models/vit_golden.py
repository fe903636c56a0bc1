"""Published vision models at a tiny size with random weights, for `test_vit_parity.py`.

    python tests/models/vit_golden.py

needs torch and transformers, and writes `data/vit_golden.npz`: for each family its weights under
the names they have in files, an image, what the model makes of it, and the same for a larger image.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).parent / "data" / "vit_golden.npz"
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
IMAGES = {"image_size": 8, "patch_size": 2}


def families() -> dict[str, tuple[Any, dict[str, Any]]]:
    """A model of each family, and options of its call for an image of another size."""
    import transformers as hf

    sizes = {**SIZES, "intermediate_size": 24}
    interpolate = {"interpolate_pos_encoding": True}
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 6, "projection_size": 16}
    return {
        "deit": (
            hf.DeiTForImageClassificationWithTeacher(
                hf.DeiTConfig(**sizes, **IMAGES, num_labels=5, layer_norm_eps=1e-4)
            ),
            interpolate,
        ),
        "beit": (
            hf.BeitModel(
                hf.BeitConfig(
                    **sizes,
                    **IMAGES,
                    use_relative_position_bias=True,
                    layer_scale_init_value=0.5,
                    layer_norm_eps=1e-4,
                )
            ),
            {},
        ),
        "dinov2_registers": (
            hf.Dinov2WithRegistersModel(
                hf.Dinov2WithRegistersConfig(
                    **SIZES,
                    **IMAGES,
                    num_register_tokens=3,
                    use_swiglu_ffn=True,
                    layer_norm_eps=1e-4,
                )
            ),
            {},
        ),
        "dinov3": (
            hf.DINOv3ViTModel(
                hf.DINOv3ViTConfig(
                    **sizes, **IMAGES, num_register_tokens=3, use_gated_mlp=True, hidden_act="silu"
                )
            ),
            {},
        ),
        "siglip": (
            hf.SiglipModel(
                hf.SiglipConfig(
                    text_config=text, vision_config={**sizes, **IMAGES, "layer_norm_eps": 1e-4}
                )
            ),
            interpolate,
        ),
    }


def outputs(name: str, model: Any, other_size: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights, inputs and outputs of one model."""
    import torch
    from safetensors.numpy import load_file

    torch.manual_seed(sum(map(ord, name)))
    model.eval()
    # Norms and biases are all ones and zeros initially.
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    arrays = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        for k, v in load_file(Path(folder) / "model.safetensors").items():
            arrays[f"weights/{k}"] = v
        for case, size in (("same", (8, 8)), ("other", (12, 6))):
            image = torch.randn(1, 3, *size)
            options = {} if case == "same" else other_size
            inputs = {"pixel_values": image}
            if name == "siglip":
                inputs["input_ids"] = torch.randint(0, 20, (2, 6))
            if name == "beit" and case == "other":
                continue  # it has other biases then
            out = model(**inputs, **options)
            wanted = {
                "deit": ("logits",),
                "siglip": ("logits_per_image", "image_embeds", "text_embeds"),
            }.get(name, ("last_hidden_state", "pooler_output"))
            for k, v in inputs.items():
                arrays[f"{case}/{k}"] = v.numpy()
            for k in wanted:
                arrays[f"{case}/out/{k}"] = out[k].numpy()
    return arrays


def interpolations() -> dict[str, np.ndarray]:
    """PyTorch's own resizing of a small picture."""
    import torch

    picture = torch.randn(1, 3, 5, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    arrays = {"interpolation/picture": picture[0].numpy()}
    for height, width in ((5, 4), (7, 9), (3, 2), (1, 5), (10, 3)):
        for antialias in (False, True):
            out = torch.nn.functional.interpolate(
                picture, size=(height, width), mode="bicubic", antialias=antialias
            )
            arrays[f"interpolation/{height}x{width}/{antialias}"] = out[0].numpy()
    return arrays


def main() -> None:
    """Writes everything into one file."""
    import torch

    torch.manual_seed(0)
    arrays = interpolations()
    for name, (model, other_size) in families().items():
        arrays |= {f"{name}/{k}": v for k, v in outputs(name, model, other_size).items()}
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH}: {len(arrays)} arrays, {PATH.stat().st_size / 1024:.0f} KiB", file=sys.stderr)


if __name__ == "__main__":
    main()
