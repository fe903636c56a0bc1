"""A vision transformer on CPU: time against those of transformers (PyTorch), Equimo and attnax.

    python tests/benchmarks/vit_cpu.py [--batch 8] [--layers 12] [--rounds 7] [--json FILE]

ViT-S/16 at 224 with 1000 classes, float32: forward, and a step of training (cross-entropy and plain
gradient descent), with as many threads as there are cores. PyTorch's and ours have the same
weights, which `load_pretrained` brings over, and are compared in what they compute; the others have
as many parameters of their own. Needs torch and transformers (the group `parity`); Equimo and
attnax take part if they are installed.
"""

import argparse
import os
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from harness import foreign_load, interleaved, ratios, report

from eqx_transformer.interop import load_pretrained
from eqx_transformer.models import VisionTransformer

try:
    from equimo.models import vit as equimo_vit
except ImportError:
    equimo_vit = None
try:
    import attnax
    from flax import nnx
except ImportError:
    attnax = nnx = None

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


def same_model(model: transformers.PreTrainedModel) -> VisionTransformer:
    """The same model here."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_pretrained(folder)


def saving(model: VisionTransformer) -> VisionTransformer:
    """The same weights in a model that keeps the results of products only for the backward pass."""
    new = VisionTransformer(model.config.replace(remat="dots"), key=jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(new), jax.tree.leaves(model))


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


def ours(model, images):
    """The scores, from our model."""
    return jax.vmap(model)(images)


def of_equimo(model, images):
    """The scores, from Equimo's model."""
    return jax.vmap(lambda image: model(image, inference=True))(images)


def of_attnax(model, images):
    """The scores, from attnax's model, which has channels last."""
    graph, state = model
    return nnx.merge(graph, state)(jnp.moveaxis(images, 1, -1), deterministic=True)


def candidates(call, model, images, labels) -> dict:
    """The same with JAX, given how the model is called."""
    forward = eqx.filter_jit(call)

    def loss_of(model, images, labels):
        scores = jax.nn.log_softmax(call(model, images))
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


def peers(layers: int) -> dict:
    """Other libraries' models of the same size, and how they are called."""
    found = {}
    if equimo_vit is not None:
        found["Equimo"] = (
            of_equimo,
            equimo_vit.VisionTransformer(
                img_size=224,
                in_channels=3,
                dim=384,
                patch_size=16,
                num_heads=6,
                depths=[layers],
                reg_tokens=0,
                global_pool="token",
                num_classes=1000,
                key=jax.random.key(0),
            ),
        )
    if attnax is not None:
        config = attnax.VisionTransformerConfig(
            d_model=384, num_heads=6, num_layers=layers, d_ff=1536, num_classes=1000
        )
        found["attnax"] = of_attnax, nnx.split(attnax.VisionTransformer(nnx.Rngs(0), config))
    return found


def size(model) -> int:
    """How many parameters there are."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


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
    data = jnp.asarray(images), jnp.asarray(labels, jnp.int32)
    model = same_model(reference)
    runs = {
        "torch": torch_candidates(reference, torch.from_numpy(images), torch.from_numpy(labels)),
        "ours": candidates(ours, model, *data),
        "ours, remat='dots'": candidates(ours, saving(model), *data),
    }
    mine, torchs = runs["ours"], runs["torch"]
    np.testing.assert_allclose(mine["forward"](), torchs["forward"](), rtol=1e-3, atol=1e-4)
    for name, (call, peer) in peers(args.layers).items():
        assert abs(size(peer) / size(model) - 1) < 0.01, (name, size(peer), size(model))
        runs[name] = candidates(call, peer, *data)
    result = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": {**vars(args), "json": None},
        "load by others before": round(foreign_load(), 2),
    }
    for name in ("forward", "step"):
        seconds = interleaved({key: run[name] for key, run in runs.items()}, args.rounds)
        result[name] = {
            "seconds": {key: min(values) for key, values in seconds.items()},
            "times as fast as": ratios(seconds, "ours"),
        }
    np.testing.assert_allclose(mine["step"](), torchs["step"](), rtol=1e-3)
    report(result, args.json)


if __name__ == "__main__":
    main()
