"""Continues texts with a trained model, and shows each token as it is generated.

    python examples/complete.py runs/language_model/checkpoint --prompt "def main("
    python examples/complete.py HuggingFaceTB/SmolLM2-135M --prompt "Gravity is"

The model is a checkpoint of `train_language_model.py`, which reads bytes, or a folder or repository
with published weights and their tokenizer (this needs the extra `hub`). Without `--prompt` it is a
conversation: every line that you type is appended to the text so far, whose keys and values stay in
the cache. It begins to write after half a minute of compiling, and needs the extra `examples`.
"""

import argparse
import codecs
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from eqx_transformer.generation import RepetitionPenalty, generate_with_log_probs
from eqx_transformer.interop import load, load_pretrained, load_tokenizer
from eqx_transformer.stacks import unstacked

BUCKET = 32
"""Prompts are padded to a multiple of this many tokens, so that few lengths are compiled."""


class UserError(Exception):
    """A user error, reported in one line."""


class Vocabulary(Protocol):
    """Text as tokens, and tokens as text while they arrive."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def next(self, token: int) -> str:
        """The text that is complete with one more token."""
        ...


class Bytes:
    """Every byte is a token."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def next(self, token: int) -> str:
        """The characters that are complete with this byte."""
        return self.decoder.decode(bytes([token]))


class Published:
    """The tokens of a published model."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.shown = ""

    def encode(self, text: str) -> list[int]:
        """The tokens of the text."""
        return self.tokenizer.encode(text).ids

    def next(self, token: int) -> str:
        """What the new token adds to the text of all tokens so far."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # in the middle of a character
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new


def open_model(name: str) -> tuple[Any, Vocabulary]:
    """A model, with its layers unstacked, and its vocabulary."""
    try:
        config = Path(name, "config.json")
        if config.exists() and "model_type" not in json.loads(config.read_text()):
            return unstacked(load(name)), Bytes()
        return unstacked(load_pretrained(name)), Published(load_tokenizer(name))
    except (OSError, ImportError, ValueError) as error:
        raise UserError(str(error)) from error


class Text:
    """A text that grows at its end, and the model's cache of it."""

    def __init__(self, model: Any, vocabulary: Vocabulary, args: argparse.Namespace):
        self.model, self.vocabulary, self.args = model, vocabulary, args
        self.max_len = min(args.max_len or model.config.max_len, model.config.max_len)
        self.cache = model.init_cache(self.max_len)
        self.pending: list[int] = []  # the tokens that the cache does not have yet
        self.length = 0
        self.key = jax.random.key(args.seed)

    def show(self, token: int) -> None:
        """Prints the text that a token adds."""
        print(self.vocabulary.next(token), end="", flush=True)

    def grow(self, prompt: str) -> float:
        """Appends a prompt and the model's continuation.

        Returns:

        How many tokens it generated per second, not counting the first one.
        """
        tokens = [*self.pending, *self.vocabulary.encode(prompt)]
        if not tokens:
            raise UserError("the prompt is empty, and there is no text before it")
        padded = BUCKET * math.ceil(len(tokens) / BUCKET)
        count = self.args.max_new_tokens
        if self.length + padded + count > self.max_len:
            raise UserError(f"the text is too long: the cache has room for {self.max_len} tokens")
        self.key, key = jax.random.split(self.key)
        start = time.perf_counter()
        result = generate_with_log_probs(
            self.model,
            jnp.asarray(tokens + [0] * (padded - len(tokens)), jnp.int32),
            prompt_length=jnp.asarray(len(tokens), jnp.int32),
            max_new_tokens=count,
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            processors=[RepetitionPenalty(self.args.repetition_penalty)],
            stop_tokens=self.args.stop,
            cache=self.cache,
            key=key,
            on_token=self.show,
        )
        made = int(result.length)
        jax.effects_barrier()
        self.cache = result.cache
        self.length += len(tokens) + made - 1
        self.pending = result.tokens[made - 1 : made].tolist()
        return made / (time.perf_counter() - start)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""

    def positive(value: str) -> int:
        if int(value) < 1:
            raise argparse.ArgumentTypeError(f"{value} must be at least 1")
        return int(value)

    parser = argparse.ArgumentParser(
        description="Continue texts with a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="a checkpoint, a folder with published weights, or a repository of the hub")
    add("--prompt", help="text to continue; without it, a conversation")
    add("--max-new-tokens", type=positive, default=200, help="tokens to add at a time")
    add("--max-len", type=positive, help="tokens in the cache; as many as the model allows")
    add("--temperature", type=float, default=0.8, help="0 for the most probable tokens")
    add("--top-p", type=float, default=0.95, help="see filter_top_p")
    add("--repetition-penalty", type=float, default=1.0, help="see RepetitionPenalty")
    add("--stop", type=int, nargs="*", default=[], help="ids of tokens that end the text")
    add("--seed", type=int, default=0, help="for sampling")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Continues one text, or holds a conversation."""
    model, vocabulary = open_model(args.model)
    try:
        text = Text(model, vocabulary, args)
        if args.prompt is not None:
            print(args.prompt, end="", flush=True)
            speed = text.grow(args.prompt)
            print(f"\n{speed:.0f} tokens per second, compilation included", file=sys.stderr)
            return 0
        while True:
            try:
                line = input("> ")
            except EOFError:
                return 0
            text.grow(line + "\n")
            print()
    except ValueError as error:
        raise UserError(str(error)) from error


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
