"""Reads handwritten digits with a block as the vector field of a differential equation.

    python examples/continuous_depth.py

Layers of a transformer are steps of Euler's method: `z + branch(z)`. Here the branches of one
block, conditioned on the time, are the velocity of `z`, and diffrax integrates it from 0 to 1 (Chen
et al., Neural Ordinary Differential Equations, 2018). It is trained with few steps of a fixed size.
Then, in float64, the tolerance of an adaptive solver is varied, and output and gradient are
compared with those for a very small one; and the memory that the gradient needs is read from the
compiled program, for three adjoints. The results, `results.json` and `depth.png`, are in the folder
`runs/continuous_depth`. It takes four minutes on two busy CPU cores, and needs the extra
`examples`.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from eqx_transformer.nn import MLP, Attention, LayerNorm, Linear, Modulation, patchify
from eqx_transformer.stacks import Condition, Residual, TransformerBlock

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATCH = (2, 2)
PATCHES = 16
"""Patches of 2 by 2 pixels, of which an image of 8 by 8 has this many."""

ADJOINTS = {
    "direct": diffrax.DirectAdjoint(),
    "checkpoints": diffrax.RecursiveCheckpointAdjoint(checkpoints=4),
    "solved backwards": diffrax.BacksolveAdjoint(),
}
"""What reverse mode stores: all that sixteen steps need, a few states, nothing."""


class UserError(Exception):
    """A user error, reported in one line."""


class VectorField(eqx.Module):
    """The velocity of a sequence at a time: what a block adds to it."""

    time: Linear
    block: TransformerBlock

    def __init__(self, d_model: int, num_heads: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.time = Linear(2, d_model, use_bias=True, key=keys[0])
        self.block = TransformerBlock(
            Attention(d_model, num_heads, key=keys[1]),
            MLP(d_model, 2 * d_model, key=keys[2]),
            Residual(LayerNorm(d_model)),
            Residual(LayerNorm(d_model)),
            Modulation(d_model, d_model, 6, key=keys[3]),
        )

    def __call__(
        self, time: Any, z: Float[Array, "seq d_model"], args: None
    ) -> Float[Array, "seq d_model"]:
        """The velocity, with the signature that diffrax expects."""
        angle = jnp.pi * jnp.asarray(time, z.dtype)
        vector = self.time(jnp.stack([jnp.cos(angle), jnp.sin(angle)]))
        return self.block(z, context=Condition(vector=vector)) - z


class Solver(eqx.Module):
    """How the equation is solved: in steps of equal size, or with a tolerance."""

    num_steps: int | None = None
    tolerance: float | None = None
    adjoint: str = "checkpoints"

    def __call__(
        self, field: VectorField, z: Float[Array, "seq d_model"]
    ) -> tuple[Float[Array, "seq d_model"], Array]:
        """`z` at time 1, and the number of steps taken."""
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=None if self.num_steps is None else 1.0 / self.num_steps,
            y0=z,
            stepsize_controller=diffrax.ConstantStepSize()
            if self.tolerance is None
            else diffrax.PIDController(rtol=self.tolerance, atol=self.tolerance),
            adjoint=ADJOINTS[self.adjoint],
            max_steps=4096 if self.num_steps is None else self.num_steps,
        )
        assert solution.ys is not None
        return solution.ys[-1], solution.stats["num_accepted_steps"]


class Classifier(eqx.Module):
    """Digits from images: patches in, the equation, the mean, logits out."""

    embed: Linear
    place: Float[Array, "patches d_model"]
    field: VectorField
    norm: LayerNorm
    head: Linear

    def __init__(self, d_model: int, num_heads: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.embed = Linear(math.prod(PATCH), d_model, use_bias=True, key=keys[0])
        self.place = jax.random.normal(keys[1], (PATCHES, d_model))
        self.field = VectorField(d_model, num_heads, key=keys[2])
        self.norm = LayerNorm(d_model)
        self.head = Linear(d_model, 10, use_bias=True, key=keys[3])

    def __call__(
        self, image: Float[Array, "1 8 8"], solver: Solver
    ) -> tuple[Float[Array, " 10"], Array]:
        """Logits, and how many steps the solver took."""
        z, steps = solver(self.field, self.embed(patchify(image, PATCH)) + self.place)
        return self.head(self.norm(z.mean(axis=0))), steps


# Training -----------------------------------------------------------------------------------------


def read_digits() -> list[np.ndarray]:
    """Images and labels for training, and for testing; pixels from -1 to 1."""
    digits: Any = load_digits()
    images = (digits.images[:, None] / 8 - 1).astype(np.float32)
    split: Any = train_test_split(
        images, digits.target.astype(np.int32), test_size=0.25, random_state=0
    )
    train, test, train_labels, test_labels = split
    return [train, train_labels, test, test_labels]


def loss_of(model: Classifier, images: Array, labels: Array, solver: Solver) -> Float[Array, ""]:
    """Cross-entropy."""
    logits = jax.vmap(lambda image: model(image, solver)[0])(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def train_step(
    model: Classifier, state: PyTree, batch: Any, solver: Solver, optimiser: Any
) -> tuple[Classifier, PyTree, Float[Array, ""]]:
    """One step of the optimiser."""
    images, labels = batch
    loss, gradient = eqx.filter_value_and_grad(loss_of)(model, images, labels, solver)
    updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def train(model: Classifier, digits: list[np.ndarray], args: argparse.Namespace) -> Classifier:
    """Trains on random digits, with steps of equal size."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(20, args.steps), args.steps + 1
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    images, labels, *_ = digits
    rng = np.random.default_rng(args.seed)
    solver = Solver(num_steps=args.solver_steps)
    for _ in tqdm(range(args.steps), unit="step", dynamic_ncols=True):
        index = rng.integers(len(images), size=args.batch)
        batch = images[index], labels[index]
        model, state, _ = train_step(model, state, batch, solver, optimiser)
    return model


# Measuring ----------------------------------------------------------------------------------------


def errors(
    model: Classifier, image: np.ndarray, label: int, tolerances: list[float]
) -> list[dict[str, float]]:
    """Relative errors of the logits, and of two gradients, for tolerances of the solver.

    In float64; the reference is a tolerance a hundred times smaller than the smallest.
    """
    with jax.enable_x64(True):
        model = jax.tree.map(
            lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, model
        )
        wide = jnp.asarray(image, jnp.float64)

        def results(tolerance: Any, adjoint: str) -> tuple[Array, Array, Array]:
            solver = Solver(tolerance=tolerance, adjoint=adjoint)

            def loss(model: Classifier) -> tuple[Array, tuple[Array, Array]]:
                logits, steps = model(wide, solver)
                wrong = optax.softmax_cross_entropy_with_integer_labels(logits, label)
                return wrong, (logits, steps)

            gradient, (logits, steps) = eqx.filter_grad(loss, has_aux=True)(model)
            return logits, jax.flatten_util.ravel_pytree(gradient)[0], steps

        # The tolerance is an argument, so that each adjoint is compiled once.
        of = {
            name: eqx.filter_jit(lambda tolerance, name=name: results(tolerance, name))
            for name in ("checkpoints", "solved backwards")
        }
        smallest = jnp.asarray(min(tolerances) / 100)
        logits, gradient, _ = of["checkpoints"](smallest)

        def apart(x: Array, y: Array) -> float:
            return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))

        rows = []
        for tolerance in tolerances:
            out, through, steps = of["checkpoints"](jnp.asarray(tolerance))
            _, backwards, _ = of["solved backwards"](jnp.asarray(tolerance))
            rows.append(
                {
                    "tolerance": tolerance,
                    "steps": int(steps),
                    "output": apart(out, logits),
                    "gradient, checkpoints": apart(through, gradient),
                    "gradient, solved backwards": apart(backwards, gradient),
                }
            )
        return rows


def memory(model: Classifier, batch: int, depths: list[int]) -> dict[str, list[float]]:
    """Megabytes that the gradient needs, by adjoint, for numbers of steps; nothing is run."""
    images, labels = np.zeros((batch, 1, 8, 8), np.float32), np.zeros(batch, np.int32)

    def of(adjoint: str, steps: int) -> float:
        solver = Solver(num_steps=steps, adjoint=adjoint)
        grad = eqx.filter_jit(eqx.filter_grad(loss_of))
        compiled = grad.lower(model, images, labels, solver).compile().compiled
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    return {adjoint: [of(adjoint, steps) for steps in depths] for adjoint in ADJOINTS}


def draw(
    rows: list[dict[str, float]], depths: list[int], megabytes: dict[str, list[float]], path: Path
) -> None:
    """Errors over tolerances, and memory over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    tolerances = [row["tolerance"] for row in rows]
    for name in ("output", "gradient, checkpoints", "gradient, solved backwards"):
        left.loglog(tolerances, [row[name] for row in rows], "o-", label=name)
    left.loglog(tolerances, tolerances, "k:", linewidth=1, label="tolerance")
    left.set(xlabel="tolerance of the solver", title="Relative error")
    left.legend()
    for name, values in megabytes.items():
        right.loglog(depths, values, "o-", label=name)
    right.set(xlabel="steps of the solver", ylabel="MB", title="Memory of the gradient")
    right.legend()
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
        description="Read digits with a block as the vector field of a differential equation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/continuous_depth"), help="where results go")
    add("--steps", type=positive, default=300, help="steps of the optimiser")
    add("--solver-steps", type=positive, default=3, help="steps of the solver in training")
    add("--batch", type=positive, default=64, help="digits in a step")
    add("--learning-rate", type=positive_float, default=3e-3, help="at the end of the warm-up")
    add("--d-model", type=positive, default=32, help="size of the vectors")
    add("--num-heads", type=positive, default=4, help="attention heads")
    add("--depths", type=positive, nargs="+", default=[4, 32], help="steps to measure memory")
    add(
        "--tolerances",
        type=positive_float,
        nargs="+",
        default=[1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8],
        help="of the adaptive solver",
    )
    add("--seed", type=int, default=0, help="for weights and batches")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Trains, measures and draws."""
    digits = read_digits()
    _, _, images, labels = digits
    try:
        model = Classifier(args.d_model, args.num_heads, key=jax.random.key(args.seed))
    except ValueError as error:
        raise UserError(str(error)) from error
    model = train(model, digits, args)
    solver = Solver(num_steps=args.solver_steps)
    logits = eqx.filter_jit(jax.vmap(lambda image: model(image, solver)[0]))(images)
    accuracy = float((np.asarray(logits).argmax(-1) == labels).mean())
    print(f"{accuracy:.1%} of the test digits are read, in {args.solver_steps} steps")

    rows = errors(model, images[0], int(labels[0]), sorted(args.tolerances, reverse=True))
    for row in rows:
        print("  ".join(f"{name} {value:.1e}" for name, value in row.items()))
    megabytes = memory(model, args.batch, args.depths)
    for name, values in megabytes.items():
        parts = (f"{x:.1f} MB at {n} steps" for n, x in zip(args.depths, values, strict=True))
        print(f"{name}: {', '.join(parts)}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        draw(rows, args.depths, megabytes, args.output / "depth.png")
        results = {"accuracy": accuracy, "errors": rows, "memory": megabytes}
        (args.output / "results.json").write_text(json.dumps(results) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"tolerance and memory: {args.output / 'depth.png'}")
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
