"""Finds the heads with which a small language model copies: an induction circuit.

    python examples/inspect_model.py

A model with two layers learns texts that repeat themselves after a random number of random letters.
It must find the last occurrence of the current letter and predict what came next there. Two heads
can do that together: one of the first layer tells every position which letter preceded it, and one
of the second looks for positions preceded by the current letter (Elhage et al., A Mathematical
Framework for Transformer Circuits, 2021; Olsson et al., In-context Learning and Induction Heads,
2022). The program trains such a model and looks for them: what each head attends to, the loss
without it, the loss if its output comes from another text, and what the model would predict after
each layer. The results, `results.json`, `heads.png` and `lens.png`, are in the folder
`runs/inspect_model`. It takes a minute on two CPU cores, and needs the extra `examples`.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqx_transformer.inspection import ablated, capture, logit_lens, replaced
from eqx_transformer.models import Llama, LlamaConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LETTERS = 32
PERIODS = (8, 25)
"""After how many letters a text repeats itself: at least, and less than."""

Texts = tuple[Int[Array, "texts seq"], Int[Array, " texts"]]
"""Letters, and the period of each text."""


def draw_texts(count: int, seq: int, key: PRNGKeyArray) -> Texts:
    """Texts that repeat themselves; no letter occurs twice in a period."""

    def draw(key: PRNGKeyArray) -> tuple[Array, Array]:
        period_key, letters_key = jax.random.split(key)
        period = jax.random.randint(period_key, (), *PERIODS)
        letters = jax.random.permutation(letters_key, LETTERS)
        return letters[jnp.arange(seq) % period], period

    return jax.vmap(draw)(jax.random.split(key, count))


def repeated(seq: int, period: Int[Array, ""]) -> Float[Array, " seq-1"]:
    """The positions at which the next letter can be known."""
    return (jnp.arange(1, seq) > period).astype(jnp.float32)


def loss(model: Llama, texts: Texts) -> Float[Array, ""]:
    """The mean cross-entropy of letters that can be known."""

    def of_text(text: Array, period: Array) -> Array:
        counts = repeated(len(text), period)
        each = optax.softmax_cross_entropy_with_integer_labels(model(text)[:-1], text[1:])
        return jnp.sum(each * counts) / jnp.sum(counts)

    return jnp.mean(jax.vmap(of_text)(*texts))


def train(model: Llama, steps: int, batch: int, key: PRNGKeyArray) -> tuple[Llama, list[float]]:
    """The model, trained, and its losses."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 8, steps)
    optimiser = optax.adamw(schedule)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def step(model: Llama, state: Any, key: PRNGKeyArray) -> tuple[Llama, Any, Array]:
        texts = draw_texts(batch, model.config.max_len, key)
        value, gradient = eqx.filter_value_and_grad(loss)(model, texts)
        updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for i, step_key in enumerate(jax.random.split(key, steps)):
        model, state, value = step(model, state, step_key)
        losses.append(float(value))
        if i % 50 == 0 or i == steps - 1:
            print(f"step {i:4}  loss {losses[-1]:.3f}", flush=True)
    return model, losses


# Measurements -------------------------------------------------------------------------------------


def attention_to(model: Llama, texts: Texts) -> dict[str, Float[Array, "layers heads"]]:
    """How much of its attention each head gives to two places, on average.

    `previous` is the letter before; `induction` the one after the last occurrence of the current.
    """

    def of_text(text: Array, period: Array) -> dict[str, Array]:
        weights = capture(model, "weights")(text)[1]["weights"]
        at = jnp.arange(len(text))
        seen = (at >= period).astype(weights.dtype)
        after = weights[:, :, at, jnp.maximum(at - period + 1, 0)] @ seen / seen.sum()
        return {"previous": weights[:, :, at[1:], at[:-1]].mean(-1), "induction": after}

    return jax.tree.map(lambda x: x.mean(0), jax.vmap(of_text)(*texts))


@eqx.filter_jit
def losses_without(model: Llama, texts: Texts) -> Float[Array, "layers heads"]:
    """The loss without each head."""
    shape = (model.config.num_layers, model.config.num_heads)
    keep = 1 - jnp.eye(math.prod(shape)).reshape(-1, *shape)
    return jax.lax.map(lambda keep: loss(ablated(model, keep), texts), keep).reshape(shape)


@eqx.filter_jit
def losses_with_another(model: Llama, texts: Texts, others: Texts) -> Float[Array, "layers heads"]:
    """The loss if the output of a head is replaced by that in another text."""
    shape = (model.config.num_layers, model.config.num_heads)
    heads = jax.vmap(lambda text: capture(model, "heads")(text)[1]["heads"])(others[0])

    def of_head(where: Array) -> Array:
        def of_text(text: Array, period: Array, heads: Array) -> Array:
            return loss(replaced(model, "heads", heads, where), (text[None], period[None]))

        return jnp.mean(jax.vmap(of_text)(*texts, heads))

    which = jnp.eye(math.prod(shape), dtype=bool).reshape(-1, shape[0], 1, shape[1])
    return jax.lax.map(of_head, which).reshape(shape)


def known_after(model: Llama, texts: Texts) -> Float[Array, " states"]:
    """The probability of the right letter, if it can be known, after each number of layers."""

    def of_text(text: Array, period: Array) -> Array:
        right = jax.nn.softmax(logit_lens(model)(text)[:, :-1])
        right = jnp.take_along_axis(right, text[None, 1:, None], axis=-1)[..., 0]
        counts = repeated(len(text), period)
        return right @ counts / counts.sum()

    return jnp.mean(jax.vmap(of_text)(*texts), axis=0)


# Pictures -----------------------------------------------------------------------------------------


def draw_heads(tables: dict[str, np.ndarray], weights: np.ndarray, path: Path) -> None:
    """Plots tables with a number for each head, and the attention of two of them."""
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 6), layout="constrained")
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=False):
        axis.imshow(table, cmap="Blues", vmin=0, vmax=1.25 * table.max(), aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9)
        axis.set(title=title, xlabel="head", ylabel="layer")
        axis.set(xticks=range(table.shape[1]), yticks=range(table.shape[0]))
    for axis, (layer, name) in zip(axes.flat[4:], enumerate(("previous", "next")), strict=True):
        table = next(table for title, table in tables.items() if name in title)
        head = int(table[layer].argmax())
        axis.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
        axis.set(title=f"layer {layer}, head {head}", xlabel="key", ylabel="query")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_lens(lens: np.ndarray, text: np.ndarray, period: int, path: Path) -> None:
    """Plots what the model would predict after each layer."""
    names = ["embedding", *(f"layer {i}" for i in range(len(lens) - 1))]
    figure, axis = plt.subplots(figsize=(10.5, 2.6), layout="constrained")
    probability = np.asarray(jax.nn.softmax(lens[:, :-1]))
    right = np.take_along_axis(probability, text[None, 1:, None], -1)[..., 0]
    shown = axis.imshow(right, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
    for (i, j), token in np.ndenumerate(probability.argmax(-1)):
        letter = chr(ord("A") + token) if token < 26 else str(token - 26)
        axis.text(j, i, letter, ha="center", va="center", fontsize=7)
    axis.axvline(period - 0.5, color="black", linewidth=1)
    letters = [chr(ord("A") + t) if t < 26 else str(t - 26) for t in text[1:]]
    axis.set_xticks(range(len(letters)), letters, fontsize=7)
    axis.set_yticks(range(len(names)), names)
    axis.set_title(
        "The most probable next letter after each layer; below, the right one", fontsize=9
    )
    figure.colorbar(
        shown,
        label="probability\nof the right one",
        boundaries=np.linspace(0, 1, 51),
        ticks=[0, 0.5, 1],
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


# The program --------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""

    def positive(value: str) -> int:
        if int(value) < 1:
            raise argparse.ArgumentTypeError(f"{value} must be at least 1")
        return int(value)

    parser = argparse.ArgumentParser(
        description="Find the heads with which a small language model copies.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/inspect_model"), help="where results go")
    add("--steps", type=positive, default=500, help="steps of training")
    add("--batch", type=positive, default=32, help="texts in a step")
    add("--d-model", type=positive, default=64, help="size of the vectors")
    add("--num-heads", type=positive, default=2, help="attention heads in a layer")
    add("--seq", type=positive, default=56, help="letters in a text")
    add("--texts", type=positive, default=64, help="texts to look at")
    add("--seed", type=int, default=0, help="for weights and texts")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trains, looks, and draws."""
    options = parse(arguments)
    if options.seq < 2 * PERIODS[1]:
        print(f"--seq {options.seq} must be at least {2 * PERIODS[1]}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(options.seed), 4)
    config = LlamaConfig(
        vocab_size=LETTERS,
        d_model=options.d_model,
        num_layers=2,
        num_heads=options.num_heads,
        max_len=options.seq,
        unroll=2,
    )
    model, history = train(Llama(config, key=keys[0]), options.steps, options.batch, keys[1])
    texts = draw_texts(options.texts, options.seq, keys[2])
    others = draw_texts(options.texts, options.seq, keys[3])

    attention = eqx.filter_jit(attention_to)(model, texts)
    tables = {
        "attention to the previous letter": attention["previous"],
        "attention to what came next": attention["induction"],
        "loss without the head": losses_without(model, texts),
        "loss with the head of another text": losses_with_another(model, texts, others),
    }
    tables = {title: np.asarray(table) for title, table in tables.items()}
    for title, table in tables.items():
        print(f"\n{title}\n{np.array2string(table, precision=2, suppress_small=True)}")
    known = np.asarray(eqx.filter_jit(known_after)(model, texts))
    print(f"\nprobability of the right letter after 0, 1, 2 layers: {np.round(known, 2)}")

    text, period = texts[0][0], int(texts[1][0])
    weights = capture(model, "weights")(text)[1]["weights"]
    draw_heads(tables, np.asarray(weights), options.output / "heads.png")
    lens = np.asarray(logit_lens(model)(text))
    draw_lens(lens, np.asarray(text), period, options.output / "lens.png")
    results = {title: table.tolist() for title, table in tables.items()}
    results |= {"losses": history, "probability after each layer": known.tolist()}
    (options.output / "results.json").write_text(json.dumps(results))
    print(f"\nwrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
