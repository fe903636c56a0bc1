"""Continues series that were observed at irregular times, with a latent differential equation.

    python examples/latent_series.py

Pendulums swing, each with its own length and friction. Angle and speed are observed with noise, at
irregular times, and often only one of them or neither. An encoder reads the observations in the
first half: its attention rotates queries and keys by the times, and a mask leaves out what is
missing. It returns a mean and an uncertainty for where in a latent space the series begins; diffrax
continues from there (Chen et al., Neural Ordinary Differential Equations, 2018; Rubanova et al.,
Latent ODEs, 2019). Both are trained together, on a lower bound of the likelihood. The comparison is
a Gaussian process for each series. The results, `results.json`, `table.md` and `series.png`, are in
the folder `runs/latent_series`. It takes three minutes on two CPU cores, and needs the extra
`examples`.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ExpSineSquared, WhiteKernel
from tqdm import tqdm

from eqx_transformer.attention import Padding
from eqx_transformer.nn import MLP, AxialRoPE, LayerNorm, Linear
from eqx_transformer.stacks import Condition, Stack, encoder_block

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEN, END = 8.0, 16.0
"""Nothing is observed after the first of these times, and nothing predicted after the second."""

NOISE = 0.1
"""Standard deviation of the noise, known from the sensor's data sheet."""

SHARES = (0.7, 0.3)
"""How often the angle is observed, and the speed."""

GRID: Any = np.linspace(0, END, 81, dtype=np.float32)
"""Times to compare with the truth at."""


class UserError(Exception):
    """A user error, reported in one line."""


class Series(NamedTuple):
    """Angles and speeds, one series or many."""

    times: Float[Any, "*series times"]
    values: Float[Any, "*series times 2"]
    known: Bool[Any, "*series times 2"]


# Pendulums ----------------------------------------------------------------------------------------


@jax.jit
def swing(start: Array, constants: Array, times: Array) -> Array:
    """Angles and speeds of pendulums at times from 0 to the end."""

    def field(time: Any, state: Array, constants: Array) -> Array:
        angle, speed = state
        frequency, friction = constants
        return jnp.stack([speed, -(frequency**2) * jnp.sin(angle) - friction * speed])

    return jax.vmap(lambda start, *rest: solve(field, start, *rest, num_steps=160))(
        start, constants, times
    )


def solve(field: Any, start: Array, args: Any, times: Array, *, num_steps: int) -> Array:
    """The solution of an equation at times, in steps of equal size."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Bosh3(),
        t0=0.0,
        t1=END,
        dt0=END / num_steps,
        y0=start,
        args=args,
        saveat=diffrax.SaveAt(ts=times),
        max_steps=num_steps + 1,
    )
    assert solution.ys is not None
    return solution.ys


def draw_series(count: int, num_times: int, seed: int) -> tuple[Series, np.ndarray]:
    """Random pendulums at random times, and their states on a grid of times."""
    rng = np.random.default_rng(seed)
    start = rng.uniform([-2.0, -0.7], [2.0, 0.7], (count, 2))
    constants = rng.uniform([0.8, 0.05], [1.3, 0.15], (count, 2))
    times = np.sort(rng.uniform(0, END, (count, num_times)))
    times[:, 0] = 0  # the beginning of each is observed
    inputs = [x.astype(np.float32) for x in (start, constants)]
    truth = np.asarray(swing(*inputs, np.tile(GRID, (count, 1))))
    values = swing(*inputs, times.astype(np.float32))
    values = values + NOISE * rng.standard_normal((count, num_times, 2))
    known = rng.random((count, num_times, 2)) < SHARES
    known[:, 0] = True
    return Series(times.astype(np.float32), np.asarray(values, np.float32), known), truth


# The model ----------------------------------------------------------------------------------------


class Encoder(eqx.Module):
    """From observations to the mean and the standard deviation of the initial state."""

    embed: Linear
    query: Float[Array, "1 d_model"]
    stack: Stack
    norm: LayerNorm
    head: Linear

    def __init__(self, args: argparse.Namespace, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        size, heads = args.d_model, args.num_heads
        # The shortest wavelength is two seconds, the longest half a minute.
        rope = AxialRoPE(num_dims=1, theta=16.0, scale=math.pi)

        def make_block(key: PRNGKeyArray) -> Any:
            return encoder_block(size, heads, 2 * size, rope=rope, key=key)

        self.embed = Linear(4, size, use_bias=True, key=keys[0])
        self.query = jax.random.normal(keys[1], (1, size))
        self.stack = Stack(make_block, args.num_layers, unroll=args.num_layers, key=keys[2])
        self.norm = LayerNorm(size)
        self.head = Linear(size, 2 * args.latent, use_bias=True, key=keys[3])

    def __call__(
        self, series: Series, until: float
    ) -> tuple[Float[Array, " latent"], Float[Array, " latent"]]:
        """Reads one series up to a time; the result is read off its first token, at time 0."""
        known = series.known & (series.times <= until)[:, None]
        values = jnp.where(known, series.values, 0)
        tokens = self.embed(jnp.concatenate([values, known.astype(values.dtype)], axis=1))
        valid = jnp.concatenate([jnp.ones(1, bool), known.any(axis=1)])
        times = jnp.concatenate([jnp.zeros(1), series.times])
        context = Condition(coordinates=times[:, None])
        x = jnp.concatenate([self.query, tokens])
        x = self.stack(x, context=context, mask=Padding(valid))
        mean, spread = jnp.split(self.head(self.norm(x[:1]))[0], 2)
        return mean, jax.nn.softplus(spread - 2)


class LatentODE(eqx.Module):
    """The initial state of a series, its dynamics, and what is observed of it."""

    encoder: Encoder
    velocity: MLP
    out: Linear
    decoder: MLP
    num_steps: int = eqx.field(static=True)

    def __init__(self, args: argparse.Namespace, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.encoder = Encoder(args, key=keys[0])
        options = {"activation": jnp.tanh, "use_bias": True}
        self.velocity = MLP(args.latent, args.width, **options, key=keys[1])
        self.decoder = MLP(args.latent, args.width, **options, key=keys[2])
        self.out = Linear(args.latent, 2, use_bias=True, key=keys[3])
        self.num_steps = args.solver_steps

    def __call__(
        self, start: Float[Array, " latent"], times: Float[Array, " times"]
    ) -> Float[Array, "times 2"]:
        """Angles and speeds at times, from the beginning."""

        def field(time: Any, z: Array, velocity: MLP) -> Array:
            return velocity(z[None])[0]

        z = solve(field, start, self.velocity, times, num_steps=self.num_steps)
        return self.out(z + self.decoder(z))


# Training -----------------------------------------------------------------------------------------


def loss_of(
    model: LatentODE, series: Series, key: PRNGKeyArray, weight: Float[Array, ""]
) -> Float[Array, ""]:
    """The negative of a lower bound of the log-likelihood of each series, up to a constant.

    The prior is the encoder's distribution given the first half, so it learns to be as uncertain as
    it should be (Garnelo et al., Neural Processes, 2018).
    """

    def of_one(series: Series, key: PRNGKeyArray) -> Array:
        mean, spread = model.encoder(series, END)
        start = mean + spread * jax.random.normal(key, mean.shape)
        wrong = (model(start, series.times) - series.values) / NOISE
        likelihood = jnp.where(series.known, -0.5 * wrong**2, 0).sum()
        # The divergence between the distributions given the whole series and its first half.
        expected, doubt = model.encoder(series, SEEN)
        ratio, moved = spread / doubt, (mean - expected) / doubt
        divergence = (0.5 * (ratio**2 + moved**2 - 1) - jnp.log(ratio)).sum()
        return weight * divergence - likelihood

    keys = jax.random.split(key, len(series.times))
    return jax.vmap(of_one)(series, keys).mean()


@eqx.filter_jit(donate="all")
def train_step(
    model: LatentODE, state: PyTree, batch: Any, optimiser: Any
) -> tuple[LatentODE, PyTree, Array]:
    """One step of the optimiser."""
    loss, gradient = eqx.filter_value_and_grad(loss_of)(model, *batch)
    updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def train(model: LatentODE, series: Series, args: argparse.Namespace) -> LatentODE:
    """Trains on random series; the divergence has its full weight after a third of the steps."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(50, args.steps), args.steps + 1
    )
    optimiser = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(args.seed)
    with tqdm(range(args.steps), unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            index = rng.integers(len(series.times), size=args.batch)
            key = jax.random.fold_in(jax.random.key(args.seed), step)
            weight = jnp.asarray(min(1.0, 3 * step / args.steps))
            batch = Series(*(x[index] for x in series)), key, weight
            model, state, loss = train_step(model, state, batch, optimiser)
            if step % 10 == 0:  # reading a loss blocks until it is computed
                progress.set_postfix_str(f"loss {float(loss):.1f}")
    return model


# Results ------------------------------------------------------------------------------------------


@eqx.filter_jit
def continued(
    model: LatentODE, series: Series, times: Array, samples: int, key: PRNGKeyArray
) -> Float[Array, "series samples times"]:
    """Angles from initial states drawn from the encoder's distribution."""

    def of_one(series: Series, key: PRNGKeyArray) -> Array:
        mean, spread = model.encoder(series, SEEN)
        starts = mean + spread * jax.random.normal(key, (samples, *mean.shape))
        return jax.vmap(lambda start: model(start, times)[:, 0])(starts)

    return jax.vmap(of_one)(series, jax.random.split(key, len(series.times)))


def by_gaussian_process(series: Series, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the angles, given those observed; one process per series."""
    means, spreads = [], []
    for at, values, known in zip(*series, strict=True):
        seen = known[:, 0] & (at <= SEEN)
        # Slowly changing oscillations: the kernel an engineer would choose.
        kernel: Any = 1.0 * RBF(8.0, (2, 50)) * ExpSineSquared(1.0, 6.0, (0.3, 10), (4, 10))
        process: Any = GaussianProcessRegressor(kernel + WhiteKernel(NOISE**2, (1e-3, 0.1)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(at[seen, None], values[seen, 0])
        mean, spread = process.predict(times[:, None], return_std=True)
        noise = process.kernel_.k2.noise_level  # not part of the angle
        means.append(mean)
        spreads.append(np.sqrt(np.maximum(spread**2 - noise, 1e-9)))
    return np.stack(means), np.stack(spreads)


def last_values(series: Series) -> np.ndarray:
    """The last observed angle of each."""
    known = series.known[..., 0] & (series.times <= SEEN)
    last = known.shape[1] - 1 - known[:, ::-1].argmax(axis=1)
    return np.take_along_axis(series.values[..., 0], last[:, None], axis=1)


def measures(
    name: str, angles: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray
) -> dict[str, Any]:
    """Errors, and how many angles are in the interval, in the observed half and beyond."""
    seen = GRID <= SEEN
    wrong, inside = (middle - angles) ** 2, (low <= angles) & (angles <= high)
    return {
        "name": name,
        "error seen": float(np.sqrt(wrong[:, seen].mean())),
        "error beyond": float(np.sqrt(wrong[:, ~seen].mean())),
        "inside seen": float(inside[:, seen].mean()),
        "inside beyond": float(inside[:, ~seen].mean()),
        "width beyond": float((high - low)[:, ~seen].mean()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| | error, seen half | error, second half | in the 90% interval | its width there |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        interval = (
            f"{row['inside seen']:.0%}, {row['inside beyond']:.0%} | {row['width beyond']:.2f}"
            if row["width beyond"]
            else "| "
        )
        lines.append(
            f"| {row['name']} | {row['error seen']:.3f} | {row['error beyond']:.3f} | {interval} |"
        )
    return "\n".join(lines) + "\n"


def draw(series: Series, angles: np.ndarray, bands: dict[str, Any], path: Path) -> None:
    """Plots some series: what was observed, what followed, and what was predicted."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 5), layout="constrained", sharex=True)
    for index, ax in enumerate(axes.flat[: len(angles)]):
        ax.plot(GRID, angles[index], "k:", linewidth=1, label="truth")
        for color, (name, (middle, low, high)) in zip(("C1", "C0"), bands.items(), strict=True):
            ax.plot(GRID, middle[index], color=color, linewidth=1.2, label=name)
            ax.fill_between(GRID, low[index], high[index], color=color, alpha=0.2, linewidth=0)
        seen = series.known[index, :, 0] & (series.times[index] <= SEEN)
        ax.plot(series.times[index, seen], series.values[index, seen, 0], "ko", ms=3, label="seen")
        ax.axvspan(SEEN, END, color="0.5", alpha=0.08)
        ax.set(xlim=(0, END), ylim=(-2.6, 2.6))
    axes[0, 0].legend(fontsize="small", ncols=2)
    figure.supxlabel("time")
    figure.supylabel("angle")
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
        description="Continue irregular series with a latent differential equation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/latent_series"), help="where results go")
    add("--series", type=positive, default=4000, help="series to learn from")
    add("--test-series", type=positive, default=64, help="series to continue")
    add("--times", type=positive, default=40, help="times at which it is seen, of both halves")
    add("--samples", type=positive, default=64, help="continuations of each")
    add("--steps", type=positive, default=3000, help="steps of the optimiser")
    add("--batch", type=positive, default=64, help="series in a step")
    add("--learning-rate", type=positive_float, default=5e-3, help="at the end of the warm-up")
    add("--latent", type=positive, default=6, help="size of the latent space")
    add("--width", type=positive, default=64, help="size inside the velocity and the decoder")
    add("--solver-steps", type=positive, default=24, help="steps of the solver")
    add("--d-model", type=positive, default=32, help="size of the encoder's vectors")
    add("--num-layers", type=positive, default=2, help="how many blocks the encoder has")
    add("--num-heads", type=positive, default=4, help="attention heads")
    add("--seed", type=int, default=0, help="for pendulums, weights, batches and samples")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Trains, continues, compares and draws."""
    try:
        model = LatentODE(args, key=jax.random.key(args.seed))
    except ValueError as error:
        raise UserError(str(error)) from error
    series, _ = draw_series(args.series, args.times, args.seed)
    test, truth = draw_series(args.test_series, args.times, args.seed + 1)
    angles = truth[..., 0]
    model = train(model, series, args)

    samples = continued(model, test, GRID, args.samples, jax.random.key(args.seed))
    low, high = np.quantile(samples, [0.05, 0.95], axis=1)
    equation = np.mean(samples, axis=1), low, high
    mean, spread = by_gaussian_process(test, GRID)
    process = mean, mean - 1.645 * spread, mean + 1.645 * spread
    last = np.broadcast_to(last_values(test), angles.shape)
    rows = [
        measures("last angle seen", angles, last, last, last),
        measures("Gaussian process", angles, *process),
        measures("latent equation", angles, *equation),
    ]
    print(table(rows))
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "table.md").write_text(table(rows))
        bands = {"Gaussian process": process, "latent equation": equation}
        draw(test, angles, bands, args.output / "series.png")
        (args.output / "results.json").write_text(json.dumps({"rows": rows}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"series: {args.output / 'series.png'}")
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
