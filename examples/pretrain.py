"""Pretrains a language model on any mesh and any number of hosts, and resumes after any crash.

    python examples/pretrain.py examples/configs/tiny.toml

A run is defined by its configuration file. Started again with the same file, even on another number
of devices, it continues from its last checkpoint, with the loss curve it would have had. Its output
folder has `checkpoints`, `metrics.jsonl`, and at the end, if a single process ran it, `model`,
which `eqx_transformer.interop.load` loads. It is meant to be copied and adapted; see
docs/pretraining.md.
"""

import argparse
import bisect
import dataclasses
import functools
import glob
import importlib.util
import itertools
import json
import logging
import math
import os
import signal
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, PyTree

from eqx_transformer.interop import save
from eqx_transformer.models import AbstractConfig, Llama, LlamaConfig
from eqx_transformer.sharding import (
    ParallelConfig,
    Rules,
    batch_sharding,
    context_parallel,
    gathered,
    init_sharded,
    specs,
)
from eqx_transformer.training import (
    accumulated_value_and_grad,
    cross_entropy_from_hidden,
    model_flops,
    parameter_counts,
    weight_decay_mask,
)

State = tuple[Llama, PyTree]
"""The model, and the state of the optimiser."""


class UserError(Exception):
    """A user error, reported in one line."""


# Configuration ------------------------------------------------------------------------------------


class Section(AbstractConfig):
    """A section whose numbers must not be negative; integers must be at least 1 unless 0 is the
    default."""

    def check(self) -> None:
        """Checks the values of the fields; names and types have been checked already."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value, least = getattr(self, field.name), int(field.type is int and field.default != 0)
            if field.type in (int, float) and not least <= value < math.inf:
                name = f"{type(self).__name__}: {field.name}"
                raise ValueError(f"{name}={value} must be at least {least}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The data, and how much of it a step reads."""

    context: int  # tokens in a row
    batch: int  # rows in a step, on all devices together
    parts: int = 1  # how many parts the batch is computed in, one after another
    files: tuple[str, ...] = ()
    """Patterns of `.npy` files, each a vector of token ids, document after document. If empty: the
    source of Python's standard library in bytes, each file after a token 256."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig(Section):
    """AdamW with a warm-up and a cosine decay; only matrices decay."""

    learning_rate: float  # at the end of the warm-up
    warmup_steps: int = 0
    final_learning_rate: float = 0.0  # at the last step
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    z_loss: float = 0.0  # the coefficient of the squared log-sum-exp of logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A run: the content of a configuration file, section by section."""

    output: str  # the folder of the run
    steps: int  # how many steps of the optimiser
    model: LlamaConfig
    data: DataConfig
    optimiser: OptimiserConfig
    parallel: ParallelConfig
    seed: int = 0  # for the weights, the order of the data, and dropout
    save_every: int = 1000  # steps between checkpoints
    keep: int = 3  # how many checkpoints are kept
    log_every: int = 10  # steps between readings of the losses, which block on the devices
    loss_chunk: int = 512  # how many tokens of a row have logits at a time
    tensorboard: bool = False  # whether to write metrics for TensorBoard, too; needs `tensorboardX`

    def check(self) -> None:
        """Checks the values of the fields, and those of sections against each other."""
        super().check()
        if self.data.context > self.model.max_len:
            sizes = f"data.context={self.data.context}, model.max_len={self.model.max_len}"
            raise ValueError(f"{sizes}: a row must not be longer than the model takes.")
        if self.parallel.pipe != 1 or self.parallel.expert != 1:
            raise ValueError("parallel: this program splits over data, fsdp, tensor and context.")
        if self.parallel.context != 1 and self.model.dropout_rate:
            sizes = f"parallel.context={self.parallel.context}"
            rate = f"model.dropout_rate={self.model.dropout_rate}"
            raise ValueError(f"{sizes}, {rate}: attention weights are not dropped on a ring.")
        if self.model.moe is not None:
            raise ValueError("model.moe: this program has no loss for the balance of experts.")
        if self.data.batch % self.data.parts:
            sizes = f"data.batch={self.data.batch}, data.parts={self.data.parts}"
            raise ValueError(f"{sizes}: the parts of a batch must be equally large.")
        for name, value in (("b1", self.optimiser.b1), ("b2", self.optimiser.b2)):
            if value >= 1:
                raise ValueError(f"optimiser.{name}={value} must be below 1.")

    def identity(self, rows: int) -> dict[str, Any]:
        """Everything that the loss curve depends on, by dotted names, but not where and how fast it
        runs. It includes the number of rows: adding some would change the order of all."""
        sections = {name: getattr(self, name).to_dict() for name in ("model", "data", "optimiser")}
        found = {f"{name}.{k}": x for name, fields in sections.items() for k, x in fields.items()}
        # In the form in which it is read again.
        others = {"seed": self.seed, "steps": self.steps, "rows": rows}
        return json.loads(json.dumps({**others, **found}))


def read_config(path: Path) -> RunConfig:
    """Reads a configuration in TOML or JSON."""
    try:
        text = path.read_text()
        fields = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return RunConfig.from_dict(fields)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # errors of TOML and JSON are ValueErrors, too
        raise UserError(f"{path}: {error}") from error


# Data ---------------------------------------------------------------------------------------------


def standard_library() -> np.ndarray:
    """The source of Python's standard library, every file after a token 256."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in sources]
    return np.concatenate([np.append(np.uint16(256), text) for text in texts])


def shuffled(index: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
    """The images of some indices under a random permutation of `range(size)`.

    A Feistel network permutes the integers of a number of bits; where the result is out of range,
    it is applied again. So any part of the order can be computed without the rest.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    keys = np.random.default_rng(seed).integers(0, 2**63, 6, np.uint64)
    index = index.astype(np.uint64)
    todo = np.ones(index.shape, bool)
    while todo.any():
        left, right = index[todo] >> np.uint64(half), index[todo] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2**64
            left, right = right, left ^ ((mixed ^ mixed >> np.uint64(29)) >> np.uint64(24)) & mask
        index[todo] = left << np.uint64(half) | right
        todo = index >= size
    return index.astype(np.int64)


class Stream:
    """Packed documents in rows, in an order that depends only on the seed and the step.

    Every row is read once before any is read again.
    """

    def __init__(self, config: DataConfig, seed: int, vocab_size: int):
        self.batch, self.context, self.seed = config.batch, config.context, seed
        if config.files:
            names = sorted(name for pattern in config.files for name in glob.glob(pattern))
            # Memory-mapped, so that every host can have all data, however large.
            self.texts = [np.load(name, mmap_mode="r") for name in names]
        else:
            self.texts = [standard_library()]
        for text in self.texts:
            if text.ndim != 1 or not np.issubdtype(text.dtype, np.integer):
                raise UserError(
                    f"data.files: {text.dtype}{list(text.shape)} is not a vector of ids"
                )
        # A row has the first token of the next one as its last target.
        counts = [max(0, len(text) - 1) // self.context for text in self.texts]
        self.ends, self.rows = list(itertools.accumulate(counts)), sum(counts)
        if self.rows < self.batch:
            raise UserError(f"there are {self.rows} rows of data, but data.batch={self.batch}")
        if not config.files and vocab_size < 257:
            raise UserError(f"model.vocab_size={vocab_size} must be at least 257 for bytes")

    def read(self, step: int, which: slice) -> Int[np.ndarray, "rows context+1"]:
        """Some rows of the batch of a step."""
        number = step * self.batch + np.arange(self.batch)[which]
        epoch, index = np.divmod(number, self.rows)
        for e in np.unique(epoch):
            index[epoch == e] = shuffled(index[epoch == e], self.rows, (self.seed, int(e)))
        rows = []
        for i in index.tolist():
            file = bisect.bisect_right(self.ends, i)
            start = (i - (self.ends[file - 1] if file else 0)) * self.context
            rows.append(self.texts[file][start : start + self.context + 1])
        return np.stack(rows).astype(np.int32)

    def on_devices(self, step: int, sharding: NamedSharding) -> Int[Array, "batch context+1"]:
        """The batch of a step; every host reads the rows of its own devices."""
        read: Any = lambda index: self.read(step, index[0])  # noqa: E731
        return jax.make_array_from_callback((self.batch, self.context + 1), sharding, read)


# Training -----------------------------------------------------------------------------------------


def make_optimiser(
    options: OptimiserConfig, steps: int
) -> tuple[optax.GradientTransformation, Callable[[int], Any]]:
    """The optimiser, and its learning rate at every step."""
    peak, last, warmup = options.learning_rate, options.final_learning_rate, options.warmup_steps
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), last
    )
    adamw = optax.adamw(
        schedule, options.b1, options.b2, weight_decay=options.weight_decay, mask=weight_decay_mask
    )
    return optax.chain(optax.clip_by_global_norm(options.max_gradient_norm), adamw), schedule


def make_state(config: RunConfig, *, key: Array) -> State:
    """The model and the optimiser's state before the first step."""
    model = Llama(config.model, key=key)
    optimiser, _ = make_optimiser(config.optimiser, config.steps)
    return model, optimiser.init(eqx.filter(model, eqx.is_inexact_array))


def make_step(
    config: RunConfig, optimiser: optax.GradientTransformation, mesh: Mesh, rules: Rules
) -> Callable[[Any, State], tuple[dict[str, Array], State]]:
    """The compiled step."""
    chunked = {"z_loss": config.optimiser.z_loss, "chunk_size": config.loss_chunk}
    of_rows = batch_sharding(mesh, rules, sequence=True)

    def loss(model: Llama, batch: Any) -> tuple[Array, Array]:
        tokens, keys = batch
        # Weights are gathered where they are used, and travel in the compute dtype.
        model = gathered(model, mesh, rules, dtype=config.model.dtype)
        model = context_parallel(model, mesh, rules)
        # Rows may be split, too: without the last token, which is only a target, they divide.
        inputs = jax.lax.with_sharding_constraint(tokens[:, :-1], of_rows)
        hidden = jax.vmap(lambda row, key: model.hidden(row, key=key))(inputs, keys)
        # In chunks of every row on its own, since rows are on different devices.
        of_row = functools.partial(cross_entropy_from_hidden, model.logits, **chunked)
        losses = jax.vmap(of_row)(hidden, tokens[:, 1:])
        return losses.sum(), jnp.asarray(losses.size)

    value_and_grad: Any = accumulated_value_and_grad(loss, config.data.parts)

    @eqx.filter_jit(donate="all-except-first")
    def step(batch: Any, state: State) -> tuple[dict[str, Array], State]:
        (tokens, number), (model, optimiser_state) = batch, state
        key = jax.random.fold_in(jax.random.key(config.seed + 1), number)
        value, gradient = value_and_grad(model, (tokens, jax.random.split(key, len(tokens))))
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state, params)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))
        state = (eqx.apply_updates(model, updates), optimiser_state)
        return {"loss": value, "gradient_norm": norm}, state

    return step


class Checkpoints:
    """Models and optimisers on disk: every process writes what its devices hold, while training
    continues. Checkpoints are atomic."""

    def __init__(self, config: RunConfig, rows: int):
        self.config, self.identity = config, config.identity(rows)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        folder = Path(config.output).absolute() / "checkpoints"
        self.manager = ocp.CheckpointManager(folder, options=options)

    def save(self, step: int, state: State) -> None:
        """Begins to save the state after `step` steps; waits for the previous save, if any."""
        run = ocp.args.JsonSave(self.identity)
        arrays = ocp.args.StandardSave(named(state))
        self.manager.save(step, args=ocp.args.Composite(run=run, state=arrays), force=True)

    def restore(self, step: int, make: Callable[..., State], mesh: Mesh, rules: Rules) -> State:
        """The state saved after `step` steps, on whatever devices, loaded onto these."""
        part: Any = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        for name, mine in self.identity.items():
            if part.run.get(name) != mine:
                theirs = f"{self.config.output} has a run with {name}={part.run.get(name)!r}"
                raise UserError(f"{theirs}, not {mine!r}; change it, or choose another output")
        like = eqx.filter_eval_shape(lambda key: make(key=key), jax.random.key(0))
        shapes, static = eqx.partition(like, lambda x: isinstance(x, jax.ShapeDtypeStruct))
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(shapes, mesh, rules))
        shapes = jax.tree.map(lambda x, place: x.update(sharding=place), shapes, places)
        arrays = ocp.args.StandardRestore(named(shapes))
        part = self.manager.restore(step, args=ocp.args.Composite(state=arrays))
        leaves = [part.state[name] for name in named(shapes)]
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), leaves), static)


def named(state: PyTree) -> dict[str, Any]:
    """The arrays by their paths: a checkpoint has names but no classes."""
    arrays = eqx.filter(state, lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct))
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


class Metrics:
    """The metrics of every step, in a file with a line of JSON each, written by the first host."""

    def __init__(self, config: RunConfig, start: int):
        self.path = Path(config.output) / "metrics.jsonl"
        # Steps after the checkpoint will be repeated, and the last line may be incomplete.
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        lines = [x for x in lines if x.endswith("}") and json.loads(x)["step"] < start]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        os.replace(temporary, self.path)
        self.board: Any = None
        if config.tensorboard:
            board = importlib.import_module("tensorboardX")
            self.board = board.SummaryWriter(config.output, purge_step=start)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Adds steps, and prints the last."""
        with self.path.open("a") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
        for row in rows if self.board else ():
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])
        if self.board:
            self.board.flush()
        speed = f"{rows[-1]['tokens_per_second']:,.0f} tokens/s"
        print(f"step {rows[-1]['step']}: loss {rows[-1]['loss']:.4f}, {speed}", flush=True)


def train(config: RunConfig) -> int:
    """Trains to the last step, from the last checkpoint if there is one."""
    try:
        mesh, rules = config.parallel.mesh(), config.parallel.rules()
    except ValueError as error:
        raise UserError(str(error)) from error
    sharding = batch_sharding(mesh, rules)
    at_a_time = config.data.batch // config.data.parts
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if at_a_time % groups:
        sizes = f"data.batch={config.data.batch}, data.parts={config.data.parts}"
        raise UserError(f"{sizes}: {at_a_time} rows at a time cannot be split over {groups}")
    stream = Stream(config.data, config.seed, config.model.vocab_size)
    optimiser, schedule = make_optimiser(config.optimiser, config.steps)
    make = functools.partial(make_state, config)
    checkpoints = Checkpoints(config, stream.rows)
    start = checkpoints.manager.latest_step() or 0
    if start:
        state = checkpoints.restore(start, make, mesh, rules)
    else:
        state = init_sharded(make, mesh, rules, key=jax.random.key(config.seed))
    step_fn = make_step(config, optimiser, mesh, rules)
    row = jax.ShapeDtypeStruct((config.data.context,), jnp.int32)
    forward = model_flops(eqx.nn.inference_mode(state[0]), row)
    work = {  # per step; the backward pass is twice the forward pass
        "tokens_per_second": config.data.batch * config.data.context,
        "model_flops_per_second": 3 * config.data.batch * forward,
    }
    metrics = None
    if jax.process_index() == 0:
        metrics = Metrics(config, start)
        sizes = f"{parameter_counts(state[0]).total:,} parameters, {stream.rows:,} rows"
        axes = {name: size for name, size in mesh.shape.items() if size > 1}
        print(f"{sizes}, mesh {axes}, from step {start}", flush=True)

    # On a signal, the current step is finished and saved before the program ends.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    unread: list[tuple[int, dict[str, Array]]] = []
    since = time.monotonic()
    batch = stream.on_devices(start, sharding)
    for step in range(start, config.steps):
        values, state = step_fn((batch, np.uint32(step)), state)
        unread.append((step, values))
        batch = stream.on_devices(step + 1, sharding)  # while the devices compute
        done = step + 1
        alone = jax.process_count() == 1  # several hosts must stop at the same step
        stopped = stop.is_set() if alone else checkpoints.manager.reached_preemption(done)
        saves = stopped or done == config.steps or done % config.save_every == 0
        if saves or done % config.log_every == 0:
            rows: list[dict[str, Any]] = [
                {"step": i, "learning_rate": float(schedule(i)), **jax.tree.map(float, values)}
                for i, values in unread
            ]
            seconds = (time.monotonic() - since) / len(rows)
            since, unread = time.monotonic(), []
            if metrics is not None:
                metrics.write([r | {k: x / seconds for k, x in work.items()} for r in rows])
            if not all(math.isfinite(r["loss"]) for r in rows):
                raise UserError(f"the loss is {rows[-1]['loss']} in step {step}; nothing was saved")
        if saves:
            checkpoints.save(done, state)
        if stopped and done < config.steps:
            checkpoints.manager.close()
            print(f"interrupted, and saved after step {step}")
            return 130
    checkpoints.manager.close()  # waits for the last one
    if jax.process_count() == 1:
        save(state[0], Path(config.output) / "model")
        print(f"model: {Path(config.output) / 'model'}")
    return 0


# The program --------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    parser = argparse.ArgumentParser(description="Pretrain a language model, or resume a run.")
    add = parser.add_argument
    add("config", type=Path, help="a configuration in TOML or JSON; see examples/configs")
    add("--output", help="the folder of the run, in place of the configuration's")
    add("--distributed", action="store_true", help="several hosts, found by jax.distributed")
    add("--coordinator", metavar="HOST:PORT", help="the first of several hosts, where not found")
    add("--num-processes", type=int, help="how many hosts")
    add("--process-id", type=int, help="which of them this one is, from 0")
    args = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        config = read_config(args.config)
        if args.output is not None:
            config = config.replace(output=args.output)
        if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise UserError("tensorboard=true needs tensorboardX: pip install tensorboardX")
        if args.distributed or args.coordinator is not None:
            try:
                jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
            except ValueError as error:
                raise UserError(f"jax.distributed: {error}") from error
        return train(config)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
