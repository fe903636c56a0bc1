"""Trains an encoder-decoder to normalise dates, character by character, and shows where it looks.

    python examples/sequence_to_sequence.py

"the 3rd of May, 1998", "5/3/98" and "Sun 3 May 1998" all become "1998-05-03". Dates that were never
trained on, in any spelling, are then decoded with beam search and counted if every character is
right. The losses and a picture of the attention of the decoder to the source are in the folder
`runs/sequence_to_sequence`. It takes a minute and a half on two CPU cores, and needs the extra
`examples`.
"""

import argparse
import datetime
import json
import math
import random
import sys
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

from eqx_transformer.attention import attention_weights
from eqx_transformer.generation import beam_search
from eqx_transformer.models import EncoderDecoder, TransformerConfig
from eqx_transformer.stacks import DecoderBlock
from eqx_transformer.training import weight_decay_mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Tokens are ASCII codes. These three are what ASCII has for the purpose: NUL, STX and ETX.
PAD, BEGIN, END = 0, 2, 3
SOURCE_LEN = 32
"""Characters of a source, padding included."""
TARGET_LEN = 10
"""Characters of a normalised date."""

Pairs = tuple[Int[np.ndarray, "batch source_seq"], Int[np.ndarray, "batch target_seq"]]
"""Sources, and targets between the tokens that begin and end them."""


class UserError(Exception):
    """A user error, reported in one line."""


# Dates --------------------------------------------------------------------------------------------

FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
"""A century, so that two digits of a year say which year it is."""

SPELLINGS = (
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "{weekday} {day} {month} {year}",
    "{weekday}, {month} {ordinal}, {year}",
    "the {ordinal} of {month}, {year}",
    "{day}-{month}-{year}",
    "{number}/{day}/{year}",  # a slash is American,
    "{day}.{number}.{year}",  # a dot European,
    "{date:%Y}/{number}/{day}",  # and a year of four digits comes first or last.
)


def spell(date: datetime.date, rng: random.Random) -> str:
    """The date in one of many spellings, each of which is unambiguous."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10 if date.day // 10 != 1 else 0, "th")
    text = rng.choice(SPELLINGS).format(
        date=date,
        day=rng.choice((f"{date.day}", f"{date.day:02}")),
        ordinal=f"{date.day}{suffix}",
        month=rng.choice((f"{date:%B}", f"{date:%b}")),
        number=rng.choice((f"{date.month}", f"{date.month:02}")),
        weekday=rng.choice((f"{date:%A}", f"{date:%a}")),
        year=rng.choice((f"{date:%Y}", f"{date:%Y}", f"{date:%y}", f"'{date:%y}")),
    )
    return rng.choice((text, text, text.lower(), text.upper()))


def encode(text: str) -> list[int]:
    """The tokens of a source."""
    return list(text.encode("ascii").ljust(SOURCE_LEN, b"\0"))


def decode(tokens: Int[np.ndarray, " seq"]) -> str:
    """The text of the printable characters: all others are padding, or begin or end the text."""
    return "".join(chr(token) for token in tokens.tolist() if chr(token).isprintable())


def pairs(dates: list[datetime.date], rng: random.Random) -> Pairs:
    """One source for every date, and its target."""
    sources = [encode(spell(date, rng)) for date in dates]
    targets = [[BEGIN, *date.isoformat().encode("ascii"), END] for date in dates]
    return np.asarray(sources, np.int32), np.asarray(targets, np.int32)


def split(held_out: int) -> tuple[list[datetime.date], list[datetime.date]]:
    """Dates to train on, and held-out ones: always the same."""
    days = list(range(FIRST.toordinal(), LAST.toordinal() + 1))
    random.Random(0).shuffle(days)
    dates = [datetime.date.fromordinal(day) for day in days]
    return dates[held_out:], dates[:held_out]


# Training -----------------------------------------------------------------------------------------


def make_model(seed: int) -> EncoderDecoder:
    """A small model: two blocks read the source, two write the target."""
    config = TransformerConfig(
        vocab_size=128,
        d_model=64,
        num_layers=2,
        num_heads=4,
        d_ff=128,
        max_len=SOURCE_LEN,
        cache_max_len=TARGET_LEN + 1,
        pad_token_id=PAD,
        dropout_rate=0.0,
        positions="rope",
        scale_embeddings=True,
        unroll=2,
    )
    return EncoderDecoder(config, key=jax.random.key(seed))


def loss_of(model: EncoderDecoder, sources: Array, targets: Array) -> Float[Array, ""]:
    """Mean cross-entropy of a character in nats, given the source and the characters before it."""
    logits = jax.vmap(model)(sources, targets[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets[:, 1:]).mean()


@eqx.filter_jit(donate="all")
def train_step(
    model: EncoderDecoder, state: PyTree, batch: Any, optimiser: optax.GradientTransformation
) -> tuple[EncoderDecoder, PyTree, Float[Array, ""]]:
    """One step of the optimiser."""
    loss, gradient = eqx.filter_value_and_grad(loss_of)(model, *batch)
    updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def train(
    model: EncoderDecoder, dates: list[datetime.date], args: argparse.Namespace
) -> tuple[EncoderDecoder, list[float]]:
    """Trains on random dates in random spellings.

    Returns:

    The model, and the loss of every step.
    """
    rng = random.Random(args.seed)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(50, args.steps // 10 + 1), args.steps + 1
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.01, mask=weight_decay_mask),
    )
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    losses: list[Array] = []
    with tqdm(range(args.steps), unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            batch = pairs(rng.choices(dates, k=args.batch), rng)
            model, state, loss = train_step(model, state, batch, optimiser)
            losses.append(loss)
            if step % 20 == 0:  # reading a loss blocks until it is computed
                progress.set_postfix_str(f"loss {float(loss):.3f}")
    return model, [float(loss) for loss in losses]


# Decoding -----------------------------------------------------------------------------------------


@eqx.filter_jit
def normalise(
    model: EncoderDecoder, sources: Int[Array, "batch source_seq"]
) -> tuple[Int[Array, "batch seq"], Float[Array, " batch"]]:
    """The most probable targets that beam search finds, and their probabilities."""

    def one(source: Array) -> tuple[Array, Array]:
        found = beam_search(
            model,  # pyright: ignore[reportArgumentType]  # its init_cache wants a source
            jnp.asarray([BEGIN], jnp.int32),
            num_beams=4,
            max_new_tokens=TARGET_LEN + 1,
            stop_tokens=(END,),
            cache=model.init_cache(source),
        )
        return found.tokens[0], jnp.exp(found.log_probs[0])

    return jax.vmap(one)(sources)


def look(
    model: EncoderDecoder, source: Int[Array, " source_seq"], target: Int[Array, " seq"]
) -> tuple[Float[Array, "seq vocab"], Float[Array, "layers heads seq source_seq"]]:
    """What `model(source, target)` returns, and the weights with which the decoder attends.

    Fused attention does not return its weights, so the decoder's layers are applied here one by
    one, with attention to the source written out.
    """
    encoded = model.encode(source)
    x, mask = model.embedding(target), model.embedding.mask(target, None)

    def apply(block: DecoderBlock, x: Array) -> tuple[Array, Array]:
        def cross(h: Array, key: PRNGKeyArray | None) -> tuple[Array, Array]:
            attention = block.cross_attention
            q = attention.q_proj(h).reshape(h.shape[0], -1, attention.head_dim)
            memory = attention.project(encoded.memory)
            # Narrows the types: in eight bits they would be `Int8Vectors`.
            assert isinstance(memory.k, jax.Array) and isinstance(memory.v, jax.Array)
            weights = attention_weights(q, memory.k, mask=encoded.mask)
            out = jnp.einsum("hts,shd->thd", weights, memory.v)
            return attention.o_proj(out.reshape(h.shape[0], -1)), weights

        x, _ = block.attention_residual(x, lambda h, key: (block.attention(h, mask=mask), None))
        x, weights = block.cross_residual(x, cross)
        x, _ = block.mlp_residual(x, lambda h, key: (block.mlp(h), None))
        return x, weights

    maps = []
    for block in model.decoder:
        assert isinstance(block, DecoderBlock)
        x, weights = apply(block, x)
        maps.append(weights)
    assert model.head is not None
    return model.head(model.decoder_norm(x)), jnp.stack(maps)


def draw(model: EncoderDecoder, text: str, path: Path) -> None:
    """Plots where the decoder looks while it normalises `text`: one panel per block."""
    source = jnp.asarray(encode(text), jnp.int32)
    written = np.asarray(normalise(model, source[None])[0][0])
    target = jnp.asarray([BEGIN, *written[:-1].tolist()], jnp.int32)
    _, weights = eqx.filter_jit(look)(model, source, target)
    maps = np.asarray(weights.mean(axis=1))[:, :, : len(text)]
    figure, panels = plt.subplots(
        len(maps), squeeze=False, figsize=(8, 3.6 * len(maps)), layout="constrained"
    )
    rows = [chr(token) if token >= ord(" ") else "end" for token in written.tolist()]
    for i, (axes, attention) in enumerate(zip(panels[:, 0], maps, strict=True)):
        image = axes.imshow(attention, vmin=0, cmap="Blues", aspect="auto")
        axes.set_xticks(range(len(text)), list(text.replace(" ", "\N{OPEN BOX}")))
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel="reads", ylabel="writes", title=f"Decoder block {i + 1}, mean over heads")
        figure.colorbar(image, ax=axes, label="attention")
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
        description="Train an encoder-decoder to normalise dates, and show where it looks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/sequence_to_sequence"), help="where results go")
    add("--steps", type=positive, default=1200, help="steps of the optimiser")
    add("--batch", type=positive, default=32, help="dates in a step")
    add("--learning-rate", type=positive_float, default=5e-3, help="at the end of the warm-up")
    add("--held-out", type=positive, default=1000, help="dates to test on")
    add("--seed", type=int, default=0, help="for weights, batches and spellings")
    args = parser.parse_args(arguments)
    days = (LAST - FIRST).days + 1
    if args.held_out >= days:
        parser.error(f"argument --held-out: must be below {days}, the number of all dates")
    return args


def run(args: argparse.Namespace) -> int:
    """Trains, tests, draws."""
    training, held_out = split(args.held_out)
    model, losses = train(make_model(args.seed), training, args)

    sources, targets = pairs(held_out, random.Random(args.seed + 1))
    found, probabilities = jax.tree.map(np.asarray, normalise(model, jnp.asarray(sources)))
    right = (found == targets[:, 1:]).all(axis=1)
    # A few examples, and then what went wrong, if anything did.
    for i in [*range(min(8, len(right))), *np.flatnonzero(~right[8:])[:4] + 8]:
        mark = "" if right[i] else f"  wrong: {held_out[i]}"
        print(f"{decode(sources[i]):>32} -> {decode(found[i])}  {probabilities[i]:6.1%}{mark}")
    print(f"{right.sum()} of {len(right)} held-out dates are right: {right.mean():.1%}")

    try:
        args.output.mkdir(parents=True, exist_ok=True)
        draw(model, "Sunday the 3rd of May, 1998", args.output / "attention.png")
        results = {"exact_match": float(right.mean()), "losses": losses}
        (args.output / "results.json").write_text(json.dumps(results) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"attention of the decoder: {args.output / 'attention.png'}")
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
