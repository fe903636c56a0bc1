"""A vision transformer on CPU: time against that of transformers, in PyTorch.

    python tests/benchmarks/vit_cpu.py [--batch 8] [--layers 12] [--rounds 7] [--json FILE]

ViT-S/16 at 224 with 1000 classes, float32: forward, and a step of training (cross-entropy and plain
gradient descent). Both have the same weights, which `load_pretrained` brings over, and as many
threads as there are cores. Needs torch and transformers (the group `parity`).
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from harness import interleaved, ratios

from eqx_transformer.interop import load_pretrained

RATE = 1e-4


def theirs(layers: int) -> transformers.PreTrainedModel:
    """The model of transformers, with its fastest attention."""
    config = transformers.ViTConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_labels=1000,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config)


def same_model(model: transformers.PreTrainedModel) -> eqx.Module:
    """The same model here."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_pretrained(folder)


def torch_candidates(model, images, labels) -> dict:
    """Forward, and a step of training, in PyTorch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)

    def forward():
        with torch.inference_mode():
            return model(images).logits.numpy()

    def step():
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images).logits, labels)
        loss.backward()
        optimiser.step()
        return loss.item()

    return {"forward": forward, "step": step}


def candidates(model, images, labels) -> dict:
    """The same here."""
    forward = eqx.filter_jit(lambda model, images: jax.vmap(model)(images))

    def loss_of(model, images, labels):
        scores = jax.nn.log_softmax(jax.vmap(model)(images))
        return -jnp.take_along_axis(scores, labels[:, None], axis=1).mean()

    @eqx.filter_jit(donate="all-except-first")
    def train(data, model):
        loss, gradient = eqx.filter_value_and_grad(loss_of)(model, *data)
        return loss, eqx.apply_updates(model, jax.tree.map(lambda g: -RATE * g, gradient))

    # Its own copy, because the arrays are given away to be overwritten.
    trained = [jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, model)]

    def step():
        loss, trained[0] = train((images, labels), trained[0])
        return loss

    return {"forward": lambda: forward(model, images), "step": step}


def main() -> None:
    """Prints the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((args.batch, 3, 224, 224)).astype(np.float32)
    labels = rng.integers(0, 1000, args.batch)
    reference = theirs(args.layers).eval()
    ours = candidates(same_model(reference), jnp.asarray(images), jnp.asarray(labels, jnp.int32))
    other = torch_candidates(reference, torch.from_numpy(images), torch.from_numpy(labels))
    np.testing.assert_allclose(ours["forward"](), other["forward"](), rtol=1e-3, atol=1e-4)
    result = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": {**vars(args), "json": None},
    }
    for name in ("forward", "step"):
        seconds = interleaved({"torch": other[name], "ours": ours[name]}, args.rounds)
        result[name] = {
            **{f"{key} seconds": min(values) for key, values in seconds.items()},
            "times faster than torch": 1 / ratios(seconds, "torch")["ours"],
        }
    np.testing.assert_allclose(ours["step"](), other["step"](), rtol=1e-3)
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
