"""Trains a model of physics on plates with hot pipes, and differentiates it by position.

    python examples/operator_learning.py

A thin round plate is cold at its rim, hot pipes go through it, and it loses heat to the air: its
temperature obeys `laplacian(u) = m**2 * u`, with `u = 1` at the pipes and `u = 0` at the rim. Every
plate has other pipes and another `m`. A thousand of them are solved by finite differences, and an
`AnchorTransformer` learns the map from the pipes and `m` to the temperature anywhere in the plate
and to the flux of heat at the pipes. It is compared with the nearest of the training plates, and
with a kernel regression onto the principal components of their temperatures.

What it has learned is a function of the position, so `jax.jacfwd` gives its derivatives. They show
how well it obeys the equation, and in the end they become part of the loss: a few more steps, on
unsolved plates, make it obey better.

It takes about four minutes on two CPU cores and needs no data. The results and a picture of some
plates are in the folder `runs/operator_learning`.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy.sparse
import scipy.sparse.linalg
from jaxtyping import Array, Bool, Float, Int, PyTree
from scipy.spatial.distance import cdist
from tqdm import tqdm

from eqx_transformer.models import AnchorState, AnchorTransformer, AnchorTransformerConfig
from eqx_transformer.training import weight_decay_mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Points = Float[np.ndarray, "points 2"]
Field = Float[np.ndarray, "nodes nodes"]

MAX_PIPES = 4
COOLING = (2.0, 8.0)
ANGLES = 256


class UserError(Exception):
    """A user error, reported in one line."""


# Plates -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plate:
    """The disc of radius 1, with pipes.

    Arguments:

    - `pipes`: two coordinates of the centre and the radius of each.
    - `cooling`: the number `m` of the equation.
    """

    pipes: Float[np.ndarray, "pipes 3"]
    cooling: float

    def distance(self, points: Points) -> Float[np.ndarray, " points"]:
        """How far points are from the nearest pipe; negative inside one."""
        offset = points[:, None] - self.pipes[None, :, :2]
        return (np.hypot(offset[..., 0], offset[..., 1]) - self.pipes[:, 2]).min(axis=1)


def draw_plate(rng: np.random.Generator) -> Plate:
    """A plate with one to four pipes, apart from each other and from the rim."""
    pipes: list[np.ndarray] = []
    count = rng.integers(1, MAX_PIPES + 1)
    while len(pipes) < count:
        pipe = np.asarray([*rng.uniform(-1, 1, 2), rng.uniform(0.1, 0.2)])
        apart = all(math.dist(pipe[:2], p[:2]) > pipe[2] + p[2] + 0.15 for p in pipes)
        if apart and math.hypot(*pipe[:2]) < 0.85 - pipe[2]:
            pipes.append(pipe)
    return Plate(np.stack(pipes), float(rng.uniform(*COOLING)))


@dataclasses.dataclass(frozen=True)
class Solution:
    """The temperature of a plate, and the flux of heat out of its pipes.

    Arguments:

    - `plate`: the plate.
    - `field`: the temperature at the nodes of a grid over the square from -1 to 1; that of the
        pipes inside them, and zero outside the plate.
    - `inside`: which nodes are in the plate.
    - `flux`: how fast the temperature falls off the surface of each pipe, along the normal, at
        `ANGLES` equal steps of the angle.
    """

    plate: Plate
    field: Field
    inside: Bool[np.ndarray, "nodes nodes"]
    flux: Float[np.ndarray, "pipes angles"]


def grid(nodes: int) -> Points:
    """The nodes of a grid over the square from -1 to 1, row by row."""
    axis = np.linspace(-1, 1, nodes)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


def solve(plate: Plate, nodes: int) -> Solution:
    """Solves the equation by finite differences of second order.

    Where a line of the grid meets a circle, the distance to it replaces the distance between nodes.
    (Shortley and Weller, The numerical solution of Laplace's equation, 1938.)
    """
    points, h = grid(nodes), 2 / (nodes - 1)
    distance = plate.distance(points)
    inside = (distance > 1e-9) & (np.hypot(*points.T) < 1 - 1e-9)
    index = np.flatnonzero(inside)
    number = np.full(len(points), -1)
    number[index] = np.arange(len(index))

    # Distance and value in four directions: a node, or where the line to it meets a circle.
    circles = np.concatenate([[[0, 0, 1]], plate.pipes])
    steps = {(0, -1): -nodes, (0, 1): nodes, (1, -1): -1, (1, 1): 1}
    length = {direction: np.full(len(index), h) for direction in steps}
    hot = {direction: np.zeros(len(index)) for direction in steps}
    which = {direction: np.full(len(index), -1) for direction in steps}
    for (axis, sign), step in steps.items():
        for circle, (*centre, radius) in enumerate(circles):
            along = (points[index, axis] - centre[axis]) * sign
            across = points[index, 1 - axis] - centre[1 - axis]
            root = np.sqrt(np.maximum(radius**2 - across**2, 0))
            meets = -along + (root if circle == 0 else -root)
            met = (np.abs(across) < radius) & (meets > 0) & (meets <= h * (1 + 1e-6))
            met &= ~inside[index + step]
            length[axis, sign][met] = meets[met]
            which[axis, sign][met] = circle
        hot[axis, sign] = (which[axis, sign] > 0).astype(float)

    rows, columns, values = [], [], []
    diagonal, right = np.full(len(index), plate.cooling**2), np.zeros(len(index))
    for (axis, sign), step in steps.items():
        both = length[axis, 1] + length[axis, -1]
        weight = 2 / (both * length[axis, sign])
        diagonal += weight
        free = which[axis, sign] < 0
        rows.append(np.flatnonzero(free))
        columns.append(number[index + step][free])
        values.append(-weight[free])
        right += np.where(free, 0, weight * hot[axis, sign])
    rows.append(np.arange(len(index)))
    columns.append(np.arange(len(index)))
    values.append(diagonal)
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    u = scipy.sparse.linalg.spsolve(scipy.sparse.csc_array(entries), right)
    field = np.where(distance <= 1e-9, 1.0, 0.0)
    field[index] = u

    # Along a surface the temperature is constant, so one derivative gives that along the normal.
    flux = []
    for circle, (*centre, radius) in enumerate(plate.pipes, start=1):
        angles, slopes = [], []
        for (axis, sign), step in steps.items():
            met = which[axis, sign] == circle
            node, near = index[met], length[axis, sign][met]
            place = points[node].copy()
            place[:, axis] += sign * near
            normal = (place - centre) / radius
            # Skip the nearest node if it is too near: the difference would suffer cancellation.
            skip = np.where(near < h / 2, 1, 0)
            a, b = near + skip * h, near + (skip + 1) * h
            ua, ub = field[node - skip * step] - 1, field[node - (skip + 1) * step] - 1
            slope = (b**2 * ua - a**2 * ub) / (a * b * (b - a)) / np.abs(normal[:, axis])
            steep = np.abs(normal[:, axis]) > 0.7
            angles.append(np.arctan2(normal[:, 1], normal[:, 0])[steep])
            slopes.append(slope[steep])
        angle, slope = np.concatenate(angles), np.concatenate(slopes)
        at = np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)
        flux.append(-np.interp(at, angle, slope, period=2 * np.pi))
    shape = (nodes, nodes)
    return Solution(plate, field.reshape(shape), inside.reshape(shape), np.stack(flux))


# What the model sees ------------------------------------------------------------------------------


class Batch(eqx.Module):
    """Some plates, some of their points, and the true values there.

    Arguments:

    - `anchors`: points of the plates, and of the surfaces of their pipes.
    - `queries`: more points of the plates.
    - `cooling`: the number `m`.
    - `temperature`: at anchors of the plate and then at queries.
    - `flux`: at anchors of the surfaces.
    """

    anchors: dict[str, Float[Array, "plates anchors 2"]]
    queries: Float[Array, "plates queries 2"]
    cooling: Float[Array, " plates"]
    temperature: Float[Array, "plates points"]
    flux: Float[Array, "plates surface"]


def in_float32(*arrays: PyTree) -> tuple[Any, ...]:
    """The same in the precision of the model."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)


def around(
    plate: Plate, count: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " count"], Float[np.ndarray, " count"], Points]:
    """Evenly spaced points around the pipes: of which pipe, at what angle, and where."""
    turns = (np.arange(count) + rng.uniform()) * len(plate.pipes) / count
    pipe, angle = turns.astype(int), 2 * np.pi * (turns % 1)
    x, y, radius = plate.pipes[pipe].T
    return pipe, angle, np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=-1)


def solved_batch(
    solutions: list[Solution], args: argparse.Namespace, rng: np.random.Generator
) -> Batch:
    """Random nodes of plates that were solved, and points around the pipes."""
    nodes = grid(len(solutions[0].field))
    points, temperature, surface, flux = [], [], [], []
    for solution in solutions:
        chosen = rng.choice(np.flatnonzero(solution.inside), args.anchors + args.queries)
        points.append(nodes[chosen])
        temperature.append(solution.field.ravel()[chosen])
        pipe, angle, where = around(solution.plate, args.surface_anchors, rng)
        surface.append(where)
        flux.append(solution.flux[pipe, (angle * ANGLES / (2 * np.pi)).astype(int)])
    places = np.stack(points)
    return Batch(
        *in_float32(
            {"plate": places[:, : args.anchors], "pipes": np.stack(surface)},
            places[:, args.anchors :],
            np.asarray([solution.plate.cooling for solution in solutions]),
            np.stack(temperature),
            np.stack(flux),
        )
    )


def unsolved_batch(
    plates: list[Plate], args: argparse.Namespace, rng: np.random.Generator
) -> tuple[dict[str, Array], Array, Array]:
    """Random points of plates, points around the pipes, and the numbers `m`."""
    count = args.anchors + args.queries
    points = []
    for plate in plates:
        square = rng.uniform(-1, 1, (8 * count, 2))
        kept = (np.hypot(*square.T) < 1) & (plate.distance(square) > 0)
        points.append(square[kept][:count])
    places = np.stack(points)
    pipes = np.stack([around(plate, args.surface_anchors, rng)[2] for plate in plates])
    anchors = {"plate": places[:, : args.anchors], "pipes": pipes}
    cooling = np.asarray([plate.cooling for plate in plates])
    return in_float32(anchors, places[:, args.anchors :], cooling)


# The model ----------------------------------------------------------------------------------------


class Surrogate(eqx.Module):
    """Temperature and flux of a plate, without solving anything.

    The model sees a plate as two kinds of points, and `m` as a condition. Coordinates are scaled so
    that their shortest wavelength, `2 pi`, is a third of the plate's radius, and the flux so that
    it is about one.
    """

    model: AnchorTransformer

    SCALE: ClassVar[float] = 18.0
    FLUX: ClassVar[float] = 5.0

    def encode(
        self, anchors: dict[str, Float[Array, "_ 2"]], cooling: Float[Array, ""]
    ) -> tuple[Float[Array, " anchors"], Float[Array, " surface"], AnchorState]:
        """Temperature and flux at the anchors, and what `temperature` needs of them."""
        scaled = {name: self.SCALE * points for name, points in anchors.items()}
        out, state = self.model.encode(scaled, conditions=5 * cooling[None])
        return out["plate"][:, 0], self.FLUX * out["pipes"][:, 0], state

    def temperature(
        self, state: AnchorState, points: Float[Array, "points 2"]
    ) -> Float[Array, " points"]:
        """The temperature at any points of the plate."""
        return self.model.decode(state, {"plate": self.SCALE * points})["plate"][:, 0]

    def residual(
        self, state: AnchorState, points: Float[Array, "points 2"], cooling: Float[Array, ""]
    ) -> Float[Array, " points"]:
        """`laplacian(u) - m**2 * u` at some points: zero if the equation is obeyed.

        The prediction at a point depends on no other point. So the derivatives with respect to a
        shift of all of them are those of each with respect to its own position.
        """

        def shifted(shift: Float[Array, "2"]) -> Float[Array, " points"]:
            return self.temperature(state, points + shift[None])

        hessian = jax.jacfwd(jax.jacfwd(shifted))(jnp.zeros(2, points.dtype))
        return jnp.trace(hessian, axis1=1, axis2=2) - cooling**2 * shifted(
            jnp.zeros(2, points.dtype)
        )


def make_model(args: argparse.Namespace) -> Surrogate:
    """A small model with a branch for the plate and one for the pipes."""
    config = AnchorTransformerConfig(
        num_dims=2,
        branches=("plate", "pipes"),
        out_features=(1, 1),
        patterns=("joint",),
        num_conditions=1,
        d_model=args.d_model,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        d_ff=2 * args.d_model,
        wavelength_base=100.0,
        rope_theta=100.0,
    )
    return Surrogate(AnchorTransformer(config, key=jax.random.key(args.seed)))


# Training -----------------------------------------------------------------------------------------


def data_loss(surrogate: Surrogate, batch: Batch) -> Float[Array, ""]:
    """Mean squared errors of temperature and flux, each relative to the variance."""

    def of_plate(plate: Batch) -> tuple[Array, Array]:
        at_anchors, flux, state = surrogate.encode(plate.anchors, plate.cooling)
        at_queries = surrogate.temperature(state, plate.queries)
        temperature = jnp.concatenate([at_anchors, at_queries])
        return temperature - plate.temperature, flux - plate.flux

    temperature, flux = jax.vmap(of_plate)(batch)
    return (temperature**2).mean() / 0.25**2 + 0.1 * (flux**2).mean() / 1.6**2


def physics_loss(
    surrogate: Surrogate,
    anchors: dict[str, Float[Array, "plates anchors 2"]],
    queries: Float[Array, "plates queries 2"],
    cooling: Float[Array, " plates"],
) -> Float[Array, ""]:
    """Mean squared residual at queries."""

    def of_plate(anchors: dict[str, Array], queries: Array, cooling: Array) -> Array:
        _, _, state = surrogate.encode(anchors, cooling)
        return surrogate.residual(state, queries, cooling)

    return (jax.vmap(of_plate)(anchors, queries, cooling) ** 2).mean()


@eqx.filter_jit(donate="all")
def train_step(
    surrogate: Surrogate,
    state: PyTree,
    solved: Batch,
    unsolved: Any,
    optimiser: optax.GradientTransformation,
    physics_weight: float,
) -> tuple[Surrogate, PyTree, Float[Array, ""]]:
    """One step of the optimiser, with the residual at unsolved plates if there are any."""

    def total(surrogate: Surrogate) -> Float[Array, ""]:
        loss = data_loss(surrogate, solved)
        if unsolved is not None:
            loss = loss + physics_weight * physics_loss(surrogate, *unsolved)
        return loss

    loss, gradient = eqx.filter_value_and_grad(total)(surrogate)
    updates, state = optimiser.update(gradient, state, eqx.filter(surrogate, eqx.is_inexact_array))
    return eqx.apply_updates(surrogate, updates), state, loss


def train(
    surrogate: Surrogate,
    solutions: list[Solution],
    args: argparse.Namespace,
    *,
    physics: bool,
    rng: np.random.Generator,
) -> tuple[Surrogate, list[float]]:
    """Trains on plates that were solved, with `physics` also on as many that were not.

    Returns:

    The model, and the loss of every step.
    """
    steps = args.physics_steps if physics else args.steps
    # The second time it only has to improve an existing model.
    peak = args.learning_rate / (4 if physics else 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(50, steps // 10 + 1), steps + 1)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.01, mask=weight_decay_mask),
    )
    state = optimiser.init(eqx.filter(surrogate, eqx.is_inexact_array))
    losses: list[Array] = []
    # Copied, because a step reuses the memory of its model.
    surrogate = jax.tree.map(lambda x: jnp.array(x) if eqx.is_array(x) else x, surrogate)
    name = "with the equation" if physics else "training"
    with tqdm(range(steps), desc=name, unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            chosen = rng.integers(len(solutions), size=args.batch)
            solved, unsolved = solved_batch([solutions[i] for i in chosen], args, rng), None
            if physics:
                plates = [draw_plate(rng) for _ in range(args.batch)]
                anchors, queries, cooling = unsolved_batch(plates, args, rng)
                unsolved = (anchors, queries[:, : args.physics_points], cooling)
            surrogate, state, loss = train_step(
                surrogate, state, solved, unsolved, optimiser, args.physics_weight
            )
            losses.append(loss)
            if step % 10 == 0:  # reading a loss blocks until it is computed
                progress.set_postfix_str(f"loss {float(loss):.4f}")
    return surrogate, [float(loss) for loss in losses]


# Testing ------------------------------------------------------------------------------------------

encode = eqx.filter_jit(Surrogate.encode)
temperature = eqx.filter_jit(Surrogate.temperature)
residual = eqx.filter_jit(Surrogate.residual)


def predict(
    surrogate: Surrogate, solution: Solution, args: argparse.Namespace, chunk: int = 1024
) -> tuple[Field, float, float]:
    """The anchors of a plate once, and then every node of its grid, chunk by chunk.

    Returns:

    The temperature at the nodes, zero outside the plate; the relative error of the flux; and the
    root mean square of the residual at random nodes.
    """
    plate: Batch = jax.tree.map(
        lambda x: x[0], solved_batch([solution], args, np.random.default_rng(args.seed))
    )
    _, flux, state = encode(surrogate, plate.anchors, plate.cooling)
    points = grid(len(solution.field))[solution.inside.ravel()].astype(np.float32)
    # Chunks of equal size, so that there is one compilation for all.
    padded = np.pad(points, ((0, -len(points) % chunk), (0, 0)))
    parts = [temperature(surrogate, state, jnp.asarray(x)) for x in padded.reshape(-1, chunk, 2)]
    field = np.zeros_like(solution.field)
    field[solution.inside] = np.concatenate(parts)[: len(points)]
    of_equation = residual(surrogate, state, plate.queries[:64], plate.cooling)
    return field, relative(flux, plate.flux), float(jnp.sqrt((of_equation**2).mean()))


def relative(predicted: Any, true: Any) -> float:
    """The relative error in the L2 norm."""
    return float(np.linalg.norm(predicted - true) / np.linalg.norm(true))


def mean_error(fields: Iterable[Field], solutions: list[Solution]) -> float:
    """The mean relative error of temperatures in the plate."""
    pairs = zip(fields, solutions, strict=True)
    return float(np.mean([relative(u[s.inside], s.field[s.inside]) for u, s in pairs]))


def measure(
    surrogate: Surrogate, solutions: list[Solution], args: argparse.Namespace
) -> dict[str, float]:
    """Mean relative errors of temperature and flux, and the mean residual."""
    fields, flux, of_equation = zip(*(predict(surrogate, s, args) for s in solutions), strict=True)
    return {
        "temperature": mean_error(fields, solutions),
        "flux": float(np.mean(flux)),
        "residual": float(np.mean(of_equation)),
    }


def baselines(training: list[Solution], test: list[Solution]) -> dict[str, float]:
    """Mean relative errors of two simple methods, to which a plate is an image and a number.

    The image is the distance to the nearest pipe. The nearest plate is the nearest in these; and
    from them kernel ridge regression predicts the principal components of the temperature ("POD"),
    with the two settings that suit the test plates best.
    """
    coarse = grid(33)

    def describe(solution: Solution) -> np.ndarray:
        image = np.minimum(solution.plate.distance(coarse), 1)
        return np.append(image, solution.plate.cooling)

    x, x_test = (np.stack([describe(s) for s in part]) for part in (training, test))
    squares, squares_test = cdist(x, x, "sqeuclidean"), cdist(x_test, x, "sqeuclidean")
    nearest = [training[i].field for i in squares_test.argmin(axis=1)]

    fields = np.stack([s.field.ravel() for s in training])
    mean = fields.mean(axis=0)
    _, _, components = np.linalg.svd(fields - mean, full_matrices=False)
    components = components[:256]
    kernel, kernel_test = (np.exp(-0.3 / np.median(squares) * d) for d in (squares, squares_test))
    weights = np.linalg.solve(kernel + 1e-4 * np.eye(len(x)), (fields - mean) @ components.T)
    predicted = mean + kernel_test @ weights @ components
    return {
        "nearest plate": mean_error(nearest, test),
        "POD and kernel regression": mean_error(predicted.reshape(-1, *test[0].field.shape), test),
    }


def draw(surrogate: Surrogate, solutions: list[Solution], args: argparse.Namespace) -> Figure:
    """Plots the true values, the predictions, and the difference."""
    figure, axes = plt.subplots(
        len(solutions), 3, figsize=(8.4, 2.6 * len(solutions)), layout="constrained", squeeze=False
    )
    for row, solution in zip(axes, solutions, strict=True):
        field, _, _ = predict(surrogate, solution, args)
        true = solution.field
        for axis, values, limits, colours in (
            (row[0], true, (0, 1), "inferno"),
            (row[1], field, (0, 1), "inferno"),
            (row[2], field - true, (-0.05, 0.05), "RdBu_r"),
        ):
            shown = np.where(solution.inside, values, np.nan).T
            picture = axis.imshow(
                shown, origin="lower", extent=(-1, 1, -1, 1), cmap=colours, clim=limits
            )
            axis.set(xticks=[], yticks=[], frame_on=False)
            figure.colorbar(picture, ax=axis)
        row[0].set_ylabel(f"m = {solution.plate.cooling:.1f}")
        error = relative(field[solution.inside], true[solution.inside])
        row[2].set_title(f"error: {error:.1%}")
    axes[0, 0].set_title("finite differences")
    axes[0, 1].set_title("predicted")
    return figure


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

    def nodes(value: str) -> int:
        if int(value) < 33:
            raise argparse.ArgumentTypeError(f"{value} must be at least 33, to resolve the pipes")
        return int(value)

    parser = argparse.ArgumentParser(
        description="Learn the temperature of plates with hot pipes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/operator_learning"), help="where results go")
    add("--plates", type=positive, default=1000, help="plates to train on")
    add("--test-plates", type=positive, default=64, help="plates to test with")
    add("--nodes", type=nodes, default=65, help="of the grid, on a side")
    add("--steps", type=positive, default=1000, help="steps of the optimiser")
    add("--physics-steps", type=positive, default=300, help="further steps, with the equation")
    add("--physics-points", type=positive, default=8, help="of each plate, for the residual")
    add("--physics-weight", type=positive_float, default=1e-5, help="of the squared residual")
    add("--batch", type=positive, default=8, help="plates in a step")
    add("--anchors", type=positive, default=32, help="points of a plate that all others see")
    add("--surface-anchors", type=positive, default=64, help="the same at the pipes")
    add("--queries", type=positive, default=160, help="points of a plate in a step, besides")
    add("--learning-rate", type=positive_float, default=2e-3, help="at the end of the warm-up")
    add("--d-model", type=positive, default=64, help="size of the vectors between layers")
    add("--num-layers", type=positive, default=4, help="how many blocks")
    add("--num-heads", type=positive, default=2, help="attention heads")
    add("--seed", type=int, default=0, help="for plates, weights and batches")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Solves, trains, compares, trains with the equation, and draws."""
    rng = np.random.default_rng(args.seed)
    try:
        surrogate = make_model(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    count = args.plates + args.test_plates
    with tqdm(
        range(count), desc="finite differences", unit="plate", dynamic_ncols=True
    ) as progress:
        solutions = [solve(draw_plate(rng), args.nodes) for _ in progress]
    training, test = solutions[: args.plates], solutions[args.plates :]
    parameters = sum(x.size for x in jax.tree.leaves(eqx.filter(surrogate, eqx.is_inexact_array)))
    print(f"{parameters:,} parameters; {len(training)} plates to train on, {len(test)} others")

    surrogate, losses = train(surrogate, training, args, physics=False, rng=rng)
    before = measure(surrogate, test, args)
    errors = baselines(training, test) | {"transformer": before["temperature"]}
    for name, value in errors.items():
        print(f"{name:>25}: {value:6.2%} relative error of the temperature")
    print(f"{'':>25}  {before['flux']:6.2%} of the flux")

    surrogate, more = train(surrogate, training, args, physics=True, rng=rng)
    after = measure(surrogate, test, args)
    print(
        f"{'trained with the equation':>25}: {after['temperature']:6.2%}, {after['flux']:.2%}; "
        f"residual {before['residual']:.2f} before, {after['residual']:.2f} after"
    )

    # On a grid four times as fine, which was not used in training.
    fine = [solve(s.plate, 4 * args.nodes - 3) for s in test[:3]]
    errors["transformer, four times finer"] = mean_error(
        (predict(surrogate, s, args)[0] for s in fine), fine
    )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        figure = draw(surrogate, fine, args)
        figure.savefig(args.output / "plates.png", dpi=80)
        plt.close(figure)
        results = {"errors": errors, "before": before, "after": after, "losses": losses + more}
        (args.output / "results.json").write_text(json.dumps(results) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"plates: {args.output / 'plates.png'}")
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
