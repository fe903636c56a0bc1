"""Writes the figures of docs/pretraining.md: what a device holds, and what it exchanges in a step.

    python docs/scripts/pretraining_traffic.py

A step of AdamW is compiled for as many devices as are asked for, without any of them: XLA splits
the program for a CPU that claims to have them, and nothing is run. What is exchanged is read in the
program that it made, and must be what the formula says.
"""

import collections
import dataclasses
import functools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from eqx_transformer.models import Llama, LlamaConfig, presets
from eqx_transformer.sharding import ParallelConfig, batch_sharding, gathered, specs
from eqx_transformer.training import cross_entropy_from_hidden, model_flops

PAGE = Path(__file__).parents[1] / "pretraining.md"
SMALL = LlamaConfig(
    vocab_size=512,
    d_model=64,
    num_layers=3,
    num_heads=8,
    d_ff=160,
    max_len=24,
    tie_embeddings=False,
    remat="full",
)
LARGE = presets.LLAMA_3_70B.replace(remat="full", dtype="bfloat16")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a mesh, and one sequence for every part of the batch."""

    config: LlamaConfig
    data: int
    fsdp: int
    tensor: int
    seq: int

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.data * self.fsdp * self.tensor

    @property
    def parallel(self) -> ParallelConfig:
        """The mesh. Norms stay whole in both models."""
        least = 2**18 if self.config is LARGE else 1024
        return ParallelConfig(
            data=self.data, fsdp=self.fsdp, tensor=self.tensor, fsdp_min_size=least
        )


CASES = {
    "small, fsdp=8": Case(SMALL, 1, 8, 1, 24),
    "small, tensor=8": Case(SMALL, 1, 1, 8, 24),
    "small, data=2, fsdp=2, tensor=2": Case(SMALL, 2, 2, 2, 24),
    "70B, fsdp=32, tensor=8": Case(LARGE, 1, 32, 8, 8192),
    "70B, data=8, fsdp=32, tensor=8": Case(LARGE, 8, 32, 8, 8192),  # a process has no more
}
ON_THE_PAGE = (
    Case(LARGE, 1, 32, 8, 8192),
    Case(LARGE, 16, 32, 8, 8192),
)


# The formula --------------------------------------------------------------------------------------


def elements(case: Case) -> dict[str, int]:
    """How many numbers the collectives of a step result in, on one device."""
    config, d, layers = case.config, case.config.d_model, case.config.num_layers
    heads = config.num_heads * config.attention_head_dim
    kv_heads = (config.num_kv_heads or config.num_heads) * config.attention_head_dim
    down, table = d * config.mlp_dim, d * config.vocab_size
    others = 2 * d * heads + 2 * d * kv_heads + 2 * down
    found = {"all-gather": 0, "all-reduce": 0}
    if case.fsdp > 1:
        # Forward, once more in the backward pass for `remat`, and for the gradient of the input;
        # the last product of a layer need not be computed again.
        weights = layers * (3 * others + 2 * down) + 2 * table + table
        found["all-gather"] = weights // case.tensor
    if case.data * case.fsdp > 1:
        weights = (layers * (others + down) + 2 * table) // case.tensor
        found["all-reduce"] += weights + (2 * layers + 1) * d + 1  # those of norms, and the loss
    if case.tensor > 1:
        # Of a layer: 2 forward, 1 of them again, 5 backward, where a branch begins. Then those of
        # embedding and head, and three numbers a token of the softmax.
        found["all-reduce"] += (8 * layers + 2) * case.seq * d + 3 * case.seq
    return found


# What XLA makes -----------------------------------------------------------------------------------


def compile_step(case: Case) -> Any:
    """One step of AdamW, compiled for the mesh."""
    config = case.config
    mesh, rules = case.parallel.mesh(), case.parallel.rules()
    optimiser = optax.adamw(1e-4)

    def make(key: Any) -> Any:
        model = Llama(config, key=key)
        return model, optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    def loss(model: Llama, tokens: Any) -> Any:
        model = gathered(model, mesh, rules, dtype=config.dtype)
        hidden = jax.vmap(model.hidden)(tokens[:, :-1])
        of_row = functools.partial(cross_entropy_from_hidden, model.logits, chunk_size=case.seq)
        return jax.vmap(of_row)(hidden, tokens[:, 1:]).mean()

    def step(arrays: Any, tokens: Any) -> Any:
        model, state = eqx.combine(arrays, static)
        value, gradient = eqx.filter_value_and_grad(loss)(model, tokens)
        updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return value, eqx.filter((eqx.apply_updates(model, updates), state), eqx.is_array)

    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    shapes, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(shapes, mesh, rules))
    placed = jax.tree.map(lambda x, place: x.update(sharding=place), shapes, places)
    batch = jax.ShapeDtypeStruct(
        (case.data * case.fsdp, case.seq + 1), jnp.int32, sharding=batch_sharding(mesh, rules)
    )
    return jax.jit(step, donate_argnums=0).lower(placed, batch).compile()


_BEGINS = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_LOOP = re.compile(r" while\(.*body=%?([\w.-]+)")
_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def exchanged(text: str) -> dict[str, int]:
    """How many numbers the collectives of a compiled program result in, loops counted."""
    parts: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _BEGINS.match(line):
            name = match[1]
            parts[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            parts[name].append(line)

    def visit(name: str) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        for line in parts[name]:
            if match := _COLLECTIVE.search(line):
                for dims in re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", match[1]):
                    found[match[2]] += math.prod(int(n) for n in dims.split(",") if n)
            elif match := _LOOP.search(line):
                inner, count = visit(match[1]), _COUNT.search(line)
                assert count is not None or not inner, line
                for kind, number in inner.items():
                    found[kind] += int(count[1] if count else 0) * number
        return found

    return dict(visit(entry))


def measured(name: str) -> dict[str, int]:
    """The numbers of one case, from a process that has as many devices."""
    code = f"import pretraining_traffic as t; t.report({name!r})"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    return {kind: int(n) for kind, n in (x.split("=") for x in out.stdout.split())}


def report(name: str) -> None:
    """Prints the numbers of one case."""
    case = CASES[name]
    jax.config.update("jax_num_cpu_devices", case.devices)
    compiled = compile_step(case)
    numbers = exchanged(compiled.as_text())
    numbers["state"] = compiled.memory_analysis().argument_size_in_bytes
    print(*(f"{kind}={number}" for kind, number in numbers.items()))


# The page -----------------------------------------------------------------------------------------


def check_table(programs: dict[str, dict[str, int]]) -> str:
    """Formula and program, side by side."""
    lines = [
        "| | gathered: formula | program | summed: formula | program |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(lines + [check_row(name, programs[name]) for name in CASES])


def check_row(name: str, program: dict[str, int]) -> str:
    """Formula and program for one case, which must agree."""
    formula = elements(CASES[name])
    cells = [f"{x:,}" for kind in formula for x in (formula[kind], program.get(kind, 0))]
    assert cells[::2] == cells[1::2], (name, cells)
    return f"| {name} | {' | '.join(cells)} |"


def device_table(state: int) -> str:
    """What a device of the large meshes holds and exchanges, in bytes, and computes."""
    columns = [column(case, state) for case in ON_THE_PAGE]
    lines = [
        f"| | {' | '.join(f'{case.devices:,} devices' for case in ON_THE_PAGE)} |",
        "|---|---|---|",
    ]
    for row in columns[0]:
        lines.append(f"| {row} | {' | '.join(column[row] for column in columns)} |")
    return "\n".join(lines)


def column(case: Case, state: int) -> dict[str, str]:
    """The figures of one mesh."""
    config, fsdp, tensor = case.config, case.fsdp, case.tensor
    shapes = eqx.filter_eval_shape(lambda key: Llama(config, key=key), jax.random.key(0))
    flops = model_flops(shapes, jax.ShapeDtypeStruct((case.seq,), jnp.int32))
    weights = (state - 4 * (case.seq + 1) - 4) // 3  # without tokens and the count of steps
    stream = case.seq * config.d_model
    formula = elements(case)
    activations = (8 * config.num_layers + 2) * stream
    norms = (2 * config.num_layers + 1) * config.d_model
    gradients = formula["all-reduce"] - activations - norms - 3 * case.seq - 1
    # A ring of n passes on n - 1 of n parts to gather or to scatter, and twice as much to sum.
    found = {
        "parameters, float32": weights,
        "Adam, float32": 2 * weights,
        "gradients, float32": weights,
        "inputs of layers, kept by `remat`": 2 * config.num_layers * stream,
        "weights gathered over `fsdp`": 2 * formula["all-gather"] * (fsdp - 1) / fsdp,
        "gradients scattered over `fsdp`": 2 * gradients * (fsdp - 1) / fsdp,
        "gradients summed over `data`": 4 * gradients * (case.data - 1) / case.data / fsdp,
        "activations summed over `tensor`": 4 * activations * (tensor - 1) / tensor,
    }
    text = {name: f"{value / 1e9:,.2f} GB" for name, value in found.items()}
    return text | {"operations, with `remat`": f"{4 * flops / tensor / 1e12:,.0f} T"}


def main() -> None:
    """Writes both tables where the page has marks for them."""
    programs = {name: measured(name) for name in CASES}
    state = programs["70B, fsdp=32, tensor=8"]["state"]
    assert state == programs["70B, data=8, fsdp=32, tensor=8"]["state"]
    page = PAGE.read_text()
    for mark, table in (("check", check_table(programs)), ("devices", device_table(state))):
        pattern = rf"(<!-- {mark} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", page, flags=re.S)
        assert count == 1, mark
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
