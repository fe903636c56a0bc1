"""The formula of docs/pretraining.md against the collectives of compiled steps."""

import importlib.util
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "scripts" / "pretraining_traffic.py"


@pytest.fixture(scope="module")
def traffic():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "small, data=2, fsdp=2, tensor=2",
        pytest.param("small, fsdp=8", marks=pytest.mark.slow),
        pytest.param("small, tensor=8", marks=pytest.mark.slow),
    ],
)
def test_the_formula_counts_what_the_compiler_makes(traffic, name):
    case = traffic.CASES[name]
    with jax.numpy_dtype_promotion("standard"):  # which optax relies on
        compiled = traffic.compile_step(case)
    program = traffic.exchanged(compiled.as_text())
    assert program.keys() <= traffic.elements(case).keys()
    assert traffic.check_row(name, program) in traffic.PAGE.read_text()


def test_loops_count_as_often_as_they_run(traffic):
    text = """\
%body (x: f32[4]) -> f32[4] {
  %a = f32[4,8]{1,0} all-gather(%x), dimensions={0}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = f32[4] while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = (f32[5], f32[]) all-reduce-start(%x, %y), to_apply=%sum
}
"""
    assert traffic.exchanged(text) == {"all-gather": 96, "all-reduce": 6}
    with pytest.raises(AssertionError):
        traffic.exchanged(text.replace("known", "no"))
