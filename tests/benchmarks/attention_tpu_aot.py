"""Whether the attention kernels compile for TPUs, on a machine without one.

    pip install libtpu  # of the version that jax[tpu] names
    python tests/benchmarks/attention_tpu_aot.py [--only TEXT] [--json FILE]

Google's compiler makes programs for every generation of TPUs, and refuses what does not fit their
memory or has no instruction. Every kernel with the tiles it has by default. Nothing is run, and
nothing is said of speed.
"""

import argparse
import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import libtpu

    # Read when JAX starts. Without the second, the machine is asked which TPU it has.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
    libtpu.configure_library_path()

import jax
import jax.numpy as jnp
from attention_cases import mask, mod
from jax.experimental import topologies

from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._kernels import pallas

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TPUS |= {"7x": "tpu7x:2x2x1"}
HEADS, KV_HEADS, SEQ = 8, 2, 4096
PATTERNS = (
    ("full", "none", 0.0),
    ("causal", "alibi", 0.0),
    ("window", "soft cap", 0.0),
    ("prefix", "none", 0.1),
    ("documents", "relative", 0.1),
)


@dataclass(frozen=True)
class Case:
    """An attention call on a generation of TPUs."""

    tpu: str
    dtype: str
    head_dim: int
    mask: str
    mod: str
    dropout_rate: float

    def __str__(self) -> str:
        return " ".join(map(str, vars(self).values()))

    def run(self, q: Any, k: Any, v: Any) -> Any:
        """Output and log-sum-exp."""
        key = jax.random.key(0) if self.dropout_rate else None
        options = {"dropout_rate": self.dropout_rate, "dropout_key": key}
        options |= {"mask": mask(self.mask, SEQ), "score_mod": mod(self.mod, HEADS)}
        return pallas(make_inputs(q, k, v, **options))

    def every_kernel(self, q: Any, k: Any, v: Any) -> Any:
        """Forward, tangent, and the two of the transpose."""
        out, pull = jax.vjp(self.run, q, k, v)
        return pull(out), jax.jvp(self.run, (q, k, v), (q, k, v))[1]


def compiled(case: Case) -> dict[str, Any]:
    """Whether every kernel of a case compiles, and if not, why."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[case.tpu])
    on = jax.sharding.SingleDeviceSharding(topology.devices[0])
    shapes = [
        jax.ShapeDtypeStruct((SEQ, heads, case.head_dim), jnp.dtype(case.dtype), sharding=on)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    start = time.perf_counter()
    program = jax.jit(case.every_kernel).trace(*shapes).lower(lowering_platforms=("tpu",))
    assert program.as_text().count("tpu_custom_call") == 4
    try:
        program.compile()
        reason = ""
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
    return {"case": str(case), "reason": reason, "seconds": time.perf_counter() - start}


def main() -> None:
    """Prints what did not compile and how many did, and JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    dims = itertools.product(TPUS, ("float32", "bfloat16"), (64, 128, 256))
    cases = [Case(*sizes, *pattern) for sizes in dims for pattern in PATTERNS]
    rows = []
    for case in (case for case in cases if args.only in str(case)):
        rows.append(compiled(case))
        print(f"{rows[-1]['seconds']:6.1f} s  {case}  {rows[-1]['reason'] or 'ok'}", flush=True)
    good = sum(not row["reason"] for row in rows)
    print(f"{good} of {len(rows)} compile, jax {jax.__version__}, {libtpu.__version__=}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
