"""Teaches a trained vision transformer new digits, from a handful of labels.

    python examples/fine_tuning.py

Scikit-learn's handwritten digits lie anywhere in a larger image. A vision transformer learns to
tell some of them apart (0 to 5). Then there are labels for ten images each of the others (6 to 9),
and four ways to learn from them: logistic regression on the pixels; the same on the output of the
transformer (a linear probe); low-rank adapters inside it (LoRA) with a new head; and training
everything. Each is done for ten choices of the ten images: with `vmap`, so that ten models train at
once. The results, and a picture of them, are in the folder `runs/fine_tuning`. It takes a minute
and a half on two CPU cores and needs the extra `examples`.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from eqx_transformer.models import VisionTransformer, ViTConfig
from eqx_transformer.nn import Linear
from eqx_transformer.training import add_lora, lora_filter

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Images = Float[np.ndarray, "count 1 height width"]
Labels = Int[np.ndarray, " count"]

Loss = Callable[[PyTree, PRNGKeyArray], Float[Array, ""]]


KNOWN, NEW = range(6), range(6, 10)
SIZE = 10


class UserError(Exception):
    """A user error, reported in one line."""


def read_digits(which: range) -> tuple[Images, Labels]:
    """The images of some digits, pixels from 0 to 1, and their labels among these digits."""
    digits: Any = load_digits()
    chosen = np.isin(digits.target, which)
    images = (digits.images[chosen, None] / 16).astype(np.float32)
    return images, (digits.target[chosen] - which.start).astype(np.int32)


def placed(images: Images, places: Int[np.ndarray, "count 2"]) -> Images:
    """Each image at its place in a larger one."""
    larger = np.zeros((len(images), 1, SIZE, SIZE), np.float32)
    height, width = images.shape[2:]
    for out, image, (i, j) in zip(larger, images, places, strict=True):
        out[:, i : i + height, j : j + width] = image
    return larger


def everywhere(images: Images) -> Float[np.ndarray, "count places 1 height width"]:
    """Each image at all places in a larger one."""
    offsets = range(SIZE - images.shape[2] + 1)
    places = np.stack(np.meshgrid(offsets, offsets), axis=-1).reshape(-1, 1, 2)
    repeated = np.broadcast_to(places, (len(places), len(images), 2))
    return np.stack([placed(images, x) for x in repeated], axis=1)


def anywhere(images: Images, rng: np.random.Generator) -> Images:
    """Each image at a random place in a larger one."""
    return placed(images, rng.integers(SIZE - images.shape[2] + 1, size=(len(images), 2)))


# Models -------------------------------------------------------------------------------------------


class Classifier(eqx.Module):
    """A backbone, and a head that is always new."""

    backbone: VisionTransformer
    head: Linear

    def __call__(
        self, image: Float[Array, "1 h w"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " n"]:
        """The scores of the digits."""
        return self.head(self.backbone(image, key=key))


def make_backbone(args: argparse.Namespace) -> VisionTransformer:
    """A small vision transformer without a head: it returns one vector per image."""
    config = ViTConfig(
        image_size=SIZE,
        patch_size=2,
        num_channels=1,
        num_classes=None,
        class_token=False,
        pooling="mean",
        d_model=args.d_model,
        num_layers=args.num_layers,
        num_heads=4,
        d_ff=2 * args.d_model,
        dropout_rate=0.1,
        # A few small blocks run faster unrolled than in a loop.
        unroll=args.num_layers,
    )
    return VisionTransformer(config, key=jax.random.key(args.seed))


def with_head(backbone: VisionTransformer, classes: range, key: PRNGKeyArray) -> Classifier:
    """The backbone with a head that initially gives all digits the same score."""
    zeros = jax.nn.initializers.zeros
    head = Linear(backbone.config.d_model, len(classes), use_bias=True, init=zeros, key=key)
    return Classifier(backbone, head)


# Training -----------------------------------------------------------------------------------------


def make_optimiser(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Adam with weight decay, slower towards the end."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))


def fit(
    loss: Loss, trained: PyTree, state: PyTree, optimiser: Any, keys: PRNGKeyArray
) -> tuple[PyTree, PyTree, Float[Array, " steps"]]:
    """One step for every key, in one program: the loop over steps is a scan.

    Returns:

    What was trained, the state of the optimiser, and the loss of every step.
    """

    def step(carry: Any, key: PRNGKeyArray) -> tuple[Any, Array]:
        trained, state = carry
        value, gradient = jax.value_and_grad(loss)(trained, key)
        updates, state = optimiser.update(gradient, state, trained)
        return (eqx.apply_updates(trained, updates), state), value

    (trained, state), losses = jax.lax.scan(step, (trained, state), keys)
    return trained, state, losses


def loss_of(model: Classifier, images: Array, labels: Array, key: PRNGKeyArray) -> Float[Array, ""]:
    """Mean cross-entropy of an image in nats."""
    keys = jax.random.split(key, len(images))
    logits = jax.vmap(lambda image, key: model(image, key=key))(images, keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def pretrain(args: argparse.Namespace) -> VisionTransformer:
    """A backbone that tells the known digits apart, wherever they are."""
    key, head_key = jax.random.split(jax.random.key(args.seed + 1))
    model = with_head(make_backbone(args), KNOWN, head_key)
    trained, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = make_optimiser(args.steps, args.learning_rate)
    digits, labels = read_digits(KNOWN)
    images = jnp.asarray(everywhere(digits))

    def loss(trained: PyTree, key: PRNGKeyArray) -> Array:
        index_key, place_key, key = jax.random.split(key, 3)
        index = jax.random.randint(index_key, (args.batch,), 0, len(labels))
        place = jax.random.randint(place_key, (args.batch,), 0, images.shape[1])
        batch = images[index, place], jnp.asarray(labels)[index]
        return loss_of(eqx.combine(trained, static), *batch, key)

    some_steps = jax.jit(functools.partial(fit, loss, optimiser=optimiser))
    state, size = optimiser.init(trained), min(50, args.steps)
    with tqdm(total=args.steps, unit="step", dynamic_ncols=True) as progress:
        while progress.n + size <= args.steps:
            key, subkey = jax.random.split(key)
            keys = jax.random.split(subkey, size)
            trained, state, losses = some_steps(trained, state, keys=keys)
            progress.set_postfix_str(f"loss {float(losses.mean()):.3f}", refresh=False)
            progress.update(size)
    return eqx.combine(trained, static).backbone


# Few examples -------------------------------------------------------------------------------------


def choices(labels: Labels, shots: int, count: int, seed: int) -> Int[np.ndarray, "count few"]:
    """Which images to learn from: equally many of each digit, drawn anew for every choice."""
    rng = np.random.default_rng(seed)
    digits = [np.flatnonzero(labels == digit) for digit in np.unique(labels)]
    return np.stack(
        [np.concatenate([rng.permutation(x)[:shots] for x in digits]) for _ in range(count)]
    )


def linear_probe(
    features: Float[np.ndarray, "count size"], labels: Labels, chosen: Int[np.ndarray, "times few"]
) -> list[Labels]:
    """The predictions of logistic regression for all images, for each choice of a few."""
    predictions = []
    for few in chosen:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        predictions.append(probe.fit(features[few], labels[few]).predict(features))
    return predictions


def fine_tune(
    backbone: VisionTransformer,
    images: Images,
    labels: Labels,
    chosen: Int[np.ndarray, "times few"],
    prepare: Callable[[Classifier, PRNGKeyArray], tuple[Classifier, PyTree]],
    *,
    args: argparse.Namespace,
    learning_rate: float,
) -> tuple[Int[Array, "times count"], int]:
    """The predictions for all images of a model trained on a few, for each choice of a few.

    Arguments:

    - `prepare`: returns the model to train, and which of its leaves to train.

    Returns:

    The predictions, and how many parameters were trained.
    """
    optimiser = make_optimiser(args.few_steps, learning_rate)

    def start(key: PRNGKeyArray) -> tuple[PyTree, Any]:
        keys = jax.random.split(key)
        model, spec = prepare(with_head(backbone, NEW, keys[0]), keys[1])
        return eqx.partition(model, spec)

    def one(few: Array, labels: Array, key: PRNGKeyArray) -> Array:
        trained, frozen = start(key)

        def loss(trained: PyTree, key: PRNGKeyArray) -> Array:
            # Gradients are computed only for what is trained.
            return loss_of(eqx.combine(trained, frozen), few, labels, key)

        keys = jax.random.split(key, args.few_steps)
        trained, _, _ = fit(loss, trained, optimiser.init(trained), optimiser, keys)
        model = eqx.nn.inference_mode(eqx.combine(trained, frozen))
        return jax.vmap(model)(jnp.asarray(images)).argmax(axis=-1)

    keys = jax.random.split(jax.random.key(args.seed + 2), len(chosen))
    sizes = jax.tree.leaves(eqx.filter_eval_shape(lambda key: start(key)[0], keys[0]))
    # One model for each choice, all at once.
    predicted = jax.jit(jax.vmap(one))(images[chosen], labels[chosen], keys)
    return predicted, sum(x.size for x in sizes)


def everything(model: Classifier, key: PRNGKeyArray) -> tuple[Classifier, PyTree]:
    """All parameters are trained."""
    return model, jax.tree.map(eqx.is_inexact_array, model)


def adapters(
    rank: int,
) -> Callable[[Classifier, PRNGKeyArray], tuple[Classifier, PyTree]]:
    """Adapters and the head are trained, the backbone is frozen."""

    def prepare(model: Classifier, key: PRNGKeyArray) -> tuple[Classifier, PyTree]:
        backbone = add_lora(model.backbone, rank, alpha=2 * rank, key=key)
        model = eqx.tree_at(lambda model: model.backbone, model, backbone)
        spec = lora_filter(model)
        head = jax.tree.map(eqx.is_inexact_array, model.head)
        return model, eqx.tree_at(lambda spec: spec.head, spec, head)

    return prepare


# The program --------------------------------------------------------------------------------------


def draw(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Plots how many images are classified correctly, one dot for each choice of a few."""
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for row, result in enumerate(results.values()):
        axes.plot(result["accuracy"], [row] * len(result["accuracy"]), "o", color="C0", alpha=0.4)
        axes.plot(np.mean(result["accuracy"]), row, "|", color="C3", markersize=24, mew=3)
    names = [f"{name}\n{x['parameters']:,} parameters" for name, x in results.items()]
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set(xlabel="images told right; the mean in red", title=title)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""

    def positive(value: str) -> int:
        if int(value) < 1:
            raise argparse.ArgumentTypeError(f"{value} must be at least 1")
        return int(value)

    def positive_float(value: str) -> float:
        if not 0 < float(value) < math.inf:
            raise argparse.ArgumentTypeError(f"{value} must be positive")
        return float(value)

    parser = argparse.ArgumentParser(
        description="Teach a vision transformer new digits from a few labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/fine_tuning"), help="where results go")
    add("--steps", type=positive, default=1500, help="steps on the known digits")
    add("--batch", type=positive, default=64, help="images in a step on them")
    add("--few-steps", type=positive, default=100, help="steps on the labelled images of new ones")
    add("--shots", type=positive, default=10, help="labelled images of each digit")
    add("--choices", type=positive, default=10, help="how often they are chosen anew")
    add("--rank", type=positive, default=4, help="of the adapters")
    add("--learning-rate", type=positive_float, default=2e-3, help="of these steps")
    add("--d-model", type=positive, default=64, help="size of the vectors between layers")
    add("--num-layers", type=positive, default=3, help="how many blocks")
    add("--seed", type=int, default=0, help="for weights and choices")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Trains a backbone, learns new digits from few labels in four ways, and compares."""
    digits, labels = read_digits(NEW)
    images = anywhere(digits, np.random.default_rng(args.seed))
    chosen = choices(labels, args.shots, args.choices, args.seed)
    prepare = adapters(args.rank)

    def untrained(key: PRNGKeyArray) -> tuple[Classifier, PyTree]:
        return prepare(with_head(make_backbone(args), NEW, key), key)

    try:
        # Checks the arguments before anything is trained.
        eqx.filter_eval_shape(untrained, jax.random.key(0))
    except ValueError as error:
        raise UserError(str(error)) from error
    backbone = pretrain(args)
    tune = functools.partial(fine_tune, backbone, images, labels, chosen, args=args)
    lora, lora_size = tune(prepare, learning_rate=5e-3)
    all_of_it, size = tune(everything, learning_rate=1e-3)
    pixels = images.reshape(len(images), -1)
    features = np.asarray(jax.jit(jax.vmap(eqx.nn.inference_mode(backbone)))(images))
    predictions = {
        "logistic regression on pixels": (
            linear_probe(pixels, labels, chosen),
            len(NEW) * (pixels.shape[1] + 1),
        ),
        "linear probe of the backbone": (
            linear_probe(features, labels, chosen),
            len(NEW) * (features.shape[1] + 1),
        ),
        f"LoRA of rank {args.rank}": (lora, lora_size),
        "everything": (all_of_it, size),
    }
    results = {}
    for name, (predicted, parameters) in predictions.items():
        # Among the images that it was not trained on.
        right = [
            float(np.delete(np.asarray(p) == labels, few).mean())
            for p, few in zip(predicted, chosen, strict=True)
        ]
        results[name] = {"accuracy": right, "parameters": parameters}
        print(f"{name:>30}: {np.mean(right):6.1%} right, {parameters:,} parameters trained")
    title = f"New digits, from {args.shots} labelled images of each"
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        draw(results, title, args.output / "fine_tuning.png")
        (args.output / "results.json").write_text(json.dumps(results) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"picture: {args.output / 'fine_tuning.png'}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    args = parse(arguments)
    try:
        return run(args)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
