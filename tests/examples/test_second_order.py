"""Second-order fitting, at a tiny size."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples.programs import exit_status, is_png, program

second_order = program("second_order")
TINY = ["--sets", "4", "--particles", "3", "--d-model", "4", "--num-heads", "2"]


def test_fits_twice_and_draws(tmp_path, capsys):
    output = tmp_path / "runs"
    steps = ["--steps", "6", "--adam-steps", "6"]
    assert second_order.main([*TINY, *steps, "--output", str(output)]) == 0
    assert "Levenberg-Marquardt: 6 steps" in capsys.readouterr().out
    assert is_png(output / "losses.png")
    results = json.loads((output / "results.json").read_text())
    losses = {name: [loss for _, loss in r["history"]] for name, r in results.items()}
    assert losses["Adam"][0] == losses["Levenberg-Marquardt"][0]  # from the same weights
    assert losses["Adam"][-1] < losses["Adam"][0]
    # A rejected step changes nothing, so the loss never rises.
    assert np.all(np.diff(losses["Levenberg-Marquardt"]) <= 0)
    assert losses["Levenberg-Marquardt"][-1] < losses["Levenberg-Marquardt"][0]


def test_energies_are_sums_over_pairs():
    where, energy = second_order.draw_sets(2, 3, jax.random.key(0))
    where = np.asarray(where)
    for i in range(3):
        apart = [where[1, i] - where[1, j] for j in range(3) if j != i]
        expected = sum(np.exp(-np.sum(d**2)) for d in apart)
        np.testing.assert_allclose(energy[1, i], expected, rtol=1e-5)


def test_the_order_of_particles_does_not_matter():
    model = eqx.filter_jit(second_order.Regressor(4, 2, key=jax.random.key(0)))
    where = jax.random.normal(jax.random.key(1), (5, 2))
    order = jnp.asarray([3, 0, 4, 1, 2])
    np.testing.assert_allclose(model(where)[order], model(where[order]), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "0"], "argument --learning-rate: 0 must be positive"),
        (["--d-model", "5", "--num-heads", "2"], "d_model=5 is not a multiple of num_heads=2"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    assert exit_status(second_order, arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
