"""What the compiler makes of the attention kernels for an H200, on a machine without a GPU.

    python -m venv aot && aot/bin/pip install . nvidia-cuda-nvcc
    aot/bin/pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION  # that of jax
    aot/bin/python tests/benchmarks/attention_aot.py [--json FILE] [--only TEXT]

Every kernel with the tiles it has by default, for sm_90a: registers a thread, bytes spilled to
memory, shared memory, and whether its products run one after the other where they could overlap.
Besides, the temporary memory of whole programs. Nothing is run, and nothing is said of speed.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from attention_cases import mask, mod

import eqx_transformer.attention as attn
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._kernels import pallas
from eqx_transformer.attention._paged import PagedKV

DUMP = Path(tempfile.gettempdir()) / f"attention_aot_{os.getpid()}"
HEADS, SEQ = 16, 4096
KERNELS = ("forward", "tangent", "transpose_q", "transpose_kv", "decode")


@dataclass(frozen=True)
class Case:
    """An attention call, and whether it decodes."""

    dtype: str
    head_dim: int
    mask: str = "causal"
    mod: str = "none"
    dropout_rate: float = 0.0
    decode: str = ""
    """"", "cache" or "pages"."""
    group: int = 1
    """How many heads of queries share one of keys. Where it decodes, it is always four."""

    def __str__(self) -> str:
        extra = [
            self.decode,
            f"dropout {self.dropout_rate}" if self.dropout_rate else "",
            f"groups of {self.group}" if self.group > 1 else "",
        ]
        parts = [
            self.dtype,
            f"D{self.head_dim}",
            "" if self.decode else self.mask,
            self.mod,
            *extra,
        ]
        return ", ".join(x for x in parts if x and x != "none")


def default_cases() -> list[Case]:
    """Masks and mods for the usual head dimensions; each of the others once or twice."""
    usual = [
        Case("bfloat16", dim, name, mod)
        for dim in (64, 128)
        for name, mods in (
            ("full", ("none", "soft cap", "relative")),
            ("causal", ("none", "alibi", "soft cap", "relative")),
            ("documents", ("none", "soft cap", "relative")),
        )
        for mod in mods
    ]
    others = [
        Case("bfloat16", 128, "causal", "none", 0.1),
        Case("bfloat16", 128, "window"),
        Case("bfloat16", 128, group=4),
        Case("bfloat16", 128, "documents", group=4),
        Case("bfloat16", 128, "causal", "none", 0.1, group=4),
        Case("bfloat16", 80),
        Case("bfloat16", 256),
        Case("bfloat16", 256, "documents", "relative"),
        Case("float16", 128),
        Case("float32", 64),
        Case("float32", 128),
        Case("float32", 128, "documents", "relative"),
        Case("float32", 256),
    ]
    decode = [
        Case(dtype, dim, "causal", mod, decode=where)
        for dtype, dim in (("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float32", 128))
        for mod, where in (("none", "cache"), ("relative", "cache"), ("none", "pages"))
    ]
    return [*usual, *others, *decode]


class Compiler:
    """XLA for an H200 that is not there."""

    def __init__(self) -> None:
        # There is no public function for plugins that `JAX_PLATFORMS` leaves out.
        from jax._src import xla_bridge
        from jax.experimental import topologies

        jax.config.update("jax_platforms", "cpu")
        # Both are read when the first program is compiled. Without the second, every note of the
        # compiler comes with a trace of the stack, which takes seconds.
        dump = f"--xla_dump_to={DUMP} --xla_dump_emitter_re=triton-to-llvm"
        os.environ["XLA_FLAGS"] = f"{dump} --xla_dump_hlo_module_re=jit_case"
        os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"
        xla_bridge._discover_and_register_pjrt_plugins()
        description = (Path(__file__).parent / "h200.txtpb").read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=description
        )
        mesh = topologies.make_mesh(topology, (1,), ("x",))
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(self, *shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """An argument."""
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self._sharding)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Compiles."""

        def case(*args: Any) -> Any:
            return function(*args)

        with _device():
            lowered = jax.jit(case).trace(*args).lower(lowering_platforms=("cuda",))
        return lowered.compile()


def _device() -> Any:
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def program(
    case: Case, compiler: Compiler, passes: Any = pallas, seq: int = SEQ
) -> tuple[Any, list[Any]]:
    """A function that runs the kernels of a case, and its arguments."""
    score_mod = mod(case.mod, HEADS)

    def array(*shape: int) -> Any:
        return compiler.array(*shape, dtype=case.dtype)

    def number(*shape: int) -> Any:
        return compiler.array(*shape, dtype="int32")

    if case.decode == "pages":

        def paged(q: Any, k: Any, v: Any, table: Any, length: Any) -> Any:
            return attn.paged_attention(
                q, PagedKV(k, v), table, length, score_mod=score_mod, implementation="pallas"
            )

        pool = array(seq, 16, HEADS // 4, case.head_dim)
        args = [array(8, 1, HEADS, case.head_dim), pool, pool, number(8, seq // 16), number(8)]
        return jax.vmap(paged, in_axes=(0, None, None, 0, 0)), args
    if case.decode == "cache":

        def decode(q: Any, k: Any, v: Any, length: Any) -> Any:
            # Heads first, as in a cache.
            k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
            return pallas(make_inputs(q, k, v, mask=attn.Prefix(length), score_mod=score_mod))[0]

        cache = array(8, HEADS // 4, seq, case.head_dim)
        return jax.vmap(decode), [array(8, 1, HEADS, case.head_dim), cache, cache, number(8)]

    def forward(q: Any, k: Any, v: Any, ids: Any) -> Any:
        options = {}
        if case.dropout_rate:
            options = {"dropout_rate": case.dropout_rate, "dropout_key": jax.random.key(0)}
        which = mask(case.mask, seq, ids)
        return passes(make_inputs(q, k, v, mask=which, score_mod=score_mod, **options))[0]

    def all_four(q: Any, k: Any, v: Any, ids: Any, dout: Any) -> Any:
        out, pull = jax.vjp(lambda *x: forward(*x, ids), q, k, v)
        tangent = jax.jvp(lambda *x: forward(*x, ids), (q, k, v), (q, k, v))[1]
        return out, tangent, pull(dout)

    q, k = (array(seq, HEADS // group, case.head_dim) for group in (1, case.group))
    return all_four, [q, k, k, number(seq), q]


def _ptxas() -> str:
    found = shutil.which("ptxas")
    for path in sys.path:
        for wheel in Path(path).glob("nvidia/*/bin/ptxas"):
            found = str(wheel)
    if found is None:
        sys.exit("ptxas is needed for the numbers: pip install nvidia-cuda-nvcc")
    return found


def _reports(ptxas: str) -> Iterator[dict[str, Any]]:
    """What the assembler says of the kernels that were just compiled."""
    for file in sorted(DUMP.glob("*.ptx")):
        text = file.read_text()
        name = re.search(r"\.entry (\w+)", text)
        kernel = "" if name is None else name[1].removeprefix("_").removesuffix("_kernel")
        if kernel not in KERNELS:
            continue
        said = subprocess.run(
            [ptxas, "-v", "-arch=sm_90a", str(file), "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        (shared,) = DUMP.glob(f"*._{kernel}_kernel.triton-to-llvm.txt")
        threads = re.search(r"\.(?:max|req)ntid (\d+)", text)
        yield {
            "kernel": kernel,
            "registers": int(_first(r"Used (\d+) registers", said)),
            "spilled": int(_first(r"(\d+) bytes spill stores", said)),
            "shared": max(map(int, re.findall(r"ttg\.shared = (\d+)", shared.read_text()))),
            "threads": None if threads is None else int(threads[1]),
            "wgmma": text.count("wgmma.mma_async"),
            "mma": text.count("mma.sync"),
            "serialized": "serialized" in said,
        }


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, (pattern, text)
    return found[1]


def compiled_kernels(cases: list[Case], compiler: Compiler) -> list[dict[str, Any]]:
    """One row for every kernel of every case."""
    ptxas, rows = _ptxas(), []
    for case in cases:
        for file in DUMP.glob("*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        start = time.perf_counter()
        try:
            function, args = program(case, compiler)
            compiled = compiler(function, *args)
        except Exception as error:
            rows.append({"case": str(case), **vars(case), "kernel": "?", "error": str(error)[:300]})
            print(f"{case}: {error}"[:300], file=sys.stderr, flush=True)
            continue
        temporary = compiled.memory_analysis().temp_size_in_bytes
        for report in _reports(ptxas):
            rows.append({"case": str(case), **vars(case), **report, "temporary": temporary})
            print(
                f"{time.perf_counter() - start:5.0f} s  {_line(rows[-1])}",
                file=sys.stderr,
                flush=True,
            )
    return rows


def temporaries(
    compiler: Compiler, passes: Any = pallas, dtype: str = "bfloat16", seq: int = 16384
) -> dict[str, float]:
    """MiB of temporary memory of whole programs: causal, 16 heads of 128."""
    x = compiler.array(seq, HEADS, 128, dtype=dtype)

    def loss(q: Any, k: Any, v: Any) -> Any:
        out, _ = passes(make_inputs(q, k, v, mask=attn.Causal()))
        return out.astype(jnp.float32).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    programs = {
        "forward": loss,
        "gradient": gradient,
        "tangent": lambda *x: jax.jvp(loss, x, x)[1],
    }
    return {
        name: compiler(program, x, x, x).memory_analysis().temp_size_in_bytes / 2**20
        for name, program in programs.items()
    }


def _line(row: dict[str, Any]) -> str:
    notes = f"{row['registers']} registers, {row['spilled']} spilled, {row['shared'] // 1024} KiB"
    notes += f" shared, {row['temporary'] / 2**20:.2f} MiB of temporaries in all"
    how = "wgmma" if row["wgmma"] else "mma"
    return f"{row['case']}: {row['kernel']}: {notes}, {how}{' SERIALIZED' * row['serialized']}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Kernels across, cases down; decoding, which has one kernel, by itself."""
    decode = [row for row in rows if row["decode"]]
    parts = ([row for row in rows if not row["decode"]], decode)
    return "\n\n".join(table(part, _cell, "fails") for part in parts if part)


def table(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str], missing: str) -> str:
    """Markdown, with kernels across and cases down, and `missing` where there is no row."""
    names = [x for x in KERNELS if any(row["kernel"] == x for row in rows)]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = {row["kernel"]: cell(row) for row in rows if row["case"] == case}
        lines.append(f"| {case} | " + " | ".join(cells.get(name, missing) for name in names) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    text = str(row["registers"])
    if row["spilled"]:
        text += f", {row['spilled']} B"
    return text + (", serialized" if row["serialized"] else "")


def main() -> None:
    """Prints a table, and JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    compiler = Compiler()
    rows = compiled_kernels([x for x in default_cases() if args.only in str(x)], compiler)
    result = {"jax": jax.__version__, "kernels": rows}
    if not args.only:
        result["temporaries, MiB"] = temporaries(compiler)
        print(json.dumps(result["temporaries, MiB"]))
    print(markdown(rows))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(DUMP, ignore_errors=True)


if __name__ == "__main__":
    main()
