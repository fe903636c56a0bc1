"""Reads handwritten digits with one block applied until nothing changes, and with a stack.

    python examples/deep_equilibrium.py

A deep-equilibrium transformer (Bai et al., Deep Equilibrium Models, 2019) returns the fixed point
`z = block(z / 4 + x)`, which optimistix finds. The gradient is that of the fixed point, by one
linear solve, so that memory does not grow with the number of iterations. A penalty on the Jacobian
of the block (Bai et al., Stabilizing Equilibrium Models by Jacobian Regularization, 2021),
estimated in forward mode with a random direction, keeps iterations few. The results are in the
folder `runs/deep_equilibrium`: `table.md`, accuracy and memory against a stack of four blocks, and
`equilibrium.png`. It takes two minutes on two CPU cores, and needs the extra `examples`.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import matplotlib
import numpy as np
import optax
import optimistix
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from eqx_transformer.nn import Linear, patchify
from eqx_transformer.stacks import AbstractBlock, Stack, encoder_block

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATCH = (2, 2)
PATCHES = 16
"""Patches of 2 by 2 pixels, of which an image of 8 by 8 has this many."""

SHARE = 1 / 4
"""How much of a block's output goes back into it."""


class UserError(Exception):
    """A user error, reported in one line."""


# Two kinds of depth -------------------------------------------------------------------------------


class Layers(eqx.Module):
    """A stack, one block after another."""

    stack: Stack

    def __call__(
        self, x: Float[Array, "batch seq d_model"], key: PRNGKeyArray | None
    ) -> tuple[Array, Array, Array]:
        """The output of the stack, no penalty, and how many blocks were applied."""
        return jax.vmap(self.stack)(x), jnp.zeros(()), jnp.asarray(self.stack.num_layers)


class Approximately(lineax.GMRES):
    """GMRES that returns its last iterate when it does not converge, instead of an error.

    While a block is not a contraction, nothing converges, and the gradient only needs to point away
    from there. The number of steps for each fixed point is recorded, so none of this is hidden.
    """

    def compute(self, state: Any, vector: Any, options: dict[str, Any]) -> Any:
        """The last iterate, as a success."""
        solution, _, stats = super().compute(state, vector, options)
        return solution, lineax.RESULTS.successful, stats


class Equilibrium(eqx.Module):
    """The fixed point `z = block(z / 4 + x)`, of a whole batch at once.

    A block whose last operation is a norm keeps the size of `z` at one. Since only a quarter of it
    is added to an `x` that is not small, a change of `z` changes the output by less, so that
    iterations converge; the penalty ensures that they keep doing so.
    """

    block: AbstractBlock
    tolerance: float = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "batch seq d_model"], key: PRNGKeyArray | None
    ) -> tuple[Array, Array, Array]:
        """The fixed point, the penalty if there is a key, and how many iterations it took."""

        def function(z: Array, args: tuple[AbstractBlock, Array]) -> Array:
            block, x = args
            return jax.vmap(block)(SHARE * z + x)

        solution = optimistix.fixed_point(
            function,
            optimistix.FixedPointIteration(
                rtol=self.tolerance, atol=self.tolerance, norm=optimistix.rms_norm
            ),
            jnp.zeros_like(x),
            args=(self.block, x),
            max_steps=self.max_steps,
            # (I - J) is never formed: the solver only needs products with its transpose.
            adjoint=optimistix.ImplicitAdjoint(
                Approximately(self.tolerance, 1e-3 * self.tolerance, restart=8, max_steps=32)
            ),
            throw=False,
        )
        z, steps = solution.value, solution.stats["num_steps"]
        if key is None:
            return z, jnp.zeros(()), steps
        # Hutchinson: the mean of |J v|^2 over random v is the squared Frobenius norm of J.
        v = jax.random.rademacher(key, z.shape, z.dtype)
        moved = jax.jvp(lambda z: function(z, (self.block, x)), (z,), (v,))[1]
        return z, jnp.mean(moved**2), steps


class Classifier(eqx.Module):
    """Digits from images: patches in, something deep, the mean, logits out."""

    embed: Linear
    place: Float[Array, "patches d_model"]
    depth: Layers | Equilibrium
    head: Linear

    def __call__(
        self, images: Float[Array, "batch 1 8 8"], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "batch 10"], Float[Array, ""], Int[Array, ""]]:
        """Logits, the penalty, and how many blocks were applied."""
        patches = jax.vmap(lambda image: patchify(image, PATCH))(images)
        z, penalty, steps = self.depth(self.embed(patches) + self.place, key)
        return self.head(z.mean(axis=1)), penalty, steps


def make_model(kind: str, args: argparse.Namespace) -> Classifier:
    """`"stack"` or `"equilibrium"`, of the same kind of block."""
    keys = jax.random.split(jax.random.key(args.seed), 4)

    def make_block(key: PRNGKeyArray) -> AbstractBlock:
        size = args.d_model
        return encoder_block(size, args.num_heads, 2 * size, layout="post", key=key)

    depth = (
        Layers(Stack(make_block, args.num_layers, key=keys[0]))
        if kind == "stack"
        else Equilibrium(make_block(keys[0]), args.tolerance, args.max_steps)
    )
    return Classifier(
        embed=Linear(math.prod(PATCH), args.d_model, use_bias=True, key=keys[1]),
        place=jax.random.normal(keys[2], (PATCHES, args.d_model)),
        depth=depth,
        head=Linear(args.d_model, 10, use_bias=True, key=keys[3]),
    )


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


def loss_of(
    model: Classifier, images: Any, labels: Any, key: PRNGKeyArray | None, penalty: float
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Cross-entropy and penalty; and how many blocks were applied."""
    logits, jacobian, steps = model(images, key if penalty else None)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss + penalty * jacobian, steps


def train_step(
    model: Classifier, state: PyTree, batch: Any, penalty: float, optimiser: Any
) -> tuple[Classifier, PyTree, Array]:
    """One step of the optimiser."""
    grad = eqx.filter_grad(loss_of, has_aux=True)
    images, labels, key = batch
    gradient, steps = grad(model, images, labels, key, penalty)
    updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, steps


def train(
    name: str, model: Classifier, penalty: float, digits: list[np.ndarray], args: argparse.Namespace
) -> dict[str, Any]:
    """Trains and measures.

    Returns:

    Figures for the table, and how many blocks each step of the optimiser applied.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(20, args.steps), args.steps + 1
    )
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    images, labels, test, test_labels = digits
    rng = np.random.default_rng(args.seed)

    def batch_of(step: int) -> tuple[Any, ...]:
        index = rng.integers(len(images), size=args.batch)
        return images[index], labels[index], jax.random.fold_in(jax.random.key(args.seed), step)

    step_fn = eqx.filter_jit(train_step)
    compiled = step_fn.lower(model, state, batch_of(0), penalty, optimiser).compile()
    seconds, counts = [], []
    for step in tqdm(range(args.steps), desc=name, unit="step", dynamic_ncols=True):
        begin = time.perf_counter()
        model, state, count = compiled(model, state, batch_of(step), penalty, optimiser)
        counts.append(int(count))  # blocks until the step is done
        seconds.append(time.perf_counter() - begin)
    logits, _, count = eqx.filter_jit(model)(jnp.asarray(test))
    return {
        "name": name,
        "parameters": sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))),
        "accuracy": float((np.asarray(logits).argmax(-1) == test_labels).mean()),
        "memory": memory_of(compiled),
        "seconds": float(np.median(seconds)),
        "blocks": int(count),
        "counts": counts,
    }


def memory_of(compiled: Any) -> float:
    """Megabytes of temporary memory that a program needs."""
    return compiled.compiled.memory_analysis().temp_size_in_bytes / 1e6


def memory_of_gradient(num_layers: int, args: argparse.Namespace) -> float:
    """Megabytes that the gradient of a stack of that depth needs; no step is taken."""
    deep = argparse.Namespace(**{**vars(args), "num_layers": num_layers})
    model = make_model("stack", deep)
    batch = np.zeros((args.batch, 1, 8, 8), np.float32), np.zeros(args.batch, np.int32), None
    grad = eqx.filter_jit(eqx.filter_grad(loss_of, has_aux=True))
    return memory_of(grad.lower(model, *batch, 0.0).compile())


# Results ------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| | parameters | accuracy | memory of a step | time of a step | blocks applied |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['parameters']:,} | {row['accuracy']:.1%} | {row['memory']:.1f} MB "
        f"| {1000 * row['seconds']:.0f} ms | {row['blocks']} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], memory: dict[int, float], path: Path) -> None:
    """Memory over depth, and iterations over training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(list(memory), list(memory.values()), "o-", label="stack")
    left.axhline(rows[-1]["memory"], color="C1", label="equilibrium, any number")
    left.set(xlabel="blocks applied", ylabel="MB", title="Memory of a step", ylim=(0, None))
    left.legend()
    for color, row in zip(("C2", "C1"), rows[1:], strict=True):
        right.plot(row["counts"], color=color, label=row["name"], linewidth=1)
    right.set(xlabel="step of the optimiser", title="Iterations to the fixed point", ylim=(0, None))
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
        description="Read digits with a deep-equilibrium transformer, and with a stack.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/deep_equilibrium"), help="where results go")
    add("--steps", type=positive, default=400, help="steps of the optimiser")
    add("--batch", type=positive, default=64, help="digits in a step")
    add("--learning-rate", type=positive_float, default=4e-3, help="at the end of the warm-up")
    add("--penalty", type=positive_float, default=1.0, help="factor of the squared Jacobian")
    add("--tolerance", type=positive_float, default=1e-3, help="of the fixed point")
    add("--max-steps", type=positive, default=40, help="iterations to the fixed point at most")
    add("--d-model", type=positive, default=32, help="size of the vectors between blocks")
    add("--num-layers", type=positive, default=4, help="how many blocks the stack has")
    add("--num-heads", type=positive, default=4, help="attention heads")
    add("--seed", type=int, default=0, help="for weights, batches and directions")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Trains, measures and draws."""
    digits = read_digits()
    try:
        stack, equilibrium = make_model("stack", args), make_model("equilibrium", args)
    except ValueError as error:
        raise UserError(str(error)) from error
    rows = [
        train(f"stack of {args.num_layers}", stack, 0.0, digits, args),
        train("equilibrium", equilibrium, 0.0, digits, args),
        train("equilibrium with penalty", equilibrium, args.penalty, digits, args),
    ]
    memory = {depth: memory_of_gradient(depth, args) for depth in (1, args.max_steps)}
    print(table(rows))
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "table.md").write_text(table(rows))
        draw(rows, memory, args.output / "equilibrium.png")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"table: {args.output / 'table.md'}")
    print(f"memory and iterations: {args.output / 'equilibrium.png'}")
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
