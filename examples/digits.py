"""Trains a vision transformer to read handwritten digits, and shows what it looks at.

    python examples/digits.py

The digits are the 1,797 that come with scikit-learn, 8 by 8 pixels each; a fifth is held out. The
transformer is compared with logistic regression on the pixels. The folder `runs/digits` then has
the results, a picture of the confusion matrix, and one of what decides: where the class token
attends, and the derivative of the score with respect to the pixels. It takes a minute on two CPU
cores, and needs the extra `examples`.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
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
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from eqx_transformer.models import VisionTransformer, ViTConfig
from eqx_transformer.training import weight_decay_mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Images = Float[np.ndarray, "count 1 height width"]
Labels = Int[np.ndarray, " count"]


class UserError(Exception):
    """A user error, reported in one line."""


# Digits -------------------------------------------------------------------------------------------


def read_digits() -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Digits to train on, and the fifth that is held out; pixels from 0 to 1."""
    digits: Any = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    parts: Any = train_test_split(
        images,
        digits.target.astype(np.int32),
        test_size=0.2,
        stratify=digits.target,
        random_state=0,
    )
    return (parts[0], parts[2]), (parts[1], parts[3])


def batches(
    images: Images, labels: Labels, size: int, rng: np.random.Generator
) -> Iterator[tuple[Images, Labels]]:
    """Random digits, each shifted by up to a pixel, endlessly."""
    height, width = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    while True:
        index = rng.integers(len(images), size=size)
        rows = rng.integers(3, size=size)[:, None] + np.arange(height)
        columns = rng.integers(3, size=size)[:, None] + np.arange(width)
        moved = padded[index[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
        yield moved[:, None], labels[index]


# Training -----------------------------------------------------------------------------------------


def make_model(args: argparse.Namespace) -> VisionTransformer:
    """A small vision transformer: 16 patches of 2 by 2 pixels, and the class token."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_classes=10,
        d_model=args.d_model,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        d_ff=2 * args.d_model,
        dropout_rate=0.1,
        # A few small blocks run faster unrolled than in a loop.
        unroll=args.num_layers,
    )
    return VisionTransformer(config, key=jax.random.key(args.seed))


def loss_of(
    model: VisionTransformer, images: Array, labels: Array, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Mean cross-entropy in nats, with a label smoothing of a tenth."""
    keys = jax.random.split(key, len(images))
    logits = jax.vmap(lambda image, key: model(image, key=key))(images, keys)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


@eqx.filter_jit(donate="all")
def train_step(
    model: VisionTransformer,
    state: PyTree,
    batch: Any,
    optimiser: optax.GradientTransformation,
) -> tuple[VisionTransformer, PyTree, Float[Array, ""]]:
    """One step of the optimiser."""
    loss, gradient = eqx.filter_value_and_grad(loss_of)(model, *batch)
    updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def train(
    model: VisionTransformer, digits: tuple[Images, Labels], args: argparse.Namespace
) -> tuple[VisionTransformer, list[float]]:
    """Trains on randomly shifted digits.

    Returns:

    The model, and the loss of every step.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(50, args.steps // 10 + 1), args.steps + 1
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.05, mask=weight_decay_mask),
    )
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    losses: list[Array] = []
    source = batches(*digits, args.batch, np.random.default_rng(args.seed))
    with tqdm(range(args.steps), unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            key = jax.random.fold_in(jax.random.key(args.seed), step)
            model, state, loss = train_step(model, state, (*next(source), key), optimiser)
            losses.append(loss)
            if step % 10 == 0:  # reading a loss blocks until it is computed
                progress.set_postfix_str(f"loss {float(loss):.3f}")
    return model, [float(loss) for loss in losses]


@eqx.filter_jit
def predict(model: VisionTransformer, images: Float[Array, "count 1 h w"]) -> Int[Array, " count"]:
    """The most probable digits."""
    return jax.vmap(eqx.nn.inference_mode(model))(images).argmax(axis=-1)


# What decides -------------------------------------------------------------------------------------


@eqx.filter_jit
def what_decides(
    model: VisionTransformer, image: Float[Array, "1 h w"]
) -> tuple[Float[Array, "rows columns"], Float[Array, "h w"]]:
    """Where the class token attends in the last layer, and how the best score changes by pixel."""
    model = eqx.nn.inference_mode(model)
    attention = model.attention_maps(image)[-1].mean(axis=0)
    to_patches = attention[0, model.config.num_prefix :].reshape(model.config.grid)
    sensitivity = jax.grad(lambda image: model(image).max())(image)
    return to_patches, sensitivity[0]


def draw_decisions(model: VisionTransformer, images: Images, labels: Labels, path: Path) -> None:
    """Plots one digit of each kind, where the model looks, and what would change its mind."""
    chosen = [int(np.flatnonzero(labels == digit)[0]) for digit in np.unique(labels)]
    figure, axes = plt.subplots(
        3, len(chosen), figsize=(1.1 * len(chosen), 3.8), layout="constrained", squeeze=False
    )
    for column, index in zip(axes.T, chosen, strict=True):
        image = images[index]
        attention, sensitivity = what_decides(model, jnp.asarray(image))
        limit = float(jnp.abs(sensitivity).max())
        column[0].imshow(image[0], cmap="gray")
        column[1].imshow(image[0], cmap="gray")
        extent = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
        column[1].imshow(attention, cmap="inferno", alpha=0.6, extent=extent, vmin=0)
        column[2].imshow(sensitivity, cmap="RdBu_r", vmin=-limit, vmax=limit)
        for axis in column:
            axis.set(xticks=[], yticks=[])
    rows = ("digit", "attention of\nthe class token", "derivative\nof the score")
    for axis, name in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_confusion(confusion: Int[np.ndarray, "10 10"], title: str, path: Path) -> None:
    """Plots how often each digit was taken for each other."""
    figure, axes = plt.subplots(figsize=(6, 5.4), layout="constrained")
    # On a logarithmic scale the few mistakes are visible next to the many correct answers.
    axes.imshow(np.log1p(confusion), cmap="Blues")
    for i, j in np.argwhere(confusion):
        colour = "white" if confusion[i, j] > 10 else "black"
        axes.text(j, i, str(confusion[i, j]), ha="center", va="center", color=colour)
    axes.set(xlabel="predicted", ylabel="true", title=title, xticks=range(10), yticks=range(10))
    figure.savefig(path, dpi=150)
    plt.close(figure)


# The program --------------------------------------------------------------------------------------


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
        description="Train a vision transformer to read handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/digits"), help="where results go")
    add("--steps", type=positive, default=2000, help="steps of the optimiser")
    add("--batch", type=positive, default=64, help="digits in a step")
    add("--learning-rate", type=positive_float, default=2e-3, help="at the end of the warm-up")
    add("--d-model", type=positive, default=64, help="size of the vectors between layers")
    add("--num-layers", type=positive, default=4, help="how many blocks")
    add("--num-heads", type=positive, default=4, help="attention heads")
    add("--seed", type=int, default=0, help="for weights and batches")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Trains, tests, compares and draws."""
    training, test = read_digits()
    try:
        model = make_model(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    parameters = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    print(
        f"{parameters:,} parameters; {len(training[0])} digits to train on, {len(test[0])} others"
    )
    model, losses = train(model, training, args)

    predicted = np.asarray(predict(model, jnp.asarray(test[0])))
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (test[1], predicted), 1)
    flat = (part[0].reshape(len(part[0]), -1) for part in (training, test))
    baseline = LogisticRegression(max_iter=1000).fit(next(flat), training[1])
    accuracy = {
        "logistic regression": float(baseline.score(next(flat), test[1])),
        "vision transformer": float((predicted == test[1]).mean()),
    }
    for name, value in accuracy.items():
        print(f"{name:>20}: {value:6.1%} right")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        title = f"Digits never seen: {accuracy['vision transformer']:.1%} right"
        draw_confusion(confusion, title, args.output / "confusion.png")
        draw_decisions(model, *test, args.output / "decisions.png")
        results = {"accuracy": accuracy, "confusion": confusion.tolist(), "losses": losses}
        (args.output / "results.json").write_text(json.dumps(results) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"confusion matrix: {args.output / 'confusion.png'}")
    print(f"what decides: {args.output / 'decisions.png'}")
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
