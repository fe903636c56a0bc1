"""Trains a small diffusion transformer to write digits, and plots what it writes.

    python examples/diffusion.py

The digits are the 1,797 that come with scikit-learn, 8 by 8 pixels each. The model learns the
velocity that carries noise to digits along straight lines (flow matching), and diffrax solves the
ordinary differential equation with that velocity. Success is measured by how many of the digits a
classifier of real digits recognises. The results, `results.json` and pictures of the digits and of
how they came about, are in the folder `runs/diffusion`. It takes two minutes on two CPU cores, and
needs the extra `examples`.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tqdm import tqdm

from eqx_transformer.models import DiT, DiTConfig
from eqx_transformer.training import weight_decay_mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Images = Float[np.ndarray, "count 1 height width"]
Labels = Int[np.ndarray, " count"]


SHAPE = (1, 8, 8)
"""Of a digit."""


class UserError(Exception):
    """A user error, reported in one line."""


def read_digits() -> tuple[Images, Labels]:
    """All digits; pixels from -1 to 1."""
    digits: Any = load_digits()
    return (digits.images[:, None] / 8 - 1).astype(np.float32), digits.target.astype(np.int32)


def batches(
    images: Images, labels: Labels, size: int, seed: int
) -> Iterator[tuple[Images, Labels]]:
    """Random digits, endlessly."""
    rng = np.random.default_rng(seed)
    while True:
        index = rng.integers(len(images), size=size)
        yield images[index], labels[index]


# Training -----------------------------------------------------------------------------------------


def make_model(args: argparse.Namespace) -> DiT:
    """A small diffusion transformer on 16 patches of 2 by 2 pixels."""
    config = DiTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_classes=10,
        d_model=args.d_model,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        time_scale=1000.0,  # times are from 0 to 1
        unroll=args.num_layers,
    )
    return DiT(config, key=jax.random.key(args.seed))


def loss_of(model: DiT, images: Array, labels: Array, key: PRNGKeyArray) -> Float[Array, ""]:
    """Flow matching: mean squared error of the velocity, from noise at time 0 to an image at 1.

    (Lipman et al., Flow Matching for Generative Modeling, 2023; Liu et al., Flow Straight and Fast,
    2023.)
    """

    def of_image(image: Array, label: Array, key: PRNGKeyArray) -> Array:
        time_key, noise_key, model_key = jax.random.split(key, 3)
        # Times in the middle, where the velocity is hardest to predict, are drawn more often.
        time = jax.nn.sigmoid(jax.random.normal(time_key))
        noise = jax.random.normal(noise_key, image.shape)
        velocity = model((1 - time) * noise + time * image, time, label, key=model_key)
        return jnp.mean((velocity - (image - noise)) ** 2)

    keys = jax.random.split(key, len(images))
    return jax.vmap(of_image)(images, labels, keys).mean()


@eqx.filter_jit(donate="all")
def train_step(
    model: DiT,
    average: DiT,
    state: PyTree,
    batch: Any,
    optimiser: optax.GradientTransformation,
) -> tuple[DiT, DiT, PyTree, Float[Array, ""]]:
    """One step of the optimiser, and of the moving average of the weights."""
    loss, gradient = eqx.filter_value_and_grad(loss_of)(model, *batch)
    updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    model = eqx.apply_updates(model, updates)

    def moved(old: Any, new: Any) -> Any:
        return 0.99 * old + 0.01 * new if eqx.is_inexact_array(new) else new

    return model, jax.tree.map(moved, average, model), state, loss


def train(
    model: DiT, digits: tuple[Images, Labels], args: argparse.Namespace
) -> tuple[DiT, list[float]]:
    """Trains on random digits.

    Returns:

    The moving average of the model, and the loss of every step.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(50, args.steps // 10 + 1), args.steps + 1
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.01, mask=weight_decay_mask),
    )
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    average = jax.tree.map(lambda x: jnp.array(x) if eqx.is_array(x) else x, model)
    losses: list[Array] = []
    source = batches(*digits, args.batch, args.seed)
    with tqdm(range(args.steps), unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            batch = (*next(source), jax.random.fold_in(jax.random.key(args.seed), step))
            model, average, state, loss = train_step(model, average, state, batch, optimiser)
            losses.append(loss)
            if step % 10 == 0:  # reading a loss blocks until it is computed
                progress.set_postfix_str(f"loss {float(loss):.3f}")
    return average, [float(loss) for loss in losses]


# Writing ------------------------------------------------------------------------------------------


@eqx.filter_jit
def write(
    model: DiT, labels: Int[Array, " count"], guidance: float, moments: int, key: PRNGKeyArray
) -> Float[Array, "count moments 1 height width"]:
    """Carries noise to digits, and returns some moments on the way, including the last one.

    With `guidance` above 1 the effect of the label on the velocity is exaggerated (Ho and Salimans,
    Classifier-Free Diffusion Guidance, 2022).
    """
    model = eqx.nn.inference_mode(model)

    def velocity(time: Any, image: Array, label: Array) -> Array:
        time = jnp.asarray(time, image.dtype)
        told, untold = model(image, time, label), model(image, time)
        return untold + guidance * (told - untold)

    def one(label: Array, key: PRNGKeyArray) -> Array:
        noise = jax.random.normal(key, SHAPE)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.05,
            y0=noise,
            args=label,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, moments)),
            stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-2),
        )
        assert solution.ys is not None
        return solution.ys

    return jax.vmap(one)(labels, jax.random.split(key, len(labels)))


def draw(images: Float[np.ndarray, "rows columns height width"], title: str, path: Path) -> None:
    """Draws pictures in rows."""
    rows, columns, height, width = images.shape
    framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=1.0)
    sheet = framed.transpose(0, 2, 1, 3).reshape(rows * (height + 2), columns * (width + 2))
    figure, axes = plt.subplots(figsize=(0.7 * columns, 0.7 * rows + 0.4), layout="constrained")
    axes.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[], title=title)
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
        description="Train a small diffusion transformer to write digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/diffusion"), help="where results go")
    add("--steps", type=positive, default=1500, help="steps of the optimiser")
    add("--batch", type=positive, default=64, help="digits in a step")
    add("--learning-rate", type=positive_float, default=2e-3, help="at the end of the warm-up")
    add("--d-model", type=positive, default=64, help="size of the vectors between layers")
    add("--num-layers", type=positive, default=4, help="how many blocks")
    add("--num-heads", type=positive, default=4, help="attention heads")
    add("--samples", type=positive, default=10, help="how many of each digit to write")
    add("--guidance", type=positive_float, default=2.0, help="1 for none")
    add("--seed", type=int, default=0, help="for weights, batches and noise")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Trains, writes digits, has them classified, and plots."""
    images, labels = read_digits()
    try:
        model = make_model(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    parameters = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    print(f"{parameters:,} parameters; {len(images)} digits")
    model, losses = train(model, (images, labels), args)

    wanted = np.repeat(np.arange(10, dtype=np.int32), args.samples)
    moments = write(model, jnp.asarray(wanted), args.guidance, 8, jax.random.key(args.seed + 1))
    written = np.asarray(moments[:, -1]).clip(-1, 1)
    reader = SVC().fit(images.reshape(len(images), -1), labels)
    recognised = float(reader.score(written.reshape(len(written), -1), wanted))
    print(f"{recognised:.1%} of what was written is recognised")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        sheet = written.reshape(10, args.samples, *written.shape[2:])
        title = f"Written digits: {recognised:.0%} recognised"
        draw(sheet, title, args.output / "samples.png")
        draw(np.asarray(moments[:: args.samples, :, 0]), "From noise", args.output / "flow.png")
        results = {"recognised": recognised, "losses": losses}
        (args.output / "results.json").write_text(json.dumps(results) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"samples: {args.output / 'samples.png'}")
    print(f"how they came about: {args.output / 'flow.png'}")
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
