"""Writing digits, at a tiny size."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples.programs import exit_status, is_png, program

diffusion = program("diffusion")
TINY = [
    *("--steps", "2", "--batch", "4", "--d-model", "8", "--num-layers", "1", "--num-heads", "2"),
    *("--samples", "1"),
]


def test_trains_writes_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    assert diffusion.main([*TINY, "--output", str(output)]) == 0
    assert "is recognised" in capsys.readouterr().out
    assert is_png(output / "samples.png") and is_png(output / "flow.png")
    results = json.loads((output / "results.json").read_text())
    assert len(results["losses"]) == 2 and 0 <= results["recognised"] <= 1


def test_noise_is_carried_along_the_velocity():
    """With a model whose velocity is constant, the end is the noise and that constant."""
    model = diffusion.make_model(diffusion.parse(TINY))
    labels, key = jnp.asarray([3, 5]), jax.random.key(0)
    start = diffusion.write(model, labels, 2.0, 3, key)
    assert start.shape == (2, 3, 1, 8, 8)
    # A model that was not trained returns zero.
    np.testing.assert_allclose(start[:, 0], start[:, -1])
    model = eqx.tree_at(lambda m: m.head.bias, model, jnp.full(4, 0.5))
    moved = diffusion.write(model, labels, 2.0, 3, key)
    np.testing.assert_allclose(moved[:, -1], start[:, 0] + 0.5, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moved[:, 1], start[:, 0] + 0.25, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance", "0"], "argument --guidance: 0 must be positive"),
        (["--d-model", "10", "--num-heads", "4"], "d_model=10 is not a multiple of num_heads=4"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert exit_status(diffusion, arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
