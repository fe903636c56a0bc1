"""Fits a small attention regressor with Levenberg-Marquardt, and with Adam.

    python examples/second_order.py

Every particle of a set has an energy: the sum of its interactions with all others. The network, one
block of attention, learns it from positions. Levenberg-Marquardt (optimistix) takes the Jacobian of
all residuals, in forward mode, through attention, and solves a linear problem in every step; Adam
follows the gradient. Both see all the data in every step and start from the same weights, in
float64. The results, `results.json` and the losses over time, `losses.png`, are in the folder
`runs/second_order`. It takes a minute and a half on two CPU cores, and needs the extra `examples`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import optimistix
from jaxtyping import Array, Float, PRNGKeyArray

from eqx_transformer.nn import Linear
from eqx_transformer.stacks import encoder_block

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Sets = tuple[Float[Array, "sets particles 2"], Float[Array, "sets particles"]]
"""Positions and energies."""

History = list[tuple[float, float]]
"""Seconds since the beginning, and the loss there."""


class UserError(Exception):
    """A user error, reported in one line."""


def draw_sets(count: int, particles: int, key: PRNGKeyArray) -> Sets:
    """Random particles in a square, which attract those nearby."""
    where = jax.random.uniform(key, (count, particles, 2), minval=-1.5, maxval=1.5)
    apart = ((where[:, :, None] - where[:, None]) ** 2).sum(-1)
    energy = jnp.exp(-apart).sum(-1) - 1  # not from itself
    return where, energy


class Regressor(eqx.Module):
    """The energies of the particles of one set, equivariant to their order."""

    embed: Linear
    block: Any
    head: Linear

    def __init__(self, d_model: int, num_heads: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.embed = Linear(2, d_model, use_bias=True, key=keys[0])
        self.block = encoder_block(d_model, num_heads, 2 * d_model, key=keys[1])
        self.head = Linear(d_model, 1, use_bias=True, key=keys[2])

    def __call__(self, where: Float[Array, "particles 2"]) -> Float[Array, " particles"]:
        """The energies."""
        return self.head(self.block(self.embed(where)))[:, 0]


def residuals(model: Regressor, sets: Sets) -> Float[Array, " residuals"]:
    """The residuals of the model; the loss is half the sum of their squares."""
    where, energy = sets
    return (jax.vmap(model)(where) - energy).reshape(-1)


def mean_square(model: Regressor, sets: Sets) -> Float[Array, ""]:
    """The loss that is reported."""
    return jnp.mean(residuals(model, sets) ** 2)


# Two ways to fit ----------------------------------------------------------------------------------


def levenberg_marquardt(
    weights: Float[Array, " weights"], wrong: Callable[..., Array], steps: int
) -> tuple[Any, Callable[..., tuple[Array, Any]]]:
    """The state of the solver, and a step of it: one iteration of optimistix, stepped by hand."""
    solver = optimistix.LevenbergMarquardt(rtol=1e-12, atol=1e-12)

    def function(weights: Array, args: None) -> tuple[Array, None]:
        return wrong(weights), None

    shape = jax.eval_shape(wrong, weights)
    state = solver.init(function, weights, None, {}, shape, None, frozenset())

    def step(weights: Array, state: Any) -> tuple[Array, Any]:
        weights, state, _ = solver.step(function, weights, None, {}, state, frozenset())
        return weights, state

    return state, step


def adam(
    weights: Float[Array, " weights"],
    wrong: Callable[..., Array],
    steps: int,
    learning_rate: float,
) -> tuple[Any, Callable[..., tuple[Array, Any]]]:
    """The state of the optimiser, and a step of it."""
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, steps + 1))

    def step(weights: Array, state: Any) -> tuple[Array, Any]:
        gradient = jax.grad(lambda weights: jnp.mean(wrong(weights) ** 2))(weights)
        updates, state = optimiser.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state  # type: ignore[return-value]

    return optimiser.init(weights), step


def fit(
    weights: Float[Array, " weights"],
    state: Any,
    step: Callable[..., tuple[Array, Any]],
    loss: Callable[[Array], Array],
    steps: int,
    record: int,
) -> tuple[Array, History, float]:
    """Takes steps.

    Returns:

    The weights, the loss after every `record` steps with the seconds that it took to get there,
    and the seconds for compilation, which those do not include.
    """
    begin = time.perf_counter()
    step, loss = eqx.filter_jit(step), eqx.filter_jit(loss)
    jax.block_until_ready(step(weights, state)[0])  # compiles
    compilation, seconds = time.perf_counter() - begin, 0.0
    history = [(0.0, float(loss(weights)))]
    for start in range(0, steps, record):
        begin = time.perf_counter()
        for _ in range(min(record, steps - start)):
            weights, state = step(weights, state)
        jax.block_until_ready(weights)
        seconds += time.perf_counter() - begin
        history.append((seconds, float(loss(weights))))
    return weights, history, compilation


def draw(histories: dict[str, History], path: Path) -> None:
    """Losses over time."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, history in histories.items():
        seconds, losses = np.asarray(history).T
        axes.semilogy(seconds, losses, label=f"{name}: {losses[-1]:.1e}")
    axes.set(xlabel="seconds", ylabel="mean squared error", title="The same network, fitted twice")
    axes.legend()
    axes.grid(alpha=0.3)
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
        description="Fit an attention regressor with Levenberg-Marquardt, and with Adam.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/second_order"), help="where results go")
    add("--sets", type=positive, default=96, help="sets to learn from, and as many for a test")
    add("--particles", type=positive, default=5, help="particles in a set")
    add("--d-model", type=positive, default=6, help="size of the vectors")
    add("--num-heads", type=positive, default=2, help="attention heads")
    add("--steps", type=positive, default=80, help="steps of Levenberg-Marquardt")
    add("--adam-steps", type=positive, default=20000, help="steps of Adam")
    add("--learning-rate", type=positive_float, default=1e-2, help="of Adam, at the beginning")
    add("--seed", type=int, default=0, help="for weights and sets")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Fits twice, and draws."""
    keys = jax.random.split(jax.random.key(args.seed), 3)
    train = draw_sets(args.sets, args.particles, keys[0])
    test = draw_sets(args.sets, args.particles, keys[1])
    try:
        model = Regressor(args.d_model, args.num_heads, key=keys[2])
    except ValueError as error:
        raise UserError(str(error)) from error
    parameters, rest = eqx.partition(model, eqx.is_inexact_array)
    start, unravel = jax.flatten_util.ravel_pytree(parameters)

    def of(weights: Array) -> Regressor:
        return eqx.combine(unravel(weights), rest)

    def wrong(weights: Array) -> Array:
        return residuals(of(weights), train)

    def loss(weights: Array) -> Array:
        return mean_square(of(weights), train)

    print(f"{start.size} parameters, {train[1].size} residuals")
    fits = {
        "Levenberg-Marquardt": (
            *levenberg_marquardt(start, wrong, args.steps),
            args.steps,
            1,
        ),
        "Adam": (
            *adam(start, wrong, args.adam_steps, args.learning_rate),
            args.adam_steps,
            max(1, args.adam_steps // 100),
        ),
    }
    histories, results = {}, {}
    for name, (state, step, steps, record) in fits.items():
        weights, histories[name], compilation = fit(start, state, step, loss, steps, record)
        seconds, last = histories[name][-1]
        held_out = float(mean_square(of(weights), test))
        print(
            f"{name}: {steps} steps in {seconds:.1f} s (and {compilation:.1f} s to compile), "
            f"mean squared error {last:.2e}, on other sets {held_out:.2e}"
        )
        results[name] = {"history": histories[name], "test": held_out, "compilation": compilation}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        draw(histories, args.output / "losses.png")
        (args.output / "results.json").write_text(json.dumps(results) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"losses: {args.output / 'losses.png'}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    args = parse(arguments)
    try:
        with jax.enable_x64(True):
            return run(args)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
