"""What the compiler makes of the kernels for Hopper GPUs, on a machine without one.

    python tests/benchmarks/attention_hopper_aot.py [--json FILE] [--only TEXT]

Like `attention_aot.py`, and in the same environment, but with JAX 0.11 or newer, the packages
nvidia-cuda-nvdisasm and absl-py, and nvdisasm on the PATH. Compiles every kernel with its default
tiles for sm_90a. A computing thread has 240 registers, which are dealt out when the kernel runs.
Reports the bytes that are spilled, how many of these words are read again with each tile, which
products are serialized, and the number of instructions in each loop over tiles, the first over
full tiles and the last over masked ones; and this number for JAX's own kernel of this kind.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from attention_aot import Case, Compiler, default_cases, program, table, temporaries

from eqx_transformer.attention._kernels._passes import kernel_passes

PASSES = kernel_passes(platform="hopper")
KERNELS = ("forward", "tangent", "transpose_q", "transpose_kv")


def cases() -> list[Case]:
    """Those of `attention_aot.py` which there are kernels for."""
    return [
        case
        for case in default_cases()
        if not case.decode and case.mod != "relative" and case.dtype != "float32"
    ]


@contextmanager
def heard() -> Iterator[list[str]]:
    """Lines that the assembler, which is no Python, writes to this process's output."""
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as file:
        kept = {stream: os.dup(stream) for stream in (1, 2)}
        for stream in kept:
            os.dup2(file.fileno(), stream)
        try:
            yield lines
        finally:
            for stream, copy in kept.items():
                os.dup2(copy, stream)
                os.close(copy)
            file.seek(0)
            lines += file.readlines()


def reports(lines: list[str]) -> Iterator[dict[str, Any]]:
    """One for every kernel that was assembled."""
    text = "".join(lines)
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part.partition("_mosaic_gpu_kernel")[0].removesuffix("_kernel")
        spilled = re.search(r"(\d+) bytes spill stores", part)
        if spilled is None:
            continue
        inner = loops(part)
        yield {
            "kernel": name,
            "spilled": int(spilled[1]),
            "reloaded": max((sum("LDL" in x for x in loop) for loop in inner), default=0),
            "instructions": [len(loop) for loop in inner],
            "serialized": re.search(rf"serialized due to.*'{name}_kernel", text) is not None,
        }


def loops(assembly: str) -> list[list[str]]:
    """The instructions of every loop over tiles: those that multiply and have no loop inside."""
    code: list[str] = []
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label is not None:
            labels[label[1]] = len(code)
        elif instruction is not None:
            code.append(instruction[1])
            back = re.search(r"BRA .*(\.L_x_\d+)", code[-1])
            if back is not None and back[1] in labels:
                found.append((labels[back[1]], len(code)))
    # To wait is a loop, too, and goes on behind the program where it takes longer.
    bodies = {(i, j): code[i:j] for i, j in found}
    tiles = [
        (i, j)
        for (i, j), body in bodies.items()
        if any("HGMMA" in x for x in body) and not any("NANOSLEEP" in x for x in body)
    ]
    inner = [(i, j) for i, j in tiles if not any(i <= a and b < j for a, b in tiles)]
    return [bodies[x] for x in sorted(set(inner))]


def compiled(compiler: Compiler, only: str) -> list[dict[str, Any]]:
    """A row for every kernel of every case."""
    rows = []
    for case in cases():
        if only not in str(case):
            continue
        function, args = program(case, compiler, PASSES)
        with heard() as lines:
            compiler(function, *args)
        found = {row["kernel"]: row for row in reports(lines) if row["kernel"] in KERNELS}
        rows += [{"case": str(case), **vars(case), **row} for row in found.values()]
        print(case, {name: row["spilled"] for name, row in found.items()}, file=sys.stderr)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Instructions of each loop over tiles, and what is spilled: kernels across, cases down."""
    return table(rows, _cell, "-")


def _cell(row: dict[str, Any]) -> str:
    text = " + ".join(map(str, row["instructions"]))
    if row["spilled"]:
        text += f", {row['spilled']} B spilled, {row['reloaded']} words read with each tile"
    return text + (", serialized" if row["serialized"] else "")


def instructions(compiler: Compiler, rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Those of the forward pass for a tile, of ours and of JAX's own kernel, by mask."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    # It asks for the version of CUDA, which this machine does not have.
    attention_mgpu.cuda_versions = types.SimpleNamespace(cuda_runtime_get_version=lambda: 13000)
    x, counts = compiler.array(1, 4096, 16, 128, dtype="float16"), {}  # It takes nothing else.
    for mask in ("full", "causal"):
        case = str(Case("bfloat16", 128, mask))
        (ours,) = (row for row in rows if (row["case"], row["kernel"]) == (case, "forward"))
        config = attention_mgpu.TuningConfig(64, 128, 2, causal=mask == "causal")
        with heard() as lines:
            compiler(
                lambda q, k, v, c=config: attention_mgpu.attention(q, k, v, c, True)[0], x, x, x
            )
        (row,) = reports(lines)
        counts |= {f"{mask}, ours": ours["instructions"], f"{mask}, JAX's": row["instructions"]}
    return counts


def main() -> None:
    """Prints a table, and JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"
    compiler = Compiler()
    rows = compiled(compiler, args.only)
    result = {"jax": jax.__version__, "kernels": rows}
    if not args.only:
        with heard():
            result["temporaries, MiB"] = temporaries(compiler, PASSES)
        result["instructions"] = instructions(compiler, rows)
        print(json.dumps({name: result[name] for name in ("temporaries, MiB", "instructions")}))
    print(markdown(rows))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
