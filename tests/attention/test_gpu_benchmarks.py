"""The programs that are to run on a GPU run here, tiny and interpreted, so that they do then."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("attention_gpu", "attention_aot", "tune_kernels", "attention_cases", "harness"):
        sys.modules.pop(name, None)


def test_every_cell_of_the_table_counts_its_work(program, monkeypatch):
    gpu = program("attention_gpu")
    monkeypatch.setattr(gpu, "ON_GPU", True)
    table = gpu.cells(quick=False)
    assert len({str(x) + str(x.batch) for x in table}) == len(table)
    assert {x.mask for x in table} == {"full", "causal", "window", "documents", "prefix"}
    small = [x for x in table if x.seq == 1024 and x.step == "forward" and x.head_dim == 64]
    full, causal = (next(x for x in small if x.mask == name) for name in ("full", "causal"))
    # Two products of two operations, for all pairs and for half of them.
    assert full.flops() == 4 * 16 * 16 * 1024**2 * 64
    assert causal.flops() == full.flops() * 1025 / 2048


def test_cases_of_the_compiler_have_names_of_their_own(program):
    cases = program("attention_aot").default_cases()
    assert len(set(map(str, cases))) == len(cases)


@pytest.mark.slow
def test_tiles_are_found(program, tmp_path):
    tune = program("tune_kernels")
    tune.main(["--json", str(tmp_path / "tiles.json"), "--only", "forward"])
    (row,) = json.loads((tmp_path / "tiles.json").read_text())
    assert tune.Tiles(*tune.Measured(**row).tiles).block_q in (16, 32)


@pytest.mark.slow
def test_everything_is_timed(program, tmp_path, capsys):
    gpu = program("attention_gpu")
    file, plot = tmp_path / "result.json", tmp_path / "plot.png"
    gpu.main(["--json", str(file), "--plot", str(plot)])
    rows = json.loads(file.read_text())["cells"]
    assert {x["step"] for x in rows} >= {"forward", "gradient", "jvp", "decode", "paged decode"}
    for row in rows:
        assert row["seconds"]["ours, pallas"] and row["seconds"]["ours, chunked"]
    assert plot.stat().st_size and "| decode D16 64" in capsys.readouterr().out
