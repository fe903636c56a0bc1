"""What the compiler makes of the kernels for Hopper GPUs, on a machine without one.

    python tests/benchmarks/attention_hopper_aot.py [--json FILE] [--only TEXT]

Like `attention_aot.py`, in whose environment it runs, but with JAX 0.11 or newer: every kernel with
its default tiles, for sm_90a. A thread that computes has 240 registers, dealt out when a program
runs. What is told is how many bytes they did not suffice for, and which products are serialized.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from attention_aot import Case, Compiler, default_cases, program, temporaries

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
        name = part.partition("_kernel")[0]
        spilled = re.search(r"(\d+) bytes spill stores", part)
        if name in KERNELS and spilled is not None:
            serialized = re.search(rf"serialized due to.*'{name}_kernel", text) is not None
            yield {"kernel": name, "spilled": int(spilled[1]), "serialized": serialized}


def compiled(compiler: Compiler, only: str) -> list[dict[str, Any]]:
    """A row for every kernel of every case."""
    rows = []
    for case in cases():
        if only not in str(case):
            continue
        function, args = program(case, compiler, PASSES)
        with heard() as lines:
            compiler(function, *args)
        found = {row["kernel"]: row for row in reports(lines)}
        rows += [{"case": str(case), **vars(case), **row} for row in found.values()]
        print(case, {name: row["spilled"] for name, row in found.items()}, file=sys.stderr)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Bytes spilled: kernels across, cases down."""
    lines = ["| | " + " | ".join(KERNELS) + " |", "|---|" + "---|" * len(KERNELS)]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {row["kernel"]: _cell(row) for row in rows if row["case"] == case}
        lines.append(f"| {case} | " + " | ".join(cells.get(x, "-") for x in KERNELS) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return str(row["spilled"]) + (", serialized" if row["serialized"] else "")


def main() -> None:
    """Prints a table, and JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    compiler = Compiler()
    rows = compiled(compiler, args.only)
    result = {"jax": jax.__version__, "kernels": rows}
    if not args.only:
        with heard():
            result["temporaries, MiB"] = temporaries(compiler, PASSES)
        print(json.dumps(result["temporaries, MiB"]))
    print(markdown(rows))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
