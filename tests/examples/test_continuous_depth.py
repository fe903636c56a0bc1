"""Continuous depth, at a tiny size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples.programs import is_png, program

continuous_depth = program("continuous_depth")
TINY = [
    *("--steps", "2", "--batch", "4", "--d-model", "8", "--num-heads", "2", "--solver-steps", "1"),
    *("--tolerances", "1e-2", "1e-4", "--depths", "2", "16"),
]


@pytest.mark.slow
def test_trains_measures_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    assert continuous_depth.main([*TINY, "--output", str(output)]) == 0
    assert "of the test digits are read" in capsys.readouterr().out
    assert is_png(output / "depth.png")
    results = json.loads((output / "results.json").read_text())
    coarse, fine = results["errors"]
    assert fine["gradient, checkpoints"] <= coarse["gradient, checkpoints"] < 1e-2
    memory = results["memory"]
    assert memory["direct"][1] > memory["checkpoints"][1]
    # With eight times the steps.
    for name in ("checkpoints", "solved backwards"):
        assert memory[name][1] < 1.5 * memory[name][0]


def test_a_constant_velocity_is_integrated():
    """A field that is not modulated yet is zero; with a bias its solution is known."""
    field = continuous_depth.VectorField(8, 2, key=jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (4, 8))
    end, steps = continuous_depth.Solver(num_steps=2)(field, z)
    np.testing.assert_allclose(end, z, atol=1e-6)
    assert steps == 2
    moving, _ = continuous_depth.Solver(num_steps=2)(lambda t, z, args: jnp.full_like(z, t), z)
    np.testing.assert_allclose(moving, z + 0.5, atol=1e-5)


def test_mistakes_get_one_line(capsys):
    assert continuous_depth.main(["--d-model", "10", "--num-heads", "4"]) == 2
    message = "d_model=10 is not a multiple of num_heads=4"
    assert message in capsys.readouterr().err.splitlines()[-1]
