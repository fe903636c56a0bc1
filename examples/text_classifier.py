"""Trains an encoder to tell which part of Python's standard library a few lines come from.

    python examples/text_classifier.py

The text is the source code of the standard library, which is on every machine, as a sequence of
words. Whole files are held out, so nothing that the model is tested on was seen in training. It is
compared with the most frequent class, and with logistic regression on how often each word occurs.
The results and a picture of the confusion matrix are in the folder `runs/text_classifier`. It takes
a minute and a half on two CPU cores, and needs the extra `examples`.
"""

import argparse
import json
import math
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from eqx_transformer.models import SequenceClassifier, TransformerConfig
from eqx_transformer.training import weight_decay_mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = {
    "asyncio": ("asyncio",),
    "email": ("email", "mailbox.py", "smtplib.py", "imaplib.py", "poplib.py"),
    "http": ("http", "urllib"),
    "importlib": ("importlib", "pkgutil.py", "zipimport.py", "modulefinder.py", "runpy.py"),
    "json, csv": ("json", "csv.py", "configparser.py", "pickle.py", "plistlib.py", "tomllib"),
    "processes": ("multiprocessing", "concurrent", "subprocess.py"),
    "unittest": ("unittest", "doctest.py"),
    "xml": ("xml", "html", "xmlrpc"),
}
"""The classes, and the packages and modules of each."""

PAD, UNKNOWN = 0, 1
"""Token ids for padding, and for all words outside the vocabulary."""
VOCAB_SIZE = 2048
MAX_LEN = 96
"""Words of a snippet, padding included."""
MIN_LEN = 32
"""The fewest words of a snippet."""
WORD_DROPOUT = 0.3
"""The share of words that are hidden in training."""

Files = list[list[bytes]]
"""The texts of every class."""
Tokens = list[list[Int[np.ndarray, " words"]]]
"""The same as token ids."""
Snippets = tuple[Int[np.ndarray, "batch seq"], Int[np.ndarray, " batch"]]
"""Token ids, padded on the right, and their classes."""


class UserError(Exception):
    """A user error, reported in one line."""


# Text ---------------------------------------------------------------------------------------------


def read_files() -> Files:
    """The source files of every class, from long to short."""
    root = Path(sysconfig.get_path("stdlib"))
    classes = []
    for name, parts in CLASSES.items():
        paths = [path for part in parts for path in (root / part, *(root / part).rglob("*.py"))]
        texts = [
            path.read_bytes()
            for path in paths
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(root).parts)
        ]
        if len(texts) < 4:
            raise UserError(f"there is no source code of {name} in {root}")
        classes.append(sorted(texts, key=lambda text: (-len(text), text)))
    return classes


def split(classes: Files) -> tuple[Files, Files]:
    """Files to train on, and every fourth of each class held out, but never the longest."""
    training = [[text for i, text in enumerate(texts) if i % 4 != 2] for texts in classes]
    return training, [texts[2::4] for texts in classes]


def words(text: bytes) -> list[bytes]:
    """Runs of letters, with `CamelCase` and `snake_case` split, and single symbols."""
    pieces = re.findall(rb"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+|[^\sA-Za-z0-9_]", text)
    return [piece.lower() for piece in pieces]


def make_vocabulary(classes: Files) -> dict[bytes, int]:
    """An id for each of the most frequent words."""
    counts = Counter(word for texts in classes for text in texts for word in words(text))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: VOCAB_SIZE - 2]
    return {word: i for i, word in enumerate(frequent, start=2)}


def tokenize(classes: Files, vocabulary: dict[bytes, int]) -> Tokens:
    """All texts as token ids."""
    return [
        [np.asarray([vocabulary.get(word, UNKNOWN) for word in words(t)], np.int32) for t in texts]
        for texts in classes
    ]


def pad(pieces: list[Int[np.ndarray, " words"]], labels: list[int]) -> Snippets:
    """Snippets as arrays."""
    rows = [np.pad(piece, (0, MAX_LEN - len(piece)), constant_values=PAD) for piece in pieces]
    return np.asarray(rows, np.int32), np.asarray(labels, np.int32)


def consecutive(classes: Tokens) -> Snippets:
    """All text, in consecutive snippets."""
    pieces, labels = [], []
    for label, texts in enumerate(classes):
        for text in texts:
            for start in range(0, max(len(text) - MIN_LEN, 1), MAX_LEN):
                pieces.append(text[start : start + MAX_LEN])
                labels.append(label)
    return pad(pieces, labels)


def draw_snippets(classes: Tokens, count: int, rng: np.random.Generator) -> Snippets:
    """Snippets of any length from anywhere; all classes are equally frequent."""
    pieces, labels = [], rng.integers(len(classes), size=count).tolist()
    for label in labels:
        texts = classes[label]
        lengths = np.asarray([len(text) for text in texts])
        text = texts[rng.choice(len(texts), p=lengths / lengths.sum())]
        length = rng.integers(MIN_LEN, MAX_LEN + 1)
        start = rng.integers(0, max(len(text) - length, 0) + 1)
        piece = text[start : start + length]
        # Hiding words at random keeps the model from memorising the snippets.
        pieces.append(np.where(rng.random(len(piece)) < WORD_DROPOUT, np.int32(UNKNOWN), piece))
    return pad(pieces, labels)


# A baseline ---------------------------------------------------------------------------------------


def bag_of_words(training: Snippets, test: Snippets) -> float:
    """Accuracy of logistic regression on which words there are."""

    def features(tokens: Int[np.ndarray, "batch seq"]) -> csr_array:
        counts = [np.bincount(row, minlength=VOCAB_SIZE)[UNKNOWN:] for row in tokens]
        return csr_array(np.log1p(np.asarray(counts, float)))

    baseline = LogisticRegression(max_iter=1000).fit(features(training[0]), training[1])
    return float(baseline.score(features(test[0]), test[1]))


# Training -----------------------------------------------------------------------------------------


def make_model(seed: int) -> SequenceClassifier:
    """An encoder of one block, and a linear map of the mean of its output."""
    config = TransformerConfig(
        vocab_size=VOCAB_SIZE,
        d_model=128,
        num_layers=1,  # there is too little text for more
        num_heads=4,
        d_ff=128,
        max_len=MAX_LEN,
        pad_token_id=PAD,
        dropout_rate=0.3,
        positions="rope",
    )
    return SequenceClassifier(config, len(CLASSES), key=jax.random.key(seed))


def loss_of(
    model: SequenceClassifier, tokens: Array, labels: Array, key: PRNGKeyArray
) -> Float[Array, ""]:
    """Mean cross-entropy of a class in nats."""
    keys = jax.random.split(key, len(tokens))
    logits = jax.vmap(lambda row, key: model(row, key=key))(tokens, keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit(donate="all")
def train_step(
    model: SequenceClassifier,
    state: PyTree,
    batch: Any,
    optimiser: optax.GradientTransformation,
) -> tuple[SequenceClassifier, PyTree, Float[Array, ""]]:
    """One step of the optimiser."""
    loss, gradient = eqx.filter_value_and_grad(loss_of)(model, *batch)
    updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


@eqx.filter_jit
def predict(model: SequenceClassifier, tokens: Int[Array, "count seq"]) -> Int[Array, " count"]:
    """The most probable classes, a few at a time to save memory."""
    model = eqx.nn.inference_mode(model)
    return jax.lax.map(lambda row: model(row).argmax(), tokens, batch_size=32)


def train(
    model: SequenceClassifier, classes: Tokens, args: argparse.Namespace
) -> tuple[SequenceClassifier, list[float]]:
    """Trains on random snippets.

    Returns:

    The model, and the loss of every step.
    """
    rng = np.random.default_rng(args.seed)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(50, args.steps // 10 + 1), args.steps + 1
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.1, mask=weight_decay_mask),
    )
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    losses: list[Array] = []
    with tqdm(range(args.steps), unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            key = jax.random.fold_in(jax.random.key(args.seed), step)
            batch = (*draw_snippets(classes, args.batch, rng), key)
            model, state, loss = train_step(model, state, batch, optimiser)
            losses.append(loss)
            if step % 10 == 0:  # reading a loss blocks until it is computed
                progress.set_postfix_str(f"loss {float(loss):.3f}")
    return model, [float(loss) for loss in losses]


# The program --------------------------------------------------------------------------------------


def draw(confusion: Int[np.ndarray, "classes classes"], title: str, path: Path) -> None:
    """Plots how often each class was taken for each other."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    for i, j in np.ndindex(*share.shape):
        colour = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, f"{share[i, j]:.0%}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(share)), list(CLASSES), rotation=40, ha="right")
    axes.set_yticks(range(len(share)), list(CLASSES))
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(image, ax=axes, label="share of the true class")
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
        description="Train an encoder to tell which part of Python's library some lines are from.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/text_classifier"), help="where results go")
    add("--steps", type=positive, default=400, help="steps of the optimiser")
    add("--batch", type=positive, default=64, help="snippets in a step")
    add("--learning-rate", type=positive_float, default=3e-3, help="at the end of the warm-up")
    add("--seed", type=int, default=0, help="for weights and batches")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Trains, tests and compares."""
    training, held_out = split(read_files())
    vocabulary = make_vocabulary(training)
    training, held_out = tokenize(training, vocabulary), tokenize(held_out, vocabulary)
    known, test = consecutive(training), consecutive(held_out)
    print(f"{len(known[0])} snippets to train on, {len(test[0])} in other files to test on")
    model, losses = train(make_model(args.seed), training, args)

    predicted = np.asarray(predict(model, jnp.asarray(test[0])))
    confusion = np.zeros((len(CLASSES), len(CLASSES)), int)
    np.add.at(confusion, (test[1], predicted), 1)
    accuracy = {
        "most frequent class": float((test[1] == np.bincount(known[1]).argmax()).mean()),
        "bag of words, linear": bag_of_words(known, test),
        "transformer": float((predicted == test[1]).mean()),
    }
    for name, value in accuracy.items():
        print(f"{name:>20}: {value:6.1%} right")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        title = f"Snippets of files never seen: {accuracy['transformer']:.0%} right"
        draw(confusion, title, args.output / "confusion.png")
        results = {"accuracy": accuracy, "confusion": confusion.tolist(), "losses": losses}
        (args.output / "results.json").write_text(json.dumps(results) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {args.output}: {error.strerror}") from error
    print(f"confusion matrix: {args.output / 'confusion.png'}")
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
