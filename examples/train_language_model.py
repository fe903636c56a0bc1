"""Trains a byte-level, llama-like language model on real text, and samples from it.

    python examples/train_language_model.py

The text is the source code of the Python standard library, which is on every machine; `--text`
takes any file instead. Training prints samples, which improve over time. At the end the folder
`runs/language_model` has a checkpoint and a picture of the loss; the checkpoint is loaded again and
samples the same text. It takes a minute and a half on two CPU cores, and needs the extra
`examples`.
"""

import argparse
import contextlib
import json
import math
import pydoc_data.topics
import signal
import sys
import sysconfig
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

from eqx_transformer.attention import Segments
from eqx_transformer.generation import generate
from eqx_transformer.interop import load, save
from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.training import weight_decay_mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = tuple[Int[np.ndarray, "batch context+1"], Int[np.ndarray, "batch context+1"]]
"""Rows of text, and the document that each byte is from."""


class UserError(Exception):
    """A user error, reported in one line."""


# Text ---------------------------------------------------------------------------------------------


def read_documents(text: Path | None) -> dict[str, bytes]:
    """The documents to train on, by name."""
    if text is not None:
        try:
            data = text.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {text}: {error.strerror}") from error
        # One file is cut into pieces, so that some can be held out.
        size = max(1, -(-len(data) // 64))
        return {f"{i:03}": data[i * size : (i + 1) * size] for i in range(-(-len(data) // size))}
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    documents = {path.name: path.read_bytes() for path in sources}
    # A Python in a zip file has no sources, but it has its help texts.
    return documents or {k: v.encode() for k, v in sorted(pydoc_data.topics.topics.items())}


@dataclass(frozen=True)
class Packed:
    """Concatenated documents: their bytes, and the document that each byte is from."""

    tokens: Int[np.ndarray, " bytes"]
    documents: Int[np.ndarray, " bytes"]

    @classmethod
    def pack(cls, documents: list[bytes]) -> "Packed":
        """Joins documents."""
        lengths = [len(document) for document in documents]
        tokens = np.frombuffer(b"".join(documents), np.uint8).astype(np.int32)
        return cls(tokens, np.repeat(np.arange(len(documents), dtype=np.int32), lengths))

    def rows(self, starts: Int[np.ndarray, " batch"], context: int) -> Rows:
        """A row of `context` bytes and the next one, from every start."""
        index = starts[:, None] + np.arange(context + 1)[None, :]
        return self.tokens[index], self.documents[index]


def split(documents: dict[str, bytes], context: int) -> tuple[Packed, Packed]:
    """Documents for training, and about a tenth held out: always the same ones."""
    held_out = [name for name in documents if zlib.crc32(name.encode()) % 10 == 0]
    parts = (
        Packed.pack([text for name, text in documents.items() if name not in held_out]),
        Packed.pack([documents[name] for name in held_out]),
    )
    for part in parts:
        if len(part.tokens) < 2 * (context + 1):
            total = sum(map(len, documents.values()))
            raise UserError(
                f"the text is too short: {total} bytes, for --context {context}; give a longer "
                "text or a smaller context"
            )
    return parts


def batches(text: Packed, batch: int, context: int, seed: int) -> Iterator[Rows]:
    """Rows from random places, endlessly."""
    random = np.random.default_rng(seed)
    while True:
        yield text.rows(random.integers(0, len(text.tokens) - context, batch), context)


# Training -----------------------------------------------------------------------------------------


def bits_per_byte(model: Llama, rows: Any) -> Float[Array, ""]:
    """Mean cross-entropy of a byte in bits, given those before it in its document."""

    def of_row(tokens: Array, documents: Array) -> tuple[Array, Array]:
        # Attention stays within a document; the model itself is causal.
        logits = model(tokens[:-1], mask=Segments(documents[:-1]))
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
        counts = documents[1:] == documents[:-1]
        return jnp.where(counts, costs, 0).sum(), counts.sum()

    costs, counts = jax.vmap(of_row)(*rows)
    return costs.sum() / counts.sum() / math.log(2)


def make_optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine decay; only matrices decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(50, steps // 10 + 1), steps + 1, 0.05 * learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.1, mask=weight_decay_mask),
    )


@eqx.filter_jit(donate="all")
def train_step(
    model: Llama, state: PyTree, rows: Any, optimiser: optax.GradientTransformation
) -> tuple[Llama, PyTree, Float[Array, ""]]:
    """One step of the optimiser."""
    loss, gradient = eqx.filter_value_and_grad(bits_per_byte)(model, rows)
    updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


evaluate = eqx.filter_jit(bits_per_byte)


@dataclass
class History:
    """Losses in bits per byte, by step."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def plot(self, path: Path) -> None:
        """Draws both curves into a picture."""
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        if self.train:
            axes.plot(
                *zip(*self.train, strict=True), color="tab:blue", alpha=0.35, label="training"
            )
        if self.held_out:
            axes.plot(*zip(*self.held_out, strict=True), "o-", color="tab:orange", label="held out")
            step, cost = self.held_out[-1]
            axes.annotate(
                f"{cost:.2f}", (step, cost), (0, 10), textcoords="offset points", ha="right"
            )
        axes.set(xlabel="step", ylabel="bits per byte", title="Cost of a byte, by step of training")
        axes.set_ylim(bottom=1.0)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=150)
        plt.close(figure)


def write_sample(model: Llama, prompt: str, count: int, key: PRNGKeyArray) -> str:
    """The prompt and the model's continuation."""
    tokens = jnp.asarray(list(prompt.encode()), jnp.int32)
    new = generate(model, tokens, max_new_tokens=count, temperature=0.7, top_p=0.95, key=key)
    text = prompt + bytes(np.asarray(new).tolist()).decode(errors="replace")
    # An untrained model writes control characters, which a terminal would interpret.
    return "".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in text)


def show(text: str) -> None:
    """Prints a sample above the progress bar."""
    tqdm.write("\n".join(["", *(f"    | {line}" for line in text.splitlines()), ""]))


@contextlib.contextmanager
def interrupted() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets the first time, instead of raising an exception.

    In the middle of a step, when the old model has been donated and the new one does not exist yet,
    an exception would lose both.
    """
    event, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def stop(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    model: Llama, text: tuple[Packed, Packed], args: argparse.Namespace, history: History
) -> tuple[Llama, bool]:
    """Trains until the last step, or until interrupted.

    Returns:

    The model, and whether it was interrupted.
    """
    training, held_out = text
    optimiser = make_optimiser(args.learning_rate, args.steps)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    starts = np.linspace(0, len(held_out.tokens) - args.context - 1, 8 * args.batch, dtype=int)
    test_rows = held_out.rows(starts, args.context)
    progress = tqdm(total=args.steps, unit="step", dynamic_ncols=True)
    recent: list[Array] = []
    with interrupted() as stop, progress:
        for step, rows in enumerate(batches(training, args.batch, args.context, args.seed)):
            if stop.is_set():
                tqdm.write("interrupted: saving what there is")
                return model, True
            if step % args.evaluate_every == 0 or step == args.steps:
                cost = float(evaluate(model, test_rows))
                history.held_out.append((step, cost))
                tqdm.write(f"step {step}: {cost:.3f} bits per byte on held-out text")
                if step < args.steps:
                    sample_bytes = min(args.sample_bytes, 120)
                    show(write_sample(model, args.prompt, sample_bytes, jax.random.key(args.seed)))
            if step == args.steps:
                return model, False
            model, state, loss = train_step(model, state, rows, optimiser)
            recent.append(loss)
            if len(recent) == 10 or step == args.steps - 1:
                # Reading a loss blocks until it is computed, so this is not done at every step.
                history.train.append((step, float(np.mean([float(x) for x in recent]))))
                recent.clear()
                rate = progress.format_dict["rate"] or 0.0
                speed = f"{rate * args.batch * args.context:,.0f}"
                progress.set_postfix_str(f"{history.train[-1][1]:.3f} bits/byte, {speed} bytes/s")
            progress.update()
    raise AssertionError("batches do not end")


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
        description="Train a byte-level, llama-like language model and sample from it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="train on this file instead of Python's source")
    add("--output", type=Path, default=Path("runs/language_model"), help="where results go")
    add("--steps", type=positive, default=800, help="steps of the optimiser")
    add("--batch", type=positive, default=8, help="rows of text in a step")
    add("--context", type=positive, default=128, help="bytes in a row")
    add("--learning-rate", type=positive_float, default=3e-3, help="at the end of the warm-up")
    add("--d-model", type=positive, default=128, help="size of the vectors between layers")
    add("--num-layers", type=positive, default=3, help="how many blocks")
    add("--num-heads", type=positive, default=4, help="query heads")
    add("--num-kv-heads", type=positive, default=2, help="key and value heads")
    add("--evaluate-every", type=positive, default=200, help="steps between held-out costs")
    add("--prompt", default="def ", help="what samples begin with")
    add("--sample-bytes", type=positive, default=300, help="length of the last sample")
    add("--seed", type=int, default=0, help="for weights, batches and samples")
    args = parser.parse_args(arguments)
    if not args.prompt:
        parser.error("argument --prompt: must not be empty")
    return args


def run(args: argparse.Namespace) -> int:
    """Trains, saves, loads, samples."""
    text = split(read_documents(args.text), args.context)
    max_len = max(args.context, len(args.prompt.encode()) + args.sample_bytes)
    try:
        config = LlamaConfig(
            vocab_size=256,
            d_model=args.d_model,
            num_layers=args.num_layers,
            num_heads=args.num_heads,
            num_kv_heads=args.num_kv_heads,
            max_len=max_len,
            # Samples may be longer than rows: so no position sees further than in training.
            window=args.context,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    model = Llama(config, key=jax.random.key(args.seed))
    parameters = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    sizes = [f"{len(part.tokens) / 1e6:.2f} MB" for part in text]
    print(f"{parameters:,} parameters; {sizes[0]} of text to train on, {sizes[1]} held out")

    history = History()
    model, interrupted = train(model, text, args, history)

    try:
        save(model, args.output / "checkpoint")
        history.plot(args.output / "loss.png")
        (args.output / "history.json").write_text(json.dumps(vars(history)) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"checkpoint: {args.output / 'checkpoint'}")
    print(f"loss curve: {args.output / 'loss.png'}")
    if interrupted:
        return 130

    key = jax.random.key(args.seed + 1)
    sample = write_sample(model, args.prompt, args.sample_bytes, key)
    show(sample)
    again = write_sample(load(args.output / "checkpoint"), args.prompt, args.sample_bytes, key)
    print(f"the loaded checkpoint samples the same text: {'yes' if again == sample else 'NO'}")
    return 0 if again == sample else 1


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
